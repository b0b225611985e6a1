"""Training and evaluation of images at their own size, exact for any devices, processes and restarts."""

import json
import signal

import commands
import helpers
import numpy as np
import pytest

import unet_jax
from unet_jax import data
from unet_jax.errors import UserError
from unet_jax.evaluation import check, evaluate
from unet_jax.training import components
from unet_jax.workdir import integrity

SIZES = {"a": (40, 24), "b": (37, 50), "c": (90, 31), "d": (12, 64), "e": (33, 33)}


@pytest.fixture
def config(config, tmp_path):
    """Images of `SIZES`, seen in windows of 16x24."""
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        mask = np.zeros(size, np.uint8)
        mask[size[0] // 4 : size[0] // 2, 5:15] = 255
        mask[:3] = 7  # ignored
        image = rng.integers(0, 127, (*size, 3), np.uint8) + (mask[..., None] == 255) * np.uint8(100)
        helpers.save_image(image, tmp_path / "cars/images" / f"{name}.png")
        helpers.save_image(mask, tmp_path / "cars/masks" / f"{name}.png")
    config.data.update(name="folder", variant="binary", root=str(tmp_path / "cars"), size=(), channels=3)
    config.data.labels, config.data.validation = ("0 background", "255 -> 1 car", "7 -> ignore"), 0.4
    config.model.features, config.augment.crop = (2, 4), (16, 24)
    return config


def _flags(config, path, *more):
    """The flags of a tiny training on these images, every random draw of which counts."""
    flags = [f"--config.data.{name}={config.data[name]}" for name in ("name", "variant", "root", "size", "labels")]
    flags += [f"--config.data.validation={config.data.validation}", "--config.augment.crop=(16,24)"]
    return commands.training(path, *flags, "--config.model.dropout=0.0", "--config.model.norm=group", *more)


def test_scores_are_those_of_the_predictions_at_the_size_of_each_image(config, tmp_path):
    workdir = helpers.save_untrained(tmp_path / "run", config)
    result = evaluate.evaluate_workdir(workdir, None, None, "all", "horizontal")
    network = unet_jax.load(workdir)
    losses = []
    for name, counts, of_image in zip(SIZES, result.confusion, result.losses, strict=True):
        image, mask = (helpers.read_image(tmp_path / f"cars/{kind}/{name}.png") for kind in ("images", "masks"))
        probability = network.predict_image(image, tta="horizontal")[..., 0].astype(np.float64)
        car, counted = mask == 255, mask != 7
        expected = [
            [((car == row) & ((probability > 0.5) == column))[counted].sum() for column in (0, 1)] for row in (0, 1)
        ]
        assert counts.tolist() == expected
        losses.append(-np.log(np.where(car, probability, 1 - probability))[counted])
        np.testing.assert_allclose(of_image, losses[-1].mean(), rtol=1e-5)
    np.testing.assert_allclose(result.loss, np.concatenate(losses).mean(), rtol=1e-5)
    written = json.loads((workdir / "eval.json").read_text())
    assert "own_size" not in written and np.sum(written["confusion"]) == sum(h * w - 3 * w for h, w in SIZES.values())
    em = evaluate.open_split(_with_em_scores(network), workdir, "all", "none").scorer.score(network.variables)
    assert {record.key for record in em.records} >= {"v_rand", "v_info"}


def _with_em_scores(network):
    network.config.eval.em_scores = True
    return network


def test_images_that_are_scaled_are_scored_at_both_sizes(config, tmp_path):
    config.data.scale = 0.5
    workdir = helpers.save_untrained(tmp_path / "run", config)
    result = evaluate.evaluate_workdir(workdir, None, None, "all")
    assert result.own_size.sum() == sum(h * w - 3 * w for h, w in SIZES.values())
    assert result.confusion.sum() < result.own_size.sum() / 3.5
    network = unet_jax.load(workdir)
    assert network.predicted_size((90, 31), "train") == (45, 16)
    assert network.predicted_size((90, 31), "native") == (90, 31)
    with pytest.raises(UserError, match="the scale 'fit' is for networks trained on images resized to one size"):
        network.predict_image(np.zeros((90, 31, 3), np.uint8), "fit")


@pytest.mark.slow
def test_devices_processes_microbatches_and_restarts_make_no_difference(config, tmp_path):
    steady = (
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=0.05",
        "--config.train.log_every_steps=1",
    )

    def train(name, run=commands.succeed, devices=1, more=()):
        path = tmp_path / name / "run"
        run(*_flags(config, path, *steady, *more), folder=path.parent, devices=devices)
        rows = helpers.metric_rows(path)
        found = [row["train/loss"] for row in rows if "train/loss" in row]
        return path, found, [row["val/loss"] for row in rows if "val/loss" in row]

    path, expected, scores = train("one")
    assert len(expected) == 9 and len(scores) == 3 and (path / "report.html").exists()
    assert {file.name for file in (path / "panels").glob("*/*.png")} <= {f"{name}.png" for name in SIZES}
    more = ("--config.mesh.space=2", "--config.train.accumulate=2")
    _, found, found_scores = train("two processes", commands.succeed_together, devices=4, more=more)
    # Sums are added, and so rounded, in another order; see test_processes.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found_scores, scores, rtol=0, atol=1e-5)
    resumed = tmp_path / "resumed" / "run"
    flags = _flags(config, resumed, *steady)
    command = commands.Command(*flags, folder=resumed.parent, devices=1)
    command.wait_for("step 2/9")
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM and integrity.steps(resumed)[-1] < 9
    commands.succeed(*flags, folder=resumed.parent, devices=1)
    helpers.assert_same_run(path, resumed)


def test_the_plan_and_the_check_know_windows(config, tmp_path, capsys):
    assert check.check(config, tmp_path / "sheet.png")
    output = capsys.readouterr().out
    assert "(width x height); at their own size, seen in windows of 24x16" in output
    assert "note      1 of 5 images are smaller than a window: mirrored up to it" in output
    assert components.examples_per_epoch(config, data.load(config.data, "all")) == 3 + 9 + 12 + 3 + 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"augment.crop": ()}, r"config.augment.crop = \(\) must be the \(height, width\) of the windows"),
        ({"data.foreground": 1.5}, r"config.data.foreground = 1.5 is a share, in 0..1"),
        ({"data.scale": 0.0}, r"config.data.scale = 0.0 must be positive"),
        ({"data.scale": 0.5, "data.size": (16, 24)}, r"config.data.scale = 0.5 is for images at their own size"),
        ({"data.pixel_size": 0.5, "data.size": (16, 24)}, r"config.data.pixel_size = 0.5 is for images at their own"),
        ({"data.pixel_size": -0.5}, r"config.data.pixel_size = -0.5 must be positive, or 0 to keep the pixels"),
        ({"data.pixel_size": 0.5, "data.scale": 2.0}, r"instead of config.data.scale; here they are 'folder' and 2.0"),
        ({"data.size": (16,)}, r"config.data.size = \(16,\) must be .* or \(\) for images at their own size"),
    ],
)
def test_settings_that_do_not_fit_are_named(config, tmp_path, changes, message):
    for name, value in changes.items():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        components.examples_per_epoch(config, data.load(config.data, "train"))
