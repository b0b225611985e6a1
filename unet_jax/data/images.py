"""Reading and resizing image files with Pillow and tifffile alone: TensorFlow need not be installed.

A path may be any path object with `open`: in a folder, a zip archive or a bucket.
"""

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unet_jax.errors import UserError, check_choice

RESIZE = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp", ".webp", ".jp2")
LOSSY = (".jpg", ".jpeg", ".webp", ".jp2")  # which a mask must not be
# Of cameras, microscopes and scanners, beside those that Pillow knows: not to be passed over in silence.
_OTHER = (".arw", ".cr2", ".czi", ".dcm", ".dng", ".h5", ".heic", ".heif", ".lif", ".mha", ".mhd", ".mrc", ".nd2")
_OTHER += (".ndpi", ".nef", ".nii", ".npy", ".npz", ".nrrd", ".raw", ".svs")
_DOCUMENTS = (".eps", ".mpeg", ".mpg", ".ps")  # which Pillow opens as well
MAX_PIXELS = 500_000_000  # a file that claims more is treated as a decompression bomb
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this, and refuses above twice as many


class Pair(NamedTuple):
    """The files of one example."""

    id: str  # unique within the data set
    image: Any  # path
    mask: Any  # path


@contextlib.contextmanager
def _open(path) -> Iterator[Image.Image]:
    """An image that is not decoded yet; any error of Pillow becomes a `UserError` that names the file."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise UserError(f"{path}: not a readable image ({error})") from error


def _loses_bits(image: Image.Image) -> bool:
    """Whether Pillow would silently keep only the upper 8 of 16 bits."""
    return image.mode not in ("I;16", "I;16B") and any(";16" in str(tile) for tile in image.tile)


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


def is_other_format(file) -> bool:
    """Whether a file that is not one of `SUFFIXES` is likely an image all the same."""
    name = file.name.lower()
    suffix = "." + name.removesuffix(".gz").rpartition(".")[-1]
    is_opened = Image.registered_extensions().get(suffix) in Image.OPEN
    return not name.endswith(SUFFIXES) and (suffix in _OTHER or (is_opened and suffix not in _DOCUMENTS))


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


def read(path, mode: str) -> np.ndarray:
    """Reads an 8-bit image file as uint8.

    Args:
      mode: `RGB` or `L` to convert to `[h, w, 3]` or `[h, w]`; `grey` for an image that must have no colour, `[h, w]`;
        `red` for the red channel `[h, w]` as it is, or the indices of an image with a palette.

    Raises:
      UserError: the file is not a readable 8-bit image; names it.
    """
    with _open(path) as image:
        is_16_bit = _loses_bits(image) or image.mode.startswith("I;16")
        if is_16_bit or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            bits = " 16-bit" if is_16_bit else ""
            raise UserError(f"{path}: a{bits} {image.mode} image; 8-bit grey, RGB or RGBA is needed")
        if mode == "red":
            if image.mode == "P":  # the class ids are the indices, not the colours
                return np.asarray(image)
            return np.asarray(image.getchannel("R") if "R" in image.getbands() else image.convert("L"))
        if mode == "grey":
            rgb = np.asarray(image.convert("RGB"))
            if (rgb != rgb[..., :1]).any():
                raise UserError(f"{path}: a coloured image; 8-bit grey is needed, convert it")
            return rgb[..., 0]
        return np.asarray(image.convert(mode))


def read_any(path, indices: bool = False) -> np.ndarray:
    """Reads an image file of any supported kind as it is, without its alpha channel.

    Args:
      indices: whether to return the indices of an image with a palette rather than its colours.

    Returns:
      uint8 or uint16, `[h, w]` if the image is grey, `[h, w, 3]` if it is coloured.

    Raises:
      UserError: not a readable image of 8 or 16 bits, or one of several pages; names it.
    """
    with _open(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # phones write photos with previews as MPO
            raise UserError(f"{path} holds {pages} pages or frames: save each as a file of its own")
        if _loses_bits(image):
            if image.format == "TIFF":
                return _read_16_bit_tiff(path)
            raise UserError(f"{path}: a 16-bit {image.mode} image: save it with 8 bits, or as TIFF")
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: 32-bit values: save it with 8 or 16 bits")
        if image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.uint16)  # in the byte order of this machine
        if image.mode == "P" and indices:
            return np.asarray(image)
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _read_16_bit_tiff(path) -> np.ndarray:
    """A TIFF image of 16 bits and several channels, uint16 `[h, w, 3]`, without its alpha channel."""
    import tifffile

    try:
        with path.open("rb") as file:
            array = tifffile.imread(file)
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise UserError(f"{path}: not a readable TIFF image ({type(error).__name__}: {error})") from error
    if array.ndim == 3 and array.shape[0] in (3, 4) and array.shape[-1] not in (3, 4):
        array = np.moveaxis(array, 0, -1)  # planar: the channels are stored one after another
    if array.dtype != np.uint16 or array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise UserError(f"{path}: {array.dtype} values of shape {array.shape}; grey or RGB of 8 or 16 bits is needed")
    return array[..., :3]


def read_image(path, channels: int, value_range: Sequence[int]) -> np.ndarray:
    """An image file of any supported kind as the input of a network, uint8 `[h, w, channels]`; raises as `read_any`.

    Args:
      channels: 1 converts colours to grey, 3 grey to colours.
      value_range: the values (low, high) of a 16-bit image that become 0 and 255; empty for (0, 65535).
    """
    array = read_any(path)
    if array.dtype == np.uint16:
        low, high = value_range or (0, 65535)
        array = np.rint((array.astype(np.float32) - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8)
    if channels == 1 and array.ndim == 3:
        array = np.asarray(Image.fromarray(array).convert("L"))
    if array.ndim == 2:
        array = array[..., None]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], channels)))


class Header(NamedTuple):
    """What the header of an image file says."""

    is_grey: bool
    is_16_bit: bool
    orientation: int  # EXIF; 1 is upright or not given
    palette: np.ndarray | None  # uint8 [colours, 3]
    size: tuple[int, int]  # height and width


def read_header(path) -> Header:
    """Reads the header of an image file without decoding the image; a `UserError` names a file that is no image."""
    with _open(path) as image:
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode == "P" else None
        is_grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        is_16_bit = image.mode.startswith("I;16") or _loses_bits(image)
        return Header(is_grey, is_16_bit, image.getexif().get(0x0112, 1), palette, (image.height, image.width))


def check_same_size(image: np.ndarray, mask: np.ndarray, pair: Pair) -> None:
    """Raises a `UserError` that names both files if an image `[h, w, ...]` and its mask differ in size."""
    if image.shape[:2] == mask.shape[:2]:
        return
    orientation = read_header(pair.image).orientation
    hint = f" The EXIF data of the photo say it is rotated ({orientation}): rotate its pixels." * (orientation != 1)
    raise UserError(
        f"{pair.image} is {image.shape[1]}x{image.shape[0]} pixels but its mask {pair.mask} is "
        f"{mask.shape[1]}x{mask.shape[0]} (width x height).{hint}"
    )


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """A (height, width) times a factor, in whole pixels."""
    return tuple(max(1, round(n * scale)) for n in size)


def resize_image(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes an image uint8 `[h, w, C]`, C = 1 or 3, to uint8 `[*size, C]`.

    `method` is `bilinear` (antialiased when shrinking) or `nearest` (centre of each pixel, as in TensorFlow 2).
    """
    check_choice("config.data.resize", method, RESIZE)
    if image.shape[:2] == tuple(size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    # Pillow rounds to whole grey levels between the two passes of `bilinear`, and newer versions choose their order by
    # the sizes. Here the width always comes first, so that versions agree, and exported graphs, which resize as well.
    if method == "bilinear":
        picture = picture.resize((size[1], picture.height), RESIZE[method])
    return np.asarray(picture.resize((size[1], size[0]), RESIZE[method])).reshape(*size, image.shape[-1])


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a label uint8 `[h, w]` or `[h, w, K]` to `size` by the nearest pixel: classes never blend."""
    y, x = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, label.shape[:2], strict=True))
    return label[y[:, None], x[None, :]]
