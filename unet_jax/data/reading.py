"""Reading image files with Pillow, tifffile and imagecodecs alone: TensorFlow need not be installed.

A path may be any path object with `open`: in a folder, a zip archive or a bucket.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from unet_jax.data import tiff_files
from unet_jax.errors import UserError

ARRAYS = (".npy", ".npz")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp", ".webp", ".jp2", *ARRAYS)
LOSSY = (".jpg", ".jpeg", ".webp", ".jp2")  # which a mask must not be
# Of cameras, microscopes and scanners, beside those that Pillow knows: not to be passed over in silence.
_OTHER = (".arw", ".cr2", ".czi", ".dcm", ".dng", ".h5", ".heic", ".heif", ".lif", ".mha", ".mhd", ".mrc", ".nd2")
_OTHER += (".ndpi", ".nef", ".nii", ".nrrd", ".raw", ".svs")
_DOCUMENTS = (".eps", ".mpeg", ".mpg", ".ps")  # which Pillow opens as well
# A file that claims more pixels is taken for a decompression bomb; what is no number sets no other limit.
MAX_PIXELS = int(_limit) if (_limit := os.environ.get("UNET_JAX_MAX_PIXELS", "")).isdecimal() else 500_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which warns below ours


@contextlib.contextmanager
def _open(path) -> Iterator[Image.Image]:
    """An image that is not decoded yet; any error of Pillow becomes a `UserError` that names the file."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            _check_pixels(path, image.size[::-1])
            yield image
    except UserError:
        raise
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise UserError(f"{path}: not a readable image ({error})") from error


def _check_pixels(path, size: Sequence[int]) -> None:
    """Raises a `UserError` if a file claims more than `MAX_PIXELS`; `size` is (height, width)."""
    height, width = size
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{path}: {width}x{height} pixels are more than {MAX_PIXELS}. If the file is what it should be, set "
            f"UNET_JAX_MAX_PIXELS={height * width} in the environment, or cut it into smaller ones"
        )


def _loses_bits(image: Image.Image) -> bool:
    """Whether Pillow would silently keep only the upper 8 of 16 bits."""
    if image.mode in ("I;16", "I;16B"):
        return False
    if image.format != "JPEG2000":
        return any(";16" in str(tile) for tile in image.tile)
    image.fp.seek(0)
    _, _, header = image.fp.read(1024).partition(b"ihdr")  # height, width, channels, then the bits of a value less one
    return len(header) > 10 and 8 <= header[10] & 0x7F < 0x7F


def is_other_format(file) -> bool:
    """Whether a file that is not one of `SUFFIXES` is likely an image all the same."""
    name = file.name.lower()
    suffix = "." + name.removesuffix(".gz").rpartition(".")[-1]
    is_opened = Image.registered_extensions().get(suffix) in Image.OPEN
    return not name.endswith(SUFFIXES) and (suffix in _OTHER or (is_opened and suffix not in _DOCUMENTS))


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


def read_any(path, indices: bool = False, orientation: str = "as_stored") -> np.ndarray:
    """Reads a grey or coloured image file as it is, without its alpha channel.

    Args:
      indices: whether to return the indices of an image with a palette rather than its colours.
      orientation: `upright` turns the image as its EXIF data say, `as_stored` does not.

    Returns:
      uint8 or uint16, `[h, w]` if the image is grey, `[h, w, 3]` if it is coloured.

    Raises:
      UserError: not a readable image of 8 or 16 bits, or one of several pages; names it.
    """
    if path.name.lower().endswith(ARRAYS):
        array = _read_array(path)
        if array.shape[-1] not in (1, 3) or not (array == array.astype(np.uint16)).all():
            raise UserError(f"{path}: a mask must hold whole numbers from 0 to 65535, [height, width]")
        return array[..., 0].astype(np.uint16) if array.shape[-1] == 1 else array.astype(np.uint16)
    with _open(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format == "TIFF":
            tiff_files.read_layout(path, "")  # an error, unless the others are overviews of the first
        elif pages > 1 and image.format != "MPO":  # phones write photos with previews as MPO
            raise UserError(f"{path} holds {pages} pages or frames: save each as a file of its own")
        if _loses_bits(image):
            return _read_16_bits(path, image.format)
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: 32-bit values: save it with 8 or 16 bits")
        if orientation == "upright" and image.format != "TIFF":  # which Pillow turns anyway
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.uint16)  # in the byte order of this machine
        if image.mode == "P" and indices:
            return np.asarray(image)
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _read_16_bits(path, kind: str) -> np.ndarray:
    """An image of 16 bits that Pillow would read with 8: uint16 `[h, w]` or `[h, w, 3]`, without its alpha channel."""
    if kind == "TIFF":
        array = tiff_files.read(path, "")
    else:
        import imagecodecs

        try:
            array = imagecodecs.imread(path.read_bytes())
        except Exception as error:  # damaged files raise all kinds of exceptions
            raise UserError(f"{path}: not a readable image ({error})") from error
        array = array[..., : {2: 1, 4: 3}.get(array.shape[-1], 3)] if array.ndim == 3 else array
    if array.dtype != np.uint16 or array.shape[2:] not in ((), (1,), (3,)):
        raise UserError(f"{path}: {array.dtype} values of shape {array.shape}; grey or RGB of 8 or 16 bits is needed")
    return array[..., 0] if array.shape[2:] == (1,) else array


def read_channels(path, pages: str = "", orientation: str = "as_stored", nodata: bool = True) -> np.ndarray:
    """Reads an image file with all its channels, uint8, uint16 or float32 `[h, w, C]`.

    A channel is left out only if the file declares it to be alpha. See `tiff_files.read` for what becomes float32; an
    array (`.npy`, or the only one of an `.npz`) is `[h, w]` or `[h, w, C]`.

    Args:
      pages, nodata: of a TIFF file, see `tiff_files.read`.
      orientation: as of `read_any`.

    Raises:
      UserError: not a readable image, or one of several pages; names it.
    """
    if path.name.lower().endswith(ARRAYS):
        return _read_array(path)
    layout = _tiff_layout(path, pages)
    if layout is not None and (not layout.is_common or (nodata and layout.has_nodata)):
        return tiff_files.read(path, pages, nodata)
    try:
        array = read_any(path, orientation=orientation)
    except UserError:
        if layout is None or layout.has_palette:
            raise
        return tiff_files.read(path, pages, nodata)  # compressed as Pillow does not know
    return np.atleast_3d(array)


def _tiff_layout(path, pages: str) -> tiff_files.Layout | None:
    """The layout of a TIFF file; None of another."""
    if not path.name.lower().endswith((".tif", ".tiff")) or not tiff_files.is_tiff(path):
        return None
    layout = tiff_files.read_layout(path, pages)
    _check_pixels(path, layout.size)
    return layout


def _read_array(path) -> np.ndarray:
    """An image `[h, w, C]` from a file of NumPy."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise UserError(f"{path}: not a readable array ({error})") from error
    if len(arrays) != 1 or arrays[0].ndim not in (2, 3) or arrays[0].dtype.kind not in "buif" or not arrays[0].size:
        shapes = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
        raise UserError(f"{path} holds {shapes or 'nothing'}; one array [height, width] or [height, width, channels]")
    array = arrays[0] if arrays[0].ndim == 3 else arrays[0][..., None]
    return array if array.dtype.name in ("uint8", "uint16") else array.astype(np.float32)


def read_image(path, settings) -> np.ndarray:
    """An image file as the input of a network, `[h, w, C]`; NaN, of floats alone, are pixels without data.

    Args:
      settings: `config.data`, whose `channels`, `dtype`, `value_range`, `pages` and `orientation` count.

    Raises:
      UserError: as `read_channels`, or an image of other channels or another depth; names it.
    """
    array = read_channels(path, settings.pages, settings.orientation, settings.dtype == "float32")
    return as_input(array, path, settings.channels, settings.dtype or "uint8", settings.value_range)


def as_input(array: np.ndarray, path, channels: int, dtype: str, value_range: Sequence[float] = ()) -> np.ndarray:
    """An image `[h, w, C]` as a network for so many `channels` of a `dtype` is given it, `[h, w, channels]`.

    Grey becomes colours, and colours grey. Integers become float32 as they are. 16 bits become 8 only by a
    `value_range`, the values that become 0 and 255.

    Raises:
      UserError: other channels, or another depth; names the file.
    """
    held = array.dtype.name
    if held == "uint16" and dtype == "uint8" and value_range:
        low, high = value_range
        array = np.rint((array.astype(np.float32) - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8)
    elif held != dtype and dtype != "float32":
        bits = {"uint8": "8-bit", "uint16": "16-bit", "float32": "32-bit float"}
        remedy = ", or set config.data.value_range to those that become 0 and 255" * (held == "uint16")
        raise UserError(
            f"{path}: {bits[held]} values, where {bits[dtype]} ones are needed, as most images of the training have: "
            f"convert it{remedy}"
        )
    array = array.astype(dtype, copy=False)
    found = array.shape[-1]
    if {found, channels} == {1, 3}:
        if found == 1:
            array = array.repeat(3, -1)
        elif dtype == "uint8":
            array = np.asarray(Image.fromarray(array).convert("L"))[..., None]
        else:  # by the weights of Pillow
            grey = array @ np.array([[0.299], [0.587], [0.114]], np.float32)
            array = (np.rint(grey) if dtype == "uint16" else grey).astype(dtype)
    elif found != channels:
        raise UserError(f"{path} has {found} channel(s), not {channels} (config.data.channels)")
    return np.ascontiguousarray(array)


class Header(NamedTuple):
    """What the header of an image file says."""

    channels: int  # without alpha
    dtype: str  # of its values: uint8, uint16 or float32
    has_nodata: bool  # whether it declares a value for pixels without data, as which it is read as float32
    has_alpha: bool
    orientation: int  # EXIF; 1 is upright or not given
    palette: np.ndarray | None  # uint8 [colours, 3]
    size: tuple[int, int]  # height and width as stored

    def upright_size(self) -> tuple[int, int]:
        """Height and width of the image once it is turned."""
        return self.size[::-1] if self.orientation in (5, 6, 7, 8) else self.size


def read_header(path, pages: str = "") -> Header:
    """Reads the header of an image file without decoding the image; a `UserError` names a file that is no image.

    `pages` as in `read_channels`.
    """
    if path.name.lower().endswith(ARRAYS):
        array = _read_array(path)
        return Header(array.shape[-1], array.dtype.name, False, False, 1, None, array.shape[:2])
    layout = _tiff_layout(path, pages)
    if layout is not None and not layout.has_palette:
        has_alpha = layout.alpha > 0
        return Header(layout.channels, layout.dtype, layout.has_nodata, has_alpha, 1, None, layout.size)
    with _open(path) as image:
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode == "P" else None
        is_grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I") or "LA;16" in str(image.tile)
        is_16_bit = image.mode.startswith("I;16") or _loses_bits(image)
        has_alpha = image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info
        size = image.height, image.width
        orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)  # Pillow turns a TIFF image
        channels, dtype = 1 if is_grey else 3, "uint16" if is_16_bit else "uint8"
        return Header(channels, dtype, False, has_alpha, orientation, palette, size)
