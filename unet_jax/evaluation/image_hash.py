"""Perceptual hashes: which images are copies of each other, though not byte for byte.

The hash of an image is 256 bits: which of its 16x16 lowest frequencies are above their median. In how many bits two
hashes differ, on carvana, CamVid, pets, DRIVE, nuclei and ISBI 2012:

- copies that were saved as JPEG of quality 50, halved, squeezed into a square, flipped or turned: up to 8 in 95 of 100
  cases, 14 at most;
- different images: 90 and more if their scenes differ; 62 for neighbouring slices of a stack; 46 for the same car,
  turned by a few degrees; 24 for different retinas; 16 for neighbouring frames of a video, one second apart.

With 64 bits some of the neighbours differ as little as copies do. Noise alone gives random bits, about 128 of them.
"""

from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

HASH_SIZE = 16  # frequencies each way
MAX_DISTANCE = 12  # bits in which the hashes of copies may differ: nearly all copies, and no neighbour
SMALL = 4 * HASH_SIZE  # pixels a side from which a hash is computed


class Hashes(NamedTuple):
    """What identifies copies of one image."""

    turned: np.ndarray  # of its 8 flips and quarter turns, uint64 `[8, 4]`; the first is the image as it is
    contrast: float  # between its dark and its bright pixels, in its own unit; 0 if all pixels are equal


def compute(image: np.ndarray) -> Hashes:
    """The hashes of an image `[h, w, C]` of any type and any number of channels; NaN are pixels without data."""
    grey, contrast = to_grey(image)
    # Resizing does not depend on the orientation, so it is done once for all of them.
    small = np.asarray(Image.fromarray(grey).resize((SMALL, SMALL), Image.Resampling.LANCZOS))
    turned = [np.rot90(view, turns) for view in (small, small[:, ::-1]) for turns in range(4)]
    bits = [imagehash.phash(Image.fromarray(np.ascontiguousarray(view)), HASH_SIZE).hash.ravel() for view in turned]
    return Hashes(np.packbits(bits, axis=1).view(np.uint64), contrast)


def to_grey(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of the channels of an image `[h, w, C]` as uint8 `[h, w]`, and its contrast.

    The 1st and the 99th percentile become 0 and 255; if they are equal, as in an image that is black but for a few
    points, the extremes do. NaN and infinite values become the mean.
    """
    grey = sum(channel.astype(np.float32) for channel in np.moveaxis(image, -1, 0)) / image.shape[-1]
    finite = np.isfinite(grey)
    step = max(1, min(grey.shape) // 256)  # percentiles of 2.4 million pixels would take longer than all the rest
    sample = grey[::step, ::step][finite[::step, ::step]]
    low, high = np.percentile(sample, (1, 99)) if sample.size else (0.0, 0.0)
    if low == high:
        low, high = grey.min(where=finite, initial=low), grey.max(where=finite, initial=high)
    stretched = ((grey - low) * (255 / max(high - low, 1e-30))).clip(0, 255)
    if not finite.all():
        stretched = np.where(finite, stretched, stretched[finite].mean() if finite.any() else 0)
    return stretched.astype(np.uint8), float(high - low)


def nearest(hashes: np.ndarray, turned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of n images the one of m others that it differs least from, in whatever orientation.

    Args:
      hashes: of the n images as they are, uint64 `[n, 4]`.
      turned: of all orientations of the m others, uint64 `[m, 8, 4]`.

    Returns:
      The index of the other image and the number of bits that differ, int `[n]` each.
    """
    words = np.ascontiguousarray(turned.reshape(-1, turned.shape[-1]).T)  # [4, m * 8]
    found = np.zeros((2, len(hashes)), int)
    for place, own in enumerate(hashes):  # 2 s for 20,000 images, a fifth of them held out
        distances = np.zeros(words.shape[1], np.uint16)
        for word, own_word in zip(words, own, strict=True):
            distances += np.bitwise_count(word ^ own_word)
        best = distances.argmin()
        found[:, place] = best // turned.shape[1], distances[best]
    return found[0], found[1]
