"""What a configuration describes: network, loss, optimizer, sizes and steps, and what is made of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import optax

from unet_jax import data, losses, models
from unet_jax.data import border, images, pipeline, windows
from unet_jax.errors import UserError, check_choice
from unet_jax.evaluation import evaluate
from unet_jax.inference import forward, normalization, tiles
from unet_jax.parallel import sharding
from unet_jax.training import augment, optimizer, state, step

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Steps(NamedTuple):
    """The training in steps."""

    per_epoch: float  # may be fractional
    ends: tuple[int, ...]  # after how many steps the run ended, each time before it was extended, and ends now
    eval_every: int  # steps between two evaluations
    save_every: int  # steps between two checkpoints

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.ends[-1]

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        return step in self.ends or step % self.eval_every == 0

    def saves(self, step: int) -> bool:
        """Whether the state after `step` steps is saved."""
        return self.evaluates(step) or step % self.save_every == 0


class Components(NamedTuple):
    """What a configuration describes beside images and state; sizes are (height, width)."""

    network: forward.Network  # on its mesh
    loss: losses.Loss  # of the training and the evaluation
    schedule: optax.Schedule  # step -> learning rate
    optimizer: optax.GradientTransformation  # with the schedule
    crop: tuple[int, int]  # what a training step predicts
    windows: windows.Windows | None  # how windows of that size are drawn; None if images are resized to one size
    input_size: tuple[int, int]  # what the network is given for it
    eval_size: tuple[int, int]  # what it predicts at a time when it is evaluated: whole images, or tiles of them
    eval_input_size: tuple[int, int]  # what the network is given for it


def build(config: "ConfigDict", classes: data.Classes, mesh: jax.sharding.Mesh, steps: Steps) -> Components:
    """Builds network, loss, schedule and optimizer, and checks that everything fits together.

    Raises:
      UserError: an invalid setting, or batches or images that the devices cannot share.
    """
    sharding.check_batch_size(mesh, config.train.batch_size, config.train.accumulate)
    if not 0 <= config.seed < 2**31:
        raise UserError(f"config.seed = {config.seed} is not in 0..2**31-1")
    if config.train.log_every_steps < 1 or config.train.panels < 0 or config.train.patience < 0:
        raise UserError(
            "config.train.log_every_steps must be 1 or more, config.train.panels and config.train.patience 0 or more"
        )
    data.check_show(config.data, classes)
    check_choice("config.train.nonfinite", config.train.nonfinite, ("stop", "skip"))
    evaluate.check(config.eval, classes)
    border.pixel_weight_fn(config.loss, classes)
    loss = losses.make(config.loss, classes.task, len(classes.names))
    if config.train.accumulate > 1 and loss.of_whole_batch():
        raise UserError(
            f"config.loss.{loss.of_whole_batch()[0]} is computed from the whole batch at once, which microbatches do "
            "not see: set config.train.accumulate to 1, or use config.loss.dice"
        )
    network = forward.create_network(config.model, classes, mesh)
    crop, drawn = augment.check(config.augment, config.data.size, classes.channels, config.train.batch_size), None
    field, eval_size = "config.data.size", tuple(config.data.size)
    if not config.data.size:
        reach = augment.reach(config.augment, network.margins(crop))
        drawn = windows.Windows(crop, reach, config.data.foreground)
        field, eval_size = "config.augment.crop", tiles.rounded(crop, network)
    if config.model.encoder_norm == "frozen" and config.optimizer.weight_decay and config.optimizer.decayed == "all":
        raise UserError(
            "config.optimizer.weight_decay would shrink scales and biases, which config.model.encoder_norm = 'frozen' "
            "keeps as they are: set config.optimizer.decayed to 'kernels'"
        )
    schedule = optimizer.make_schedule(config.optimizer, steps.per_epoch, steps.ends)
    params = models.shapes(models.abstract_variables(network.model, classes.channels)["params"])
    optimizer.check_names(config.optimizer, params)
    return Components(
        network=network,
        loss=loss,
        schedule=schedule,
        optimizer=optimizer.make_optimizer(config.optimizer, schedule),
        crop=crop,
        windows=drawn,
        eval_size=eval_size,
        eval_input_size=_input_size(field, network, eval_size),  # first: maybe it is the crop too
        input_size=_input_size("config.augment.crop", network, crop),
    )


def _input_size(field: str, network: forward.Network, size: Sequence[int]) -> tuple[int, int]:
    """What the network is given to predict `size`: with the margins it needs, which mirror the image."""
    height, width = (n + sum(margin) for n, margin in zip(size, network.margins(size), strict=True))
    try:
        sharding.check_height(network.mesh, height)
    except UserError as error:
        raise UserError(f"{field} = {tuple(size)}, for which the network needs {height} rows: {error}") from error
    return height, width


def examples_per_epoch(config: "ConfigDict", source: data.Source) -> int:
    """Training examples in an epoch: images, or as many windows as cover them if they keep their own size."""
    if config.data.size:
        return len(source)
    window = augment.check(config.augment, config.data.size)
    scaled = lambda index, size: images.scaled_size(size, source.factors(index), source.ids[index])
    sizes = [scaled(index, size) for index, size in enumerate(source.sizes())]
    return int(windows.per_image(sizes, window).sum())


def describe_images(config: "ConfigDict", source: data.Source) -> dict[str, list]:
    """What a new training has to know of its images: pixels of each class, and values, each if it is needed."""
    needed = {
        "class_counts": losses.needs_class_counts(config.loss),
        "values": normalization.needs_values(config.data, source.classes),
    }
    if not any(needed.values()):
        return {}
    opened = evaluate.open_images(source, config, source.classes)
    found = {"class_counts": opened.class_counts, "values": opened.values}
    return {name: find() for name, find in found.items() if needed[name]}


def count_steps(settings: Mapping, steps_per_epoch: float) -> Steps:
    """The epochs of `config.train`, which must be positive, as whole numbers of steps, each at least one."""
    for field in ("epochs", "eval_every_epochs", "checkpoint_every_epochs"):
        value, may_be_zero = settings[field], field != "epochs"
        if not (0 < value < math.inf or (may_be_zero and value == 0)):
            remedy = ", or 0 for about ten times" if may_be_zero else ""
            raise UserError(f"config.train.{field} = {value} must be positive{remedy}")
    lengths = (*settings["extends"], settings["epochs"])
    are_numbers = all(isinstance(length, int | float) and 0 < length < math.inf for length in lengths)
    steps = lambda epochs: max(1, round(epochs * steps_per_epoch))
    ends = tuple(map(steps, lengths)) if are_numbers else ()
    if list(ends) != sorted(set(ends)) or not are_numbers:
        raise UserError(
            f"config.train.epochs = {settings['epochs']}, at which the run ends, must be a step or more above where it "
            f"ended before, config.train.extends = {tuple(settings['extends'])}, and these must rise, too"
        )
    if ends[-1] >= 2**31:
        raise UserError(f"config.train.epochs = {settings['epochs']} is {ends[-1]:.3g} steps; 2147483647 are the most")
    tenth = math.ceil(ends[0] / 10) / steps_per_epoch
    every = (steps(settings[field] or tenth) for field in ("eval_every_epochs", "checkpoint_every_epochs"))
    return Steps(steps_per_epoch, ends, *every)


def create_state(config: "ConfigDict", built: Components) -> state.TrainState:
    """The state before the first step, on the mesh of the network."""
    network = built.network
    return state.create(
        seed=config.seed,
        model=network.model,
        image_shape=(1, *network.model.smallest_input, network.classes.channels),
        optimizer=built.optimizer,
        ema=config.optimizer.ema > 0,
        mesh=network.mesh,
        shard_optimizer=config.mesh.shard_optimizer,
        ema_statistics=config.optimizer.ema_statistics,
    )


def make_scorer(config: "ConfigDict", built: Components, split: pipeline.Pipeline) -> evaluate.Scorer:
    """What scores the images of a split during the training."""
    tile, em_scores = built.windows and built.eval_size, config.eval.em_scores
    return evaluate.Scorer(built.network, split, built.loss, config.train.batch_size, tile=tile, em_scores=em_scores)


def make_train_step(config: "ConfigDict", components: Components, shardings: state.TrainState) -> Callable:
    """The training step of a configuration, see `step.make_train_step`."""
    return step.make_train_step(
        components.network,
        components.optimizer,
        components.loss,
        augmentation=config.augment,
        is_cut=components.windows is not None,
        seed=config.seed,
        shardings=shardings,
        ema=config.optimizer.ema,
        microbatches=config.train.accumulate,
        skip_nonfinite=config.train.nonfinite == "skip",
    )
