import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import data, metrics
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate, report, scores
from unet_jax.metrics import Record, confusion
from unet_jax.parallel import signals
from unet_jax.training import log, loop, setup
from unet_jax.workdir import integrity, lock, metrics_log

RNG = np.random.default_rng(0)


def _numpy_confusion(prediction, label, mask, classes):
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (label[mask], prediction[mask]), 1)
    return counts


def _scores(counts, names):
    """Key -> value, as in `metrics.jsonl`."""
    return metrics.flatten(metrics.records(metrics.Counts(counts, names)))


def test_confusion_equals_numpy():
    label, prediction = RNG.integers(0, 5, (2, 3, 7, 6))
    mask = RNG.random(label.shape) < 0.8
    label_given = jnp.asarray(np.where(mask, label, 255))
    counts = confusion.confusion(jnp.asarray(prediction), label_given, mask, "multiclass", 5)
    assert counts.dtype == jnp.int32
    for i in range(3):  # of each example
        expected = _numpy_confusion(prediction[i], label[i], mask[i], 5)
        assert (np.asarray(counts[i]) == expected).all()
        given = label_given[i].astype(np.uint8), prediction[i].astype(np.uint8)
        assert (confusion.count(given[1], np.asarray(given[0]), mask[i], "multiclass", 5) == expected).all()
    assert counts.sum() == mask.sum()


def test_multilabel_confusion_equals_numpy_per_class():
    label, prediction = RNG.integers(0, 2, (2, 3, 7, 6, 4))
    mask = RNG.random(label.shape) < 0.8
    counts = confusion.confusion(jnp.asarray(prediction), jnp.asarray(label), mask, "multilabel", 4)
    for i in range(3):
        for k in range(4):
            expected = _numpy_confusion(prediction[i, ..., k], label[i, ..., k], mask[i, ..., k], 2)
            assert (np.asarray(counts[i, k]) == expected).all()
            assert (confusion.count(prediction[i], label[i], mask[i], "multilabel", 4)[k] == expected).all()


def test_scores_worked_by_hand():
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # the third class is neither present nor predicted
    scores = _scores(counts, ("road", "car", "dog"))
    assert scores["accuracy"] == 9 / 12
    assert [scores[f"iou/{name}"] for name in ("road", "car", "dog")] == [6 / 9, 3 / 6, None]
    assert [scores[f"dice/{name}"] for name in ("road", "car", "dog")] == [12 / 15, 6 / 9, None]
    assert scores["miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert confusion.pixel_counts(counts).tolist() == [8, 4, 0]


def test_false_positives_of_an_absent_class_lower_the_others_but_do_not_count_in_the_mean():
    scores = _scores(np.array([[6, 2], [0, 0]]), ("road", "dog"))
    assert scores["iou/road"] == 6 / 8 and scores["iou/dog"] is None and scores["miou"] == 6 / 8


def test_multilabel_scores_worked_by_hand():
    counts = np.array([[[5, 1], [1, 3]], [[10, 0], [0, 0]]])
    scores = _scores(counts, ("plus", "ring"))
    assert scores["iou/plus"] == 3 / 5 and scores["iou/ring"] is None
    assert scores["accuracy"] == 18 / 20
    assert confusion.pixel_counts(counts).tolist() == [4, 0]


def test_of_two_classes_the_foreground_stands_first():
    found = metrics.records(metrics.Counts(np.array([[90, 2], [1, 7]]), ("background", "car")))
    first, *others = metrics.summary(found)
    assert (first.key, first.title, first.value) == ("dice/car", "Dice of car", 14 / 17)
    assert first.value == metrics.flatten(found)[first.key]
    assert [record.key for record in others] == ["accuracy", "miou", "mdice"]
    table = scores.format_table(0.5, found, {"background": 92, "car": 8})
    assert table.splitlines()[-1].startswith("Dice of car 0.8235   pixel accuracy 0.9700")
    # Neither three classes nor two overlapping masks have one that is the background.
    for described in (metrics.describe(("a", "b", "c")), metrics.describe(("a", "b"), "multilabel")):
        assert [record.key for record in metrics.summary(described)] == ["accuracy", "miou", "mdice"]


def test_scores_of_no_pixels_are_none():
    scores = _scores(np.zeros((2, 2), int), ("a", "b"))
    assert scores["accuracy"] is None and scores["miou"] is None


def test_predicted_labels():
    logits = jnp.array([[[[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]]]])
    assert confusion.predict_label(logits, "multiclass").tolist() == [[[1, 0]]]
    assert confusion.predict_label(logits, "multilabel").tolist() == [[[[0, 1, 1], [1, 0, 0]]]]
    assert confusion.predict_label(logits[..., :1], "binary").tolist() == [[[0, 1]]]


def test_records_have_these_keys_titles_and_directions():
    records = metrics.describe(("road", "car", "tree"))
    assert [(record.key, record.title) for record in records] == [
        ("accuracy", "pixel accuracy"),
        ("miou", "mean IoU"),
        ("mdice", "mean Dice"),
        ("iou", "IoU"),
        ("dice", "Dice"),
    ]
    assert [record.per_class for record in records] == [False, False, False, True, True]
    assert all(record.higher_is_better for record in records)
    assert metrics.flatten(records)["iou/car"] is None  # there are no values yet


# A new metric: one function that returns records, and its place in `metrics.METRICS`.


def missed(counts):
    """The share of pixels whose class is missed, in all and per class; and of those predicted as class 0."""
    total, pixels = counts.confusion, counts.confusion.sum(1)
    share = lambda part, whole: float(part / whole) if whole else None
    per_class = [share(n - hit, n) for n, hit in zip(pixels, total.diagonal(), strict=True)]
    return [
        Record("missed", "missed", share(pixels.sum() - total.trace(), pixels.sum()), higher_is_better=False),
        Record("miss", "Missed", dict(zip(counts.names, per_class, strict=True)), higher_is_better=False),
        Record("background_share", "background share", share(total[:, 0].sum(), pixels.sum())),
    ]


@pytest.fixture
def with_missed(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, missed))


@pytest.mark.usefixtures("with_missed")
def test_a_new_metric_is_in_table_json_and_log(tmp_path):
    counts, names = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]), ("road", "car", "dog")
    records = metrics.records(metrics.Counts(counts, names))
    result = scores.Evaluation(0.5, records, counts[None], names, [0.5])

    header, road, car, dog, last = scores.format_table(result.loss, result.records, result.pixels).splitlines()
    assert "Missed" in header and "missed 0.2500" in last
    assert "0.2500" in road and "0.2500" in car and dog.split() == ["dog", "absent", "absent", "absent"]

    values = json.loads(json.dumps(scores.to_json(result)))
    assert values["missed"] == 3 / 12 and values["miss"] == {"road": 2 / 8, "car": 1 / 4, "dog": None}

    settings = dict(steps_per_epoch=2.0, ends=[4], batch_size=1, every=1, skips_nonfinite=False)
    training_log = log.TrainingLog(tmp_path, schedule=lambda step: 0.1, **settings)
    training_log.add_evaluation(4, result, None)
    training_log.close()
    (row,) = metrics_log.read(tmp_path)
    assert row["val/missed"] == 3 / 12 and row["val/miss/car"] == 1 / 4 and row["val/miss/dog"] is None


@pytest.mark.usefixtures("with_missed")
def test_a_new_metric_can_be_the_best_metric_by_its_key(config):
    classes = data.classes(config.data)
    for key in ("missed", "miss/ring", "background_share"):
        evaluate.check(config.eval.to_dict() | {"best_metric": key}, classes)
    with pytest.raises(UserError, match="Did you mean 'missed'"):
        evaluate.check(config.eval.to_dict() | {"best_metric": "mised"}, classes)


def test_the_final_table_is_that_of_the_best_step(config, tmp_path):
    names, total = ("background", "car"), 10

    def result(wrong):
        counts = np.array([[60 - wrong, wrong], [wrong, 40 - wrong]])
        records = metrics.records(metrics.Counts(counts, names))
        return scores.Evaluation(0.1 * wrong, records, counts[None], names, [0.5])

    settings = dict(steps_per_epoch=2.0, ends=[total], batch_size=1, every=1, skips_nonfinite=False)
    training_log = log.TrainingLog(tmp_path, schedule=lambda step: 0.1, **settings)
    for step, wrong in ((5, 10), (total, 20)):
        training_log.add_evaluation(step, result(wrong), None)
    training_log.close()
    network = SimpleNamespace(classes=data.Classes("binary", names, ((0, 0, 0),) * 2))
    run = SimpleNamespace(path=tmp_path, config=config, log=training_log, steps=SimpleNamespace(total=total))
    run.components = SimpleNamespace(network=network)
    best, last = result(10), result(20)
    best_table, last_table = (scores.format_table(one.loss, one.records, one.pixels) for one in (best, last))
    assert loop._final_table(run, total) == (last_table, "")
    shown = [f"{metrics.flatten(one.records)['miou']:.4f}" for one in (best, last)]
    note = f", whose scores these are (miou {shown[0]}); after step {total} it was {shown[1]}"
    assert loop._final_table(run, 5) == (best_table, note)  # from metrics.jsonl: the same after a resume
    note = f", but these are the scores of step {total}, as metrics.jsonl has none of step 4"
    assert loop._final_table(run, 4) == (last_table, note)


def test_scores_of_one_class_alone_are_not_telling():
    names = ("background", "car")
    for counts, telling in (([[60, 3], [2, 5]], True), ([[60, 3], [0, 0]], False), ([[0, 0], [0, 0]], False)):
        counts = np.array(counts)
        result = scores.Evaluation(0.5, metrics.records(metrics.Counts(counts, names)), counts[None], names, [0.5])
        assert result.is_telling == telling
    overlapping = np.array([[[9, 0], [0, 0]], [[6, 1], [1, 1]]])  # only the second mask occurs
    result = scores.Evaluation(0.5, [], overlapping[None], names, [0.5])
    assert result.is_telling and not result._replace(confusion=overlapping[None, [0, 0]]).is_telling


def test_a_step_without_labelled_pixels_does_not_count_in_the_mean_loss(tmp_path):
    settings = dict(steps_per_epoch=2.0, ends=[3], batch_size=1, every=3, skips_nonfinite=False)
    training_log = log.TrainingLog(tmp_path, schedule=lambda step: 0.1, **settings)
    for step, (loss, labelled) in enumerate(((0.5, True), (0.0, False), (0.25, True)), 1):
        found = {"loss": loss, "grad_norm": 1.0, "param_norm": 1.0, "labelled": labelled, "signal": 0}
        training_log.add(step, found)
    training_log.close()
    assert metrics_log.read(tmp_path)[0]["train/loss"] == 0.375


@pytest.mark.slow
@pytest.mark.usefixtures("with_missed")
@pytest.mark.parametrize("best_metric, best", [("miss/circle", 1), ("background_share", 2)])
def test_a_new_metric_picks_the_best_checkpoint_whichever_direction_is_better(config, tmp_path, best_metric, best):
    config.eval.best_metric, config.train.eval_every_epochs = best_metric, 0.4  # every step
    with lock.Lock(tmp_path) as held, signals.Deferred() as deferred:
        run = setup.open_run(config, tmp_path, held)
        # Networks that predict one class everywhere, after steps 1 to 4: circles, background, triangles, triangles.
        for step, predicted in enumerate((2, 0, 3, 3), 1):
            bias = jax.device_put(100.0 * jnp.eye(7)[predicted], run.state.params["head"]["bias"].sharding)
            params = {**run.state.params, "head": {**run.state.params["head"], "bias": bias}}
            loop.evaluate_and_save(run, run.state.replace(params=params, ema=params), step, 0, deferred)
    run.writer.close()
    run.log.close()
    rows = {row["step"]: row for row in metrics_log.read(tmp_path)}
    assert [rows[step]["val/miss/circle"] for step in (1, 2, 3)] == [0, 1, 1]
    assert integrity.steps(tmp_path) == [best, 3, 4] and integrity.best_step(tmp_path) == best

    result = evaluate.evaluate_workdir(tmp_path, None, None, "validation")
    assert metrics.flatten(result.records)[best_metric] == rows[best][f"val/{best_metric}"]
    assert "missed" in report.write(tmp_path).read_text()
