"""Resizing as the training did, and back: at which size an image is predicted, and its probabilities at its own size.

Training resizes images with Pillow, see `data.images.resize_image`. Its `bilinear` filter is a triangle that spans two
pixels of the coarser grid. `triangle` has its weights as integers, so that exported graphs agree with Pillow.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

SCALES = ("train", "fit", "native")
INTERPOLATION = ("bilinear", "nearest")  # of probabilities
ROWS = 256  # of probabilities at the size of the image, at a time

Size = Sequence[int]  # height and width
Bands = Iterable[tuple[slice, np.ndarray]]  # rows and their probabilities float32 [rows, W, K], from top to bottom


def predicted_size(scale: str, size: Size, train_size: Size, source_sizes: Sequence[Size] | None) -> tuple[int, int]:
    """The height and width that an image is resized to before it is predicted.

    Args:
      scale: one of `SCALES`. `train` resizes to `train_size` as training did, but along each axis never shrinks further
        than training shrank its largest image, nor enlarges further than it enlarged its smallest, or at all if it
        enlarged none. `fit` resizes all images to `train_size`; `native` resizes none.
      size: of the image.
      train_size: `config.data.size`.
      source_sizes: the smallest and the largest training image before they were resized; if None, `train` is `fit`.
    """
    if scale == "native":
        return tuple(size)
    if scale == "fit" or source_sizes is None:
        return tuple(train_size)
    smallest, largest = source_sizes
    # A small image is more often all of a scene than a cut of it, so it is not shrunk like the large ones of training.
    closest = np.clip(size, np.minimum(smallest, train_size), largest).tolist()
    return tuple(max(1, round(n * to / near)) for n, to, near in zip(size, train_size, closest, strict=True))


def excess(size: Size, new: Size, train_size: Size, source_sizes: Sequence[Size] | None) -> float:
    """How many times further an image of `size` is shrunk to `new` than any training image was, along the worse axis.

    1 if the training images are not known.
    """
    if source_sizes is None:
        return 1.0
    strongest = np.maximum(np.divide(source_sizes[1], train_size), 1)
    return float((np.divide(size, new) / strongest).max())


def triangle(i, j, old, new, xp=np):
    """The weight of pixel j for pixel i when `old` pixels become `new`: an integer, to be divided by its sum over j.

    Args:
      i, j: integer arrays that broadcast.
      old, new: lengths; symbolic ones need `xp = jnp`.
      xp: `np` or `jnp`.
    """
    return xp.maximum(2 * xp.maximum(old, new) - abs((2 * j + 1) * new - (2 * i + 1) * old), 0)


def resize_bands(bands: Bands, old: Size, new: Size, interpolation: str) -> Iterator[tuple[slice, np.ndarray]]:
    """Resizes probabilities of the size `old` to `new` as Pillow would, holding no more than a few rows of them.

    Args:
      bands: rows and their probabilities float32 `[rows, old[1], K]`, from top to bottom; together all rows.
      old, new: height and width.
      interpolation: one of `INTERPOLATION`.

    Yields:
      rows and their probabilities float32 `[rows, new[1], K]`, from top to bottom.
    """
    if tuple(old) == tuple(new):
        yield from bands
        return
    (length, width), (new_length, new_width) = old, new
    first, last = _taps(np.arange(new_length), length, new_length, interpolation)
    held, top, done = None, 0, 0  # the rows from `top` on that are still needed; how many new rows are finished
    for rows, band in bands:
        held = band if held is None else np.concatenate([held, band])
        ready = int(np.searchsorted(last, rows.stop))
        for start in range(done, ready, ROWS):
            i = np.arange(start, min(start + ROWS, ready))
            taken = held[first[i[0]] - top : last[i[-1]] + 1 - top]
            if interpolation == "nearest":
                columns = _taps(np.arange(new_width), width, new_width, interpolation)[0]
                block = taken[first[i] - first[i[0]]][:, columns]
            else:
                weights = triangle(i[:, None], np.arange(first[i[0]], last[i[-1]] + 1), length, new_length)
                weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
                block = _widen(np.tensordot(weights, taken, 1), new_width)
            yield slice(start, start + len(i)), block
        done = ready
        needed = min(first[done], rows.stop) if done < new_length else rows.stop
        held, top = held[needed - top :], needed


def _taps(i: np.ndarray, old: int, new: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last of `old` pixels that count for pixel i of `new`."""
    if interpolation == "nearest":
        return (nearest := (2 * i + 1) * old // (2 * new)), nearest
    center, reach = (2 * i + 1) * old - new, 2 * max(old, new)  # in halves of a pixel, times `new`
    return ((center - reach) // (2 * new) + 1).clip(0), (-(-(center + reach) // (2 * new)) - 1).clip(max=old - 1)


def _widen(block: np.ndarray, width: int) -> np.ndarray:
    """`[rows, w, K]` -> `[rows, width, K]`."""
    channels = (np.ascontiguousarray(block[..., k]) for k in range(block.shape[-1]))
    size = width, len(block)
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in channels], -1)
