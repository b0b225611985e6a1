import json
import shutil

import jax
import numpy as np
import pytest

from unet_jax import data
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.metrics import confusion
from unet_jax.models import unet
from unet_jax.parallel import sharding
from unet_jax.training import state
from unet_jax.workdir import checkpoints, files, integrity, metrics_log


def _evaluate(config, variables, batch_size, variant, devices=None):
    config.data.variant = variant
    source = data.load(config.data, "validation")
    images = pipeline.Pipeline(source, config.data.size, config.data.resize, 1.0)
    model = unet.create(source.classes.num_outputs, **config.model)
    devices = devices or sharding.create_mesh(0, 1)
    if variables is None:
        variables = model.init(jax.random.key(3), np.zeros((1, *config.data.size, 1), np.float32))
    step = evaluate.make_eval_step(model, source.classes, config, devices)
    batches = images.eval_batches(batch_size, np.arange(batch_size))
    weights = {"cross_entropy": 1.0, "dice": 1.0}
    result = evaluate.evaluate(step, variables, batches, devices, weights, source.classes)
    return result, source, model, variables


@pytest.mark.parametrize("variant", ["multiclass", "multilabel"])
def test_evaluation_is_exact_and_does_not_depend_on_batch_size_or_devices(config, variant):
    result, source, model, variables = _evaluate(config, None, 8, variant)
    expected = np.zeros_like(result.confusion)
    for index in range(len(source)):
        image, label = source.read(index)
        logits = np.asarray(model.apply(variables, image[None] / np.float32(255)))[0]
        if variant == "multiclass":
            np.add.at(expected, (label, logits.argmax(-1)), 1)
        else:
            for k in range(6):
                np.add.at(expected[k], (label[..., k], (logits[..., k] > 0).astype(int)), 1)
    assert (result.confusion == expected).all()
    assert result.confusion.sum() == 10 * 48 * 48 * (6 if variant == "multilabel" else 1)
    for batch_size, devices in ((16, None), (24, None), (10, sharding.create_mesh(1, 1, jax.devices()[:1]))):
        other, *_ = _evaluate(config, variables, batch_size, variant, devices)
        assert (other.confusion == result.confusion).all()
        assert other.loss == pytest.approx(result.loss, rel=1e-6)  # convolutions of other batch sizes may round


def test_eval_mode_needs_the_work_directory_alone(trained, capsys, tmp_path):
    moved = trained.rename(tmp_path / "moved")
    try:
        result = evaluate.evaluate_workdir(moved, None, None, "validation", None)
        out = capsys.readouterr().out
        assert "background" in out and "mean IoU" in out and "10 images" in out
        written = json.loads((moved / "eval.json").read_text())
        assert written["miou"] == result.scores["miou"] and written["split"] == "validation"
        assert np.array(written["confusion"]).sum() == 10 * 48 * 48
        rows = {row["step"]: row for row in metrics_log.read(moved) if "val/miou" in row}
        best = max(rows.values(), key=lambda row: row["val/miou"])
        assert written["step"] == best["step"] and written["miou"] == best["val/miou"]
        assert written["loss"] == pytest.approx(best["val/loss"], rel=1e-6)
        evaluate.evaluate_workdir(moved, None, None, "train", None)
        assert "train split of shapes: 20 images" in capsys.readouterr().out
    finally:
        moved.rename(trained)


def test_eval_mode_names_what_is_missing(trained, tmp_path):
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
    with pytest.raises(UserError, match="stopped before the first"):
        evaluate.evaluate_workdir(tmp_path, None, None, "validation", None)


def test_absent_classes_are_shown_as_absent():
    from unet_jax.evaluation import evaluate

    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    table = evaluate.format_table(evaluate.Evaluation(0.5, confusion.scores(counts, ("a", "b", "dog")), counts, {}))
    assert [line.split() for line in table.splitlines() if line.startswith("dog")] == [["dog", "absent", "absent"]]
    assert "over 2 classes present" in table


def test_the_best_survives_nan_and_never_displaces_the_latest(config, tmp_path):
    source = data.load(config.data, "train")
    model = unet.create(source.classes.num_outputs, **config.model)
    import optax

    from unet_jax.parallel import sharding

    tiny = state.create(0, model, (1, 48, 48, 1), optax.identity(), False, sharding.create_mesh(0, 1))
    writer = checkpoints.CheckpointWriter(tmp_path)
    for step, score in ((1, 0.5), (2, float("nan")), (3, 0.9), (4, None), (5, 0.1), (6, 0.2), (7, None)):
        writer.save(step, tiny, {}, score)
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
        sums = json.loads((copy / "checkpoints" / step / "checksums.json").read_text())
        files = {str(f.relative_to(copy / "checkpoints" / step)) for f in (copy / "checkpoints" / step).glob("*/**/*")}
        assert {name for name in files if (copy / "checkpoints" / step / name).is_file()} == sums.keys()
    files = [file for file in (copy / "checkpoints/5/variables").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=rf"{largest.name} is not what was written.* --step: 4"):
        evaluate.evaluate_workdir(copy, 5, None, "validation", None)
    largest.unlink()
    with pytest.raises(UserError, match=rf"{largest.name} is missing.* --step: 4"):
        evaluate.evaluate_workdir(copy, 5, None, "validation", None)
    evaluate.evaluate_workdir(copy, 4, None, "validation", None)


def test_images_of_another_task_are_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = files.read_json(tmp_path / "run/config.json")
    config["data"]["variant"] = "multilabel"
    files.write_json(tmp_path / "run/config.json", config)
    with pytest.raises(UserError, match="for a multiclass task of 7 classes.* are for a multilabel task of 6"):
        evaluate.evaluate_workdir(tmp_path / "run", None, None, "validation", None)
