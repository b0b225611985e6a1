"""Scores at the images' own sizes, on one device, eight, and two processes."""

import json

import commands
import helpers
import numpy as np
import pytest

import unet_jax
from unet_jax import metrics
from unet_jax.evaluation import evaluate

SIZES = {"a": (16, 24), "b": (37, 50), "c": (200, 31)}


@pytest.fixture
def workdir(config, tmp_path):
    """The work directory of an untrained network for images of `SIZES` that are resized to 16x24."""
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, 5:15] = 255
        image = rng.integers(0, 255, (height, width, 3), np.uint8)
        helpers.save_image(image, tmp_path / "cars/images" / f"{name}.png")
        helpers.save_image(mask, tmp_path / "cars/masks" / f"{name}.png")
    config.data.update(name="folder", variant="binary", root=str(tmp_path / "cars"), size=(16, 24), channels=3)
    config.data.labels, config.model.features = ("0 background", "255 -> 1 car"), (2, 4)
    return helpers.save_untrained(tmp_path / "run", config)


def test_each_image_is_scored_as_it_is_predicted(workdir, tmp_path, capsys):
    result = evaluate.evaluate_workdir(workdir, None, None, "all", "horizontal")
    own_table = capsys.readouterr().out.split("at the images' own sizes, as --mode=predict writes them:")[1]
    network = unet_jax.load(workdir)
    for name, counts in zip(SIZES, result.own_size, strict=True):
        image, mask = (helpers.read_image(tmp_path / f"cars/{kind}/{name}.png") for kind in ("images", "masks"))
        predicted = network.predict_image(image, tta="horizontal")[..., 0] > 0.5
        expected = [[((mask > 0) == row) & (predicted == column) for column in (0, 1)] for row in (0, 1)]
        assert (counts == np.sum(expected, (2, 3))).all() and counts.sum() == mask.size
    written = json.loads((workdir / "eval.json").read_text())
    own = written["own_size"]
    of_counts = metrics.flatten(metrics.records(metrics.Counts(result.own_size.sum(0), result.names)))
    assert own["miou"] == of_counts["miou"] and own["dice"]["car"] == of_counts["dice/car"]
    assert np.sum(own["confusion"]) == 16 * 24 + 37 * 50 + 200 * 31 and np.sum(written["confusion"]) == 3 * 16 * 24
    assert f"mean IoU {of_counts['miou']:.4f}" in own_table and "loss" not in own_table


@pytest.mark.slow
def test_devices_and_processes_make_no_difference(workdir, tmp_path):
    flags = ("--mode=eval", f"--workdir={workdir}", "--split=all")
    found = []
    for run, devices in ((commands.succeed, 1), (commands.succeed, 8), (commands.succeed_together, 2)):
        run(*flags, folder=tmp_path, devices=devices)
        found.append(json.loads((workdir / "eval.json").read_text())["own_size"]["confusion"])
    assert found[0] == found[1] == found[2]


def test_images_of_the_size_of_the_training_are_scored_once(trained, capsys):
    evaluate.evaluate_workdir(trained, None, None)
    assert "own sizes" not in capsys.readouterr().out
    assert "own_size" not in json.loads((trained / "eval.json").read_text())
