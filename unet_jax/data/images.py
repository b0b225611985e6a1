"""Images as arrays, resized, and work on many files at once."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unet_jax.errors import UserError, check_choice

MAX_SIDE = 2**17  # pixels, of an image that was scaled
RESIZE = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


class Pair(NamedTuple):
    """The files of one example."""

    id: str  # unique within the data set
    image: Any  # path
    mask: Any  # path


def files_below(folder, ancestors: frozenset = frozenset()) -> list:
    """All files in a folder and its subfolders, in order. Follows links to folders; skips hidden files and folders.

    Raises:
      UserError: a folder cannot be read; names it.
    """
    real_path = os.path.realpath(folder)
    if real_path in ancestors:  # a cycle of links
        return []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    files = []
    for entry in entries:
        if not entry.name.startswith((".", "__MACOSX")):
            files += files_below(entry, ancestors | {real_path}) if entry.is_dir() else [entry]
    return files


def map_parallel(function: Callable, items: Sequence, title: str) -> list[Any]:
    """The results of `iterate_parallel`."""
    return list(iterate_parallel(function, items, title))


def iterate_parallel(function: Callable, items: Sequence, title: str) -> Iterator[Any]:
    """The results of `function` for all items, in order, computed in threads, with a progress bar called `title`.

    It holds no more of them than twice as many as there are threads.
    """
    import tqdm

    threads = os.cpu_count()
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(desc=title, total=len(items), leave=False, delay=1) as bar,
    ):
        pending: collections.deque = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == 2 * threads:
                    yield pending.popleft().result()
                    bar.update()
            while pending:
                yield pending.popleft().result()
                bar.update()
        finally:
            for future in pending:
                future.cancel()


def scaled_size(size: Sequence[int], factors: Sequence[float], name: str) -> tuple[int, int]:
    """A (height, width) times two factors, in whole pixels.

    Raises:
      UserError: nothing is left of it, or it is far larger than an image can be; names the image.
    """
    new = tuple(max(1, round(min(n * factor, MAX_SIDE + 1))) for n, factor in zip(size, factors, strict=True))
    if max(new) > MAX_SIDE or (max(new) == 1 < max(size)):
        raise UserError(
            f"{name}: of {size[1]}x{size[0]} pixels, and scaled to {new[1]}x{new[0]} or more: see config.data.scale, "
            "config.data.pixel_size and what its file says of its pixels"
        )
    return new


def resize_image(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes an image uint8, uint16 or float32 `[h, w, C]` to `[*size, C]` of the same type.

    `method` is `bilinear` (antialiased when shrinking) or `nearest` (centre of each pixel, as in TensorFlow 2).
    """
    check_choice("config.data.resize", method, RESIZE)
    if image.shape[:2] == tuple(size):
        return image
    if image.dtype != np.uint8 or image.shape[-1] not in (1, 3):  # Pillow knows neither: one channel after another
        deep = image if image.dtype == np.uint8 else image.astype(np.float32)
        resized = np.stack([_resize_channel(deep[..., c], size, method) for c in range(image.shape[-1])], -1)
        return (np.rint(resized) if image.dtype == np.uint16 else resized).astype(image.dtype)
    return _resize_picture(image[..., 0] if image.shape[-1] == 1 else image, size, method).reshape(*size, -1)


def _resize_channel(channel: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """The mean of the values that there are; NaN where more than half of the weight is on NaN."""
    missing = np.isnan(channel)
    if method == "nearest" or not missing.any():
        return _resize_picture(np.ascontiguousarray(channel), size, method)
    there = _resize_picture((~missing).astype(np.float32), size, method)
    summed = _resize_picture(np.where(missing, np.float32(0), channel), size, method)
    return np.where(there >= 0.5, summed / np.maximum(there, 0.5), np.float32(np.nan))


def _resize_picture(pixels: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    picture = Image.fromarray(pixels)
    # Pillow rounds to whole grey levels between the two passes of `bilinear`, and newer versions choose their order by
    # the sizes. Here the width always comes first, so that versions agree, and exported graphs, which resize as well.
    if method == "bilinear":
        picture = picture.resize((size[1], picture.height), RESIZE[method])
    return np.asarray(picture.resize((size[1], size[0]), RESIZE[method]))


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a label uint8 `[h, w]` or `[h, w, K]` to `size` by the nearest pixel: classes never blend."""
    y, x = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, label.shape[:2], strict=True))
    return label[y[:, None], x[None, :]]
