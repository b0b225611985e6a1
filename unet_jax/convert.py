"""Weights of PyTorch and Keras U-Nets, made into a work directory."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from unet_jax import checkpoint, data, layouts, state, trained, weights, workdir
from unet_jax.data.labels import distinct_colors
from unet_jax.errors import UserError, check_choice
from unet_jax.models import unet

if TYPE_CHECKING:
    from ml_collections import ConfigDict

TASKS = ("multiclass", "binary", "multilabel")


class Network(NamedTuple):
    """A network of ours with the weights of a file.

    Attributes:
      layout: what the file was recognised as, for people.
      settings: `config.model`.
      num_outputs: channels of the logits.
      channels: of the images.
      activation: of the head, where the file tells: `sigmoid`, `softmax` or `linear`; else empty.
      variables: float32 `params` and `batch_stats`.
    """

    layout: str
    settings: dict[str, Any]
    num_outputs: int
    channels: int
    activation: str
    variables: dict[str, Any]


def convert(
    file: str | pathlib.Path,
    path: epath.PathLike,
    config: "ConfigDict",
    class_names: Sequence[str] = (),
    task: str = "",
) -> tuple[Network, data.Classes]:
    """Writes a new work directory with the weights of a file as step 0.

    Args:
      file: see `weights.read`.
      path: the work directory; it must be empty or not exist.
      config: what becomes its `config.json`, with `model` as the file has it and no averaged weights.
      class_names: one for each class, two for a binary task; empty makes them up.
      task: see `make_classes`.

    Raises:
      UserError: the file cannot be read, is refused, or is of no network that we have; the classes do not fit its
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
    workdir.check(path, config)
    workdir.claim(path, config, classes.to_json())
    checkpoints = checkpoint.Checkpoints(path)
    imported = state.TrainState(
        step=jnp.zeros((), jnp.int32), **jax.tree.map(jnp.asarray, network.variables), opt_state={}, ema=None
    )
    checkpoints.save(0, imported, {}, None)
    checkpoints.close()
    return network, classes


def read_network(file: str | pathlib.Path) -> Network:
    """Recognises the network of a file, and lays out its weights as ours.

    Raises:
      UserError: see `convert`.
    """
    arrays, layers = weights.read(file)
    layout = layouts.recognise(weights.Weights(arrays, layers), str(file))
    needed = {source for source, _ in layout.table.values()}
    missing, left = needed - arrays.keys(), arrays.keys() - needed - layout.ignored
    if missing or left:
        lacks = f"lacks {layouts.some(missing)}" if missing else ""
        has = f"also has {layouts.some(left)}" if left else ""
        raise UserError(
            f"{file} looks like {layout.name}, but {' and '.join(filter(None, (lacks, has)))}: it is another network. "
            f"{layouts.KNOWN}"
        )
    variables = {}
    for name, (source, lay_out) in layout.table.items():
        if arrays[source].ndim != (4 if name.endswith("kernel") else 1) or not arrays[source].size:
            raise UserError(
                f"{file}: {source} has the shape {arrays[source].shape}, which no array of {layout.name} has"
            )
        variables[name] = np.ascontiguousarray(lay_out(arrays[source]), np.float32)
        if not np.isfinite(variables[name]).all():
            raise UserError(f"{file}: {source} is not finite. Take a checkpoint from before its training diverged")

    features = tuple(variables[f"params/down_{level}/Conv_1/kernel"].shape[-1] for level in range(layout.levels))
    settings = {"features": features, **layout.settings}
    channels = variables["params/down_0/Conv_0/kernel"].shape[2]
    num_outputs = variables["params/head/kernel"].shape[-1]
    expected = trained.shapes(unet.abstract(unet.create(num_outputs, **settings), channels))
    for name, (source, _) in layout.table.items():
        if variables[name].shape != expected[name]:
            raise UserError(
                f"{file}: {source}, {arrays[source].shape}, does not fit {layout.name} of widths {features}: laid out "
                f"as ours it is {variables[name].shape} instead of {expected[name]}"
            )
    tree = {"batch_stats": {}, **traverse_util.unflatten_dict(variables, sep="/")}
    return Network(layout.name, settings, num_outputs, channels, layout.activation, tree)


def make_classes(network: Network, names: Sequence[str], task: str, file: str) -> data.Classes:
    """What the outputs of a network mean.

    Args:
      network: from `read_network`.
      names: of the classes; empty makes them up.
      task: `multiclass`, `binary` or `multilabel`. Empty is `binary` for a single output, `multilabel` for several with
        a sigmoid as far as the file tells, otherwise `multiclass`.
      file: where it comes from, for messages.

    Raises:
      UserError: the task or the number of names does not fit the outputs.
    """
    outputs = network.num_outputs
    if not task:
        several = "multilabel" if network.activation == "sigmoid" else "multiclass"
        task = "binary" if outputs == 1 else several
    check_choice("task", task, TASKS)
    if (task == "binary" and outputs > 1) or (task == "multiclass" and outputs == 1):
        raise UserError(f"{file} has {outputs} output(s), too {'many' if outputs > 1 else 'few'} for a {task} task")
    if task == "multilabel" and network.activation == "softmax":
        raise UserError(f"{file} ends in a softmax, so its classes do not overlap: it is not multilabel")
    count = 2 if task == "binary" else outputs
    made_up = ("background", "foreground") if task == "binary" else tuple(f"class {i}" for i in range(count))
    names = tuple(names) or made_up
    if len(names) != count or len(set(names)) != count or not all(names):
        raise UserError(f"{file} has {count} classes ({task}), but the names given are {', '.join(names)}")
    return data.Classes(task, names, distinct_colors(count), network.channels)
