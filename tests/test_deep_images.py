"""Images of any number of channels and any depth: read as they are, normalised by what the training saw."""

import dataclasses
import json
import subprocess
import sys

import helpers
import imagecodecs
import jax
import numpy as np
import pytest
import tifffile
import tiny
from etils import epath
from helpers import save_image
from PIL import Image

import unet_jax
from unet_jax import data
from unet_jax.data import images, reading, statistics, tiff_files
from unet_jax.errors import UserError
from unet_jax.inference import forward, normalization

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (20, 30)).astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 200
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
TURNS = {number: Image.Transpose[name] for number, name in TURNS.items()}
stack = lambda array, count: np.stack([array + k for k in range(count)], -1)


@pytest.mark.parametrize(
    "array, options, expected",
    [
        (stack(GREY, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, 3),
        (stack(GREY, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, 4),
        (stack(GREY, 2), {"photometric": "minisblack", "planarconfig": "contig"}, 2),
        (stack(GREY, 2), {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}, 1),
        (stack(DEEP, 7), {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"}, 7),
        (stack(DEEP, 3), {"photometric": "rgb", "compression": "deflate"}, 3),
        (GREY.astype(np.float32) / 7, {"compression": "zstd"}, 1),
        (DEEP, {}, 1),
    ],
)
def test_a_tiff_file_is_read_with_all_its_channels_but_declared_alpha(array, options, expected, tmp_path):
    file = epath.Path(tmp_path / "a.tif")
    tifffile.imwrite(file, array, **options)
    found, header = reading.read_channels(file), reading.read_header(file)
    np.testing.assert_array_equal(found, np.atleast_3d(array)[..., :expected])
    assert found.dtype == array.dtype and header.dtype == array.dtype.name
    assert header.channels == expected and header.size == (20, 30)
    assert header.has_alpha == ("unassalpha" in options.get("extrasamples", []))


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float64, np.float16])
def test_other_values_become_float32(kind, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(kind) - 5)
    found = reading.read_channels(epath.Path(tmp_path / "a.tif"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[..., 0], GREY.astype(np.float32) - 5)


def test_channels_may_be_planes_or_pages_and_pages_are_channels_only_if_asked(tmp_path):
    planes, file = np.moveaxis(stack(DEEP, 5), -1, 0), epath.Path(tmp_path / "a.tif")
    for options in (
        {"photometric": "minisblack", "planarconfig": "separate"},
        {"imagej": True, "metadata": {"axes": "CYX"}},
        {"ome": True, "photometric": "minisblack", "metadata": {"axes": "CYX"}},
    ):
        tifffile.imwrite(file, planes, **options)
        np.testing.assert_array_equal(reading.read_channels(file), stack(DEEP, 5))
    for options in ({"photometric": "minisblack"}, {"ome": True, "metadata": {"axes": "ZYX"}}):
        tifffile.imwrite(file, planes, **options)
        with pytest.raises(UserError, match=r"a.tif holds 5 pages or frames: .*config.data.pages='channels'"):
            reading.read_channels(file)
        np.testing.assert_array_equal(reading.read_channels(file, "channels"), stack(DEEP, 5))
        assert reading.read_header(file, "channels").channels == 5


def test_white_may_be_zero(tmp_path):
    for array in (GREY, DEEP):
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
        found = reading.read_channels(epath.Path(tmp_path / "a.tif"))[..., 0]
        np.testing.assert_array_equal(found, np.iinfo(array.dtype).max - array)


def test_16_bit_png_files_and_arrays(tmp_path):
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(stack(DEEP, 3)))
    np.save(tmp_path / "b.npy", stack(GREY, 6).astype(np.float64))
    np.savez(tmp_path / "c.npz", DEEP)
    expected = {"a.png": stack(DEEP, 3), "b.npy": stack(GREY, 6), "c.npz": DEEP[..., None]}
    for name, array in expected.items():
        np.testing.assert_array_equal(reading.read_channels(epath.Path(tmp_path / name)), array)
    np.savez(tmp_path / "d.npz", DEEP, GREY)
    with pytest.raises(UserError, match=r"d.npz holds uint16 \(20, 30\), uint8 \(20, 30\); one array"):
        reading.read_channels(epath.Path(tmp_path / "d.npz"))


OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"
DimensionOrder="XYCZT" Type="uint8" SizeX="30" SizeY="20" SizeC="2" SizeZ="1" SizeT="1">
<Channel ID="Channel:0:0" SamplesPerPixel="1"/><Channel ID="Channel:0:1" SamplesPerPixel="1"/>
<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>
<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData>
</Pixels></Image></OME>"""


def test_an_ome_image_in_several_files_needs_all_of_them(tmp_path):
    file = epath.Path(tmp_path / "a.ome.tif")
    tifffile.imwrite(file, GREY, description=OME, metadata=None)
    with pytest.raises(UserError, match=r"a.ome.tif holds only a part of its image: the files that hold the others"):
        reading.read_channels(file)
    with pytest.raises(UserError, match=r"a.ome.tif holds only a part of its image"):
        reading.read_header(file)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_jpeg_2000_keeps_its_depth(shape, dtype, tmp_path):
    array = RNG.integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    file = epath.Path(tmp_path / "a.jp2")
    file.write_bytes(imagecodecs.jpeg2k_encode(array, level=0, codecformat="jp2"))  # without loss
    np.testing.assert_array_equal(reading.read_channels(file), np.atleast_3d(array))
    header = reading.read_header(file)
    assert (header.dtype, header.channels, header.size) == (
        dtype.__name__,
        array.shape[2] if array.ndim == 3 else 1,
        (20, 30),
    )


def _write_geotiff(file, bands, nodata=None):
    """With overviews, as GDAL writes it; `bands` `[h, w, C]`."""
    rasterio = pytest.importorskip("rasterio")
    height, width, count = bands.shape
    profile = dict(driver="GTiff", height=height, width=width, count=count, dtype=bands.dtype, nodata=nodata)
    profile |= dict(crs="EPSG:32633", transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10))
    with rasterio.open(file, "w", tiled=True, blockxsize=16, blockysize=16, compress="deflate", **profile) as scene:
        scene.write(np.moveaxis(bands, -1, 0))
    with rasterio.open(file, "r+") as scene:
        scene.build_overviews([2, 4])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_overviews_are_no_images_and_nodata_is_nan(count, tmp_path):
    file = epath.Path(tmp_path / "a.tif")
    for array in (stack(GREY, count), stack(DEEP, count)):
        array[3, 4:9] = array[3, 4, 0]
        _write_geotiff(file, array)
        np.testing.assert_array_equal(reading.read_channels(file), array)
        _write_geotiff(file, array, nodata=int(array[3, 4, 0]))
        found = reading.read_channels(file)
        missing = (array == array[3, 4, 0]).all(-1)
        assert reading.read_header(file).has_nodata and found.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(found), missing[..., None].repeat(count, -1))
        np.testing.assert_array_equal(found[~missing], array[~missing])


def test_nodata_of_integers_is_where_all_channels_hold_it(tmp_path):
    array, file = stack(GREY, 3), epath.Path(tmp_path / "a.tif")
    array[:4], array[6, :, 1] = 0, 0
    _write_geotiff(file, array, nodata=0)
    found = reading.read_channels(file)
    assert np.isnan(found).any(-1).sum() == 4 * 30
    assert not np.isnan(found[6]).any()
    # A network for 8 bits, as one from before there was nodata, is given the values as they are.
    np.testing.assert_array_equal(reading.read_channels(file, nodata=False), array)
    settings = tiny.get_config().data
    settings.channels = 3
    np.testing.assert_array_equal(reading.read_image(file, settings), array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_file_is_turned_whatever_its_depth(orientation, tmp_path):
    """As Pillow turns those that it reads."""
    file, found = epath.Path(tmp_path / "a.tif"), []
    for array in (GREY, DEEP, stack(GREY, 3), stack(DEEP, 5)):
        kind = "rgb" if array.shape[2:] == (3,) else "minisblack"
        tag = [(274, "H", 1, orientation, False)]
        planar = {} if array.ndim == 2 else {"planarconfig": "contig"}
        tifffile.imwrite(file, array, photometric=kind, extratags=tag, **planar)
        found.append(reading.read_channels(file)[..., 0])
        assert reading.read_header(file).size == found[-1].shape
    turned = Image.fromarray(GREY).transpose(TURNS[orientation]) if orientation > 1 else GREY
    np.testing.assert_array_equal(found[0], np.asarray(turned))
    for other, factor in zip(found[1:], (200, 1, 200), strict=True):
        np.testing.assert_array_equal(other, found[0].astype(np.uint16) * factor)


def test_a_file_that_pillow_cannot_decompress(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(GREY, 3), photometric="rgb", compression="lerc")
    np.testing.assert_array_equal(reading.read_channels(epath.Path(tmp_path / "a.tif")), stack(GREY, 3))


def test_nan_does_not_spread_when_an_image_is_resized():
    image = np.full((64, 64, 2), 3.0, np.float32)
    image[RNG.random((64, 64)) < 0.1, 0] = np.nan
    image[:16, :16, 1] = np.nan
    small = images.resize_image(image, (8, 8), "bilinear")
    expected = np.full((8, 8, 2), 3.0)
    expected[:2, :2, 1] = np.nan
    np.testing.assert_allclose(small, expected)


def _folder(root, arrays, suffix=".tif"):
    """Images, and masks whose class is where the last channel is above its middle."""
    for name, array in arrays.items():
        (root / "images").mkdir(parents=True, exist_ok=True)
        file = root / "images" / f"{name}{suffix}"
        if suffix == ".npy":
            np.save(file, array)
        else:
            tifffile.imwrite(file, array, photometric="minisblack", planarconfig="contig")
        middle = np.nanmedian(array[..., -1])
        save_image((array[..., -1] > middle).astype(np.uint8), root / "masks" / f"{name}.png")


def _config(root, **settings):
    config = tiny.get_config().copy_and_resolve_references()
    config.data.update({"name": "folder", "root": str(root), "size": (16, 16), "cache_gib": 0.0, **settings})
    return config


def _infer(config):
    printed = []
    data.infer_settings(config.data, printed.append)
    return "\n".join(printed)


def test_channels_and_depth_are_read_off_the_files(tmp_path):
    _folder(tmp_path, {name: stack(DEEP, 5) for name in "abcdefgh"})
    config = _config(tmp_path)
    printed = _infer(config)
    assert (config.data.channels, config.data.dtype) == (5, "uint16")
    assert "Images of 5 channel(s)" in printed and "Images of 16 bits" in printed
    source = data.load(config.data, "all")
    assert source.classes.channels == 5 and source.classes.dtype == "uint16"
    np.testing.assert_array_equal(source[0][0], stack(DEEP, 5))


@pytest.mark.parametrize(
    "other, message",
    [
        (stack(DEEP, 4), r"differ in their channels: 4 channel\(s\): .*odd.tif; 5 channel\(s\): .*a.tif"),
        (stack(GREY, 5), r"differ in their depth: .*16 bits: .*a.tif.*8 bits: .*odd.tif.*value_range=\(low, high\)"),
        (
            stack(DEEP, 5).astype(np.float32),
            r"differ in their depth: 32-bit floats: .*odd.tif; 16 bits: .* Convert them$",
        ),
    ],
)
def test_images_that_do_not_go_together_are_named(other, message, tmp_path):
    _folder(tmp_path, {"a": stack(DEEP, 5), "b": stack(DEEP, 5), "odd": other})
    with pytest.raises(UserError, match=f"(?s){message}"):
        _infer(_config(tmp_path))


def test_16_bits_become_8_only_by_a_range(tmp_path):
    _folder(tmp_path, {"a": stack(GREY, 3), "b": stack(DEEP, 3), "c": stack(GREY, 3), "d": stack(GREY, 3)})
    config = _config(tmp_path, value_range=(1000, 20000))
    _infer(config)
    image, _ = data.load(config.data, "all")[1]
    expected = ((stack(DEEP, 3).astype(float) - 1000) / 19000).clip(0, 1) * 255
    assert config.data.dtype == "" and image.dtype == np.uint8 and np.abs(image - expected).max() <= 0.501
    config.data.value_range = ()
    with pytest.raises(UserError, match=r"b.tif: 16-bit values, where 8-bit ones are needed.*config.data.value_range"):
        data.load(config.data, "all")[1]


def test_pixels_without_a_value_are_ignored(tmp_path):
    float_image = stack(GREY, 2).astype(np.float32)
    float_image[2:5, 7, 1] = np.nan
    _folder(tmp_path, dict.fromkeys("abcdef", float_image), ".npy")
    config = _config(tmp_path)
    _infer(config)
    image, label = data.load(config.data, "all")[0]
    assert config.data.dtype == "float32" and np.isnan(image[2:5, 7, 1]).all()
    expected = np.zeros(label.shape, bool)
    expected[2:5, 7] = True
    np.testing.assert_array_equal(label == 255, expected)


def test_a_work_directory_with_the_whole_range_of_16_bits_goes_on_dividing_by_it(tmp_path, capsys):
    """Older versions recorded it, and where no image had 16 bits too: hence the warning."""
    config = tiny.get_config()
    config.data.value_range = (0, 65535)
    network = unet_jax.load(helpers.save_untrained(tmp_path / "run", config))
    tifffile.imwrite(tmp_path / "a.tif", DEEP)
    image = network.read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image[..., 0], np.rint(DEEP / 257))
    assert "warning: 16-bit images are divided by 257" in capsys.readouterr().out


def test_alpha_is_said(tmp_path):
    for name in "abcdef":
        save_image(stack(GREY, 4), tmp_path / f"images/{name}.png")
        save_image((GREY > 99).astype(np.uint8), tmp_path / f"masks/{name}.png")
    config = _config(tmp_path)
    assert "6 image(s) have an alpha channel, which is left out, e.g. " in _infer(config)
    assert config.data.channels == 3 and config.data.dtype == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_and_masks_can_be_turned_upright(orientation, tmp_path):
    """The pixels as stored and the EXIF number of all eight ways to hold a camera, against Pillow's own turns."""
    stored, exif = Image.fromarray(stack(GREY, 3)), Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    upright = stored.transpose(TURNS[orientation]) if orientation > 1 else stored
    for name in "abcdef":
        stored.save(tmp_path / f"images/{name}.png", exif=exif)
        save_image((np.asarray(upright)[..., 0] > 99).astype(np.uint8), tmp_path / f"masks/{name}.png")
    config = _config(tmp_path, orientation="upright")
    _infer(config)
    source = data.load(config.data, "all")
    image, label = source[0]
    np.testing.assert_array_equal(image, np.asarray(upright))
    np.testing.assert_array_equal(label, image[..., 0] > 99)
    assert source.read_size(0) == image.shape[:2]
    config.data.orientation = "as_stored"
    if orientation >= 5:
        with pytest.raises(UserError, match=r"say it is rotated .*: try config.data.orientation='upright'"):
            data.load(config.data, "all")[0]


def test_the_values_of_integers_are_described_exactly_and_of_floats_nearly():
    arrays = [RNG.integers(low, low + 4000, (40, 50, 2)).astype(np.uint16) for low in (0, 500, 9000)]
    exact = np.stack(arrays).reshape(-1, 2).astype(np.float64)
    for kind in (np.uint16, np.float32):
        found = statistics.describe(lambda i, kind=kind: {"image": arrays[i].astype(kind)}, 3)
        for name, function in {"min": np.min, "max": np.max, "mean": np.mean, "deviation": np.std}.items():
            np.testing.assert_allclose(found[name], function(exact, axis=0), rtol=1e-9)
        for name, share in statistics.SHARES.items():
            np.testing.assert_allclose(found[name], np.quantile(exact, share, axis=0), atol=10)
    arrays[0] = arrays[0].astype(np.float32)
    arrays[0][0] = np.nan
    found = statistics.describe(lambda i: {"image": arrays[i].astype(np.float32)}, 3)
    np.testing.assert_allclose(found["mean"], np.nanmean(np.stack(arrays).reshape(-1, 2), axis=0), rtol=1e-6)


VALUES = {"min": [10.0], "low": [100.0], "median": [300.0], "high": [900.0], "max": [5000.0]}
VALUES |= {"mean": [400.0], "deviation": [160.0]}
NETWORK = forward.Normalization((127.0,), (127.0,))


@pytest.mark.parametrize(
    "kind, dtype, values, pretrained, value, expected",
    [
        ("", "uint8", None, None, 51, 0.2),
        ("", "uint8", None, NETWORK, 254, 1.0),
        ("range", "uint8", None, NETWORK, 51, 0.2),
        ("percentile", "uint8", {**VALUES, "low": [10.0], "high": [110.0]}, None, 60, 0.5),
        ("", "uint16", VALUES, None, 500, 0.5),
        ("", "uint16", VALUES, None, 4000, 1.0),
        ("range", "uint16", VALUES, None, 13107, 0.2),
        ("range", "float32", VALUES, None, 2505, 0.5),
        ("standard", "float32", VALUES, None, 400, 0.0),
        ("standard", "float32", VALUES, None, 560, 1.0),
        ("standard", "float32", VALUES, None, np.nan, 0.0),
        ("network", "float32", VALUES, NETWORK, 100 + 800 * 254 / 255, 1.0),
    ],
)
def test_normalisation_follows_the_training_images(kind, dtype, values, pretrained, value, expected):
    settings = {"normalize": kind, "value_range": ()}
    classes = data.Classes("binary", ("a", "b"), ((0, 0, 0),) * 2, channels=1, dtype=dtype)
    assert normalization.needs_values(settings, classes) == (values is not None)
    made = normalization.make(settings, classes, values, pretrained or forward.Normalization())
    assert forward.Normalization.from_json(json.loads(json.dumps(made.to_json()))) == made
    found = jax.jit(lambda x: made(made.to_unit(x)))(np.array([[value]], dtype))
    assert float(found[0, 0]) == pytest.approx(expected, abs=1e-3)


def test_the_limits_of_other_weights_hold_for_images_of_the_same_type():
    classes = data.Classes("binary", ("a", "b"), ((0, 0, 0),) * 2, channels=1, dtype="uint16")
    other = forward.Normalization((0.0,), (255.0,), (50.0,), (60.0,), (0.0,))
    make = lambda value_range: normalization.make({"normalize": "", "value_range": value_range}, classes, VALUES, other)
    assert make(()) == other
    assert (make((0, 1000)).low, make((0, 1000)).high) == ((0.0,), (1000.0,))


def test_floats_between_0_and_255_and_tiny_ones():
    for low, high in ((0.0, 255.0), (0.0, 1e-9)):
        values = {**VALUES, "low": [low], "high": [high], "mean": [high / 2], "deviation": [0.0]}
        for kind in ("percentile", "standard"):
            classes = data.Classes("binary", ("a", "b"), ((0, 0, 0),) * 2, channels=1, dtype="float32")
            made = normalization.make({"normalize": kind, "value_range": ()}, classes, values, forward.Normalization())
            made = forward.Normalization.from_json(json.loads(json.dumps(made.to_json())))
            found = made(made.to_unit(np.float32([[np.nan, high, 2 * high]])))
            expected = [[0.5, 1, 1]] if kind == "percentile" else [[0, 0.5, 0.5]]
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_channel_to_show_that_there_is_not(tmp_path):
    classes = data.Classes("binary", ("a", "b"), ((0, 0, 0),) * 2, channels=2)
    with pytest.raises(UserError, match=r"config.data.show = \(2,\) names a channel that the images do not have"):
        data.check_show(_config(tmp_path, show=(2,)).data, classes)


def test_a_normalisation_that_there_is_not():
    classes = data.Classes("binary", ("a", "b"), ((0, 0, 0),) * 2)
    with pytest.raises(UserError, match="config.data.normalize = 'network' is for pretrained weights"):
        normalization.make({"normalize": "network", "value_range": ()}, classes, None, forward.Normalization())


def _draw_scene(rng, height, width):
    """Five bands uint16, of which only the last shows the discs, and the mask of these."""
    bands = rng.normal(1000, 200, (height, width, 5))
    disc = np.zeros((height, width), bool)
    for _ in range(height * width // 700):
        y, x, radius = rng.integers(0, height), rng.integers(0, width), rng.integers(5, 9)
        disc |= (np.mgrid[:height, :width][0] - y) ** 2 + (np.mgrid[:height, :width][1] - x) ** 2 < radius**2
    bands[..., 4] = rng.normal(300, 20, (height, width)) + 120 * disc
    return bands.astype(np.uint16), disc


@pytest.fixture(scope="module")
def five_bands(tmp_path_factory):
    """A training on GeoTIFF files at their own size."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(3)
    (root / "images").mkdir()
    for k in range(16):
        bands, disc = _draw_scene(rng, 40, 48)
        _write_geotiff(root / f"images/{k:02}.tif", bands)
        save_image(disc.astype(np.uint8) * 255, root / f"masks/{k:02}.png")
    flags = {
        "data.root": root,
        "data.size": "()",
        "augment.crop": "(32, 32)",
        "train.epochs": 30.0,
        "train.batch_size": 8,
        "train.eval_every_epochs": 30.0,
        "optimizer.learning_rate": 0.01,
        "train.panels": 2,
        "data.show": "(4,)",
    }
    command = ["--config=configs/folder.py", f"--workdir={root / 'run'}"]
    command += ["--config.model.name=unet", "--config.model.features=(8,16)", "--config.loss.dice=0.5"]
    _run(*command, *(f"--config.{name}={value}" for name, value in flags.items()))
    return root


def _run(*flags):
    done = subprocess.run([sys.executable, "-m", "unet_jax.main", *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_a_class_that_only_the_fifth_channel_shows_is_learned(five_bands):
    assert helpers.metric_rows(five_bands / "run")[-1]["val/miou"] > 0.9
    classes = json.loads((five_bands / "run/classes.json").read_text())
    assert classes["channels"] == 5 and classes["dtype"] == "uint16" and len(classes["values"]["mean"]) == 5
    assert list((five_bands / "run/panels").glob("*/*.png")) and (five_bands / "run/report.html").exists()
    trained, mask = unet_jax.load(five_bands / "run"), np.asarray(Image.open(five_bands / "masks/03.png")) > 0
    image = trained.read_image(five_bands / "images/03.tif")
    shown = trained.picture(image)
    assert shown.shape == (40, 48, 1) and shown[mask].mean() > shown[~mask].mean() + 80

    contiguous = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(five_bands / "bright.tif", np.minimum(image * 30.0, 65535).astype(np.uint16), **contiguous)
    with pytest.raises(
        UserError, match=r"bright.tif: channel 0 holds values around \d+; in the images of the training"
    ):
        trained.read_image(five_bands / "bright.tif")
    tifffile.imwrite(five_bands / "8.tif", image.astype(np.uint8), **contiguous)
    with pytest.raises(UserError, match=r"8.tif: 8-bit values, where 16-bit ones are needed"):
        trained.read_image(five_bands / "8.tif")
    tifffile.imwrite(five_bands / "3.tif", image[..., :3], photometric="rgb")
    with pytest.raises(UserError, match=r"3.tif has 3 channel\(s\), not 5"):
        trained.read_image(five_bands / "3.tif")


@pytest.mark.slow
def test_a_scene_is_predicted_back_with_its_georeference(five_bands):
    rasterio = pytest.importorskip("rasterio")
    bands, disc = _draw_scene(np.random.default_rng(9), 300, 200)
    (five_bands / "scenes").mkdir()
    _write_geotiff(five_bands / "scenes/a.tif", bands)
    _run(
        "--mode=predict",
        f"--workdir={five_bands / 'run'}",
        f"--input={five_bands / 'scenes'}",
        f"--output={five_bands / 'out'}",
        "--vector=gpkg",
    )
    with rasterio.open(five_bands / "scenes/a.tif") as scene, rasterio.open(five_bands / "out/a.tif") as label:
        assert (label.crs, label.transform, label.shape) == (scene.crs, scene.transform, scene.shape)
        found = label.read(1)
    assert ((found == 1) == disc).mean() > 0.98
    polygons = pytest.importorskip("geopandas").read_file(five_bands / "out/a.gpkg")
    assert polygons.area.sum() == pytest.approx(100 * (found == 1).sum())  # pixels of 10 m


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_exports_take_deep_images(dtype, five_bands):
    from jax import export as jax_export

    from unet_jax.interop import export

    onnxruntime = pytest.importorskip("onnxruntime")
    trained = unet_jax.load(five_bands / "run")
    normalized = dataclasses.replace(trained.network.normalization, fill=(500.0,) * 5)
    network = dataclasses.replace(
        trained.network, normalization=normalized, classes=dataclasses.replace(trained.classes, dtype=dtype)
    )
    trained.config.data.size = (32, 32)  # to which images are resized
    trained = dataclasses.replace(trained, network=network, classes=network.classes, source_sizes=((9, 9), (99, 99)))
    image = np.stack([reading.read_channels(five_bands / "images" / f"{k:02}.tif") for k in (1, 2)]).astype(dtype)
    image = np.concatenate([image, image[:, ::-1]], 2)[:, :, 3:50]  # to be resized
    expected = np.stack([trained.predict_image(one, "fit", "none") for one in image])
    _, probability = jax_export.deserialize(export.to_stablehlo(trained)).call(image)
    np.testing.assert_allclose(probability, expected, atol=2e-3 if dtype == "uint16" else 1e-5)
    session = onnxruntime.InferenceSession(export.to_onnx(trained).SerializeToString())
    _, probability = session.run(["label", "probability"], {"image": image})
    np.testing.assert_allclose(probability, expected, atol=2e-3 if dtype == "uint16" else 1e-5)
    if dtype == "float32":
        image[0, 5:9, 7] = np.nan
        assert np.isfinite(session.run(["probability"], {"image": image})[0]).all()


def test_a_layout_of_a_damaged_file_names_it(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0garbage")
    with pytest.raises(UserError, match=r"a.tif: not a readable TIFF image"):
        tiff_files.read_layout(epath.Path(tmp_path / "a.tif"), "")
