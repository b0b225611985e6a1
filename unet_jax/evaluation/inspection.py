"""What `--mode=check` finds in a single example: pixels and objects of each class, and what tells copies apart."""

import hashlib
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from unet_jax.data import images
from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError
from unet_jax.evaluation import image_hash

_NEIGHBOURS = np.ones((3, 3))  # pixels that touch at a corner belong together


class Objects(NamedTuple):
    """The connected components of each class in a label; none of the background. All int64 `[K]`."""

    count: np.ndarray
    smallest: np.ndarray  # pixels; 0 if there is none
    lost: np.ndarray  # those of which no pixel is left at the size of the training
    largest_lost: np.ndarray  # pixels, before the resize; 0 if none is lost


class Example(NamedTuple):
    """One example; if it has a fault, nothing else is known of it."""

    split: str
    index: int  # in the split
    name: str  # of the split and the example
    fault: str = ""  # what is wrong with it; empty if nothing is
    size: tuple[int, int] = (0, 0)  # height and width of the image
    trained_size: tuple[int, int] = (0, 0)  # of what training resizes it to, or cuts its windows from
    pixels: np.ndarray = np.zeros(0)  # of each class, and ignored ones, int64 `[K + 1]`
    seen: np.ndarray = np.zeros(0)  # the same at the size of the training
    objects: Objects | None = None
    image_digest: bytes = b""
    label_digest: bytes = b""
    hashes: image_hash.Hashes | None = None


def inspect(source: Source, split: str, index: int, config) -> Example:
    """Reads one example of a split; `config` is `config.data`."""
    name = f"{split} {source.ids[index]}"
    try:
        image, label = source[index]
        size = tuple(config.size) or images.scaled_size(label.shape[:2], source.factors(index), source.ids[index])
    except UserError as error:
        return Example(split, index, name, str(error))
    classes = source.classes
    pixels = count_pixels(label, classes)
    if classes.task != "multilabel" and pixels[-1] == label.size:
        return Example(split, index, name, f"{name}: every pixel of its label is ignored")
    return Example(
        split=split,
        index=index,
        name=name,
        size=image.shape[:2],
        trained_size=size,
        pixels=pixels,
        seen=count_pixels(images.resize_label(label, size), classes),
        objects=find_objects(label, size, classes),
        image_digest=_digest(image),
        label_digest=_digest(label),
        hashes=image_hash.compute(image),
    )


def count_pixels(label: np.ndarray, classes: Classes) -> np.ndarray:
    """Pixels of each class in a label `[h, w]` or `[h, w, K]`, and ignored ones (if multilabel 0), int64 `[K + 1]`."""
    if classes.task == "multilabel":
        return np.append((label == 1).sum((0, 1)), 0)
    values = np.bincount(label.ravel(), minlength=256)
    return np.append(values[: len(classes.names)], values[classes.ignore_label])


def find_objects(label: np.ndarray, size: tuple[int, int], classes: Classes) -> Objects:
    """The objects in a label `[h, w]` or `[h, w, K]`, and what is left of them in `images.resize_label(label, size)`.

    An object is lost if none of its pixels is among those that `resize_label` picks. What it picks depends on their
    place alone, so it is given the numbers of the objects instead of their class.
    """
    found = np.zeros((4, len(classes.names)), np.int64)
    is_multilabel = classes.task == "multilabel"
    for k in foreground(classes):
        mask = label[..., k] == 1 if is_multilabel else label == k
        if not mask.any():
            continue
        numbers, count = ndimage.label(mask, _NEIGHBOURS)
        pixels = np.bincount(numbers.ravel())[1:]
        is_lost = np.bincount(images.resize_label(numbers, size).ravel(), minlength=count + 1)[1:] == 0
        found[:, k] = count, pixels.min(), is_lost.sum(), pixels[is_lost].max(initial=0)
    return Objects(*found)


def foreground(classes: Classes) -> range:
    """The classes whose objects count: all but the background, class 0, which overlapping masks do not have."""
    return range(0 if classes.task == "multilabel" else 1, len(classes.names))


def _digest(array: np.ndarray) -> bytes:
    kind = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(kind + np.ascontiguousarray(array).tobytes()).digest()
