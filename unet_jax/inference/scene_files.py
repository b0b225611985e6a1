"""What `--mode=predict` writes of a georeferenced image: GeoTIFF files, strip by strip; never all of it in memory."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from etils import epath

from unet_jax import data
from unet_jax.data import colors
from unet_jax.inference import forward, polygons, prediction_files, scenes

NODATA = 255  # the label of pixels without data, which is never a class
_BLOCK = 512  # pixels a side of the blocks of a file
_SETTINGS = dict(driver="GTiff", count=1, tiled=True, blockxsize=_BLOCK, blockysize=_BLOCK, compress="deflate")

Place = Callable[[str], epath.Path]  # suffix -> file


def write(
    place: Place,
    scene: scenes.Scene,
    bands: Iterable[tuple[slice, np.ndarray]],
    picture: np.ndarray,
    classes: data.Classes,
    threshold: float,
    probabilities: bool,
    vector: str,
) -> None:
    """Writes labels and, if wanted, probabilities and polygons; last the overlay, of a preview of the scene.

    Args:
      place: of its files.
      scene: the image.
      bands: rows and their probabilities float32 `[rows, W, K]`, from top to bottom; together all rows.
      picture: the preview, uint8 `[h, w, 1 or 3]`.
      classes: of the network.
      threshold: of the probability of a sigmoid.
      probabilities: whether to write them as well; 65535 is 1, and 0 is also where there are no data.
      vector: one of `polygons.FORMATS`.
    """
    label_suffixes, map_suffixes = prediction_files.suffixes(classes)
    values = _label_values(classes)
    place(".tif").parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        rasters = []
        for suffix, held in zip(label_suffixes, values, strict=True):
            raster = stack.enter_context(_created(place(f"{suffix}.tif"), scene, dtype="uint8", nodata=NODATA))
            raster.write_colormap(1, {value: classes.palette[k] for value, k in held.items()})
            raster.update_tags(**{f"CLASS_{value}": classes.names[k] for value, k in held.items()})
            raster.set_band_description(1, classes.names[held[1]] if classes.task == "multilabel" else "class")
            rasters.append(raster)
        if probabilities:
            for suffix, name in zip(map_suffixes, classes.names[-classes.num_outputs :], strict=True):
                raster = stack.enter_context(_created(place(f"{suffix}.tif"), scene, dtype="uint16", predictor=2))
                raster.set_band_description(1, f"probability of {name}")
                rasters.append(raster)
        for top, strip in _strips(_planes(scene, bands, classes.task, threshold, probabilities)):
            for raster, rows in zip(rasters, strip, strict=True):
                raster.write(rows, 1, window=((top, top + len(rows)), (0, raster.width)))

    if vector != "none":
        names = [{value: classes.names[k] for value, k in held.items() if value != 0} for held in values]
        layers = [(place(f"{suffix}.tif"), held) for suffix, held in zip(label_suffixes, names, strict=True)]
        target = place(f".{vector}")
        with _whole(target) as part:
            polygons.write(part, layers, target.stem)
    label = _read_label(place, classes, picture.shape[:2])
    prediction_files.save(colors.overlay(picture, label, classes), place(prediction_files.OVERLAY))


def shares(place: Place, classes: data.Classes) -> dict[str, float]:
    """The share of each class in the pixels with data, from the labels that `write` wrote."""
    rasterio, found = scenes.optional("rasterio"), {}
    for suffix, held in zip(prediction_files.suffixes(classes)[0], _label_values(classes), strict=True):
        counts = np.zeros(256, np.int64)
        with rasterio.open(place(f"{suffix}.tif")) as raster:
            for top in range(0, raster.height, _BLOCK):
                for row in raster.read(1, window=((top, min(top + _BLOCK, raster.height)), (0, raster.width))):
                    counts += np.bincount(row, minlength=256)
        total = max(counts.sum() - counts[NODATA], 1)
        found |= {classes.names[k]: float(counts[value] / total) for value, k in held.items()}
    return found


def _label_values(classes: data.Classes) -> list[dict[int, int]]:
    """Of each label file the values that stand for a class, and for which."""
    numbers = range(len(classes.names))
    return [{1: k} for k in numbers] if classes.task == "multilabel" else [{k: k for k in numbers}]


@contextlib.contextmanager
def _whole(file: epath.Path) -> Iterator[epath.Path]:
    """A hidden file to write to, which gets the name of `file` once it is whole."""
    part = file.with_name(f".{file.name}")
    part.unlink(missing_ok=True)  # of a prediction that was killed
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _created(file: epath.Path, scene: scenes.Scene, **settings) -> Iterator:
    """A GeoTIFF of one band with the size and the georeference of a scene, opened for writing."""
    rasterio, source = scenes.optional("rasterio"), scene.source
    settings |= dict(height=source.height, width=source.width, BIGTIFF="IF_SAFER", **_SETTINGS)
    has_transform = not source.transform.is_identity
    if has_transform or source.crs is not None:
        settings |= dict(crs=source.crs, transform=source.transform)
    with _whole(file) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # by control points alone
        with rasterio.open(part, "w", **settings) as raster:
            if not has_transform and source.gcps[0]:
                raster.gcps = source.gcps
            if not has_transform and source.rpcs:
                raster.rpcs = source.rpcs
            yield raster


def _planes(
    scene: scenes.Scene,
    bands: Iterable[tuple[slice, np.ndarray]],
    task: str,
    threshold: float,
    probabilities: bool,
) -> Iterator[list[np.ndarray]]:
    """What is written of each band of rows, `[rows, W]` of each file."""
    import tqdm

    with tqdm.tqdm(total=scene.shape[0], desc=scene.file.name, unit=" rows", leave=False, disable=None) as bar:
        for rows, band in bands:
            missing = scene.missing(rows)
            label = forward.to_label(band, task, threshold)
            label[missing] = NODATA
            planes = list(np.moveaxis(label, -1, 0)) if task == "multilabel" else [label]
            if probabilities:
                scaled = (np.where(missing, 0, np.rint(one * 65535)) for one in np.moveaxis(band, -1, 0))
                planes += [one.astype(np.uint16) for one in scaled]
            yield planes
            bar.update(len(band))


def _strips(pieces: Iterable[list[np.ndarray]]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The same rows in the height of a block, each with the first row, so that a block is compressed once."""
    top, held = 0, None
    for piece in pieces:
        held = piece if held is None else [np.concatenate(both) for both in zip(held, piece, strict=True)]
        count = len(held[0]) // _BLOCK * _BLOCK
        if count:
            yield top, [plane[:count] for plane in held]
            top, held = top + count, [plane[count:] for plane in held]
    if held is not None and len(held[0]):
        yield top, held


def _read_label(place: Place, classes: data.Classes, size: tuple[int, int]) -> np.ndarray:
    """The label of a preview of `size`, uint8 `[h, w]`, or `[h, w, K]` if multilabel."""
    rasterio, parts = scenes.optional("rasterio"), []
    for suffix in prediction_files.suffixes(classes)[0]:
        with rasterio.open(place(f"{suffix}.tif")) as raster:
            parts.append(raster.read(1, out_shape=size))
    return np.stack(parts, -1) if classes.task == "multilabel" else parts[0]
