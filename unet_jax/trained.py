"""What a work directory holds, for evaluation, prediction, export and notebooks alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn

from unet_jax import checkpoint, data, mesh, predict, processes, state, workdir
from unet_jax.errors import UserError, check_choice
from unet_jax.models import unet


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network; `load` makes it.

    Attributes:
      config: the configuration that it was trained with.
      classes: task, class names, palette, and channels of the images.
      model: the network.
      variables: its weights, averaged ones where they were on; whole on every device.
      step: of the checkpoint.
      devices: the mesh that it lies on.
      image_size: (height, width) of the first training image before it was resized; None where it was not recorded.
    """

    config: Any
    classes: data.Classes
    model: nn.Module
    variables: dict[str, Any]
    step: int
    devices: jax.sharding.Mesh
    image_size: tuple[int, int] | None = None

    def __post_init__(self):
        model, task, devices = self.model, self.classes.task, self.devices

        def probability(variables, images, tta):
            window = mesh.split_height(devices, predict.surround_image(model, images, tta))
            logits = predict.logits(model, variables, window, images.shape[1:3], task, tta)
            return predict.to_probability(logits, task)

        object.__setattr__(self, "_probability", mesh.jit_replicated(devices, probability, static_argnames="tta"))

    def predict(self, images, tta: str = "none") -> jax.Array:
        """Class probabilities of whole images; compiled once for each shape.

        Args:
          images: uint8 `[B, H, W, C]`, at the size that the network was trained on (`config.data.size`).
          tta: test-time augmentation, see `predict.logits`.

        Returns:
          float32 `[B, H, W, K]`; K = 1 for a binary task.

        Raises:
          UserError: no uint8 images of that many channels; an unknown `tta`.
        """
        check_choice("tta", tta, predict.TTA)
        if images.ndim != 4 or images.dtype != "uint8" or images.shape[-1] != self.classes.channels:
            raise UserError(
                f"images must be uint8 [batch, height, width, {self.classes.channels} channel(s)], not {images.dtype} "
                f"{images.shape}"
            )
        return self._probability(self.variables, images, tta)


def load(path: epath.PathLike, step: int | None = None, devices: jax.sharding.Mesh | None = None) -> Trained:
    """Loads a trained network from its work directory alone.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      devices: the mesh to put the weights on, whole on each device; None is all devices, with images split over as many
        of them as training did, as far as these allow it.

    Raises:
      UserError: no work directory, or no such checkpoint; or one of another network than `config.json` describes.
    """
    path = epath.Path(path)
    config = workdir.read_config(path)
    if config.deterministic:
        processes.be_deterministic()
    values = workdir.read_classes(path)
    classes = data.Classes.from_json(values)
    devices = mesh.create_for_evaluation(config.mesh.data, config.mesh.space) if devices is None else devices
    model = unet.create(classes.num_outputs, **config.model, one_cpu=mesh.is_one_cpu(devices))
    step, saved = checkpoint.read_variables(path, step, mesh.replicated(devices))
    variables = {"params": saved.get("ema", saved["params"]), "batch_stats": saved.get("batch_stats", {})}
    check_fits(model, classes, variables, f"{path}, step {step}")
    image_size = tuple(values["image_size"]) if "image_size" in values else None
    return Trained(config, classes, model, variables, step, devices, image_size)


def check_source(path: epath.PathLike, classes: data.Classes, source: data.Source) -> None:
    """Checks that the network of a work directory is for images like those of `source`.

    Raises:
      UserError: it is for another task, number of classes, or number of channels.
    """
    kinds = [(c.task, len(c.names), c.channels) for c in (classes, source.classes)]
    if kinds[0] != kinds[1]:
        given, held = (f"{task} task of {count} classes, {channels} channel(s)" for task, count, channels in kinds)
        raise UserError(f"{path} is a network for a {given}; the images in config.data.root are for a {held}")


def read_beginning(
    path: epath.PathLike, model: nn.Module, classes: data.Classes, sharding: jax.sharding.Sharding
) -> tuple[dict[str, Any], str]:
    """The weights of another work directory, for a new training to begin with.

    Args:
      path: the other work directory; its best checkpoint is taken.
      model: the network of the new training.
      classes: what it predicts.
      sharding: of every array.

    Returns:
      `params` and `batch_stats`, without the head where it predicts another number of classes; and what was done.

    Raises:
      UserError: no work directory; a network that differs elsewhere than in its head, of which it names the first.
    """
    try:
        workdir.read_config(epath.Path(path))
        names = data.Classes.from_json(workdir.read_classes(epath.Path(path))).names
        step, saved = checkpoint.read_variables(path, None, sharding)
    except UserError as error:
        raise UserError(f"config.init_from = {str(path)!r}: {error}") from error
    given = {"params": saved.get("ema", saved["params"]), "batch_stats": saved.get("batch_stats", {})}
    found, needed = shapes(given), shapes(unet.abstract(model, classes.channels))
    differing = sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
    for name in differing:
        if not name.startswith("params/head/"):
            raise UserError(
                f"config.init_from = {str(path)!r}: {name} is {found.get(name, 'absent')} there, but "
                f"{needed.get(name, 'absent')} in this network. Set config.model (and config.data.channels) as there"
            )
    done = f"Begins with the weights of {path}, step {step}"
    if differing:
        del given["params"]["head"]
        outputs = [sizes["params/head/bias"][0] for sizes in (found, needed)]
        done += f"; its head has {outputs[0]} outputs and is drawn anew with {outputs[1]}"
    elif names != classes.names:
        done += f"; its head was trained for {', '.join(names)}, and is kept"
    return given, done


def begin(fresh: state.TrainState, given: dict[str, Any]) -> state.TrainState:
    """A new state with the weights that `read_beginning` gave; those that it lacks stay as they were drawn."""
    params = {**fresh.params, **given["params"]}
    ema = None if fresh.ema is None else jax.tree.map(jnp.copy, params)
    return fresh.replace(params=params, batch_stats=given["batch_stats"], ema=ema)


def check_fits(model: nn.Module, classes: data.Classes, variables: dict[str, Any], name: str) -> None:
    """Checks that the network takes these weights.

    Args:
      model: the network.
      classes: what it predicts.
      variables: weights.
      name: where they come from, for the message.

    Raises:
      UserError: it does not; names the first that differs.
    """
    needed = shapes(unet.abstract(model, classes.channels))
    found = shapes(variables)
    for weight in sorted(needed.keys() | found.keys()):
        if needed.get(weight) != found.get(weight):
            raise UserError(
                f"{name}: {weight} is {found.get(weight, 'absent')}, but the network of config.json with "
                f"{len(classes.names)} classes and {classes.channels} channel(s) needs {needed.get(weight, 'none')}: "
                "the files of this work directory do not belong together"
            )


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by its path, as in `params/head/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
