"""What a configuration makes: network, optimizer and sizes, checked against each other and the devices."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import optax
from flax import linen as nn

from unet_jax import augment, data, losses, mesh, optimizer, trained
from unet_jax.errors import UserError, check_choice
from unet_jax.models import unet

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Parts(NamedTuple):
    """What a configuration makes, beside images and state; sizes are (height, width)."""

    model: nn.Module
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    loss_weights: dict[str, float]
    crop: tuple[int, int]  # what a training step predicts
    input_size: tuple[int, int]  # from which
    image_size: tuple[int, int]  # from which an evaluation predicts a whole image


def prepare(
    config: "ConfigDict",
    classes: data.Classes,
    devices: jax.sharding.Mesh,
    steps_per_epoch: float,
    total_steps: int,
) -> Parts:
    """Makes network, optimizer and schedule, and checks that everything fits together.

    Raises:
      UserError: a setting has no meaning, or the devices cannot share batches or images.
    """
    mesh.check_batch_size(devices, config.train.batch_size, config.train.accumulate)
    if not 0 <= config.seed < 2**31:
        raise UserError(f"config.seed = {config.seed} is not in 0..2**31-1")
    if config.train.log_every_steps < 1 or config.train.panels < 0:
        raise UserError("config.train.log_every_steps must be 1 or more, config.train.panels 0 or more")
    check_choice("config.train.nonfinite", config.train.nonfinite, ("stop", "skip"))
    loss_weights = losses.term_weights(config.loss)
    losses.check(loss_weights, config.loss.class_weights, len(classes.names))
    model = unet.create(classes.num_outputs, **config.model, one_cpu=mesh.is_one_cpu(devices))
    crop = augment.check(config.augment, config.data.size)
    schedule = optimizer.make_schedule(config.optimizer, steps_per_epoch, total_steps)
    optimizer.check_frozen(config.optimizer.frozen, trained.shapes(unet.abstract(model, classes.channels)["params"]))
    image_size = _input_size("config.data.size", model, config.data.size, devices)  # before the crop, maybe the same
    return Parts(
        model=model,
        schedule=schedule,
        tx=optimizer.make_optimizer(config.optimizer, schedule),
        loss_weights=loss_weights,
        crop=crop,
        input_size=_input_size("config.augment.crop", model, crop, devices),
        image_size=image_size,
    )


def _input_size(field: str, model: nn.Module, size: Sequence[int], devices: jax.sharding.Mesh) -> tuple[int, int]:
    """What the network is given to predict `size`: with the margins it needs, which mirror the image.

    Raises:
      UserError: the devices cannot share its height.
    """
    height, width = (n + sum(around) for n, around in zip(size, model.margins(size), strict=True))
    try:
        mesh.check_height(devices, height)
    except UserError as error:
        raise UserError(f"{field} = {tuple(size)}, to which the network gives {height} rows: {error}") from error
    return height, width


def count_steps(field: str, epochs: float, steps_per_epoch: float) -> int:
    """Epochs as a whole number of steps, at least one.

    Raises:
      UserError: `config.train.FIELD` is not positive.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"config.train.{field} = {epochs} must be positive")
    return max(1, round(epochs * steps_per_epoch))
