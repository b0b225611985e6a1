"""Georeferenced TIFF files, of any size: read by rasterio (the extra `geo`), and only the part that is needed."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from math import ceil, prod

import numpy as np
from etils import epath

from unet_jax.data import reading
from unet_jax.errors import UserError, import_extra
from unet_jax.inference.trained import Trained

# GeoTIFF: pixel scale, tie points, transformation and geographic keys; and the rational polynomials of a camera.
_TAGS = (33550, 33922, 34264, 34735, 50844)
_PREVIEW = 2048  # pixels a side, at most
_CACHE = 512 * 2**20  # bytes of decoded blocks: tiles overlap, and blocks reach over several tiles

optional = functools.partial(import_extra, extra="geo")


def is_georeferenced(file: epath.Path) -> bool:
    """Whether a file is a TIFF with a georeference: tags of GeoTIFF, or a world file beside it. Needs no rasterio."""
    import tifffile

    suffix = file.suffix.lower()
    if suffix not in (".tif", ".tiff"):
        return False
    try:
        with file.open("rb") as opened, tifffile.TiffFile(opened) as tiff:
            found = any(tag in tiff.pages[0].tags for tag in _TAGS)
    except Exception:  # a damaged file, which the reader will name
        return False
    return found or any(file.with_suffix(world).exists() for world in (".tfw", f"{suffix}w", ".wld"))


class Scene:
    """An image `[H, W, C]` as a network takes it, in a file: `scene[rows, columns]` reads these alone.

    Attributes:
      file: its path.
      source: the opened `rasterio` data set.
      shape, ndim, dtype: as of an array.
    """

    ndim = 3

    def __init__(self, file: epath.Path, source, network: Trained):
        self.file, self.source, self._network = file, source, network
        self.shape = (source.height, source.width, network.classes.channels)
        self.dtype = np.dtype(network.classes.dtype)
        interpretation = [color.name for color in source.colorinterp]
        self._bands = [band for band, color in enumerate(interpretation, 1) if color != "alpha"]
        layout = source.tags(ns="IMAGE_STRUCTURE") | source.tags(1, ns="IMAGE_STRUCTURE")
        # Whether rasterio reads the same values as training, which turns all of these into grey levels or colours.
        is_common = int(layout.get("NBITS", 8)) >= 8 and "MINISWHITE" not in layout
        self._is_common = is_common and not {"palette", "cyan"} & {*interpretation} and not source.subdatasets

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        return self._read(key)[0]

    def missing(self, rows: slice) -> np.ndarray:
        """Where whole rows have no data, bool `[rows, W]`: NaN, or what is declared; of integers in all channels."""
        is_float = np.dtype(self.source.dtypes[0]).kind == "f"
        found = np.full((rows.stop - rows.start, self.shape[1]), not is_float)
        if self.source.nodata is None and not is_float:
            return ~found
        for band in self._bands:  # one at a time: all would be large
            of_band = self._is_missing(self._read_values([band], (rows, slice(None))))[0]
            found = found | of_band if is_float else found & of_band
        return found

    @functools.cached_property
    def preview(self) -> tuple[np.ndarray, np.ndarray]:
        """Every n-th pixel, at most 2048 a side: the image `[h, w, C]`, and where it has no data, bool `[h, w]`."""
        step = ceil(max(self.shape[:2]) / _PREVIEW)
        if not self._is_common:
            image = self._decoded[::step, ::step]
            return image, np.zeros(image.shape[:2], bool)
        return self._read(shape=tuple(ceil(n / step) for n in self.shape[:2]))

    @functools.cached_property
    def _decoded(self) -> np.ndarray:
        """All of the image, as training reads it."""
        return self._network.read_image(self.file)

    def _read(self, key=None, shape=None) -> tuple[np.ndarray, np.ndarray]:
        values = self._read_values(self._bands, key, shape)
        missing = self._is_missing(values)
        if values.dtype.kind != "f":  # see `tiff_files.read`
            missing = np.broadcast_to(missing.all(0), missing.shape)
        array = np.moveaxis(values, 0, -1)
        if array.dtype.name not in ("uint8", "uint16"):
            array = array.astype(np.float32)
        if self.dtype == np.float32:
            array = np.where(np.moveaxis(missing, 0, -1), np.float32(np.nan), array.astype(np.float32))
        return self._network.as_input(array, self.file), missing.any(0)

    def _read_values(self, bands: Sequence[int], key=None, shape=None) -> np.ndarray:
        """The values `[bands, h, w]` of a window (rows, columns), by default of all, resampled to `shape`."""
        rasterio = optional("rasterio")
        window = None
        if key is not None:
            (top, bottom, _), (left, right, _) = (part.indices(n) for part, n in zip(key, self.shape[:2], strict=True))
            window = ((top, bottom), (left, right))
        size = shape and (len(bands), *shape)
        try:
            return self.source.read(bands, window=window, out_shape=size)
        except rasterio.errors.RasterioError as error:
            raise UserError(f"{self.file}: not a readable image ({error})") from error

    def _is_missing(self, values: np.ndarray) -> np.ndarray:
        """Whether values are NaN, or those that the file declares to be none."""
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        nodata = self.source.nodata
        if nodata is not None:
            missing |= values == (values.dtype.type(nodata) if values.dtype.kind == "f" else nodata)
        return missing

    def for_prediction(self, scale: str, factors: tuple[float, float] | None):
        """What `Trained.predict_bands` is given: the scene itself, or all of it in memory if it must be resized first.

        `scale` and `factors` are those that it is given as well.

        Raises:
          UserError: it is not like the images of the training: of other channels, of another depth, or of other values
            altogether; or it must be resized, and is too large for that.
        """
        if not self._is_common:
            return self._decoded
        preview, missing = self.preview
        if not missing.all():
            self._network.check_values(preview[~missing][None], self.file)
        size = self.shape[:2]
        new = self._network.predicted_size(size, scale, factors)
        if new == size != self._network.size:
            return self
        if prod(size) > reading.MAX_PIXELS:
            raise UserError(
                f"{self.file}: {size[1]}x{size[0]} pixels, to be resized to {new[1]}x{new[0]}, but no more than "
                f"{reading.MAX_PIXELS:,} pixels can be. Choose --scale=native, which resizes nothing and reads piece by"
                " piece, or cut or resize the file"
            )
        return self[:, :]


@contextlib.contextmanager
def opened(file: epath.Path, network: Trained) -> Iterator[Scene]:
    """A scene as `network` takes it.

    Raises:
      UserError: it cannot be read, or rasterio is not installed.
    """
    rasterio = optional("rasterio")
    with contextlib.ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # by control points alone
                source = stack.enter_context(rasterio.open(file))
                scene = Scene(file, source, network)
        except Exception as error:  # also a path that is not UTF-8
            raise UserError(f"{file}: rasterio cannot read it ({error})") from error
        yield scene
