"""The one way through a network: image -> normalised -> margins -> network -> logits -> probability.

Evaluation, panels, reports, tiles, notebooks and exports all take it, so that none of them sees another image than the
training did.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from math import ceil, hypot, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unet_jax import models
from unet_jax.data.source import Classes
from unet_jax.inference import resample
from unet_jax.inference.normalization import Normalization
from unet_jax.metrics.confusion import predict_label
from unet_jax.parallel import sharding

ROTATIONS = 7  # of the paper's ISBI 2012 score; the angles, which it does not give, are spread evenly over the circle
# The views of an image that test-time augmentation averages over: (degrees by which it is turned, whether it is then
# mirrored left to right).
VIEWS = {
    "none": ((0, False),),
    "horizontal": ((0, False), (0, True)),
    "vertical": ((0, False), (180, True)),
    "flips": ((0, False), (0, True), (180, False), (180, True)),
    "turns": ((0, False), (90, False), (180, False), (270, False)),
    "dihedral": tuple((degrees, mirrored) for degrees in (0, 90, 180, 270) for mirrored in (False, True)),
    "rotations": tuple((k * 360 / ROTATIONS, False) for k in range(ROTATIONS)),
}
TTA = ("auto", *VIEWS)  # what a user may ask for; `auto` is what `best_tta` finds


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and all that a prediction needs beside its weights; the methods can be jitted.

    They take images of the type `classes.dtype`.
    """

    model: nn.Module  # see `unet_jax.models`
    classes: Classes  # what it predicts
    mesh: jax.sharding.Mesh  # the devices, which share the batch and, along `space`, the height of images
    normalization: Normalization = dataclasses.field(default_factory=Normalization)  # of its images

    @property
    def task(self) -> str:
        """`multiclass`, `binary` or `multilabel`."""
        return self.classes.task

    def labels(self, variables: Mapping[str, Any], image: jax.Array, tta: str = "none") -> jax.Array:
        """Whole images `[B, H, W, C]` -> uint8 labels `[B, H, W]`, or `[B, H, W, K]` for a multilabel task."""
        return predict_label(self.logits(variables, image, tta), self.task)

    def probability(self, variables: Mapping[str, Any], image: jax.Array, tta: str = "none") -> jax.Array:
        """Whole images `[B, H, W, C]` -> class probabilities float32 `[B, H, W, K]`; K = 1 for a binary task."""
        return to_probability(self.logits(variables, image, tta), self.task)

    def logits(self, variables: Mapping[str, Any], image: jax.Array, tta: str = "none") -> jax.Array:
        """Whole images `[B, H, W, C]` -> float32 logits `[B, H, W, K]`; mirrored at the borders."""
        size = image.shape[1:3]
        return self._window_logits(
            variables, reflect_pad(self.normalization.to_unit(image), self.margins(size, tta)), size, tta
        )

    def window_logits(
        self, variables: Mapping[str, Any], window: jax.Array, size: Sequence[int], tta: str = "none"
    ) -> jax.Array:
        """Windows of larger images, `size` with its `margins` -> float32 logits `[B, *size, K]`."""
        return self._window_logits(variables, self.normalization.to_unit(window), size, tta)

    def _window_logits(self, variables, window, size, tta):
        """Normalises, averages over the views of test-time augmentation, and cuts; `window` is float in 0..1.

        With several `VIEWS` the result is the logits of the mean probability.
        """
        window = sharding.split_height(self.mesh, window)
        apply = lambda x: self.model.apply(variables, self.normalization(x))
        cut = lambda x: x[:, : size[0], : size[1]]
        if tta == "none":
            return cut(apply(window))
        probability = lambda x: to_probability(apply(x), self.task)
        if tta == "rotations":
            mean = self._mean_over_rotations(probability, window, size)
        else:
            views = [(degrees // 90, mirrored) for degrees, mirrored in VIEWS[tta]]
            mean = cut(sum(_unview(probability(_view(window, *view)), *view) for view in views)) / len(views)
        return to_logits(mean, self.task)

    def margins(self, size: Sequence[int], tta: str = "none") -> list[tuple[int, int]]:
        """Pixels needed around a window of (height, width) `size`: (above, below), (left, right)."""
        if tta != "rotations":
            return list(self.model.margins(size))
        side, ((before, after), _) = self._canvas(size)
        radius = ceil(sqrt(2) * (max(before, after) + side / 2 + 1)) + 2  # two pixels for the cubic kernel
        return [(radius - n // 2, radius - n + n // 2) for n in size]

    def _canvas(self, size: Sequence[int]) -> tuple[int, Sequence[tuple[int, int]]]:
        """The side of a square that holds a window of `size` at any angle, and the margins around the square."""
        side = ceil(hypot(*size)) + 2
        return side, self.model.margins((side, side))

    def _mean_over_rotations(self, probability, window, size):
        side, ((before, after), _) = self._canvas(size)
        center = [margin + n // 2 for (margin, _), n in zip(self.margins(size, "rotations"), size, strict=True)]
        offset = jnp.arange(-before, side + after) - side // 2
        sample = jax.vmap(resample.sample, (0, None, None, None))
        total = 0.0
        for angle in np.arange(ROTATIONS) * 2 * np.pi / ROTATIONS:
            rows, columns = resample.rotate(offset, offset, angle, 1.0)
            turned = sample(window, rows + center[0], columns + center[1], "cubic").clip(0, 1)
            predicted = probability(turned)[:, :side, :side]
            rows, columns = resample.rotate(*(jnp.arange(n) - n // 2 for n in size), -angle, 1.0)
            total = total + sample(predicted, rows + side // 2, columns + side // 2, "bilinear")
        return total / ROTATIONS


def unseen_views(tta: str, augment: Mapping[str, Any]) -> list[str]:
    """The views of a set of `VIEWS` that a training never drew, in words.

    A training draws its flips, each turned by quarters of a circle if it has `turns`, and by up to `rotate` degrees
    either way. `augment` is `config.augment`.
    """
    horizontal, vertical = augment["flip_horizontal"], augment["flip_vertical"]
    flips = {(0, False): True, (0, True): horizontal, (180, True): vertical, (180, False): horizontal and vertical}

    quarters = (0, 90, 180, 270) if augment["turns"] else (0,)

    def is_drawn(degrees, mirrored):
        starts = [flip + quarter for (flip, m), on in flips.items() if on and m == mirrored for quarter in quarters]
        return any(abs((degrees - start + 180) % 360 - 180) <= augment["rotate"] for start in starts)

    return [_describe_view(*view) for view in VIEWS[tta] if not is_drawn(*view)]


def best_tta(augment: Mapping[str, Any]) -> str:
    """What `auto` means: the most views that are all as a training with `config.augment` drew them.

    Never `rotations`, which samples the image twice and so blurs it.
    """
    exact = [name for name in VIEWS if name != "rotations" and not unseen_views(name, augment)]
    return max(exact, key=lambda name: len(VIEWS[name]))


def _describe_view(degrees: float, mirrored: bool) -> str:
    if mirrored and degrees in (0, 180):
        return f"flipped {'vertically' if degrees else 'horizontally'}"
    return f"turned by {degrees:.0f} degrees" + (" and flipped" if mirrored else "")


def create_network(
    settings: Mapping[str, Any], classes: Classes, mesh: jax.sharding.Mesh, normalization: Normalization | None = None
) -> Network:
    """The network of `config.model` for `classes`, in the form that suits the devices of `mesh`."""
    conv_impl = "cpu" if sharding.is_one_cpu(mesh) else "plain"
    model = models.create(num_outputs=classes.num_outputs, conv_impl=conv_impl, **settings)
    return Network(model, classes, mesh, normalization or Normalization())


def reflect_pad(image: jax.Array, margins: Sequence[tuple[int, int]]) -> jax.Array:
    """`[B, H, W, C]` with mirrored margins, as in figure 2 of the paper."""
    return jnp.pad(image, ((0, 0), *margins, (0, 0)), mode="reflect")


def to_probability(logits: jax.Array, task: str) -> jax.Array:
    """Softmax, or sigmoids."""
    return jax.nn.softmax(logits) if task == "multiclass" else jax.nn.sigmoid(logits)


def to_logits(probability: jax.Array, task: str) -> jax.Array:
    """Logits whose `to_probability` is `probability`; finite, where that is 0 or 1.

    Sigmoids of logits from 17 on are 1 in float32: all of these become 16.6.
    """
    limits = jnp.finfo(probability.dtype)
    log = jnp.log(probability.clip(limits.tiny))
    return log if task == "multiclass" else log - jnp.log((1 - probability).clip(limits.epsneg))


def to_label(probability: np.ndarray, task: str, threshold: float = 0.5) -> np.ndarray:
    """Probabilities `[..., K]` -> class uint8 `[...]`, or masks uint8 `[..., K]` for a multilabel task.

    A sigmoid predicts its class where the probability exceeds the threshold; K = 1 for a binary task.
    """
    if task == "multiclass":
        return probability.argmax(-1).astype(np.uint8)
    positive = (probability > threshold).astype(np.uint8)
    return positive[..., 0] if task == "binary" else positive


def _view(x: jax.Array, turn: int, mirrored: bool) -> jax.Array:
    x = jnp.rot90(x, turn, (1, 2))
    return x[:, :, ::-1] if mirrored else x


def _unview(x: jax.Array, turn: int, mirrored: bool) -> jax.Array:
    return jnp.rot90(x[:, :, ::-1] if mirrored else x, -turn, (1, 2))
