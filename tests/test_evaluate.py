"""Scoring a split and a work directory: exact, from the work directory alone, and with errors that name the file."""

import json
import shutil

import helpers
import jax
import numpy as np
import pytest

from unet_jax import data, losses, metrics
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.inference import forward
from unet_jax.parallel import sharding
from unet_jax.workdir import checkpoints, integrity, metrics_log


def _evaluate(config, variables, batch_size, mesh=None):
    source = data.load(config.data, "validation")
    images = pipeline.Pipeline(source, config.data.size, config.data.resize, 1.0)
    network = forward.create_network(config.model, source.classes, mesh or sharding.create_mesh(0, 1))
    loss = losses.make(config.loss, source.classes.task, len(source.classes.names))
    step = evaluate.make_eval_step(network, loss)
    batches = images.eval_batches(batch_size, np.arange(batch_size))
    return evaluate.evaluate(step, variables, batches, loss, network)


@pytest.mark.parametrize("variant", ["multiclass", "multilabel"])
def test_evaluation_is_exact_and_does_not_depend_on_batch_size_or_devices(config, variant):
    config.data.variant, config.loss.dice = variant, 1.0
    source = data.load(config.data, "validation")
    model = forward.create_network(config.model, source.classes, sharding.create_mesh(0, 1)).model
    variables = model.init(jax.random.key(3), np.zeros((1, *config.data.size, 1), np.float32))
    result = _evaluate(config, variables, 8)
    assert len(result.confusion) == len(source) == 10
    for index in range(len(source)):
        image, label = source.read(index)
        logits = np.asarray(model.apply(variables, image[None] / np.float32(255)))[0]
        expected = np.zeros_like(result.confusion[index])
        if variant == "multiclass":
            np.add.at(expected, (label, logits.argmax(-1)), 1)
        else:
            for k in range(6):
                np.add.at(expected[k], (label[..., k], (logits[..., k] > 0).astype(int)), 1)
        assert (result.confusion[index] == expected).all()
    assert result.confusion.sum() == 10 * 48 * 48 * (6 if variant == "multilabel" else 1)
    for batch_size, mesh in ((16, None), (24, None), (10, helpers.one_device())):
        other = _evaluate(config, variables, batch_size, mesh)
        assert (other.confusion == result.confusion).all()
        assert other.loss == pytest.approx(result.loss, rel=1e-6)  # convolutions of other batch sizes may round


def test_eval_mode_needs_the_work_directory_alone(trained, capsys, tmp_path):
    moved = trained.rename(tmp_path / "moved")
    try:
        result = evaluate.evaluate_workdir(moved, None, None, "validation", None)
        out = capsys.readouterr().out
        assert "background" in out and "mean IoU" in out and "10 images" in out
        written = json.loads((moved / "eval.json").read_text())
        assert written["miou"] == metrics.flatten(result.records)["miou"] and written["split"] == "validation"
        assert np.array(written["confusion"]).sum() == 10 * 48 * 48
        rows = {row["step"]: row for row in metrics_log.read(moved) if "val/miou" in row}
        best = max(rows.values(), key=lambda row: row["val/miou"])
        assert written["step"] == best["step"] and written["miou"] == best["val/miou"]
        assert written["loss"] == pytest.approx(best["val/loss"], rel=1e-6)
        evaluate.evaluate_workdir(moved, None, None, "train", None)
        assert "train split of shapes: 20 images" in capsys.readouterr().out
    finally:
        moved.rename(trained)


def test_errors_name_what_is_missing(trained, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        evaluate.evaluate_workdir(tmp_path, None, None, "validation", None)
    with pytest.raises(UserError, match=r"has no step 3; it has 4, 5"):
        evaluate.evaluate_workdir(trained, 3, None, "validation", None)
    (tmp_path / "config.json").write_text((trained / "config.json").read_text()[:100])
    with pytest.raises(UserError, match="config.json cannot be read"):
        evaluate.evaluate_workdir(tmp_path, None, None, "validation", None)
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(UserError, match="classes.json cannot be read"):
        evaluate.evaluate_workdir(tmp_path, None, None, "validation", None)
    (tmp_path / "classes.json").write_text((trained / "classes.json").read_text())
    with pytest.raises(UserError, match="was stopped before its first one"):
        evaluate.evaluate_workdir(tmp_path, None, None, "validation", None)


def test_absent_classes_are_shown_as_absent():
    names, counts = ("a", "b", "dog"), np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    result = evaluate.Evaluation(0.5, metrics.records(metrics.Counts(counts, names)), counts[None], names)
    table = evaluate.format_table(result)
    assert [line.split() for line in table.splitlines() if line.startswith("dog")] == [["dog", "absent", "absent"]]
    assert "over 2 classes present" in table


@pytest.mark.slow
def test_the_best_survives_nan_and_never_displaces_the_latest(config, tmp_path):
    _, state = helpers.build(config, sharding.create_mesh(0, 1))
    writer = checkpoints.CheckpointWriter(tmp_path)
    for step, score in ((1, 0.5), (2, float("nan")), (3, 0.9), (4, None), (5, 0.1), (6, 0.2), (7, None)):
        writer.save(step, state, {}, score)
    writer.close()
    assert (integrity.best_step(tmp_path), integrity.steps(tmp_path)) == (3, [3, 6, 7])


def test_a_damaged_checkpoint_is_named_with_the_step_before(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for file in (copy / "checkpoints" / "5" / "variables").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged: .* --step: 4"):
        evaluate.evaluate_workdir(copy, 5, None, "validation", None)
    evaluate.evaluate_workdir(copy, 4, None, "validation", None)


def test_a_flipped_bit_and_a_missing_file_are_named_with_another_step(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for step in ("4", "5"):
        folder = copy / "checkpoints" / step
        sums = json.loads((folder / "checksums.json").read_text())
        assert {str(file.relative_to(folder)) for file in folder.glob("*/**/*") if file.is_file()} == sums.keys()
    largest = helpers.largest_file(copy / "checkpoints/5/variables")
    helpers.flip_bit(largest)
    with pytest.raises(UserError, match=rf"{largest.name} is damaged, its checksum differs.* --step: 4"):
        evaluate.evaluate_workdir(copy, 5, None, "validation", None)
    largest.unlink()
    with pytest.raises(UserError, match=rf"{largest.name} is missing.* --step: 4"):
        evaluate.evaluate_workdir(copy, 5, None, "validation", None)
    evaluate.evaluate_workdir(copy, 4, None, "validation", None)


def test_images_of_another_task_are_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with helpers.edited_json(tmp_path / "run/config.json") as config:
        config["data"]["variant"] = "multilabel"
    with pytest.raises(UserError, match="for a multiclass task of 7 classes.* are for a multilabel task of 6"):
        evaluate.evaluate_workdir(tmp_path / "run", None, None, "validation", None)
