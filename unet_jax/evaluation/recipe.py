"""A recipe read off the training images, `config.auto`: each rule sets some fields, and says why.

The rules stand in a table in configs/README.md, with what each rests on. What they set is recorded in the work
directory like any other setting. The same images give the same recipe.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from unet_jax import data, defaults
from unet_jax.data import windows
from unet_jax.errors import UserError, did_you_mean
from unet_jax.evaluation import survey

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FINE = 8  # pixels that a thing must be wide at least to be resized no further
THIN = 12  # pixels: what is less wide, as most classes are, needs a network that works at full resolution
RARE = 1e-3  # share of the pixels, below which a class does not decide the size
STRIDE = 32  # sides are multiples of it
EXAMPLES = 8_000  # images or windows that a training sees, if no time is given


class Choice(NamedTuple):
    """Fields of the configuration that one rule sets."""

    values: Mapping[str, Any]  # dotted name -> value
    why: str


class Case(NamedTuple):
    """What the rules look at."""

    found: survey.Survey
    classes: data.Classes
    config: "ConfigDict"  # with what earlier rules have set
    is_open: Callable[[str], bool]  # whether rules may set a field
    is_cpu: bool

    @property
    def scale(self) -> float:
        """By what factor training resizes the images of the survey, on average of both sides."""
        size = self.config.data.size
        return sqrt(prod(size) / prod(self.found.size)) if size else 1.0

    @property
    def view(self) -> tuple[int, int]:
        """Height and width of what training sees at a time."""
        return tuple(self.config.augment.crop or self.config.data.size)

    @property
    def width(self) -> float:
        """How wide things are when training sees them, in pixels: the median over all classes but the largest."""
        largest = int(np.argmax(self.found.shares)) if self.classes.task != "multilabel" else -1
        widths = [w for k, w in enumerate(self.found.widths) if w and k != largest]
        return self.scale * float(np.median(widths)) if widths else inf

    @property
    def is_photographic(self) -> bool:
        """Whether the images may be photographs: three channels of 8 bits."""
        return self.found.channels == 3 and self.found.dtype == "uint8"

    @property
    def examples_per_epoch(self) -> float:
        """Images of an epoch, or windows that cover them."""
        if self.config.data.size:
            return self.found.images
        count = int(windows.per_image(self.found.sizes, self.view).sum())
        return count * self.found.images / len(self.found.sizes)


def apply(config: "ConfigDict", source: data.Source, notify: Callable[[str], None]) -> list[Choice]:
    """Sets the fields of `config` that are open: at their default, and not in `config.keep`.

    Args:
      config: as in `configs/default.py`; changed in place.
      source: the training images.
      notify: called with a line for each rule that sets a field.

    Returns:
      the rules that set a field, with the fields that they set.

    Raises:
      UserError: an unknown field in `config.keep`; an image that cannot be read.
    """
    check_kept(config)
    is_open, chosen = open_fields(config), []
    case = Case(survey.conduct(source), source.classes, config, is_open.__contains__, jax.default_backend() == "cpu")
    for rule in RULES:
        for choice in rule(case):
            values = {name: value for name, value in choice.values.items() if name in is_open}
            if values:
                config.update_from_flattened_dict(values)
                chosen.append(Choice(values, choice.why))
                notify(f"auto     {describe(chosen[-1])}")
    return chosen


def check_kept(config: "ConfigDict") -> None:
    """Raises a `UserError` for an unknown field in `config.keep`."""
    for name in config.keep:
        if name not in defaults.fields():
            raise UserError(f"config.keep: there is no field {name!r}.{did_you_mean(name, defaults.fields())}")


def open_fields(config: "ConfigDict") -> set[str]:
    """The dotted names of the fields that rules may set."""
    flat = defaults.flatten(json.loads(config.to_json()))
    return flat.keys() - defaults.differing(flat).keys() - {*config.keep}


def reuse(config: "ConfigDict", earlier: "ConfigDict") -> None:
    """Copies what `apply` set from the configuration of a work directory into the same fields of `config`."""
    for name in open_fields(config) & {*FIELDS}:
        group, _, field = name.rpartition(".")
        config[group][field] = earlier[group][field]


def describe(choice: Choice) -> str:
    """The fields and the reason, on one line."""
    return f"{', '.join(f'{name}={value!r}' for name, value in choice.values.items())}: {choice.why}"


def to_file(config: "ConfigDict", chosen: Sequence[Choice]) -> str:
    """A config file with the fields of `config` that are not at their default, and why rules have set them.

    Args:
      config: after `apply`.
      chosen: what that returned.
    """
    why = {name: choice.why for choice in chosen for name in choice.values}
    plain = config.copy_and_resolve_references()
    plain.auto, plain.keep, plain.train.minutes = False, (), 0.0  # the epochs were measured
    lines, before = [], ""
    for name in defaults.differing(defaults.flatten(json.loads(plain.to_json()))):
        group, _, field = name.rpartition(".")
        reason = why.get(name, "")
        lines += [f"    # {line}" for line in textwrap.wrap(reason, 110)] if reason != before else []
        lines.append(f"    config.{name} = {(plain[group] if group else plain)[field]!r}")
        before = reason
    return "\n".join(
        [
            f'"""Read off the images in {plain.data.root}; a copy in configs/ can be edited and trained."""\n',
            "from configs import default\n\n",
            "def get_config():",
            "    config = default.get_config()",
            *lines,
            "    return config\n",
        ]
    )


# The rules, in their order: a later one sees what those before it have set. Each yields what it would set.


def _size(case: Case) -> Iterator[Choice]:
    """Whole images, resized, as long as the finest class stays visible; or windows of them."""
    found, names = case.found, case.classes.names
    side, (height, width) = 256 if case.is_cpu else 512, found.size
    crop = {"augment.crop": tuple(min(side, max(STRIDE, n // STRIDE * STRIDE)) for n in found.size)}
    if not case.is_open("data.size"):
        if not case.config.data.size and case.is_open("augment.crop"):
            yield Choice(crop, "windows of the images, which keep their own size")
        elif not case.config.data.size:
            windows.check_size(case.config.augment.crop)
        return
    shrink = min(1.0, side / sqrt(height * width))
    widths = {n: w for n, w, share in zip(names, found.widths, found.shares, strict=True) if w and share > RARE}
    finest = min(widths, key=widths.get, default=names[-1])
    wide = widths.get(finest, inf)
    if case.is_open("augment.crop") and (shrink == 1 or wide * shrink >= FINE):
        resized = tuple(max(STRIDE, STRIDE * round(n * shrink / STRIDE)) for n in found.size)
        stays = f": the finest class, {finest!r}, stays {wide * shrink:.0f} px wide" if wide < inf else ""
        yield Choice(
            {"data.size": found.size if shrink == 1 else resized},
            f"the network sees whole images, whose median is {width}x{height}{stays}",
        )
        return
    yield Choice(
        {"data.size": (), **crop},
        f"the network sees windows of the images as they are: in images resized to {side}x{side} the finest class, "
        f"{finest!r}, would be {wide * shrink:.1f} px wide instead of {wide:.1f}",
    )


def _network(case: Case) -> Iterator[Choice]:
    """A pretrained encoder, but for fine structures, which need full resolution from the first layer to the last."""
    at = f"most classes are {case.width:.0f} px wide when the network sees them" if case.width < inf else "all is large"
    is_plain = case.width < THIN if case.is_open("model.name") else case.config.model.name == "unet"
    if is_plain:
        features = (16, 32, 64, 128) if case.is_cpu else (32, 64, 128, 256)
        yield Choice({"model.features": features}, f"a narrow network at full resolution, from scratch: {at}")
        yield Choice({"optimizer.learning_rate": 3e-3}, "for weights that start at random")
        return
    features, stride = ((64, 96, 192), 4) if len(case.classes.names) > 2 else ((32, 64, 96, 192), 2)
    yield Choice(
        {"model.name": "encoder_unet", "model.features": features, "model.upsample": "nearest"},
        f"weights that have seen ImageNet learn from few images; the head is at stride {stride}: {at}",
    )


def _loss(case: Case) -> Iterator[Choice]:
    """Cross-entropy and Dice; weights for rare classes, or for the gaps between touching things."""
    found, gaps = case.found, case.found.widths[0] * case.scale
    if case.classes.task != "multilabel" and 0 < gaps < THIN and max(found.regions[1:]) >= 10:
        yield Choice(
            {"loss.border_weight": 10.0},
            f"an image has {max(found.regions[1:]):.0f} regions on average: the gaps between them, {gaps:.0f} px "
            "wide, count more",
        )
        return
    yield Choice({"loss.cross_entropy": 0.5, "loss.dice": 0.5}, "Dice counts small regions as much as large ones")
    shares = dict(zip(case.classes.names, found.shares, strict=True))
    rarest = min((name for name, share in shares.items() if share), key=shares.get, default="")
    if len(shares) > 2 and rarest and shares[rarest] < 0.05 and case.classes.task != "multilabel":
        yield Choice(
            {"loss.class_weights": ("sqrt",)},
            f"{rarest!r} has {shares[rarest]:.2%} of the pixels: rare classes count more",
        )


def _augmentation(case: Case) -> Iterator[Choice]:
    """What the images may have looked like as well."""
    if case.is_photographic:
        yield Choice({"augment.flip_horizontal": True}, "mirrored, but not upside down: these may be photographs")
    else:
        views = {"augment.flip_horizontal": True, "augment.flip_vertical": True}
        views |= {"augment.turns": True} if case.view[0] == case.view[1] else {}
        yield Choice(views, "mirrored and turned: these are no photographs, which have an up and down")
    if case.config.loss.border_weight:
        warps = {"augment.elastic": 10.0, "augment.interpolation": "cubic"}
        yield Choice(warps, "deformed as the membranes of ISBI 2012 are, whose gaps cubic interpolation keeps")
    elif case.width >= THIN:
        warps = {"augment.rotate": 15.0, "augment.scale": 0.2}
        warps |= {"augment.shift": 0.05} if case.config.data.size else {}
        yield Choice(warps, "rotated, zoomed and shifted a little: at this width nothing is lost")
    values = {"augment.brightness": 0.1, "augment.contrast": 0.2, "augment.gamma": 0.2}
    yield Choice(values, "in other light")


def _batch(case: Case) -> Iterator[Choice]:
    """Small batches take more steps in the same time."""
    mesh = case.config.mesh
    devices = mesh.data or max(1, jax.device_count() // max(mesh.space, 1))
    unit = devices * max(case.config.train.accumulate, 1)
    size = (4 if case.config.model.name == "unet" else 8) if case.is_cpu else 16
    size = -(-min(size, max(2, int(case.examples_per_epoch))) // unit) * unit
    yield Choice(
        {"train.batch_size": size}, f"for {case.examples_per_epoch:.0f} examples an epoch, on {devices} device(s)"
    )
    if not case.is_cpu:
        yield Choice({"model.dtype": "bfloat16"}, "which accelerators compute twice as fast")


def _optimizer(case: Case) -> Iterator[Choice]:
    """AdamW with an average of the weights, as all measured recipes have it."""
    decay = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.01, "optimizer.decayed": "kernels"}
    average = {"optimizer.ema": 0.99, "optimizer.ema_statistics": True, "optimizer.clip_norm": 1.0}
    yield Choice({**decay, **average}, "as in the recipes measured")


def _length(case: Case) -> Iterator[Choice]:
    """So many epochs that each training sees about as many images, unless it is to take some time."""
    per_epoch, minutes = case.examples_per_epoch, case.config.train.minutes
    if not minutes:
        epochs = float(min(400, max(10, round(EXAMPLES / per_epoch))))
        yield Choice(
            {"train.epochs": epochs},
            f"{epochs * per_epoch:.0f} images or windows; --config.train.minutes sets a time instead",
        )
    if minutes or case.config.train.epochs > 2:
        yield Choice(
            {"optimizer.warmup_epochs": min(1.0, round(400 / per_epoch, 3))}, "a short rise of the learning rate"
        )
    yield Choice({"train.eval_every_epochs": 0.0, "train.checkpoint_every_epochs": 0.0}, "about ten evaluations")


RULES = (_size, _network, _loss, _augmentation, _batch, _optimizer, _length)
FIELDS = ("data.size", "train.batch_size", "train.epochs", "train.eval_every_epochs", "train.checkpoint_every_epochs")
FIELDS += ("model.name", "model.features", "model.upsample", "model.dtype")
FIELDS += ("loss.cross_entropy", "loss.dice", "loss.class_weights", "loss.border_weight")
FIELDS += tuple(f"augment.{name}" for name in ("crop", "flip_horizontal", "flip_vertical", "turns", "rotate", "scale"))
FIELDS += tuple(f"augment.{name}" for name in ("shift", "elastic", "interpolation", "brightness", "contrast", "gamma"))
FIELDS += tuple(f"optimizer.{name}" for name in ("name", "learning_rate", "weight_decay", "decayed", "ema"))
FIELDS += tuple(f"optimizer.{name}" for name in ("ema_statistics", "clip_norm", "warmup_epochs"))
