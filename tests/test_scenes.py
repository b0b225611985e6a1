"""`--mode=predict` of georeferenced images: GeoTIFF in, GeoTIFF and polygons out."""

import dataclasses
import json
import os
import sys

import geopandas
import helpers
import numpy as np
import pytest
import rasterio
import shapely
import tiny
from affine import Affine
from helpers import read_image, save_image
from PIL import Image
from rasterio.control import GroundControlPoint

import unet_jax
from unet_jax.data import colors, reading
from unet_jax.errors import UserError
from unet_jax.inference import forward, polygons, predict, scene_files, scenes

RNG = np.random.default_rng(0)
MAP = dict(crs="EPSG:32633", transform=Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000))
DEGREES = dict(crs="EPSG:4326", transform=Affine(0.01, 0, 15, 0, -0.01, 45))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The work directory of a network for grey images; initial weights predict a pattern as well as others."""
    return helpers.save_untrained(tmp_path_factory.mktemp("untrained") / "run", tiny.get_config())


def save_scene(array, path, **settings):
    """Writes a GeoTIFF, `[H, W]` or `[H, W, C]`, on `MAP` unless set otherwise, and returns the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    planes = np.moveaxis(np.atleast_3d(array), -1, 0)
    shape = dict(zip(("count", "height", "width"), planes.shape, strict=True), dtype=array.dtype)
    with rasterio.open(path, "w", driver="GTiff", **shape, **{**MAP, **settings}) as file:
        file.write(planes)
    return array


def read_scene(path):
    with rasterio.open(path) as file:
        return file.read(1)


def as_png(array, path, folder):
    """The probabilities of the same pixels as a plain file."""
    save_image(array, folder / "plain.png")
    return unet_jax.load(path).predict_image(folder / "plain.png", "native")


def test_a_label_has_the_georeference_of_its_image_and_the_pixels_of_a_plain_one(untrained, tmp_path, monkeypatch):
    pixels = RNG.integers(0, 256, (600, 130, 4), np.uint8)
    save_scene(pixels, tmp_path / "in/a/x.tif", photometric="RGB", alpha="YES")
    read, windows = scenes.Scene.__getitem__, []

    def recorded(scene, key):
        part = read(scene, key)
        windows.append(part.shape)
        return part

    monkeypatch.setattr(scenes.Scene, "__getitem__", recorded)
    output = tmp_path / "out/a"
    predict.predict_files(untrained, str(tmp_path / "in"), tmp_path / "out", scale="native", probabilities="png")
    assert len(windows) > 40 and max(windows) <= (48, 48, 1)

    probability, classes = as_png(pixels[..., :3], untrained, tmp_path), unet_jax.load(untrained).classes
    expected = forward.to_label(probability, classes.task)
    assert len(np.unique(expected)) > 1
    with rasterio.open(output / "x.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)
        assert file.crs == MAP["crs"] and file.transform == MAP["transform"] and file.nodata == 255
        assert file.dtypes == ("uint8",) and file.block_shapes == [(512, 512)]
        assert file.compression.name == "deflate" and file.descriptions == ("class",)
        assert [file.colormap(1)[k][:3] for k in range(7)] == list(classes.palette)
        assert file.tags()["CLASS_0"] == "background" and file.tags()["CLASS_6"] == "plus"
    with rasterio.open(output / "x_probability_circle.tif") as file:
        assert file.crs == MAP["crs"] and file.transform == MAP["transform"] and file.dtypes == ("uint16",)
        np.testing.assert_array_equal(file.read(1), np.rint(probability[..., 2] * 65535))
    names = [f"x_probability_{name}.tif" for name in classes.names]
    assert {file.name for file in output.iterdir()} == {*names, "x.tif", "x_overlay.jpg"}
    made = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert made["images"][str(tmp_path / "in/a/x.tif")] == {
        "size": [600, 130],
        "predicted_at": [600, 130],
        "in_tiles": True,
    }
    shares = made["shares"][str(tmp_path / "in/a/x.tif")]
    assert shares == pytest.approx({name: (expected == k).mean() for k, name in enumerate(classes.names)})
    assert read_image(output / "x_overlay.jpg").shape == (600, 130, 3)


def test_pixels_without_data_have_no_class(untrained, tmp_path):
    pixels = RNG.integers(0, 64, (100, 70), np.uint8)
    save_scene(pixels, tmp_path / "x.tif", nodata=7)
    predict.predict_files(untrained, str(tmp_path / "x.tif"), tmp_path / "out", scale="native", probabilities="npy")
    probability, missing = as_png(pixels, untrained, tmp_path), pixels == 7
    expected = np.where(missing, 255, forward.to_label(probability, "multiclass"))
    np.testing.assert_array_equal(read_scene(tmp_path / "out/x.tif"), expected)
    plus = np.where(missing, 0, np.rint(probability[..., 6] * 65535))
    np.testing.assert_array_equal(read_scene(tmp_path / "out/x_probability_plus.tif"), plus)
    shares = json.loads((tmp_path / "out/predictions.json").read_text())["shares"]
    assert sum(shares[str(tmp_path / "x.tif")].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "dtype, channels, settings",
    [
        ("uint8", 3, dict(compress="zstd", tiled=True, blockxsize=32, blockysize=32)),
        ("uint8", 2, dict(nodata=3, photometric="MINISBLACK", alpha="NO")),
        ("uint16", 5, dict(interleave="band", compress="lzw", predictor=2)),
        ("int16", 4, dict(nodata=-5, photometric="MINISBLACK", alpha="NO")),
        ("float32", 2, dict(nodata=-3.4028234663852886e38)),
        ("float64", 1, dict(nodata=float("nan"))),
    ],
)
def test_windows_hold_what_training_reads(untrained, tmp_path, dtype, channels, settings):
    array = RNG.integers(-40 if dtype[0] in "if" else 0, 200, (60, 50, channels)).astype(dtype)
    if dtype[0] == "f":
        array[5:9, 6:20, -1], array[20:30, :9, 0] = np.nan, settings["nodata"]
    elif "nodata" in settings:
        array[20:30, :9] = settings["nodata"]  # of integers, all channels
    save_scene(array, tmp_path / "x.tif", **settings)
    network = unet_jax.load(untrained)
    depth = "float32" if "nodata" in settings else dtype
    network = dataclasses.replace(network, classes=dataclasses.replace(network.classes, channels=channels, dtype=depth))
    expected = network.read_image(tmp_path / "x.tif")
    with scenes.opened(tmp_path / "x.tif", network) as scene:
        assert (scene.shape, scene.ndim, scene.dtype) == (expected.shape, 3, expected.dtype)
        found = scene[10:40, 3:50]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected[10:40, 3:50])
        missing = np.isnan(expected[5:55]).any(-1) if depth == "float32" else np.zeros((50, 50), bool)
        np.testing.assert_array_equal(scene.missing(slice(5, 55)), missing)
        assert missing.any() == ("nodata" in settings)
        np.testing.assert_array_equal(scene.preview[0], expected)


def test_what_rasterio_reads_otherwise_is_read_as_training_reads_it(untrained, tmp_path):
    indices = RNG.integers(0, 2, (60, 50), np.uint8)
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", count=1, height=60, width=50, dtype="uint8", **MAP
    ) as file:
        file.write_colormap(1, {0: (250, 250, 250), 1: (90, 9, 200)})
        file.write(indices, 1)
    predict.predict_files(untrained, str(tmp_path / "x.tif"), tmp_path / "out", scale="native")
    palette = np.array([[250, 250, 250], [90, 9, 200]], np.uint8)
    expected = forward.to_label(as_png(palette[indices], untrained, tmp_path), "multiclass")
    np.testing.assert_array_equal(read_scene(tmp_path / "out/x.tif"), expected)
    grey = np.array(Image.fromarray(palette[indices]).convert("L"))[..., None]
    shown = colors.overlay(grey, expected, unet_jax.load(untrained).classes)
    assert abs(read_image(tmp_path / "out/x_overlay.jpg").astype(float) - shown).mean() < 20  # as JPEG


def test_a_scene_that_must_be_resized_is_read_whole(untrained, tmp_path, monkeypatch):
    pixels = save_scene(RNG.integers(0, 256, (100, 70), np.uint8), tmp_path / "in/x.tif")
    predict.predict_files(untrained, str(tmp_path / "in"), tmp_path / "out", scale="fit")
    save_image(pixels, tmp_path / "plain.png")
    expected = unet_jax.load(untrained).predict_image(tmp_path / "plain.png", "fit")
    np.testing.assert_array_equal(read_scene(tmp_path / "out/x.tif"), expected.argmax(-1))
    monkeypatch.setattr(reading, "MAX_PIXELS", 6000)
    predict.predict_files(untrained, str(tmp_path / "in"), tmp_path / "native", scale="native")
    with pytest.raises(UserError, match="x.tif: 70x100 pixels, to be resized to 48x48, but no more than 6,000 pixels"):
        predict.predict_files(untrained, str(tmp_path / "in"), tmp_path / "fit", scale="fit")


def test_a_prediction_that_was_stopped_goes_on(untrained, tmp_path, monkeypatch, capsys):
    for k in range(3):
        save_scene(RNG.integers(0, 256, (100, 70), np.uint8), tmp_path / f"in/{k}.tif")
    arguments, options = (untrained, str(tmp_path / "in")), dict(scale="native", vector="geojson")
    predict.predict_files(*arguments, tmp_path / "whole", **options)
    to_label, calls = forward.to_label, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 5:  # within the second image
            raise KeyboardInterrupt
        return to_label(*args)

    monkeypatch.setattr(forward, "to_label", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict.predict_files(*arguments, tmp_path / "out", **options)
    begun = {file.name for file in (tmp_path / "out").iterdir()}
    assert begun == {"0.tif", "0.geojson", "0_overlay.jpg", "predictions.json"}
    (tmp_path / "out/.1.tif").write_bytes(b"II*\0")  # as if it had been killed
    monkeypatch.setattr(forward, "to_label", to_label)
    with pytest.raises(UserError, match="with other settings: vector 'geojson', now None"):
        predict.predict_files(*arguments, tmp_path / "out", scale="native")
    predict.predict_files(*arguments, tmp_path / "out", **options)
    assert "1 already predicted by the run that was stopped" in capsys.readouterr().out
    files = sorted((tmp_path / "whole").iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (tmp_path / "out").iterdir())
    for file in files:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_overlapping_masks_are_written_one_file_each(tmp_path):
    config = tiny.get_config()
    config.data.variant = "multilabel"
    path = helpers.save_untrained(tmp_path / "run", config)
    pixels = save_scene(RNG.integers(1, 256, (60, 50), np.uint8), tmp_path / "x.tif", nodata=0)
    probability = as_png(pixels, path, tmp_path)
    threshold = float(np.median(probability[..., 1]))
    options = dict(scale="native", threshold=threshold, vector="gpkg")
    predict.predict_files(path, str(tmp_path / "x.tif"), tmp_path / "out", **options)
    expected = probability > threshold
    with rasterio.open(tmp_path / "out/x_circle.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected[..., 1])
        assert file.tags()["CLASS_1"] == "circle" and file.colormap(1)[1][:3] == (60, 180, 75)
    areas = geopandas.read_file(tmp_path / "out/x.gpkg").groupby("class").area.sum()
    names = unet_jax.load(path).classes.names
    assert dict(areas) == {name: expected[..., k].sum() / 4 for k, name in enumerate(names) if expected[..., k].any()}


def test_ground_control_points_are_kept(untrained, tmp_path):
    corners = [(0, 0, 15, 46), (0, 50, 16, 46), (60, 0, 15, 45), (60, 50, 16, 45.1)]
    points = [GroundControlPoint(*corner, id=str(k)) for k, corner in enumerate(corners)]
    pixels = RNG.integers(0, 256, (60, 50), np.uint8)
    save_scene(pixels, tmp_path / "x.tif", crs="EPSG:4326", transform=None, gcps=points)
    predict.predict_files(untrained, str(tmp_path / "x.tif"), tmp_path / "out", scale="native")
    with rasterio.open(tmp_path / "out/x.tif") as file:
        found, crs = file.gcps
        assert crs == "EPSG:4326" and [(p.row, p.col, p.x, p.y) for p in found] == corners
    with pytest.raises(UserError, match="x.tif has no transform from pixels to a map, which --vector=gpkg needs"):
        predict.predict_files(untrained, str(tmp_path / "x.tif"), tmp_path / "none", scale="native", vector="gpkg")


# 1: a frame that crosses all strips, with a hole in which 2 is; 2: also two pixels that touch at a corner.
LABEL = np.zeros((30, 20), np.uint8)
LABEL[2:28, 3:17] = 1
LABEL[4:26, 5:15] = 0
LABEL[7:17, 6:9] = 2
LABEL[7, 12], LABEL[8, 13] = 2, 2
LABEL[29, 19] = 255
AREAS = {"cell": [26 * 14 - 22 * 10], "wall": [1, 1, 30]}


def vectorized(tmp_path, suffix, **settings):
    label, file = tmp_path / "label.tif", tmp_path / f"polygons.{suffix}"
    save_scene(LABEL, label, **settings)
    polygons.write(file, [(label, {1: "cell", 2: "wall"})], "x")
    return file, geopandas.read_file(file)


@pytest.mark.parametrize("rows", [1, 4, 8, 1024])
def test_polygons_do_not_depend_on_the_strips(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(polygons, "_ROWS", rows)
    file, found = vectorized(tmp_path, "gpkg")
    assert found.crs == "EPSG:32633" and list(found.columns) == ["class", "area", "geometry"]
    assert geopandas.list_layers(file).name.tolist() == ["x"]
    areas = {name: sorted(group.area.tolist()) for name, group in found.groupby("class")}
    assert areas == {name: [n / 4 for n in counts] for name, counts in AREAS.items()}
    np.testing.assert_array_equal(found["area"], found.geometry.area)
    corner = lambda x, y: (500_000 + x / 2, 5_000_000 - y / 2)
    box = lambda left, top, right, bottom: shapely.box(*corner(left, bottom), *corner(right, top))
    (cell,) = found.geometry[found["class"] == "cell"]
    assert cell.equals(box(3, 2, 17, 28) - box(5, 4, 15, 26)) and shapely.get_num_coordinates(cell) == 10
    assert found.geometry[found["area"] == 7.5].item().equals(box(6, 7, 9, 17))


def test_geojson_is_in_longitude_and_latitude(tmp_path, monkeypatch):
    monkeypatch.setattr(polygons, "_ROWS", 8)
    file, found = vectorized(tmp_path, "geojson")
    assert "crs" not in json.loads(file.read_text())
    assert found.crs == "EPSG:4326" and sorted(found["area"]) == [0.25, 0.25, 7.5, 36]
    west, south, east, north = found.total_bounds
    assert 15 < west < east < 15.001 and 45.15 < south < north < 45.16
    cell = found.geometry[found["class"] == "cell"].item()
    assert cell.exterior.is_ccw and not cell.interiors[0].is_ccw  # as RFC 7946 wants
    assert found.to_crs(32633).area.sum() == pytest.approx(44, rel=0.05)  # of its seven decimals


def test_areas_in_degrees_are_of_an_equal_area_projection(tmp_path, monkeypatch):
    monkeypatch.setattr(polygons, "_ROWS", 8)
    _, found = vectorized(tmp_path, "gpkg", **DEGREES)
    assert found.crs == "EPSG:4326" and list(found.columns) == ["class", "area_m2", "geometry"]
    geod = found.crs.get_geod()
    for area, region in zip(found["area_m2"], found.geometry, strict=True):
        fine = shapely.segmentize(region, 0.001)  # a geodesic between two corners is not on their parallel
        assert area == pytest.approx(abs(geod.geometry_area_perimeter(fine)[0]), rel=1e-5)


def test_a_label_of_background_alone_has_no_polygons(tmp_path):
    save_scene(np.zeros((9, 9), np.uint8), tmp_path / "label.tif", crs=None)
    polygons.write(tmp_path / "x.gpkg", [(tmp_path / "label.tif", {1: "cell"})], "x")
    assert list(geopandas.read_file(tmp_path / "x.gpkg").columns) == ["class", "area", "geometry"]


def test_the_package_that_is_missing_is_named(untrained, tmp_path, monkeypatch):
    save_scene(np.zeros((60, 50), np.uint8), tmp_path / "x.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match=r'x.tif is georeferenced.*package rasterio.*pip install "unet_jax\[geo\]"'):
        predict.predict_files(untrained, str(tmp_path / "x.tif"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_that_rasterio_cannot_open_is_named(untrained, tmp_path):
    place = tmp_path / os.fsdecode("café".encode("latin-1"))  # not UTF-8
    save_scene(np.zeros((60, 50), np.uint8), tmp_path / "x.tif")
    with pytest.raises(UserError, match="--output = .*/caf.*is not UTF-8"):
        predict.predict_files(untrained, str(tmp_path / "x.tif"), place)
    place.mkdir()
    (tmp_path / "x.tif").rename(place / "x.tif")
    with pytest.raises(UserError, match="1 of 1 files could not be predicted:\n.*x.tif: rasterio cannot read it"):
        predict.predict_files(untrained, str(place / "x.tif"), tmp_path / "out")


def test_a_world_file_is_a_georeference(untrained, tmp_path):
    save_image(RNG.integers(0, 256, (60, 50), np.uint8), tmp_path / "x.tif")
    assert not scenes.is_georeferenced(tmp_path / "x.tif")
    (tmp_path / "x.tfw").write_text("0.5\n0\n0\n-0.5\n500000.25\n4999999.75\n")
    arguments = untrained, str(tmp_path / "x.tif")
    predict.predict_files(*arguments, tmp_path / "out", scale="native", vector="gpkg")
    with rasterio.open(tmp_path / "out/x.tif") as file:
        assert file.transform == MAP["transform"] and file.crs is None
    with pytest.raises(UserError, match="x.tif does not say in which coordinate reference system"):
        predict.predict_files(*arguments, tmp_path / "json", scale="native", vector="geojson")


def test_a_scene_that_cannot_be_predicted_is_listed_and_leaves_no_label(untrained, tmp_path):
    pixels = RNG.integers(0, 256, (600, 500), np.uint8)
    save_scene(pixels[:60, :50], tmp_path / "in/good.tif")
    save_scene(pixels, tmp_path / "in/cut.tif", compress="deflate")
    content = (tmp_path / "in/cut.tif").read_bytes()
    (tmp_path / "in/cut.tif").write_bytes(content[: len(content) // 2])
    save_scene(pixels.astype(np.float32), tmp_path / "in/deep.tif")
    save_scene(np.stack([pixels] * 5, -1), tmp_path / "in/spectral.tif")
    with pytest.raises(UserError, match="3 of 4 files could not be predicted") as error:
        predict.predict_files(untrained, str(tmp_path / "in"), tmp_path / "out", scale="native")
    assert "cut.tif: not a readable image" in str(error.value)
    assert "deep.tif: 32-bit float values, where 8-bit ones are needed" in str(error.value)
    assert "spectral.tif has 5 channel(s), not 1" in str(error.value)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"good.tif", "good_overlay.jpg", "predictions.json"}


def test_the_overlay_of_a_large_scene_is_a_preview(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "_PREVIEW", 32)
    pixels = save_scene(np.zeros((128, 64), np.uint8) + np.arange(64, dtype=np.uint8), tmp_path / "x.tif")
    predict.predict_files(untrained, str(tmp_path / "x.tif"), tmp_path / "out", scale="native")
    label = read_scene(tmp_path / "out/x.tif")
    classes = unet_jax.load(untrained).classes
    shown = colors.overlay(pixels[2::4, 2::4, None], label[2::4, 2::4], classes)
    drawn = read_image(tmp_path / "out/x_overlay.jpg")
    assert drawn.shape == (32, 16, 3)
    assert abs(drawn.astype(float) - shown).mean() < 20  # as JPEG


def test_blocks_are_written_once():
    random = lambda n, dtype: RNG.integers(0, 9, (n, 3), dtype)
    pieces = [[random(n, np.uint8), random(n, np.uint16)] for n in (36, 700, 1, 800, 24)]
    strips = list(scene_files._strips(pieces))
    assert [(top, len(strip[0])) for top, strip in strips] == [(0, 512), (512, 1024), (1536, 25)]
    for k in range(2):
        np.testing.assert_array_equal(
            np.concatenate([strip[k] for _, strip in strips]), np.concatenate([piece[k] for piece in pieces])
        )
