"""Converts the weights of PyTorch and Keras U-Nets to a work directory."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from unet_jax import data, models
from unet_jax.data import colors
from unet_jax.errors import UserError, check_choice
from unet_jax.inference.forward import Normalization
from unet_jax.interop import foreign_formats
from unet_jax.training import state
from unet_jax.weights import files as weight_files
from unet_jax.workdir import checkpoints, files, lock, record


class Network(NamedTuple):
    """Our U-Net with the weights of a file."""

    source: str  # name of the foreign network, for messages
    settings: dict[str, Any]  # `config.model`
    num_outputs: int  # channels of the logits
    channels: int  # channels of the images
    activation: str  # of the last layer, if the file specifies it: `sigmoid`, `softmax` or `linear`; else empty
    variables: dict[str, Any]  # float32 `params` and `batch_stats`


def convert(
    file: str | pathlib.Path, path: epath.PathLike, config: ConfigDict, class_names: Sequence[str] = (), task: str = ""
) -> tuple[Network, data.Classes]:
    """Writes a new work directory with the weights of a file as step 0.

    Args:
      file: see `weights.files.read`.
      path: the work directory; it must be empty or not exist.
      config: becomes its `config.json`, with `model` as in the file and no EMA weights.
      class_names: one per class, two for a binary task; empty: default names.
      task: see `make_classes`.

    Raises:
      UserError: the file cannot be read, is refused, or holds an unsupported network; the classes do not fit its
        outputs; the work directory is not empty or cannot be written.
    """
    network = read_network(file)
    classes = make_classes(network, class_names, task, str(file))
    path = epath.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--workdir={path} exists and is not empty: choose another, or delete it")
    config = config.copy_and_resolve_references()
    config.model.update(network.settings)
    config.optimizer.ema = 0.0
    if config.data.name == "folder":
        config.data.channels = network.channels
    files.check(path, config)
    with lock.Lock(path) as held:
        held.take()
        described = {**classes.to_json(), "normalization": Normalization().to_json()}
        files.claim(path, config, described)
        writer = checkpoints.CheckpointWriter(path)
        variables = jax.tree.map(jnp.asarray, network.variables)
        imported = state.TrainState(step=jnp.zeros((), jnp.int32), **variables, opt_state={}, ema=None)
        writer.save(0, imported, record.make(config, described), None)
        writer.close()
    return network, classes


def read_network(file: str | pathlib.Path) -> Network:
    """Recognises the network of a file and converts its weights to ours; the errors are those of `convert`."""
    weights = weight_files.read(file)
    arrays, foreign_format = weights.arrays, foreign_formats.recognise(weights, str(file))
    needed = {source for source, _ in foreign_format.table.values()}
    missing, surplus = needed - arrays.keys(), arrays.keys() - needed - foreign_format.ignored
    if missing or surplus:
        lacks = f"lacks {foreign_formats.some(missing)}" if missing else ""
        has = f"also has {foreign_formats.some(surplus)}" if surplus else ""
        raise UserError(
            f"{file} looks like {foreign_format.name}, but {' and '.join(filter(None, (lacks, has)))}: it is another "
            f"network. {foreign_formats.SUPPORTED}"
        )
    variables = {}
    for path, (source, to_our_layout) in foreign_format.table.items():
        if arrays[source].ndim != (4 if path.endswith("kernel") else 1) or not arrays[source].size:
            raise UserError(f"{file}: {source} has the shape {arrays[source].shape}, unlike in {foreign_format.name}")
        variables[path] = np.ascontiguousarray(to_our_layout(arrays[source]), np.float32)
        if not np.isfinite(variables[path]).all():
            raise UserError(f"{file}: {source} is not finite. Use a checkpoint from before the training diverged")

    widths = tuple(variables[f"params/down_{n}/Conv_1/kernel"].shape[-1] for n in range(foreign_format.levels))
    settings = {"features": widths, **foreign_format.settings}
    channels = variables["params/down_0/Conv_0/kernel"].shape[2]
    num_outputs = variables["params/head/kernel"].shape[-1]
    model = models.create(num_outputs=num_outputs, **settings)
    expected = models.shapes(models.abstract_variables(model, channels))
    for path, (source, _) in foreign_format.table.items():
        if variables[path].shape != expected[path]:
            raise UserError(
                f"{file}: {source}, {arrays[source].shape}, does not fit {foreign_format.name} with widths {widths}: "
                f"in our layout it is {variables[path].shape} instead of {expected[path]}"
            )
    tree = {"batch_stats": {}, **traverse_util.unflatten_dict(variables, sep="/")}
    return Network(foreign_format.name, settings, num_outputs, channels, foreign_format.activation, tree)


def make_classes(network: Network, names: Sequence[str], task: str, file: str) -> data.Classes:
    """The meaning of the outputs of a network.

    Args:
      names: of the classes; empty: default names.
      task: `multiclass`, `binary` or `multilabel`. Empty: `binary` for a single output; for several, `multilabel` if
        the file specifies a sigmoid, else `multiclass`.
      file: where the network comes from, for messages.

    Raises:
      UserError: the task or the number of names does not fit the outputs.
    """
    outputs = network.num_outputs
    if not task:
        several = "multilabel" if network.activation == "sigmoid" else "multiclass"
        task = "binary" if outputs == 1 else several
    check_choice("task", task, ("multiclass", "binary", "multilabel"))
    if (task == "binary" and outputs > 1) or (task == "multiclass" and outputs == 1):
        raise UserError(f"{file} has {outputs} output(s), too {'many' if outputs > 1 else 'few'} for a {task} task")
    if task == "multilabel" and network.activation == "softmax":
        raise UserError(f"{file} ends in a softmax, so its classes do not overlap: the task is not multilabel")
    default_names = ("background", "foreground") if task == "binary" else tuple(f"class {i}" for i in range(outputs))
    count, names = len(default_names), tuple(names) or default_names
    if len(names) != count or len(set(names)) != count or not all(names):
        raise UserError(f"{file} has {count} classes ({task}), but the given names are {', '.join(names)}")
    return data.Classes(task, names, colors.distinct_colors(count), network.channels)
