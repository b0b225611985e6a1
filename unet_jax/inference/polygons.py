"""Labels of georeferenced images as polygons, in a GeoPackage or a GeoJSON file."""

import collections
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.errors import UserError
from unet_jax.inference import scenes

FORMATS = ("none", "gpkg", "geojson")
_ROWS = 1024  # of a label, at a time
# Cylindrical, for the whole earth: pixels along longitude and latitude stay rectangles, so that their areas are exact.
_EQUAL_AREA = "EPSG:6933"


def check(scene: scenes.Scene, vector: str) -> None:
    """Raises a `UserError` if the georeference of a scene does not give what one of `FORMATS` needs."""
    if vector != "none" and scene.source.transform.is_identity:
        raise UserError(
            f"{scene.file} has no transform from pixels to a map, which --vector={vector} needs (control points and "
            "rational polynomials are none): rectify it, as by gdalwarp, or leave out --vector"
        )
    if vector == "geojson" and scene.source.crs is None:
        raise UserError(
            f"{scene.file} does not say in which coordinate reference system (CRS) it is, and GeoJSON holds longitudes "
            "and latitudes: assign one, as by gdal_edit -a_srs, or choose --vector=gpkg"
        )


def write(file: epath.Path, labels: Sequence[tuple[epath.Path, Mapping[int, str]]], layer: str) -> None:
    """Writes a polygon for each connected region (by edges, not corners) of a class.

    Columns: `class`, its name, and `area`, in square units of the map, as square metres; or, if its CRS is geographic
    (degrees), `area_m2`, in square metres of the equal-area projection EPSG:6933. A GeoPackage has the CRS of the
    label, GeoJSON longitude and latitude (WGS 84), as RFC 7946 has it.

    Args:
      file: `.gpkg` or `.geojson`; must not exist.
      labels: GeoTIFF files, and the class of each value that becomes polygons.
      layer: its name.
    """
    pandas = scenes.optional("pandas")
    frames = (frame for label, names in labels for frame in _frames(label, names))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")  # nor has the image one
        settings = dict(engine="pyogrio", geometry_type="Polygon", layer=layer)
        if file.suffix == ".geojson":  # to which nothing can be appended
            frame = pandas.concat(frames, ignore_index=True)
            frame.to_file(os.fspath(file), driver="GeoJSON", RFC7946="YES", **settings)
        else:
            for frame in frames:
                frame.to_file(os.fspath(file), driver="GPKG", mode="a" if file.exists() else "w", **settings)


def _frames(file: epath.Path, names: Mapping[int, str]) -> Iterator[Any]:
    """The polygons of a label, as tables; what is cut by the border of a strip comes last, put together again."""
    rasterio, features, shapely = map(scenes.optional, ("rasterio", "rasterio.features", "shapely"))
    cut: dict[int, list] = collections.defaultdict(list)
    with rasterio.open(file) as raster:
        for top in range(0, raster.height, _ROWS):
            bottom = min(top + _ROWS, raster.height)
            label = raster.read(1, window=((top, bottom), (0, raster.width)))
            shapes = list(features.shapes(label, np.isin(label, list(names)), connectivity=4))
            values = np.array([value for _, value in shapes], int)
            pieces = np.array([shapely.geometry.shape(shape) for shape, _ in shapes], object)
            pieces = shapely.transform(pieces, lambda xy, top=top: xy + (0, top))
            _, low, _, high = shapely.bounds(pieces).reshape(-1, 4).T
            is_cut = ((low == top) & (top > 0)) | ((high == bottom) & (bottom < raster.height))
            for value, piece in zip(values[is_cut].tolist(), pieces[is_cut], strict=True):
                cut[value].append(piece)
            yield _frame(raster, names, values[~is_cut], pieces[~is_cut])
        for value, pieces in cut.items():
            # Still in pixels, where the union of edges is exact. It leaves a corner wherever the border of a strip was.
            regions = shapely.get_parts(shapely.union_all(pieces))
            regions = shapely.simplify(shapely.normalize(regions), 0)
            yield _frame(raster, names, np.full(len(regions), value), regions)


def _frame(raster, names: Mapping[int, str], values: np.ndarray, regions: np.ndarray):
    """A table of polygons, given in pixels of `raster`, and their classes, given as values of it."""
    geopandas, shapely = scenes.optional("geopandas"), scenes.optional("shapely")
    a, b, c, d, e, f = raster.transform[:6]
    on_map = shapely.transform(regions, lambda xy: xy @ np.array([[a, d], [b, e]]) + (c, f))
    classes = np.array([names[value] for value in values.tolist()], object)
    frame = geopandas.GeoDataFrame({"class": classes}, geometry=on_map, crs=raster.crs)
    if raster.crs is not None and raster.crs.is_geographic:
        area = {"area_m2": frame.to_crs(_EQUAL_AREA).area}
    else:
        area = {"area": shapely.area(regions) * abs(raster.transform.determinant)}
    return frame.assign(**area)
