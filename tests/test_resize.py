"""At which size images are predicted, and the way back, compared with Pillow, which resizes in training."""

import itertools
import zipfile

import helpers
import jax
import numpy as np
import pytest
from PIL import Image

from unet_jax import data
from unet_jax.data import images, reading
from unet_jax.inference import resize
from unet_jax.interop import export

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((400, 600), (96, 128)),  # within the range: as each of its images
        ((300, 500), (96, 128)),
        ((1000, 1600), (240, 256)),  # larger: by the factors of the largest, 400 -> 96 and 800 -> 128
        ((150, 250), (96, 128)),  # smaller: shrunk less
        ((48, 64), (48, 64)),  # but never enlarged, as training enlarged none
        ((1000, 600), (240, 128)),  # each axis by itself
        ((1, 1), (1, 1)),
    ],
    ids=str,
)
def test_images_are_neither_shrunk_nor_enlarged_further_than_in_training(size, expected):
    sizes = (300, 500), (400, 800)
    assert resize.predicted_size("train", size, (96, 128), sizes) == expected
    assert resize.predicted_size("fit", size, (96, 128), sizes) == (96, 128)
    assert resize.predicted_size("native", size, (96, 128), sizes) == size
    assert resize.predicted_size("train", size, (96, 128), None) == (96, 128)  # nothing is known
    assert resize.predicted_size("train", size, (96, 128), ((96, 128),) * 2) == size  # training did not resize
    assert resize.predicted_size("train", (12, 20), (96, 128), ((24, 32),) * 2) == (48, 80)  # it enlarged four times


def test_the_excess_is_that_of_the_worse_axis_over_the_strongest_reduction_in_training():
    sizes = (300, 500), (400, 800)
    assert resize.excess((400, 800), (96, 128), (96, 128), sizes) == 1
    assert resize.excess((1600, 800), (96, 128), (96, 128), sizes) == 4
    assert resize.excess((50, 50), (96, 128), (96, 128), ((24, 32),) * 2) == pytest.approx(50 / 96)  # all were enlarged
    assert resize.excess((9000, 9000), (96, 128), (96, 128), None) == 1


@pytest.mark.parametrize("interpolation", resize.INTERPOLATION)
@pytest.mark.parametrize("old, new", [((60, 31), (700, 95)), ((70, 90), (13, 200)), ((1, 1), (5, 3)), ((9, 9), (9, 9))])
def test_bands_are_resized_as_the_whole_by_pillow(old, new, interpolation):
    whole = RNG.random((*old, 2), np.float32)
    cuts = [*range(0, old[0], 17), old[0]]
    bands = [(slice(*rows), whole[slice(*rows)]) for rows in itertools.pairwise(cuts)]
    found = list(resize.resize_bands(bands, old, new, interpolation))
    assert [i for rows, _ in found for i in range(rows.start, rows.stop)] == list(range(new[0]))
    assert max(len(band) for _, band in found) <= max(resize.ROWS, 17)
    method = Image.Resampling[interpolation.upper()]
    channels = [Image.fromarray(np.ascontiguousarray(one)) for one in np.moveaxis(whole, -1, 0)]
    expected = np.stack([np.asarray(one.resize(new[::-1], method)) for one in channels], -1)
    np.testing.assert_allclose(np.concatenate([band for _, band in found]), expected, atol=3e-7)  # 2.5 roundings


@pytest.mark.parametrize("old, new, channels", [((300, 200), (96, 128), 3), ((3, 211), (60, 33), 1)], ids=str)
def test_graphs_resize_images_as_training_but_for_a_grey_level_where_pillow_rounds_otherwise(old, new, channels):
    image = RNG.integers(0, 256, (*old, channels), np.uint8)
    in_graph = jax.jit(export.resize_image, static_argnums=(1, 2))
    found = np.asarray(in_graph(image[None], new, "bilinear"))[0]
    difference = np.abs(found.astype(int) - images.resize_image(image, new, "bilinear"))
    assert found.dtype == np.uint8 and difference.max() <= 1 and (difference > 0).mean() < 0.02
    nearest = np.asarray(in_graph(image[None], new, "nearest"))[0]
    np.testing.assert_array_equal(nearest, images.resize_image(image, new, "nearest"))


def test_every_version_of_pillow_resizes_the_width_first():
    image = RNG.integers(0, 256, (300, 200, 3), np.uint8)  # Pillow 13 by itself would begin with the height
    across = Image.fromarray(image).resize((128, 300), Image.Resampling.BILINEAR)
    expected = np.asarray(across.resize((128, 96), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images.resize_image(image, (96, 128), "bilinear"), expected)


def test_the_sizes_of_training_images_come_from_headers(config, tmp_path, monkeypatch):
    config.data.update({"name": "folder", "root": str(tmp_path / "own"), "validation": 0.3, "channels": 3})
    config.data.update({"labels": ("0 a", "1 b"), "value_range": (0, 65535)})
    sizes = [(20 + 7 * k, 90 - 5 * k) for k in range(10)]
    for k, size in enumerate(sizes):
        helpers.save_image(np.zeros((*size, 3), np.uint8), tmp_path / f"own/images/{k}.jpg")
        helpers.save_image(np.zeros(size, np.uint8), tmp_path / f"own/masks/{k}.png")
    helpers.make_frames(tmp_path / "carla", range(8), size=(12, 8))
    with zipfile.ZipFile(tmp_path / "carla.zip", "w") as archive:
        for file in (tmp_path / "carla").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "carla"))
    own = data.load(config.data, "all")
    config.data.update({"name": "carla", "root": str(tmp_path / "carla.zip"), "variant": "carla23"})
    street = data.load(config.data, "train")
    monkeypatch.setattr(reading, "read_image", None)  # nothing is decoded
    assert own.size_range() == ((20, 45), (83, 90))
    assert street.size_range() == ((8, 12), (8, 12))

    read = lambda index: (np.zeros((10 + index, 5, 1), np.uint8), None)
    source = data.Source(own.classes, [str(k) for k in range(1000)], read)
    assert source.size_range() == ((10, 5), (1009, 5))  # the first and the last are always read
