"""Images scaled to pixels of one size, as their files tell: of maps and of microscopes."""

import json

import helpers
import numpy as np
import pytest
import tifffile

import unet_jax
from unet_jax import data
from unet_jax.data import pixel_sizes
from unet_jax.errors import UserError
from unet_jax.evaluation import check, evaluate
from unet_jax.inference import predict
from unet_jax.training import components

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90), np.uint8)
TRANSFORMATION = (0.3, 0.8, 0, 9, 0.4, -0.6, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1)  # columns are 0.5 apart, rows 1.0


def _ome(path, height, width, unit="nm", image=IMAGE):
    sizes = {"PhysicalSizeY": height, "PhysicalSizeX": width, "PhysicalSizeYUnit": unit, "PhysicalSizeXUnit": unit}
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image, ome=True, metadata={"axes": "YX", **sizes})


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(imagej=True, resolution=(4, 2), metadata={"unit": "micron"}), (0.5, 0.25)),  # columns and rows a unit
        (dict(imagej=True, resolution=(1000, 500), metadata={"unit": "cm"}), (20, 10)),
        (dict(imagej=True, resolution=(4, 2), metadata={"unit": "pixel"}), None),
        (dict(imagej=True, resolution=(4, 2)), None),
        (dict(extratags=[(33550, "d", 3, (0.5, 2, 0), True)]), (2, 0.5)),
        (dict(extratags=[(34264, "d", 16, TRANSFORMATION, True)]), (1, 0.5)),
        (dict(extratags=[(33550, "d", 3, (0.5, 2, 0), True), (274, "H", 1, 6, True)]), (0.5, 2)),  # to be turned
        (dict(extratags=[(33550, "d", 3, (0, 0, 0), True)]), None),
        (dict(resolution=(300, 300), resolutionunit="INCH"), None),  # for printing
    ],
)
def test_the_pixel_size_is_what_the_file_says(options, expected, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", IMAGE, **options)
    if expected:
        np.testing.assert_allclose(pixel_sizes.read(tmp_path / "x.tif"), expected, rtol=1e-6)  # ratios of integers
    else:
        with pytest.raises(UserError, match=r"x.tif does not say how large its pixels are"):
            pixel_sizes.read(tmp_path / "x.tif")


def test_ome_files_tell_it_in_their_unit_and_others_not_at_all(tmp_path):
    _ome(tmp_path / "a.ome.tif", 650, 325)
    np.testing.assert_allclose(pixel_sizes.read(tmp_path / "a.ome.tif"), (0.65, 0.325))
    _ome(tmp_path / "b.ome.tif", 0.65, 0.325, "µm")
    np.testing.assert_allclose(pixel_sizes.read(tmp_path / "b.ome.tif"), (0.65, 0.325))
    _ome(tmp_path / "c.ome.tif", 1, 1, "pixel")
    tifffile.imwrite(tmp_path / "d.ome.tif", IMAGE, ome=True)
    helpers.save_image(IMAGE, tmp_path / "e.png", dpi=(300, 300))
    for name in ("c.ome.tif", "d.ome.tif", "e.png"):
        with pytest.raises(UserError, match=rf"{name} does not say how large its pixels are"):
            pixel_sizes.read(tmp_path / name)


@pytest.fixture
def cells(config, tmp_path):
    """The same field of view at two magnifications, and a third at half the width."""
    for name, size, *pixel in (("a", (60, 90), 400, 400), ("b", (120, 180), 200, 200), ("c", (60, 45), 400, 800)):
        _ome(tmp_path / f"cells/images/{name}.ome.tif", *pixel, image=np.resize(IMAGE, size))
        mask = np.zeros(size, np.uint8)
        mask[size[0] // 4 : size[0] // 2, size[1] // 3 :] = 1
        helpers.save_image(mask, tmp_path / f"cells/masks/{name}.ome.png")
    config.data.update(name="folder", variant="binary", root=str(tmp_path / "cells"), size=(), channels=1)
    config.data.labels, config.data.pixel_size, config.data.validation = ("0 rest", "1 cell"), 0.8, 0.4
    config.model.features, config.augment.crop = (2, 4), (16, 24)
    return config


def test_training_and_prediction_scale_all_images_to_pixels_of_one_size(cells, tmp_path, capsys):
    source = data.load(cells.data, "all")
    opened = evaluate.open_images(source, cells, source.classes)
    assert [opened.read(i)["image"].shape for i in range(3)] == [(30, 45, 1)] * 3
    assert [opened.read(i)["label"].shape for i in range(3)] == [(30, 45)] * 3
    assert components.examples_per_epoch(cells, source) == 3 * 4
    assert check.check(cells, tmp_path / "sheet.png")
    assert "scaled to pixels of 0.8, seen in windows of 24x16" in capsys.readouterr().out

    workdir = helpers.save_untrained(tmp_path / "run", cells)
    result = evaluate.evaluate_workdir(workdir, None, None, "all")
    assert result.confusion.sum() == 3 * 30 * 45 and result.own_size.sum() == 60 * 90 + 120 * 180 + 60 * 45
    predict.predict_files(workdir, str(tmp_path / "cells/images"), tmp_path / "out")
    assert "3 image(s), scaled to pixels of 0.8 as in training" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert [image["predicted_at"] for image in found.values()] == [[30, 45]] * 3
    network, file = unet_jax.load(workdir), tmp_path / "cells/images/b.ome.tif"
    label = network.predict_image(file)[..., 0] > 0.5
    np.testing.assert_array_equal(helpers.read_image(tmp_path / "out/b.ome.png") > 0, label)
    with pytest.raises(UserError, match="trained on images scaled to pixels of 0.8, which an array does not tell"):
        network.predict_image(np.zeros((60, 90, 1), np.uint8))
    assert network.predict_image(np.zeros((60, 90, 1), np.uint8), "native").shape == (60, 90, 1)


def test_a_file_that_does_not_tell_is_named_before_work_starts_and_predicted_as_it_is_on_demand(
    cells, tmp_path, capsys
):
    workdir = helpers.save_untrained(tmp_path / "run", cells)
    helpers.save_image(IMAGE, tmp_path / "cells/images/d.png")
    helpers.save_image(IMAGE // 128, tmp_path / "cells/masks/d.png")
    assert not check.check(cells, tmp_path / "sheet.png")
    assert "d.png does not say how large its pixels are" in capsys.readouterr().out
    with pytest.raises(UserError, match="d.png does not say how large its pixels are"):
        components.examples_per_epoch(cells, data.load(cells.data, "all"))
    file = str(tmp_path / "cells/images/d.png")
    with pytest.raises(UserError, match=r"1 of 1 files could not be predicted:\n  .*d.png does not say how large"):
        predict.predict_files(workdir, file, tmp_path / "out")
    predict.predict_files(workdir, file, tmp_path / "native", scale="native")
    assert helpers.read_image(tmp_path / "native/d.png").shape == IMAGE.shape


@pytest.mark.parametrize("pixel_size", [1e-9, 1e300])
def test_a_size_in_another_unit_is_an_error_before_memory_runs_out(cells, pixel_size):
    cells.data.pixel_size = pixel_size
    with pytest.raises(
        UserError, match=r"a.ome: of 90x60 pixels, and scaled to .*: see config.data.scale, config.data.pixel"
    ):
        components.examples_per_epoch(cells, data.load(cells.data, "all"))


def test_only_files_of_a_folder_tell_it(config):
    config.data.update(name="shapes", size=(), pixel_size=0.5)
    with pytest.raises(UserError, match=r"config.data.pixel_size = 0.5 is for images of config.data.name='folder'"):
        data.load(config.data, "train")
