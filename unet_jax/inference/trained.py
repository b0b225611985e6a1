"""What a work directory holds, for evaluation, prediction, export and notebooks alike."""

import dataclasses
import functools
from typing import Any

import jax
from etils import epath
from flax import linen as nn

from unet_jax import data, models
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward
from unet_jax.parallel import sharding
from unet_jax.workdir import checkpoints, files


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, made by `load`."""

    config: Any  # the configuration that it was trained with
    classes: data.Classes  # task, class names, palette, and channels of the images
    network: forward.Network  # the network on its mesh, with its normalization
    variables: dict[str, Any]  # its weights, the EMA weights if enabled; whole on every device
    step: int  # of the checkpoint
    # Height and width of the first training image before it was resized; None if they were not recorded.
    source_size: tuple[int, int] | None = None

    @functools.cached_property
    def _probability(self):
        return sharding.jit_replicated(self.mesh, self.network.probability, static_argnames="tta")

    @property
    def model(self) -> nn.Module:
        """The Flax module."""
        return self.network.model

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that the weights lie on."""
        return self.network.mesh

    def predict(self, images, tta: str = "none") -> jax.Array:
        """Class probabilities of whole images; compiled once per shape.

        Args:
          images: uint8 `[B, H, W, C]`, at the size that the network was trained on (`config.data.size`).
          tta: test-time augmentation, one of `forward.TTA`.

        Returns:
          float32 `[B, H, W, K]`; K = 1 for a binary task.

        Raises:
          UserError: other images than uint8 with that many channels; an unknown `tta`.
        """
        check_choice("tta", tta, forward.TTA)
        if images.ndim != 4 or images.dtype != "uint8" or images.shape[-1] != self.classes.channels:
            raise UserError(
                f"images must be uint8 [batch, height, width, {self.classes.channels} channel(s)], not {images.dtype} "
                f"{images.shape}"
            )
        return self._probability(self.variables, images, tta=tta)


def load(path: epath.PathLike, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Trained:
    """Loads a trained network from its work directory alone.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      mesh: the devices to put the weights on; None is all devices, see `sharding.create_eval_mesh`.

    Raises:
      UserError: no work directory, or no such checkpoint; or one of another network than `config.json` describes.
    """
    path = epath.Path(path)
    config = files.read_config(path)
    if config.deterministic:
        sharding.use_deterministic_kernels()
    values = files.read_classes(path)
    classes = data.Classes.from_json(values)
    mesh = sharding.create_eval_mesh(config.mesh.data, config.mesh.space) if mesh is None else mesh
    normalization = forward.Normalization.from_json(values.get("normalization"))
    network = forward.create_network(config.model, classes, mesh, normalization)
    step, saved = checkpoints.read_variables(path, step, sharding.replicated(mesh))
    variables = evaluated_variables(saved)
    differing = models.differing_shapes(network.model, classes.channels, variables)
    if differing:
        weight, (found, needed) = next(iter(differing.items()))
        raise UserError(
            f"{path}, step {step}: {weight} is {found or 'absent'}, but the network of config.json with "
            f"{len(classes.names)} classes and {classes.channels} channel(s) needs {needed or 'none'}: the files of "
            "this work directory do not belong together"
        )
    source_size = tuple(values["image_size"]) if "image_size" in values else None
    return Trained(config, classes, network, variables, step, source_size)


def evaluated_variables(saved: dict[str, Any]) -> dict[str, Any]:
    """Of the variables of a checkpoint those that a network is evaluated with: the EMA weights if there are any."""
    return {"params": saved.get("ema", saved["params"]), "batch_stats": saved.get("batch_stats", {})}


def check_source(path: epath.PathLike, classes: data.Classes, source: data.Source) -> None:
    """Raises a `UserError` if a network is for another task, or number of classes or channels, than the images."""
    kinds = [(c.task, len(c.names), c.channels) for c in (classes, source.classes)]
    if kinds[0] != kinds[1]:
        given, held = (f"{task} task of {count} classes, {channels} channel(s)" for task, count, channels in kinds)
        raise UserError(f"{path} is a network for a {given}; the images in config.data.root are for a {held}")
