"""What `--mode=check` measures: objects that a resize loses, hashes of copies, and the choice of what is drawn."""

import io

import numpy as np
import pytest
from etils import epath
from PIL import Image
from scipy import ndimage

from unet_jax.data import images
from unet_jax.data.source import Classes, Source
from unet_jax.evaluation import check_sheet, duplicates, image_hash, inspection

RNG = np.random.default_rng(1)
CLASSES = Classes("multiclass", ("background", "cell", "dirt"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))


def _picture(height=120, width=160):
    """Soft blobs uint8 `[height, width, 3]`."""
    blobs = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), np.uint8))
    return np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(20, 30), (13, 17), (40, 60), (80, 90)])
def test_an_object_is_lost_if_none_of_its_pixels_is_picked(size):
    label = RNG.choice([0, 1, 2, 255], (40, 60), p=[0.8, 0.12, 0.05, 0.03]).astype(np.uint8)
    found = inspection.find_objects(label, size, CLASSES)
    for k in (1, 2):
        numbers, count = ndimage.label(label == k, np.ones((3, 3)))
        alone = [np.where(numbers == n, k, 0).astype(np.uint8) for n in range(1, count + 1)]
        lost = [mask for mask in alone if not images.resize_label(mask, size).any()]
        assert found.count[k] == count and found.lost[k] == len(lost)
        assert found.smallest[k] == min((mask > 0).sum() for mask in alone)
        assert found.largest_lost[k] == max(((mask > 0).sum() for mask in lost), default=0)
    assert found.count[0] == 0
    assert (found.lost[1:] > 0).all() == (size < (40, 60))


def test_overlapping_masks_have_objects_of_every_class():
    classes = Classes("multilabel", ("a", "b"), ((0, 0, 0), (255, 0, 0)))
    label = np.zeros((8, 8, 2), np.uint8)
    label[2, 2] = 1  # of both classes
    label[5:, 5:, 1] = 1
    found = inspection.find_objects(label, (4, 4), classes)
    assert found.count.tolist() == [1, 2] and found.lost.tolist() == [1, 1] and found.smallest.tolist() == [1, 1]
    assert inspection.count_pixels(label, classes).tolist() == [1, 10, 0]


def _jpeg(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=60)
    return np.asarray(Image.open(stream))


COPIES = {
    "jpeg": _jpeg,
    "half": lambda image: np.asarray(Image.fromarray(image).reduce(2)),
    "flipped": lambda image: image[:, ::-1],
    "turned": np.rot90,
    "transposed": lambda image: _jpeg(np.ascontiguousarray(image.swapaxes(0, 1))),
    "grey": lambda image: image.mean(-1, keepdims=True).astype(np.uint8),
    "16 bits": lambda image: image.astype(np.uint16) * 50 + 1000,
    "6 channels": lambda image: image[..., [0, 1, 2, 0, 1, 2]].astype(np.float32),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_have_similar_hashes_and_other_images_have_not(name):
    pictures = [_picture() for _ in range(4)]
    turned = np.array([image_hash.compute(picture).turned for picture in pictures])
    copies = np.array([image_hash.compute(COPIES[name](picture)).turned[0] for picture in pictures])
    indices, distances = image_hash.nearest(copies, turned)
    assert indices.tolist() == [0, 1, 2, 3] and distances.max() <= image_hash.MAX_DISTANCE
    _, distances = image_hash.nearest(copies[:1], turned[1:])
    assert distances[0] > 60


def test_missing_pixels_count_as_the_mean_and_outliers_are_clipped():
    picture = _picture().astype(np.float32) / 1000 - 0.1
    damaged = picture.copy()
    damaged[5, 5], damaged[7, 7, 1], damaged[9, 9] = np.nan, np.nan, 1e9
    grey, contrast = image_hash.to_grey(damaged)
    assert grey.dtype == np.uint8 and grey[9, 9] == 255 and 0 < grey[7, 7] == grey[5, 5] < 255
    assert 0.05 < contrast < 0.3
    hashes = image_hash.compute(damaged).turned[:1], image_hash.compute(picture).turned[None]
    assert image_hash.nearest(*hashes)[1] <= 4
    assert image_hash.compute(np.full((9, 9, 2), np.nan, np.float32)).contrast == 0
    points = np.zeros((100, 100, 1), np.uint8)
    points[50, 50] = 200
    assert image_hash.compute(points).contrast == 200 and image_hash.compute(points + 3).contrast == 200


def _example(split, index, image, **fields):
    label = np.ones(image.shape[:2], np.uint8)
    return inspection.Example(
        split=split,
        index=index,
        name=f"{split} {index}",
        pixels=inspection.count_pixels(label, CLASSES),
        objects=inspection.find_objects(label, image.shape[:2], CLASSES),
        image_digest=image.tobytes(),
        hashes=image_hash.compute(image),
        **fields,
    )


def test_nearly_flat_images_are_no_copies_of_each_other():
    flat = np.full((64, 64, 3), 100, np.uint8) + (np.arange(64) // 32).astype(np.uint8)[:, None, None]
    flats = [_example("train", 9, flat), _example("validation", 9, flat + 1)]
    assert image_hash.nearest(flats[0].hashes.turned[:1], flats[1].hashes.turned[None])[1] == 0
    good = [_example("train", index, _picture()) for index in range(5)] + flats
    assert duplicates.near_copies(good) == []


def test_the_sheet_shows_what_is_wrong_first_and_then_all_splits():
    good = [_example("train", index, _picture()) for index in range(40)]
    good += [_example("validation", index, _picture()) for index in range(10)]
    lost = np.array([0, 2, 0])
    good[3] = good[3]._replace(objects=good[3].objects._replace(lost=lost // 2))
    good[7] = good[7]._replace(objects=good[7].objects._replace(lost=lost, count=np.array([0, 9, 0])))
    good[11] = good[11]._replace(pixels=np.array([0, 5, 5, 0]))
    copies = [duplicates.NearCopy(good[5], good[45], 2)]
    chosen = check_sheet.choose(good, copies, CLASSES)
    assert [(example.name, reason) for example, reason in chosen[:5]] == [
        ("train 7", "2 of 9 objects lost"),
        ("train 3", "1 of 1 objects lost"),
        ("train 5", "near-duplicates, pair 1"),
        ("validation 5", "near-duplicates, pair 1"),
        ("train 11", "the only one with 'dirt'"),
    ]
    assert len(chosen) == len({example.name for example, _ in chosen}) == check_sheet.SHOWN
    assert chosen[5][0].name == "train 0" and chosen[-1][0].name == "validation 9"


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (2, np.uint16), (5, np.float32)])
def test_images_of_any_type_are_drawn(tmp_path, channels, dtype):
    image = np.repeat(_picture()[..., :1], channels, -1).astype(dtype)
    if dtype == np.float32:
        image = image / 1000
        image[:10] = np.nan
    source = Source(CLASSES, ["a"], lambda index: (image, np.zeros(image.shape[:2], np.uint8)))
    check_sheet.draw({"train": source}, [_example("train", 0, image)], [], CLASSES, (), epath.Path(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as sheet:
        assert np.asarray(sheet)[30:100, 10:160].std() > 20
