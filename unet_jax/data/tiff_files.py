"""TIFF files with any number of channels and any depth, read by tifffile and imagecodecs."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from unet_jax.errors import UserError

_NODATA = 42113  # the tag in which GDAL writes the value of pixels without data


class Layout(NamedTuple):
    """How a file holds its image."""

    size: tuple[int, int]  # height and width, turned
    channels: int  # without alpha
    dtype: str  # of the values, uint8, uint16 or float32; pixels without data aside, of what `read` returns
    has_nodata: bool  # whether the file declares a value for pixels without data
    alpha: int  # number of alpha channels, as the file declares them
    is_common: bool  # grey or coloured, with 8 bits at most: Pillow reads it too, palettes and CMYK included
    has_palette: bool


def is_tiff(path) -> bool:
    """Whether a file begins as a TIFF file does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_layout(path, pages: str) -> Layout:
    """Reads the layout of a file, not its pixels; the arguments and errors of `read`."""
    with _open(path, pages) as series:
        page, dtype = series.keyframe, np.dtype(series.dtype)
        alpha, kind = len(_alpha(page)), page.photometric.name
        sides = dict(zip(series.axes, series.shape, strict=True))
        channels = math.prod(n for axis, n in sides.items() if axis not in "YX")
        if "S" in sides:
            channels = channels // sides["S"] * (sides["S"] - alpha)
        needed = {"MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1, "RGB": 3, "YCBCR": 3, "SEPARATED": 4}  # CMYK the last
        is_common = dtype.itemsize == 1 and dtype.kind in "bu" and len(series.pages) == 1
        is_common &= channels == needed.get(kind) and (alpha == 0 or (alpha == 1 and kind == "RGB"))
        if is_common:
            channels = 1 if kind.startswith("MINIS") else 3
        name = "uint8" if is_common else dtype.name if dtype.name in ("uint8", "uint16") else "float32"
        size = (sides["X"], sides["Y"]) if is_turned(page) else (sides["Y"], sides["X"])
        return Layout(size, channels, name, _nodata(page) is not None, alpha, is_common, kind == "PALETTE")


def read(path, pages: str, nodata: bool = True) -> np.ndarray:
    """The image of a file, `[h, w, C]` without alpha, turned as the file says, as Pillow does.

    uint8 and uint16 stay as they are; all other values become float32.

    Args:
      pages: `channels` to read several pages, or slices, as channels; `` if a file must hold one image.
      nodata: whether an image that declares a value for pixels without data becomes float32, and these NaN: of floats
        each such value, of integers, which may just hold it, the pixels where all channels do.

    Raises:
      UserError: not a readable TIFF file, or one of several images.
    """
    with _open(path, pages) as series:
        page, array = series.keyframe, series.asarray()
        if _alpha(page):
            array = np.delete(array, _alpha(page), series.axes.index("S"))
        others = [axis for axis in series.axes if axis not in "YX"]
        array = array.transpose([series.axes.index(axis) for axis in ("Y", "X", *others)])
        array = _turn(array.reshape(*array.shape[:2], -1), _orientation(page))
        missing = _find_missing(array, _nodata(page)) if nodata and _nodata(page) is not None else None
        if page.photometric.name == "MINISWHITE" and array.dtype.kind == "u":
            array = np.array(2**page.bitspersample - 1, array.dtype) - array
        if missing is not None:
            return np.where(missing, np.float32(np.nan), array.astype(np.float32))
        return np.ascontiguousarray(array if array.dtype.name in ("uint8", "uint16") else array.astype(np.float32))


def _find_missing(array: np.ndarray, nodata: float) -> np.ndarray:
    """Where an image `[h, w, C]` has no data, bool, of that shape or `[h, w, 1]`."""
    with np.errstate(over="ignore"):  # as a smaller type than the one it was meant for, it may be infinite
        same = array == array.dtype.type(nodata)
    return same if array.dtype.kind == "f" else same.all(-1, keepdims=True)


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """An image `[h, w, C]` as tag 274 says it is to be seen."""
    turns = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
    transposed, upside_down, mirrored = turns.get(orientation, (0, 0, 0))
    array = array.swapaxes(0, 1) if transposed else array
    array = array[::-1] if upside_down else array
    return array[:, ::-1] if mirrored else array


def is_turned(page) -> bool:
    """Whether what a `tifffile.TiffPage` stores as height is seen as width."""
    return _orientation(page) >= 5


def _orientation(page) -> int:
    tag = page.tags.get("Orientation")
    return 1 if tag is None else int(tag.value)


@contextlib.contextmanager
def _open(path, pages: str) -> Iterator[Any]:
    """The one image of a file, a `tifffile.TiffPageSeries`; overviews and masks that go with it do not count."""
    import tifffile

    try:
        with path.open("rb") as file, tifffile.TiffFile(file) as tiff:
            found = [s for s in tiff.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)]
            axes = found[0].axes
            own = set(axes) <= set("YXSC") or pages == "channels"  # else slices or times, each an image of its own
            if len(found) > 1 or not own:
                count = sum(
                    math.prod(n for a, n in zip(s.axes, s.shape, strict=True) if a not in "YXSC") for s in found
                )
                raise UserError(
                    f"{path} holds {count} pages or frames: save each as a file of its own"
                    + ", or set config.data.pages='channels' if they are the channels of one image" * (len(found) == 1)
                )
            if any(page is None for page in found[0].pages):
                raise UserError(f"{path} holds only a part of its image: the files that hold the others are missing")
            yield found[0]
    except UserError:
        raise
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise UserError(f"{path}: not a readable TIFF image ({type(error).__name__}: {error})") from error


def _alpha(page) -> list[int]:
    """Which samples of a pixel the file declares to be alpha."""
    first = page.samplesperpixel - len(page.extrasamples)
    return [first + i for i, kind in enumerate(page.extrasamples) if kind.name in ("ASSOCALPHA", "UNASSALPHA")]


def _nodata(page) -> float | None:
    """The value of pixels without data, if the file declares one that its type can hold."""
    tag = page.tags.get(_NODATA)
    if tag is None:
        return None
    try:
        value = float(str(tag.value).strip("\0 "))
    except ValueError:
        return None
    dtype = np.dtype(page.dtype)
    if dtype.kind == "f":
        return value
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    return value if limits and limits.min <= value <= limits.max and value.is_integer() else None  # nor is NaN
