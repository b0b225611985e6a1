"""What values the images of a split hold: the fingerprint by which a network normalises them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from unet_jax.data import images

SHARES = {"low": 0.001, "median": 0.5, "high": 0.999}  # of the values that are below
SAMPLED = 2**22  # float pixels whose values are sorted, of all images together


def describe(read: Callable[[int], Mapping[str, np.ndarray]], count: int) -> dict[str, list[float]]:
    """Of each channel: `min`, `low` (0.1 % are below), `median`, `high` (99.9 %), `max`, `mean`, `deviation`.

    Exact for integers. The shares of floats are those of a grid of pixels in each image, and NaN does not count.

    Args:
      read: index -> an example with its `image` `[h, w, C]`.
      count: of the images.
    """
    if read(0)["image"].dtype.kind == "u":
        return _of_integers(images.iterate_parallel(lambda i: _count(read(i)["image"]), range(count), "Reading values"))
    sampled = max(64, SAMPLED // count)
    parts = images.iterate_parallel(lambda i: _sum(read(i)["image"], sampled), range(count), "Reading values")
    return _of_floats(parts)


def _count(image: np.ndarray) -> np.ndarray:
    """How often each value is in each channel, int64 `[C, values]`."""
    length = np.iinfo(image.dtype).max + 1
    return np.stack([np.bincount(channel, minlength=length) for channel in image.reshape(-1, image.shape[-1]).T])


def _of_integers(parts: Iterable[np.ndarray]) -> dict[str, list[float]]:
    counts = next(iter(parts))
    for part in parts:
        counts += part
    values, total = np.arange(counts.shape[1], dtype=np.float64), counts.sum(1)
    below = counts.cumsum(1) / total[:, None]
    held = [np.flatnonzero(channel) for channel in counts]
    mean = counts @ values / total
    deviation = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    shares = {name: [int(np.searchsorted(row, share)) for row in below] for name, share in SHARES.items()}
    return _named([h[0] for h in held], shares, [h[-1] for h in held], mean, deviation)


def _sum(image: np.ndarray, sampled: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Number, sum and sum of squares of the values; their limits; some pixels `[n, C]`, a copy that keeps no image."""
    pixels = image.reshape(-1, image.shape[-1])
    counted = np.isfinite(pixels)
    wide = np.where(counted, pixels, 0).astype(np.float64)
    limits = np.where(counted, pixels, np.inf).min(0), np.where(counted, pixels, -np.inf).max(0)
    every = max(1, len(pixels) // sampled)
    return np.stack([counted.sum(0), wide.sum(0), (wide**2).sum(0)]), *limits, pixels[every // 2 :: every].copy()


def _of_floats(parts: Iterable[tuple]) -> dict[str, list[float]]:
    sums, lows, highs, sampled = zip(*parts, strict=True)
    count, total, squares = sum(sums)
    count = np.maximum(count, 1)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    sample = np.concatenate(sampled)
    sample = np.where(np.isfinite(sample), sample, np.nan)
    shares = {name: np.nanquantile(sample, share, axis=0) for name, share in SHARES.items()}
    return _named(np.min(lows, 0), shares, np.max(highs, 0), mean, deviation)


def _named(low, shares: Mapping[str, Any], high, mean, deviation) -> dict[str, list[float]]:
    found = {"min": low, **shares, "max": high, "mean": mean, "deviation": deviation}
    return {name: [float(value) for value in values] for name, values in found.items()}
