"""DRIVE: drawings of vessels within the field of view, and how the generated images of thin and small things look."""

import os
import pathlib
import runpy

import numpy as np
import pytest
from helpers import ROOT, save_image

from unet_jax import data
from unet_jax.errors import UserError

DATA = os.environ.get("UNET_JAX_TEST_DATA")


@pytest.fixture
def settings(config, tmp_path):
    """Four photographs of 20x16 for training and two for test; photograph k has a vessel in row k."""
    for part, kind, numbers in (("training", "training", (21, 22, 23, 24)), ("test", "test", (1, 2))):
        for number in numbers:
            vessels, field = np.zeros((20, 16), np.uint8), np.zeros((20, 16), np.uint8)
            vessels[number % 20], field[:, 3:] = 255, 255
            image = np.full((20, 16, 3), number, np.uint8)
            save_image(image, tmp_path / part / "images" / f"{number:02d}_{kind}.tif")
            save_image(vessels, tmp_path / part / "1st_manual" / f"{number:02d}_manual1.gif")
            save_image(field, tmp_path / part / "mask" / f"{number:02d}_{kind}_mask.gif")
    config.data.update(name="drive", variant="binary", root=str(tmp_path), size=())
    return config.data


def test_vessels_are_labelled_within_the_field_of_view(settings):
    source = data.load(settings, "all")
    assert source.ids == ["21", "22", "23", "24"] and source.sizes() == [(20, 16)] * 4 and len(source.files) == 12
    image, label = source[2]
    assert image.shape == (20, 16, 3) and (image == 23).all()
    expected = np.zeros((20, 16))
    expected[3], expected[:, :3] = 1, 255
    np.testing.assert_array_equal(label, expected)


def test_splits_are_of_the_training_folder_and_the_test_folder(settings, tmp_path):
    train, validation = (data.load(settings, split).ids for split in ("train", "validation"))
    assert sorted(train + validation) == ["21", "22", "23", "24"] and len(validation) == 1
    assert data.load(settings, "test").ids == ["01", "02"]
    (tmp_path / "train.txt").write_text("21_training.tif\nimages/23_training\n")
    (tmp_path / "val.txt").write_text("24_training.tif\n")
    settings.lists = ("train.txt", "val.txt")
    assert data.load(settings, "train").ids == ["21", "23"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: (root / "training/mask/22_training_mask.gif").unlink(),
            "22_training.tif: no mask of the field of",
        ),
        (
            lambda root: (root / "training/1st_manual/22_manual1.gif").unlink(),
            "22_training.tif: no drawing of the vessel",
        ),
        (lambda root: (root / "training/mask").rename(root / "masks"), "training/mask is not a folder. It must hold"),
        (lambda root: save_image(np.zeros((9, 9), np.uint8), root / "training/mask/22_training_mask.gif"), "is 9x9"),
    ],
)
def test_what_is_missing_is_named(settings, tmp_path, change, message):
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        source = data.load(settings, "all")
        [source[i] for i in range(len(source))]


@pytest.mark.skipif(not DATA, reason="UNET_JAX_TEST_DATA is not set")
def test_the_published_photographs(settings):
    settings.root = str(pathlib.Path(DATA) / "drive")
    source = data.load(settings, "all")
    assert len(source) == 20 and set(source.sizes()) == {(584, 565)}
    labels = np.stack([source[i][1] for i in range(3)])
    assert 0.10 < (labels == 1).sum() / (labels != 255).sum() < 0.15 and 0.3 < (labels == 255).mean() < 0.33


def test_generated_things_are_as_tiny_as_they_should_be():
    script = runpy.run_path(str(ROOT / "scripts/make_tiny_things.py"))
    image, mask = script["objects"](np.random.default_rng(0))
    rows, columns = np.nonzero(mask)
    assert image.shape == (2000, 2000) and mask.sum() == 64 and np.ptp(rows) == np.ptp(columns) == 7
    image, mask = script["lines"](np.random.default_rng(0))
    # Of a line that is one pixel wide, no 2x2 pixels are all set, but where lines touch.
    blocks = mask[1:, 1:] & mask[:-1, 1:] & mask[1:, :-1] & mask[:-1, :-1]
    assert image.shape == (1024, 1024) and 3_000 < mask.sum() < 20_000 and blocks.sum() < 0.01 * mask.sum()
