"""A work directory written by version 0.1.0, before the package was divided into rooms: everything still reads it.

The archive holds the run of `tiny.py` up to step 5 of 10 on one CPU device, without what is only to look at, and
`expected.json`: the scores, probabilities and metrics that version 0.1.0 got from it. Float32 sums are reordered on
other devices and by other compiler settings: a relative 1e-4 after five steps of Adam.
"""

import json
import tarfile

import numpy as np
import pytest
import tiny
from helpers import ROOT, read_image, save_image

import unet_jax
from configs import default
from unet_jax import defaults
from unet_jax.evaluation import evaluate
from unet_jax.inference import predict
from unet_jax.training import loop
from unet_jax.workdir import checkpoints, files

ARCHIVE = ROOT / "tests" / "fixtures" / "workdir_0_1_0.tar.xz"


@pytest.fixture
def old(tmp_path):
    """The work directory, and what version 0.1.0 found."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "workdir", json.loads((tmp_path / "expected.json").read_text())


def test_it_is_loaded_and_predicts_the_same(old):
    path, expected = old
    image = (np.arange(48 * 48) % 251).astype(np.uint8).reshape(1, 48, 48, 1)
    probability = np.asarray(unet_jax.load(path).predict(image))
    np.testing.assert_allclose(probability.mean((0, 1, 2)), expected["probability_mean"], rtol=1e-4)
    np.testing.assert_allclose(probability[0, 7, 11], expected["pixel"], rtol=1e-4)


def test_it_is_scored_the_same(old):
    path, expected = old
    result = evaluate.evaluate_workdir(path, 5, None, "validation")
    written = json.loads((path / "eval.json").read_text())
    assert written.keys() == expected["eval"].keys()
    assert written["pixels"] == expected["eval"]["pixels"] and written["images"] == 10
    # A pixel whose two best classes are level may go to the other one: 4 of 23,040.
    assert np.abs(np.subtract(written["confusion"], expected["eval"]["confusion"])).sum() <= 8
    assert result.loss == pytest.approx(expected["eval"]["loss"], rel=1e-4)


def test_it_predicts_files(old, tmp_path):
    path, _ = old
    save_image((np.arange(48 * 64) % 251).astype(np.uint8).reshape(48, 64), tmp_path / "a.png")
    predict.predict_files(path, str(tmp_path / "a.png"), tmp_path / "masks")
    assert read_image(tmp_path / "masks" / "a.png").shape == (48, 64)


@pytest.mark.slow
def test_it_is_resumed_to_the_same_end(old, capsys):
    path, expected = old
    loop.train(tiny.get_config(), path)
    assert "Resuming from step 5" in capsys.readouterr().out
    assert "config" in checkpoints.read_meta(path, 10)  # unlike step 5, it remembers what it was saved with
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in expected["finished"]]
    for row, before in zip(rows, expected["finished"], strict=True):
        assert row.keys() == before.keys()
        for key in {"train/loss", "train/grad_norm", "train/learning_rate", "val/loss"} & row.keys():
            assert row[key] == pytest.approx(before[key], rel=1e-4), (row["step"], key)


def test_no_default_has_changed_since(old):
    path, _ = old
    written = defaults.flatten(json.loads((path / "config.json").read_text()))
    changed_by_tiny = defaults.differing(defaults.flatten(json.loads(tiny.get_config().to_json())))
    now = defaults.flatten(json.loads(default.get_config().to_json()))
    assert {name: now[name] for name in written if name not in changed_by_tiny} == {
        name: value for name, value in written.items() if name not in changed_by_tiny
    }
    assert files.read_config(path).model.name == "unet"  # a later field
