"""Images that occur twice: within a split, in more than one split, or nearly so in more than one split."""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unet_jax.evaluation import image_hash
from unet_jax.evaluation.inspection import Example

# Every image of a split is compared with all images of the others. If a fifth of so many is held out, that takes 50 s,
# far less than reading them; but for twice as many it takes four times as long.
MAX_COMPARED = 100_000
FLAT = 0.02  # of the median contrast: an image with less shows nothing that could be compared


class NearCopy(NamedTuple):
    """Two images of different splits that are nearly the same, perhaps flipped or turned."""

    first: Example
    second: Example
    distance: int  # bits in which their hashes differ


def same_images(good: Sequence[Example]) -> tuple[list[str], list[str]]:
    """Faults and notes of images that are equal byte for byte, but for images of one value.

    An image in two splits is a fault, because its score would measure memory, not generalisation; and so are two labels
    of the same image, one of which must be wrong.
    """
    same = collections.defaultdict(list)
    for example in good:
        if example.hashes.contrast:
            same[example.image_digest].append(example)
    faults, notes = [], []
    for found in same.values():
        if len({example.split for example in found}) > 1:
            faults.append(f"the same image is in more than one split: {_names(found)}")
        for _, group in itertools.groupby(found, lambda example: example.split):
            group = list(group)
            if len({example.label_digest for example in group}) > 1:
                faults.append(f"contradicting masks: the same image has different labels: {_names(group)}")
            elif len(group) > 1:
                notes.append(f"the same image with the same label: {_names(group)}")
    return faults, notes


def near_copies(good: Sequence[Example]) -> list[NearCopy]:
    """For each image that has near copies in an earlier split, the nearest of them; those equal byte for byte apart."""
    splits = collections.defaultdict(list)
    contrasts = [example.hashes.contrast for example in good]
    for example in good:
        if example.hashes.contrast > FLAT * np.median(contrasts):
            splits[example.split].append(example)
    found = []
    for first, second in itertools.combinations(splits.values(), 2):
        indices, distances = image_hash.nearest(
            np.array([example.hashes.turned[0] for example in second]),
            np.array([example.hashes.turned for example in first]),
        )
        for example, index, distance in zip(second, indices, distances, strict=True):
            other = first[index]
            if distance <= image_hash.MAX_DISTANCE and example.image_digest != other.image_digest:
                found.append(NearCopy(other, example, int(distance)))
    return sorted(found, key=lambda pair: pair.distance)


def _names(examples: Sequence[Example]) -> str:
    return ", ".join(example.name for example in examples)
