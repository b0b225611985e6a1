"""Batches: a pure function of source, seed and step, whether cached or not, for any number of processes."""

import contextlib

import numpy as np
import pytest

from unet_jax.data import pipeline
from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError

CLASSES = Classes("multiclass", ("a", "b"), ((0, 0, 0), (1, 1, 1)), channels=1)


def _source(count=10, broken=()):
    """Images whose pixels all hold the index of the image."""

    def read(index):
        if index in broken:
            raise UserError(f"image {index} is broken")
        return np.full((6, 8, 1), index, np.uint8), np.full((6, 8), index % 2, np.uint8)

    settings = {"test": "test_pipeline", "broken": broken}
    return Source(CLASSES, [str(i) for i in range(count)], read, files=(), settings=settings)


def _pipeline(count=10, cached=True, **kwargs):
    return pipeline.Pipeline(_source(count, **kwargs), (6, 8), "nearest", cache_gib=1.0 if cached else 0.0)


def _train(images, steps, start=0, rows=np.arange(0, 4), seed=7):
    batches = images.train_batches(4, seed, start, rows)
    return [next(batches)["image"][:, 0, 0, 0].tolist() for _ in range(steps)]


@pytest.mark.parametrize("cached", [True, False])
def test_every_epoch_is_a_new_permutation(cached):
    images = _pipeline(cached=cached)
    assert images.cached == cached
    order = np.concatenate(_train(images, 10)).reshape(4, 10)
    assert (np.sort(order) == np.arange(10)).all()
    assert len(set(map(tuple, order.tolist()))) == 4
    assert _train(images, 10, seed=8) != _train(images, 10)


def test_shuffles_are_uniform():
    counts = np.zeros((3, 3))
    batches = _pipeline(3).train_batches(3, 0, 0, np.arange(0, 3))
    for _ in range(600):
        first, second, _ = next(batches)["image"][:, 0, 0, 0]
        counts[first, second] += 1
    pairs = counts[~np.eye(3, dtype=bool)]
    # Chi-square with 5 degrees of freedom: one seed in 1,000 exceeds 20.5.
    assert ((pairs - 100) ** 2 / 100).sum() < 20.5


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_pixels_of_each_class_are_counted_without_ignored_ones(task, cached):
    rng = np.random.default_rng(0)
    shape = (5, 12, 16) if task == "multiclass" else (5, 12, 16, 3)
    labels = rng.choice(np.array([0, 1, 255] if task == "multilabel" else [0, 1, 3, 255], np.uint8), shape)
    names = ("a", "b", "c", "d") if task == "multiclass" else ("a", "b", "c")
    classes = Classes(task, names, tuple((i, i, i) for i in range(len(names))), channels=1)
    read = lambda index: (np.zeros((12, 16, 1), np.uint8), labels[index])
    source = Source(classes, list("abcde"), read, files=(), settings={"test": "counts", "task": task})
    images = pipeline.Pipeline(source, (6, 8), "nearest", cache_gib=1.0 if cached else 0.0)
    seen = np.stack([images.read(i)["label"] for i in range(5)])  # at the size of the batches
    assert images.cached == cached and seen.shape[1:3] == (6, 8)
    if task == "multiclass":
        expected = [int((seen == value).sum()) for value in range(4)]
        assert expected[2] == 0 and sum(expected) < seen.size
    else:
        expected = [int((seen[..., mask] == 1).sum()) for mask in range(3)]
    assert images.class_counts() == expected


@pytest.mark.parametrize("cached", [True, False])
def test_resuming_at_any_step_gives_the_same_batches(cached):
    images = _pipeline(cached=cached)
    whole = _train(images, 12)
    for start in (0, 1, 5, 10, 11):  # an epoch is 2.5 steps
        assert _train(images, 12 - start, start) == whole[start:]


def test_cached_and_streamed_batches_are_equal():
    assert _train(_pipeline(cached=True), 6) == _train(_pipeline(cached=False), 6)


@pytest.mark.parametrize("cached", [True, False])
def test_two_processes_feed_the_batches_of_one(cached):
    images = _pipeline(cached=cached)
    halves = [_train(images, 6, rows=rows) for rows in (np.arange(0, 2), np.arange(2, 4))]
    assert [a + b for a, b in zip(*halves, strict=True)] == _train(images, 6)
    per_process = [list(images.eval_batches(4, rows)) for rows in (np.arange(0, 2), np.arange(2, 4))]
    for whole, *shares in zip(images.eval_batches(4, np.arange(0, 4)), *per_process, strict=True):
        for name, array in whole.items():
            assert (np.concatenate([share[name] for share in shares]) == array).all()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 16])
def test_evaluation_gives_every_example_once(cached, batch_size):
    batches = list(_pipeline(cached=cached).eval_batches(batch_size, np.arange(0, batch_size)))
    assert all(batch["image"].shape == (batch_size, 6, 8, 1) for batch in batches)
    seen = [
        i for batch in batches for i, counts in zip(batch["image"][:, 0, 0, 0], batch["mask"], strict=True) if counts
    ]
    assert seen == list(range(10))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "task, value, message",
    [
        ("multiclass", 2, r"example '7': label 2 is not in 0\.\.1 .* and not 255.* Values found: 0, 1, 2"),
        ("multiclass", 254, "example '7': label 254 .* Values found: 0, 1, 254"),
        ("multiclass", -1, "example '7': label -1 "),
        ("multiclass", 255, None),
        ("binary", 2, "example '7': label 2 "),
        ("multilabel", 2, r"example '7': label 2 is not in 0\.\.1 "),
        ("multilabel", 255, None),
    ],
)
def test_a_label_that_is_no_class_is_an_error(cached, task, value, message):
    label = np.eye(6, 8, dtype=np.uint8 if value > 0 else np.int16)
    wrong = np.where(np.arange(8) == 7, value, label).astype(label.dtype)
    names = ("a", "b", "c") if task == "multilabel" else ("a", "b")
    to_masks = (lambda label: np.stack([label] * 3, -1)) if task == "multilabel" else lambda label: label
    source = Source(
        Classes(task, names, ((0, 0, 0),) * len(names), channels=1),
        [str(i) for i in range(10)],
        lambda index: (np.zeros((6, 8, 1), np.uint8), to_masks(wrong if index == 7 else label)),
        files=(),
        settings={"test": "labels", "task": task, "value": value},
    )
    raises = contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message)
    with raises:
        images = pipeline.Pipeline(source, (6, 8), "nearest", cache_gib=1.0 if cached else 0.0)
        list(images.eval_batches(4, np.arange(0, 4)))


@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_image_is_named(cached):
    with pytest.raises(UserError, match="image 3 is broken"):
        list(_pipeline(cached=cached, broken=(3,)).eval_batches(4, np.arange(0, 4)))


def test_batches_are_uint8_of_the_right_shape():
    batch = next(_pipeline().train_batches(4, 0, 0, np.arange(0, 4)))
    assert batch["image"].dtype == batch["label"].dtype == np.uint8
    assert batch["label"].shape == (4, 6, 8)
    assert batch["mask"].dtype == bool and batch["mask"].all()
    assert (batch["label"][:, 0, 0] == batch["image"][:, 0, 0, 0] % 2).all()
