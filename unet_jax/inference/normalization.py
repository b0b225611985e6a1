"""What a network is given for the values of an image, and how a new network chooses it: `config.data.normalize`."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.data import Classes
from unet_jax.errors import UserError

FULL = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What a network is given for the values of an image: part of the network, in its work directory and exports.

    First the values become 0..1, in which images are augmented, by `low` and `high`; then (255 x - mean) / scale. Each
    field has one number for all channels, or one per channel.
    """

    mean: tuple[float, ...] = (0.0,)  # where 0..1 is 0..255
    scale: tuple[float, ...] = (255.0,)  # likewise
    low: tuple[float, ...] = (0.0,)  # value that becomes 0, as do those below
    high: tuple[float, ...] = (255.0,)  # value that becomes 1, as do those above
    fill: tuple[float, ...] = (0.0,)  # value in place of NaN, which are pixels without data

    @property
    def has_limits(self) -> bool:
        """Whether other values than 0 and 255 become 0 and 1."""
        return (self.low, self.high) != ((0.0,), (255.0,))

    def to_unit(self, image: jax.Array) -> jax.Array:
        """Images `[..., C]` of any type as float32 in 0..1."""
        x = image.astype(jnp.float32)
        if image.dtype == jnp.uint8 and not self.has_limits:
            return x / 255
        if jnp.issubdtype(image.dtype, jnp.floating):
            x = jnp.where(jnp.isnan(x), np.float32(self.fill), x)
        low, high = np.float32(self.low), np.float32(self.high)
        return ((x - low) / (high - low)).clip(0, 1)

    def __call__(self, image: jax.Array) -> jax.Array:
        """float images `[..., C]` in 0..1 -> what the network is given."""
        if self.mean == (0.0,) and self.scale == (255.0,):
            return image
        return (image - np.float32(self.mean) / 255) / (np.float32(self.scale) / 255)

    def picture(self, image: np.ndarray, show: Sequence[int] = ()) -> np.ndarray:
        """What people see of an image `[H, W, C]`: uint8 `[H, W, 1 or 3]`, from black at `low` to white at `high`.

        `show` are the numbers of the channels, `config.data.show`; by default the first three, or the first.
        """
        count = image.shape[-1]
        chosen = list(show) or list(range(3 if count >= 3 else 1))
        image = image[..., chosen] if chosen != list(range(count)) else image
        if image.dtype == np.uint8 and not self.has_limits:
            return image
        low, high = (np.broadcast_to(np.float32(x), count)[chosen] for x in (self.low, self.high))
        unit = (image.astype(np.float32) - low) / (high - low)
        return np.rint(np.nan_to_num(unit, nan=0.0).clip(0, 1) * 255).astype(np.uint8)

    def to_json(self) -> dict[str, list[float]]:
        """A dictionary that `from_json` takes back."""
        values = {"mean": list(self.mean), "scale": list(self.scale)}
        if not self.has_limits and self.fill == (0.0,):  # as before there were any
            return values
        return {**values, "low": list(self.low), "high": list(self.high), "fill": list(self.fill)}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[float]] | None) -> "Normalization":
        """The inverse of `to_json`; None, from a work directory without it, is the default."""
        return cls(**{name: tuple(map(float, numbers)) for name, numbers in (values or {}).items()})


def needs_values(settings: Mapping, classes: Classes) -> bool:
    """Whether `make` needs to know the values of the training images."""
    return classes.dtype != "uint8" or settings["normalize"] in ("percentile", "standard")


def make(
    settings: Mapping, classes: Classes, values: Mapping[str, Sequence[float]] | None, pretrained: Normalization
) -> Normalization:
    """The normalization of a network.

    Args:
      settings: `config.data`, of which `normalize` and `value_range` count.
      classes: which type the images have.
      values: what `data.statistics.describe` returns of the training images; None if it is not needed.
      pretrained: of the weights that the training starts from; the default if they have none.

    Raises:
      UserError: `network`, and the weights have no normalization; images without any value in a channel.
    """
    kind = settings["normalize"]
    if not kind:
        kind = "network" if pretrained != Normalization() else "range" if classes.dtype == "uint8" else "percentile"
    if kind == "network" and pretrained == Normalization():
        raise UserError(
            "config.data.normalize = 'network' is for pretrained weights that were trained with a normalization; there "
            "are none here: choose 'range', 'percentile' or 'standard'"
        )
    if values is not None and not np.isfinite(list(values.values())).all():
        raise UserError("config.data.root: a channel of the training images holds no value but NaN or nodata")
    if kind == "network" and pretrained.has_limits and not settings["value_range"]:  # the values that its weights know
        return pretrained
    low, high = _limits(kind, settings["value_range"], classes.dtype, values)
    mean, scale = (0.0,), (255.0,)
    if kind == "network":
        mean, scale = pretrained.mean, pretrained.scale
    elif kind == "standard":
        to_255 = 255 / (np.array(high) - low)
        mean = tuple(float(x) for x in (np.array(values["mean"]) - low) * to_255)
        deviation = np.array(values["deviation"]) * to_255
        scale = tuple(float(x) for x in np.where(deviation > 1e-3, deviation, 255))  # a channel may be constant
    fill = tuple(values["mean"]) if values is not None and classes.dtype == "float32" else (0.0,)
    return Normalization(mean, scale, low, high, fill)


def _limits(kind, value_range, dtype, values) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What becomes 0 and what becomes 1."""
    if value_range and dtype != "uint8":
        return tuple((float(value),) for value in value_range)
    if dtype == "uint8" and kind != "percentile":
        return tuple((value,) for value in FULL["uint8"])
    if kind == "range":
        low, high = ([value] for value in FULL[dtype]) if dtype in FULL else (values["min"], values["max"])
    else:
        low, high = values["low"], values["high"]
    spread = np.subtract(high, low)
    spread = np.where(spread > 0, spread, np.maximum(np.abs(low), 1) * 1e-6)  # of a channel that is all the same
    return tuple(low), tuple(float(x) for x in low + spread)


def check_values(image: np.ndarray, limits: Sequence[Sequence[float]], file) -> None:
    """Raises a `UserError` if the values of an image, or of a part of it, cannot be like those of the training.

    That is, if the median of a channel is further outside of what the training images held than that is wide: they may
    have been resized, which narrows it.

    Args:
      image: `[H, W, C]`, of a file that the error names.
      limits: the smallest and the largest value of each channel in the training images.
    """
    values = image[::8, ::8].reshape(-1, image.shape[-1]).astype(np.float64)
    values = values[~np.isnan(values).any(1)]
    if not len(values):
        return
    (low, high), middle = map(np.array, limits), np.median(values, axis=0)
    for channel in np.flatnonzero((middle < 2 * low - high) | (middle > 2 * high - low)):
        raise UserError(
            f"{file}: channel {channel} holds values around {middle[channel]:g}; in the images of the training "
            f"they were {low[channel]:g} to {high[channel]:g}: convert it as those were"
        )
