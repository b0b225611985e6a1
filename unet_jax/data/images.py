"""Reading and resizing image files, by Pillow and tifffile alone: it works where TensorFlow is not installed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from unet_jax.errors import UserError, check_choice

RESIZE = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif")
LIMIT = 500_000_000  # pixels; a file that claims more is taken for a decompression bomb
Image.MAX_IMAGE_PIXELS = LIMIT // 2  # above it Pillow warns, above twice as many it refuses


@contextlib.contextmanager
def _open(path) -> Iterator[Image.Image]:
    """A picture, not yet decoded; whatever its file does wrong becomes a `UserError`."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # whatever damaged files make of it
        raise UserError(f"{path}: not a readable image ({error})") from error


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow would keep the upper 8 of 16 bits, and not say so."""
    return image.mode not in ("I;16", "I;16B") and any(";16" in str(tile) for tile in image.tile)


def files_below(folder, above: frozenset = frozenset()) -> list:
    """All files below a folder, in order; also behind links to folders, but not hidden ones.

    Args:
      folder: any path object of a folder.
      above: the folders that led here, so that a circle of links ends.

    Raises:
      UserError: a folder cannot be read; names it.
    """
    place = os.path.realpath(folder)
    if place in above:
        return []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    files = []
    for entry in entries:
        if not entry.name.startswith((".", "__MACOSX")):
            files += files_below(entry, above | {place}) if entry.is_dir() else [entry]
    return files


def read(path, mode: str) -> np.ndarray:
    """Reads an 8-bit image file as uint8.

    Args:
      path: a file, as any path object with `open` (of a folder, of a zip archive, of a bucket).
      mode: `RGB` or `L` to convert to `[h, w, 3]` or `[h, w]`; `grey` for an image without colour `[h, w]`; `red` for
        the red channel `[h, w]` as it is, or the indices of an image with a palette.

    Raises:
      UserError: the file is not a readable 8-bit image; names it.
    """
    with _open(path) as image:
        deep = _is_deep(image) or image.mode.startswith("I;16")
        if deep or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            raise UserError(
                f"{path}: a{' 16-bit' if deep else ''} {image.mode} image; 8-bit grey, RGB or RGBA is needed"
            )
        if mode == "red":
            if image.mode == "P":  # the ids are the indices, not the colours
                return np.asarray(image)
            return np.asarray(image.getchannel("R") if "R" in image.getbands() else image.convert("L"))
        if mode == "grey":
            rgb = np.asarray(image.convert("RGB"))
            if (rgb != rgb[..., :1]).any():
                raise UserError(f"{path}: a coloured image; 8-bit grey is needed, convert it")
            return rgb[..., 0]
        return np.asarray(image.convert(mode))


def read_any(path, indices: bool = False) -> np.ndarray:
    """Reads any image file as it is, without its alpha.

    Args:
      path: a file, as any path object with `open`.
      indices: whether an image with a palette gives its indices; otherwise its colours.

    Returns:
      uint8 or uint16, `[h, w]` where it is grey and `[h, w, 3]` where it has colours.

    Raises:
      UserError: not a readable image of 8 or 16 bits, or of more than one page; names it.
    """
    with _open(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # a photo with previews, as phones write
            raise UserError(f"{path} holds {pages} pages or frames: save each as a file of its own")
        if _is_deep(image) and image.format == "TIFF":
            return _read_deep(path)
        if _is_deep(image):
            raise UserError(f"{path}: a 16-bit {image.mode} image: save it with 8 bits, or as TIFF")
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: 32-bit values: save it with 8 or 16 bits")
        if image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.uint16)  # in the byte order of this machine
        if image.mode in ("1", "L", "LA") or (image.mode == "P" and indices):
            return np.asarray(image if image.mode == "P" else image.convert("L"))
        return np.asarray(image.convert("RGB"))


def _read_deep(path) -> np.ndarray:
    """A TIFF image of 16 bits and several channels, without its alpha."""
    import tifffile

    try:
        with path.open("rb") as file:
            array = tifffile.imread(file)
    except Exception as error:  # whatever damaged files make of it
        raise UserError(f"{path}: not a readable TIFF image ({type(error).__name__}: {error})") from error
    if array.ndim == 3 and array.shape[0] in (3, 4) and array.shape[-1] not in (3, 4):
        array = np.moveaxis(array, 0, -1)  # channels stored one after another
    if array.dtype != np.uint16 or array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise UserError(f"{path}: {array.dtype} values of shape {array.shape}; grey or RGB of 8 or 16 bits is needed")
    return array[..., :3]


def read_image(path, channels: int, value_range: Sequence[int]) -> np.ndarray:
    """Reads any image file as the network takes it.

    Args:
      path: a file, as any path object with `open`.
      channels: 1 turns colours into grey, 3 grey into colours.
      value_range: the values (low, high) of a 16-bit image that become 0 and 255; empty is all of 0..65535.

    Returns:
      uint8 `[h, w, channels]`.

    Raises:
      UserError: see `read_any`.
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


class Kind(NamedTuple):
    """What the head of an image file tells."""

    grey: bool
    deep: bool  # 16 bits
    orientation: int  # EXIF; 1 is upright, or none given
    palette: np.ndarray | None  # uint8 [colours, 3]


def kind(path) -> Kind:
    """Looks at an image file without decoding it.

    Raises:
      UserError: it is no image; names it.
    """
    with _open(path) as image:
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode == "P" else None
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        deep = image.mode.startswith("I;16") or _is_deep(image)
        return Kind(grey, deep, image.getexif().get(0x0112, 1), palette)


def resize_image(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes an image uint8 `[h, w, C]` to (height, width) `size`.

    Args:
      image: uint8 `[h, w, C]`, C = 1 or 3.
      size: height and width in pixels.
      method: `bilinear` (antialiased where it shrinks) or `nearest` (centre of each pixel, as in TensorFlow 2).
    """
    check_choice("config.data.resize", method, RESIZE)
    if image.shape[:2] == tuple(size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((size[1], size[0]), RESIZE[method]))
    return resized.reshape(*size, image.shape[-1])


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a label uint8 `[h, w]` or `[h, w, K]` to `size` by the nearest pixel: classes never blend."""
    rows, columns = ((np.arange(n) + 0.5) * old / n for n, old in zip(size, label.shape[:2], strict=True))
    return label[rows.astype(int)[:, None], columns.astype(int)[None, :]]
