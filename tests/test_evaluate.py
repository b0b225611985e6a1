"""Scoring a split and a work directory: exact, from the work directory alone, and with errors that name the file."""

import csv
import io
import json
import re
import shutil

import helpers
import jax
import numpy as np
import pytest

import unet_jax
from unet_jax import data, losses, metrics
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate, report, scores
from unet_jax.inference import forward, predict
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
        assert "train split of shapes: 20 images of 40" in capsys.readouterr().out
    finally:
        moved.rename(trained)


def _save_cars(root, names):
    """Photographs with a car, and its masks; the last one is empty."""
    rng = np.random.default_rng(0)
    for name in names:
        mask = np.zeros((16, 24), np.uint8)
        mask[4:10, 5:15] = 0 if name == names[-1] else 255
        helpers.save_image(rng.integers(0, 255, (16, 24, 3), np.uint8), root / "images" / f"{name}.png")
        helpers.save_image(mask, root / "masks" / f"{name}.png")


@pytest.fixture
def cars(config, tmp_path):
    """The work directory of an untrained network for `tmp_path / "cars"`."""
    _save_cars(tmp_path / "cars", [f"car{i}" for i in range(5)])
    config.data.update(name="folder", variant="binary", root=str(tmp_path / "cars"), size=(16, 24), channels=3)
    config.data.labels, config.model.features = ("0 background", "255 -> 1 car"), (2, 4)
    config.augment.flip_horizontal, config.augment.rotate = True, 10.0
    return helpers.save_untrained(tmp_path / "run", config)


def test_other_images_are_all_scored_and_no_scores_land_over_others(cars, tmp_path, capsys):
    _save_cars(tmp_path / "unseen", ["=1+1", "a,b", "c", "d"])
    _save_cars(tmp_path / "other/cars", [f"car{i}" for i in range(5)])
    evaluate.evaluate_workdir(cars, None, None)
    assert f"validation split of {tmp_path}/cars: 1 image of 5;" in capsys.readouterr().out
    unseen = str(tmp_path / "unseen")
    result = evaluate.evaluate_workdir(cars, None, unseen)
    out = capsys.readouterr().out
    assert f"all images of {unseen}: 4 images of 4;" in out and "warning" not in out
    assert len(result.confusion) == 4
    evaluate.evaluate_workdir(cars, None, unseen, "validation")
    assert f"validation split of {unseen}: 1 image of 4;" in capsys.readouterr().out
    evaluate.evaluate_workdir(cars, None, str(tmp_path / "other/cars"))
    out = capsys.readouterr().out
    assert "5 images of 5" in out and "have the names of those of the training" in out and "--split=validation" in out

    stems = [
        "cars-validation-1-none",
        "cars_HASH-all-1-none",
        "unseen_HASH-all-1-none",
        "unseen_HASH-validation-1-none",
    ]
    found = {re.sub("_[0-9a-f]{8}-", "_HASH-", file.name): file for file in (cars / "eval").iterdir()}
    assert sorted(found) == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "json"))
    written = json.loads(found["unseen_HASH-all-1-none.json"].read_text())
    scored = {"step": 1, "split": "all", "data_root": unseen, "images": 4, "tta": "none"}
    assert scored.items() <= written.items() and written["dice"] == result.records[0].value
    latest, last = (cars / file for file in ("eval.json", found["cars_HASH-all-1-none.json"]))
    assert latest.read_text() == last.read_text()

    lines = list(csv.DictReader(io.StringIO(found["unseen_HASH-all-1-none.csv"].read_text())))
    assert [line["id"] for line in lines] == ["'=1+1", "a,b", "c", "d"]
    for line, counts in zip(lines, result.confusion, strict=True):
        alone = metrics.flatten(metrics.records(metrics.Counts(counts, result.names)))
        assert {key: float(line[key]) if line[key] else None for key in alone} == alone
    assert lines[-1]["dice/car"] == lines[-1]["iou/car"] == "" and lines[-1]["pixels"] == "384"
    assert np.mean([float(line["loss"]) for line in lines]) == pytest.approx(result.loss)  # images of one size

    text = report.write(cars, data_dir=unseen).read_text()
    assert f"all 4 images of 16x24 in {unseen}" in text
    assert text.index("<dt>Dice of car</dt>") < text.index("<dt>mean IoU</dt>")
    shutil.rmtree(unseen)
    # The latest scores are of other images, but a report finds those of these.
    kept = f"eval/{found['unseen_HASH-all-1-none.json'].name}, 4 images, test-time augmentation none"
    assert kept in report.write(cars, data_dir=unseen).read_text()


def test_files_of_scores_have_short_safe_names_and_one_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = lambda root: scores.data_name(root, "data/cars", "folder")
    assert name("data/cars") == name(str(tmp_path / "data/cars")) == name("data/../data/cars/") == "cars"
    assert scores.data_name("", "", "shapes") == "shapes"
    roots = ["cars", "x/cars", "gs://bucket/cars", "/", "", "a b/[1e-3]", "..", "n" * 300, "é", "\udce9", "cars.zip"]
    names = [name(root) for root in roots]
    assert len(set(names)) == len(names) and "cars" not in names
    assert all(re.fullmatch(r"[\w-][\w.-]*_[0-9a-f]{8}", one, re.ASCII) and len(one) < 60 for one in names)


@pytest.mark.slow
def test_every_way_in_takes_the_views_of_the_training_and_warns_of_others(cars, tmp_path, capsys):
    with helpers.edited_json(cars / "config.json") as values:
        values["eval"]["tta"] = "auto"
    warning = "warning: test-time augmentation 'flips' averages over views that training never drew "
    warning += "(turned by 180 degrees, flipped vertically), which can make it worse; here 'auto' means 'horizontal'"
    image, network = np.zeros((1, 16, 24, 3), np.uint8), unet_jax.load(cars)
    evaluate.evaluate_workdir(cars, None, None)
    assert network.resolve_tta() == "horizontal"
    assert (network.predict(image, tta="auto") == network.predict(image, tta="horizontal")).all()
    assert "warning: test-time" not in capsys.readouterr().out
    ways = {
        "eval": lambda: evaluate.evaluate_workdir(cars, None, None, tta="flips"),
        "predict": lambda: predict.predict_files(cars, str(tmp_path / "cars"), tmp_path / "out", tta="flips"),
        "load": lambda: [network.predict_image(image[0], tta="flips") for _ in range(2)],
        "report": lambda: report.write(cars),
    }
    for name, way in ways.items():
        if name == "report":
            with helpers.edited_json(cars / "config.json") as values:
                values["eval"]["tta"] = "flips"
        way()
        assert capsys.readouterr().out.count(warning) == 1, name
    assert json.loads((tmp_path / "out/predictions.json").read_text())["tta"] == "flips"
    assert {file.stem for file in (cars / "eval").iterdir()} == {
        f"cars-validation-1-{x}" for x in ("horizontal", "flips")
    }
    with pytest.raises(UserError, match="--tta = 'flip'.*Did you mean 'flips'"):
        evaluate.evaluate_workdir(cars, None, None, tta="flip")


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
    result = scores.Evaluation(0.5, metrics.records(metrics.Counts(counts, names)), counts[None], names, [0.5])
    table = scores.format_table(result.loss, result.records, result.pixels)
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


def test_images_of_another_task_are_refused(trained):
    network = unet_jax.load(trained)
    network.config.data.variant = "multilabel"
    with pytest.raises(UserError, match="for a multiclass task of 7 classes.* are for a multilabel task of 6"):
        evaluate.open_split(network, trained, "validation", "none")
