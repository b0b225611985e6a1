"""What values the images of a split hold: the fingerprint by which a network normalises them."""

from collections.abc import Callable, Mapping
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
    parts = images.map_parallel(lambda i: _part(read(i)["image"], count), range(count), "Reading values")
    if parts[0][0] == "counts":
        return _of_counts(sum(part for _, part in parts))
    return _of_floats([part for _, part in parts])


def _part(image: np.ndarray, count: int) -> tuple[str, Any]:
    pixels = image.reshape(-1, image.shape[-1])
    if image.dtype.kind == "u":
        length = np.iinfo(image.dtype).max + 1
        return "counts", np.stack([np.bincount(channel, minlength=length) for channel in pixels.T])
    wide = pixels.astype(np.float64)
    counted = np.isfinite(wide)
    wide = np.where(counted, wide, 0)
    sums = np.stack([counted.sum(0), wide.sum(0), (wide**2).sum(0)])
    limits = np.where(counted, pixels, np.inf).min(0), np.where(counted, pixels, -np.inf).max(0)
    every = max(1, len(pixels) // max(64, SAMPLED // count))
    return "floats", (sums, *limits, pixels[every // 2 :: every])


def _of_counts(counts: np.ndarray) -> dict[str, list[float]]:
    """`counts` int `[C, values]`."""
    values, total = np.arange(counts.shape[1], dtype=np.float64), counts.sum(1)
    below = counts.cumsum(1) / total[:, None]
    held = [np.flatnonzero(channel) for channel in counts]
    mean = counts @ values / total
    deviation = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    shares = {name: [int(np.searchsorted(row, share)) for row in below] for name, share in SHARES.items()}
    return _named([h[0] for h in held], shares, [h[-1] for h in held], mean, deviation)


def _of_floats(parts: list) -> dict[str, list[float]]:
    count, total, squares = sum(sums for sums, *_ in parts)
    count = np.maximum(count, 1)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    sample = np.concatenate([pixels for *_, pixels in parts])
    sample = np.where(np.isfinite(sample), sample, np.nan)
    shares = {name: np.nanquantile(sample, share, axis=0) for name, share in SHARES.items()}
    low, high = np.min([part[1] for part in parts], axis=0), np.max([part[2] for part in parts], axis=0)
    return _named(low, shares, high, mean, deviation)


def _named(low, shares: Mapping[str, Any], high, mean, deviation) -> dict[str, list[float]]:
    found = {"min": low, **shares, "max": high, "mean": mean, "deviation": deviation}
    return {name: [float(value) for value in values] for name, values in found.items()}
