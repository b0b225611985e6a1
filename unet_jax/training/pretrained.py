"""Starting a training from the weights of another work directory: `config.init_from`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from unet_jax import data, models
from unet_jax.errors import UserError
from unet_jax.inference import forward, trained
from unet_jax.parallel import sharding
from unet_jax.training import state
from unet_jax.workdir import checkpoints, files


class Pretrained(NamedTuple):
    """Weights to start from."""

    params: dict[str, Any]  # without the head if it predicts another number of classes
    batch_stats: dict[str, Any]
    normalization: forward.Normalization  # that these weights were trained with
    summary: str  # what was loaded, for people


def load_pretrained(path: epath.PathLike, network: forward.Network) -> Pretrained:
    """Loads the best checkpoint of another work directory, to train `network`.

    Raises:
      UserError: no work directory; a network that differs elsewhere than in its head (names the first difference).
    """
    classes = network.classes
    try:
        files.read_config(epath.Path(path))
        values = files.read_classes(epath.Path(path))
        names = data.Classes.from_json(values).names
        step, saved = checkpoints.read_variables(path, None, sharding.replicated(network.mesh))
    except UserError as error:
        raise UserError(f"config.init_from = {str(path)!r}: {error}") from error
    variables = trained.evaluated_variables(saved)
    differing = models.differing_shapes(network.model, classes.channels, variables)
    for name, (found, needed) in differing.items():
        if not name.startswith("params/head/"):
            raise UserError(
                f"config.init_from = {str(path)!r}: {name} is {found or 'absent'} there, but {needed or 'absent'} in "
                "this network. Set config.model (and config.data.channels) as there"
            )
    summary = f"Starting from the weights of {path}, step {step}"
    if differing:
        del variables["params"]["head"]
        (before,), (after,) = differing["params/head/bias"]
        summary += f"; its head has {before} outputs and is replaced by a new one with {after}"
    elif names != classes.names:
        summary += f"; its head was trained for {', '.join(names)}, and is kept"
    normalization = forward.Normalization.from_json(values.get("normalization"))
    return Pretrained(variables["params"], variables["batch_stats"], normalization, summary)


def with_pretrained(fresh: state.TrainState, pretrained: Pretrained) -> state.TrainState:
    """A new state with pretrained weights; weights that they lack stay as they were initialised."""
    params = {**fresh.params, **pretrained.params}
    ema = None if fresh.ema is None else jax.tree.map(jnp.copy, params)
    return fresh.replace(params=params, batch_stats=pretrained.batch_stats, ema=ema)
