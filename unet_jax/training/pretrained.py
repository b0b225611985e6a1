"""What a new run starts from: weights of another run, published weights of its encoder, or random ones."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath

from unet_jax import data, models
from unet_jax.errors import UserError
from unet_jax.inference import forward
from unet_jax.parallel import sharding
from unet_jax.training import optimizer, state
from unet_jax.weights import encoder_weights
from unet_jax.workdir import checkpoints, files

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Pretrained(NamedTuple):
    """Weights to start from; those that are not here stay random."""

    arrays: dict[str, np.ndarray]  # by the path of the variable, as in `params/head/kernel`
    normalization: forward.Normalization  # that they were trained with
    summary: str  # what was loaded, for people; empty if nothing was


NOTHING = Pretrained({}, forward.Normalization(), "")


def load_pretrained(config: "ConfigDict", network: forward.Network) -> Pretrained:
    """Loads the weights that a new training of `network` starts from.

    First those of `config.init_from`, all or the parts `config.init_parts`. If the first convolution is not among them
    and belongs to an encoder, the rest of the encoder has the weights of `config.model.pretrained`.

    Raises:
      UserError: weights that cannot be read or do not fit; `init_parts` without `init_from`.
    """
    parts, first_conv = tuple(config.init_parts), network.model.first_conv
    if parts and not config.init_from:
        raise UserError(f"config.init_parts = {parts} needs config.init_from, the work directory to take them from")
    loaded = _load_run(config.init_from, parts, network) if config.init_from else NOTHING
    has_encoder = first_conv.startswith(optimizer.ENCODER)
    if not has_encoder or not config.model.pretrained or f"params/{first_conv}" in loaded.arrays:
        return loaded
    encoder = encoder_weights.load(config.model.encoder, config.model.pretrained, network.classes.channels)
    variables = {"params": {"encoder": encoder.params}, "batch_stats": {"encoder": encoder.batch_stats}}
    normalization = forward.Normalization(tuple(encoder.mean), tuple(encoder.scale))
    summary = "\n".join(filter(None, (encoder.summary, loaded.summary)))
    return Pretrained({**_flatten(variables), **loaded.arrays}, normalization, summary)


def _load_run(path: epath.PathLike, parts: tuple[str, ...], network: forward.Network) -> Pretrained:
    """The best checkpoint of another work directory, without a head for another number of outputs.

    A first convolution for another number of channels is adapted, and the normalization with it. With `parts` only the
    variables that have one of these prefixes, all of which must fit.

    Raises:
      UserError: no work directory; variables that do not fit (names the first); a prefix of none.
    """
    classes, field = network.classes, f"config.init_from = {str(path)!r}"
    try:
        files.read_config(epath.Path(path))
        values = files.read_classes(epath.Path(path))
        names = data.Classes.from_json(values).names
        step, saved = checkpoints.read_variables(path, None, sharding.replicated(network.mesh))
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    arrays = _flatten(checkpoints.evaluated(saved))
    summary, first_conv = f"Starting from the weights of {path}, step {step}", f"params/{network.model.first_conv}"
    differing = models.differing_shapes(network.model, classes.channels, arrays)
    if first_conv in arrays and first_conv in differing:
        adapted = models.adapt_channels(arrays[first_conv], classes.channels)
        if adapted.shape == differing[first_conv][1]:
            del differing[first_conv]
            arrays[first_conv] = adapted
    if parts:
        below = {name.partition("/")[2] for name in arrays.keys() | differing.keys()}
        optimizer.check_prefixes("config.init_parts", parts, below)
        is_part = lambda name: name.partition("/")[2].startswith(parts)
        arrays, differing = ({n: x for n, x in found.items() if is_part(n)} for found in (arrays, differing))
        summary += f": {', '.join(parts)}"
    for name, (found, needed) in differing.items():
        if parts or not name.startswith(("params/head/", "params/deep_head_")):
            raise UserError(
                f"{field}: {name} is {found or 'absent'} there, but {needed or 'absent'} in this network. Set "
                "config.model as there, or config.init_parts to what the two have in common"
            )
    if values["channels"] != classes.channels and first_conv in arrays:
        summary += f"; its first convolution, for {values['channels']} channel(s), is adapted to {classes.channels}"
    arrays = {name: array for name, array in arrays.items() if name not in differing}
    if "params/head/bias" in differing:
        (before,), (after,) = differing["params/head/bias"]
        summary += f"; its head has {before} outputs and is replaced by a new one with {after}"
    elif names != classes.names and "params/head/bias" in arrays:
        summary += f"; its head was trained for {', '.join(names)}, and is kept"
    normalization = forward.Normalization.from_json(values.get("normalization"))
    is_alike = data.Classes.from_json(values).dtype == classes.dtype
    kept = [field.name for field in dataclasses.fields(normalization)] if is_alike else ["mean", "scale"]
    adapted = {name: encoder_weights.adapt_numbers(getattr(normalization, name), classes.channels) for name in kept}
    return Pretrained(arrays, forward.Normalization(**adapted), summary)


def _flatten(variables: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def with_pretrained(fresh: state.TrainState, pretrained: Pretrained) -> state.TrainState:
    """A new state with pretrained weights, sharded as it was; its EMA begins with them."""

    def fill(prefix, tree):
        def put(path, old):
            array = pretrained.arrays.get("/".join([prefix, *(key.key for key in path)]))
            # Each shard is a copy: the first step donates it.
            shard = lambda index: np.array(array[index], old.dtype)
            return old if array is None else jax.make_array_from_callback(old.shape, old.sharding, shard)

        return jax.tree_util.tree_map_with_path(put, tree)

    return fresh.replace(
        params=fill("params", fresh.params),
        batch_stats=fill("batch_stats", fresh.batch_stats),
        ema=fill("params", fresh.ema),
        ema_batch_stats=fill("batch_stats", fresh.ema_batch_stats),
    )
