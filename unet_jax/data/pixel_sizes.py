"""How large the pixels of an image are, as its file says: of GeoTIFF, OME-TIFF and ImageJ's TIFF files."""

import math

from unet_jax.data import tiff_files
from unet_jax.errors import UserError

_PIXEL_SCALE, _TRANSFORMATION = 33550, 34264  # tags of GeoTIFF
_MICROMETRES = {"nm": 1e-3, "um": 1, "µm": 1, "μm": 1, "\\u00b5m": 1, "micron": 1, "microns": 1, "mm": 1e3}
_MICROMETRES |= {"cm": 1e4, "m": 1e6, "inch": 25400}


def read(path) -> tuple[float, float]:
    """Height and width of a pixel: in units of its map for a GeoTIFF file, else in micrometres.

    The resolution that any TIFF, PNG or JPEG file may give for printing does not count: it is seldom true of the things
    in the image.

    Raises:
      UserError: the file does not say it, or not in a unit of length; names it.
    """
    import tifffile

    found, is_turned = None, False
    if tiff_files.is_tiff(path):
        try:
            with path.open("rb") as file, tifffile.TiffFile(file) as tiff:
                found, is_turned = _of_map(tiff) or _of_microscope(tiff), tiff_files.is_turned(tiff.pages[0])
        except Exception as error:  # damaged files raise all kinds of exceptions
            raise UserError(f"{path}: not a readable TIFF image ({type(error).__name__}: {error})") from error
    if found is None or not all(0 < n < math.inf for n in found):
        raise UserError(
            f"{path} does not say how large its pixels are, as GeoTIFF, OME-TIFF and ImageJ's TIFF files can: "
            "config.data.pixel_size cannot be reached"
        )
    return found[::-1] if is_turned else found


def factors(settings, pixel_size: tuple[float, float] | None) -> tuple[float, float]:
    """What height and width of an image at its own size are multiplied by, to be as training sees it.

    Args:
      settings: `config.data`, whose `scale` and `pixel_size` count.
      pixel_size: of the image, as `read` returns it; needed if `config.data.pixel_size` is set.
    """
    if not settings.pixel_size:
        return settings.scale, settings.scale
    return pixel_size[0] / settings.pixel_size, pixel_size[1] / settings.pixel_size


def describe(settings) -> str:
    """At which size images are that are not resized to one, in words."""
    if settings.pixel_size:
        return f"scaled to pixels of {settings.pixel_size:g}"
    return "at their own size" if settings.scale == 1 else f"scaled by {settings.scale:g}"


def _of_map(tiff) -> tuple[float, float] | None:
    """What a GeoTIFF file says, in units of its map."""
    tags = tiff.pages[0].tags
    if _PIXEL_SCALE in tags:
        width, height, *_ = tags[_PIXEL_SCALE].value
        return height, width
    if _TRANSFORMATION in tags:  # of columns and rows to x and y: a 4 x 4 matrix, row by row
        a, b, _, _, d, e, *_ = tags[_TRANSFORMATION].value
        return math.hypot(b, e), math.hypot(a, d)
    return None


def _of_microscope(tiff) -> tuple[float, float] | None:
    """What an OME-TIFF file or one of ImageJ says, in micrometres."""
    import tifffile

    if tiff.ome_metadata:
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        sides = [(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit", "µm")) for a in "YX"]
    elif tiff.imagej_metadata:
        tags, unit = tiff.pages[0].tags, tiff.imagej_metadata.get("unit", "")
        rates = [tags[name].value if name in tags else None for name in ("YResolution", "XResolution")]
        sides = [(rate and rate[0] and rate[1] / rate[0], unit) for rate in rates]
    else:
        return None
    if not all(size and str(unit).lower() in _MICROMETRES for size, unit in sides):
        return None
    height, width = (float(size) * _MICROMETRES[str(unit).lower()] for size, unit in sides)
    return height, width
