"""Windows of images at their own size: where they lie, what is in them, and that nothing else makes a difference."""

import collections

import numpy as np
import pytest

from unet_jax.data import border, pipeline, windows
from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError

IGNORED = 255
CLASSES = Classes("multiclass", ("ground", "thing", "rare"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), channels=3)
BINARY = Classes("binary", ("ground", "thing"), ((0, 0, 0), (1, 1, 1)), channels=3)
MASKS = Classes("multilabel", ("ground", "thing"), ((0, 0, 0), (1, 1, 1)), channels=3)
SIZES = [(40, 50), (16, 90), (64, 32), (9, 12)]
WINDOW = windows.Windows(size=(16, 24), reach=(3, 5), foreground=0.0)


def _label(index):
    """Mostly class 0, with a block of class 1 and three pixels of class 2; the last image has class 0 alone."""
    label = np.zeros(SIZES[index], np.uint8)
    if index < 3:
        label[4:10, 7:20] = 1
        label[12, 20:23] = 2
    return label


def _image(index):
    """Its channels are the number of the image, and row and column of each pixel."""
    height, width = SIZES[index]
    rows, columns = np.indices((height, width))
    return np.stack([np.full_like(rows, index), rows, columns], -1).astype(np.uint8)


def _pipeline(cached=True, scale=1.0, label=_label, classes=CLASSES, count=4, notify=print):
    read = lambda index: (_image(index), label(index))
    settings = {"test": "test_windows", "label": label(0).tobytes().hex(), "count": count}
    ids, factors = [str(i) for i in range(count)], lambda index: (scale, scale)
    source = Source(classes, ids, read, files=(), settings={**settings, "scale": scale}, factors=factors)
    return pipeline.Pipeline(source, (), "nearest", 1.0 if cached else 0.0, notify=notify)


def _batches(images, steps, start=0, rows=np.arange(4), drawn=WINDOW, seed=7):
    batches = images.train_batches(4, seed, start, rows, drawn)
    return [next(batches) for _ in range(steps)]


def _inner(batch, name):
    """What is in the windows themselves."""
    (top, left), (height, width) = WINDOW.reach, WINDOW.size
    return batch[name][:, top : top + height, left : left + width]


def test_an_epoch_has_as_many_windows_of_each_image_as_cover_it():
    images, expected = _pipeline(), {0: 9, 1: 4, 2: 8, 3: 1}
    assert windows.per_image(SIZES, WINDOW.size).tolist() == list(expected.values())
    numbers = np.concatenate([batch["image"][:, 0, 0, 0] for batch in _batches(images, 11)])  # 2 epochs of 22 windows
    for epoch in numbers.reshape(2, 22).tolist():
        assert collections.Counter(epoch) == expected


def test_a_window_shows_the_image_at_its_place_and_mirrors_it_outside_where_the_label_is_ignored():
    for batch in _batches(_pipeline(), 30):
        for image, label in zip(batch["image"].astype(int), batch["label"], strict=True):
            index = image[0, 0, 0]
            height, width = SIZES[index]
            rows, columns = image[:, 0, 1], image[0, :, 2]
            np.testing.assert_array_equal(image, _image(index)[rows[:, None], columns])  # whole rows and columns
            assert (
                np.abs(np.diff(rows)).max() == np.abs(np.diff(columns)).max() == 1
            )  # mirrored: they turn at the border
            inside = label != IGNORED
            np.testing.assert_array_equal(label[inside], _label(index)[rows[:, None], columns][inside])
            # What is inside is a rectangle, as large as the image allows, in which nothing is mirrored.
            found_rows, found_columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert inside.sum() == len(found_rows) * len(found_columns)
            assert (np.diff(rows[found_rows]) == 1).all() and (np.diff(columns[found_columns]) == 1).all()
            # The window itself is inside the image, or the image inside of the window.
            top, left = WINDOW.reach
            assert (label[top : top + 16, left : left + 24] != IGNORED).sum() == min(height, 16) * min(width, 24)


def test_loss_weights_are_cut_with_their_labels_and_0_outside():
    of_label = border.BorderWeights(10.0, 5.0, IGNORED)
    images = pipeline.Pipeline(_pipeline().source, (), "nearest", 1.0, of_label)
    for batch in _batches(images, 10):
        for image, label, weight in zip(batch["image"], batch["label"], batch["weight"], strict=True):
            whole = of_label(_label(image[0, 0, 0]))
            expected = np.where(label == IGNORED, 0, whole[image[..., 1], image[..., 2]])
            np.testing.assert_array_equal(weight, expected)


def test_windows_lie_anywhere_with_the_same_probability():
    batches = _batches(_pipeline(), 600)
    rows, columns = [], []
    for batch in batches:
        image = _inner(batch, "image")
        chosen = image[:, 0, 0, 0] == 0
        rows += image[chosen, 0, 0, 1].tolist()
        columns += image[chosen, 0, 0, 2].tolist()
    for found, places in ((rows, 40 - 16 + 1), (columns, 50 - 24 + 1)):
        counts = np.bincount(found, minlength=places)
        assert len(counts) == places
        # Chi-square with 24 or 26 degrees of freedom: one seed in 1,000 exceeds 52 or 55.
        assert ((counts - len(found) / places) ** 2 / (len(found) / places)).sum() < 52


def test_a_share_of_the_windows_is_centred_on_a_pixel_of_a_class_drawn_evenly():
    drawn = windows.Windows((5, 5), (0, 0), foreground=1.0)
    batches = _batches(_pipeline(count=1), 300, drawn=drawn)
    at_centre = np.concatenate([batch["label"][:, 2, 2] for batch in batches])
    shares = np.bincount(at_centre, minlength=3) / len(at_centre)  # standard deviation 0.014
    # Windows stay within the image, so that a few near its border are centred on another pixel than the one drawn.
    assert abs(shares[2] - 1 / 3) < 0.05 and abs(shares[1] - 1 / 3) < 0.05
    half = windows.Windows((5, 5), (0, 0), foreground=0.5)
    at_centre = np.concatenate([batch["label"][:, 2, 2] for batch in _batches(_pipeline(count=1), 300, drawn=half)])
    assert abs((at_centre == 2).mean() - 1 / 6) < 0.04  # three pixels of 2,000


def test_two_classes_and_masks_balance_what_is_not_background():
    drawn = windows.Windows((5, 5), (0, 0), foreground=1.0)
    one = lambda index: (_label(index) == 2).astype(np.uint8)
    batches = _batches(_pipeline(label=one, classes=BINARY, count=3), 50, drawn=drawn)
    assert np.mean([batch["label"][:, 2, 2] == 1 for batch in batches]) == 1
    two = lambda index: np.stack([_label(index) == 0, _label(index) == 2], -1).astype(np.uint8)
    batches = _batches(_pipeline(label=two, classes=MASKS, count=3), 100, drawn=drawn)
    assert abs(np.mean([batch["label"][:, 2, 2, 1] for batch in batches]) - 0.5) < 0.1


def test_no_window_without_a_labelled_pixel_is_drawn():
    def sparse(index):
        label = np.full(SIZES[index], IGNORED, np.uint8)
        if index < 2:
            label[10, 11] = index
        return label

    said = []
    batches = _batches(_pipeline(label=sparse, notify=said.append), 100)
    assert all((_inner(batch, "label") != IGNORED).any((1, 2)).all() for batch in batches)
    assert {int(i) for batch in batches for i in batch["image"][:, 0, 0, 0]} == {0, 1}
    assert said[0] == "note: no window is drawn from 2 images without labelled pixels"
    assert said[1].startswith("note: 1 of 4 training images are smaller than a window of 16x24")
    nothing = lambda index: np.full(SIZES[index], IGNORED, np.uint8)
    with pytest.raises(UserError, match="every pixel of every training image is ignored"):
        _batches(_pipeline(label=nothing), 1)


@pytest.mark.parametrize("foreground", [0.0, 0.5])
def test_neither_cache_nor_processes_nor_a_restart_make_a_difference(foreground):
    drawn = windows.Windows(WINDOW.size, WINDOW.reach, foreground)
    expected = _batches(_pipeline(), 20, drawn=drawn)

    def check(found, expected, rows=slice(None)):
        for batch, other in zip(found, expected, strict=True):
            assert batch.keys() == other.keys() == {"image", "label", "mask"}
            assert all((batch[name] == other[name][rows]).all() for name in other)

    check(_batches(_pipeline(cached=False), 20, drawn=drawn), expected)
    check(_batches(_pipeline(), 13, start=7, drawn=drawn), expected[7:])
    for rows in ([0, 1], [3], [2, 0]):
        check(_batches(_pipeline(), 20, rows=np.array(rows), drawn=drawn), expected, rows)
    other = _batches(_pipeline(), 20, drawn=drawn, seed=8)
    assert any((batch["image"] != expected[i]["image"]).any() for i, batch in enumerate(other))


def test_whole_images_of_many_sizes_make_no_batches():
    with pytest.raises(ValueError, match="read them one by one"):
        _pipeline().eval_batches(4, np.arange(4))
    with pytest.raises(ValueError, match="windows are drawn from images at their own size"):
        _batches(_pipeline(), 1, drawn=None)


def test_a_scale_changes_the_size_of_all_images():
    images = _pipeline(scale=0.5)
    assert [images.read(i)["image"].shape[:2] for i in range(4)] == [(20, 25), (8, 45), (32, 16), (4, 6)]
    assert images.read(0)["label"].shape == (20, 25)


def test_pixels_of_each_class_are_listed_and_some_of_very_many():
    label = np.array([[0, 1, 255], [2, 1, 0]], np.uint8)
    found = windows.index_pixels(label, CLASSES)
    of_classes = np.split(found["pixels"], found["ends"])
    assert [part.tolist() for part in of_classes] == [[0, 5], [1, 4], [3], [0, 1, 3, 4, 5], []]
    many = windows.index_pixels(np.zeros((200, 200), np.uint8), CLASSES)
    assert many["ends"].tolist() == [windows.INDEXED] * 3 + [2 * windows.INDEXED]
    assert len(set(many["pixels"].tolist())) > 5_000 and 0 <= many["pixels"].min() and many["pixels"].max() < 200**2
    np.testing.assert_array_equal(
        many["pixels"], windows.index_pixels(np.zeros((200, 200), np.uint8), CLASSES)["pixels"]
    )


@pytest.mark.parametrize("length", [1, 2, 7])
def test_indices_are_reflected_without_repeating_the_border(length):
    expected = np.pad(np.arange(length), 20, mode="reflect") if length > 1 else np.zeros(41)
    np.testing.assert_array_equal(windows.mirror(np.arange(-20, length + 20), length), expected)
