import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax.metrics import confusion

RNG = np.random.default_rng(0)


def _numpy_confusion(prediction, label, mask, classes):
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (label[mask], prediction[mask]), 1)
    return counts


def test_confusion_equals_numpy():
    label, prediction = RNG.integers(0, 5, (2, 3, 7, 6))
    mask = RNG.random(label.shape) < 0.8
    counts = confusion.confusion(jnp.asarray(prediction), jnp.asarray(np.where(mask, label, 255)), mask, "multiclass", 5)
    assert counts.dtype == jnp.int32
    assert (np.asarray(counts) == _numpy_confusion(prediction, label, mask, 5)).all()
    assert counts.sum() == mask.sum()


def test_multilabel_confusion_equals_numpy_per_class():
    label, prediction = RNG.integers(0, 2, (2, 3, 7, 6, 4))
    mask = RNG.random(label.shape) < 0.8
    counts = confusion.confusion(jnp.asarray(prediction), jnp.asarray(label), mask, "multilabel", 4)
    for k in range(4):
        expected = _numpy_confusion(prediction[..., k], label[..., k], mask[..., k], 2)
        assert (np.asarray(counts[k]) == expected).all()


def test_scores_worked_by_hand():
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # nothing of the third class, nor predicted as such
    scores = confusion.scores(counts, ("road", "car", "dog"))
    assert scores["accuracy"] == 9 / 12
    assert scores["iou"] == {"road": 6 / 9, "car": 3 / 6, "dog": None}
    assert scores["dice"] == {"road": 12 / 15, "car": 6 / 9, "dog": None}
    assert scores["miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert scores["pixels"] == {"road": 8, "car": 4, "dog": 0}


def test_false_positives_of_an_absent_class_lower_the_others_but_not_the_mean():
    scores = confusion.scores(np.array([[6, 2], [0, 0]]), ("road", "dog"))
    assert scores["iou"] == {"road": 6 / 8, "dog": None} and scores["miou"] == 6 / 8


def test_multilabel_scores_worked_by_hand():
    counts = np.array([[[5, 1], [1, 3]], [[10, 0], [0, 0]]])
    scores = confusion.scores(counts, ("plus", "ring"))
    assert scores["iou"] == {"plus": 3 / 5, "ring": None}
    assert scores["accuracy"] == 18 / 20


def test_no_pixel_at_all():
    scores = confusion.scores(np.zeros((2, 2), int), ("a", "b"))
    assert scores["accuracy"] is None and scores["miou"] is None


def test_predicted_labels():
    logits = jnp.array([[[[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]]]])
    assert confusion.predict_label(logits, "multiclass").tolist() == [[[1, 0]]]
    assert confusion.predict_label(logits, "multilabel").tolist() == [[[[0, 1, 1], [1, 0, 0]]]]
    assert confusion.predict_label(logits[..., :1], "binary").tolist() == [[[0, 1]]]
