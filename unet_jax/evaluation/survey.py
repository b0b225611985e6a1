"""What a recipe is read off: how many images there are, how large, and how large the things in them are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from unet_jax.data import images
from unet_jax.data.source import Classes, Source

SAMPLED = 100  # images whose labels are looked at, spread evenly

_NEIGHBOURS = np.ones((3, 3))  # pixels that touch at a corner belong together, as for `--mode=check`


class Survey(NamedTuple):
    """The training images at their own size, or, if they are scaled, at that."""

    images: int
    size: tuple[int, int]  # the median height and width
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each that was looked at
    channels: int
    dtype: str  # of the values: uint8, uint16 or float32
    # Of each class: its share of the labelled pixels; the mean width of its regions in pixels, 0 if there are none,
    # infinite if they fill whole images; and how many regions an image has, on average.
    shares: tuple[float, ...]
    widths: tuple[float, ...]
    regions: tuple[float, ...]


def conduct(source: Source) -> Survey:
    """Looks at up to `SAMPLED` of the images of a source.

    Raises:
      UserError: an image or a label cannot be read.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)).tolist()
    found = images.map_parallel(lambda index: _look(source, index), chosen, "Looking at images")
    sizes = tuple(size for size, _ in found)
    pixels, borders, regions = (np.sum([counts[row] for _, counts in found], 0) for row in range(3))
    return Survey(
        images=len(source),
        size=tuple(int(n) for n in np.median(sizes, 0)),
        sizes=sizes,
        channels=source.classes.channels,
        dtype=source.classes.dtype,
        shares=tuple((pixels / max(pixels.sum(), 1)).tolist()),
        widths=tuple(map(_width, pixels.tolist(), borders.tolist())),
        regions=tuple((regions / len(found)).tolist()),
    )


def _width(pixels: int, border: int) -> float:
    """The mean width of regions, of which so many pixels are at a border; infinite if they fill whole images."""
    return 2 * pixels / border if border else (math.inf if pixels else 0.0)


def _look(source: Source, index: int) -> tuple[tuple[int, int], np.ndarray]:
    """The size of an image, and of each class pixels, pixels at a border of its regions, and regions, `[3, K]`."""
    _, label = source[index]
    size = images.scaled_size(label.shape[:2], source.factors(index), source.ids[index])
    return size, np.array([_measure(mask) for mask in _masks(images.resize_label(label, size), source.classes)]).T


def _masks(label: np.ndarray, classes: Classes) -> Sequence[np.ndarray]:
    """Where each class is, bool `[K, h, w]`."""
    if classes.task == "multilabel":
        return np.moveaxis(label == 1, -1, 0)
    return [label == k for k in range(len(classes.names))]


def _measure(mask: np.ndarray) -> tuple[int, int, int]:
    """Pixels, those next to a pixel that is not in the mask, and regions. The border of the image is none."""
    inner = ndimage.binary_erosion(mask, border_value=1)
    pixels = int(mask.sum())
    return pixels, pixels - int(inner.sum()), ndimage.label(mask, _NEIGHBOURS)[1]
