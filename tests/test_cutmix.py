"""CutMix against a paste in NumPy, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax.parallel import sharding
from unet_jax.training import augment, cutmix

KEYS = jax.random.split(jax.random.key(7), 16)


def _batch(count=16, height=20, width=32, margins=((0, 0), (0, 0)), masks=()):
    rng = np.random.default_rng(0)
    extended = [n + sum(margin) for n, margin in zip((height, width), margins, strict=True)]
    return {
        "image": rng.random((count, *extended, 3), np.float32),
        "label": rng.integers(0, 256, (count, height, width, *masks), np.uint8),
        "weight": rng.random((count, height, width), np.float32),
    }


def _rectangle(key, size, share):
    """Rows and columns of the rectangle of a key, as algorithm 1 of the paper has them; None if there is none."""
    chosen, area, *center = np.asarray(jax.random.uniform(key, (4,)), float)
    if chosen >= share:
        return None
    place = []
    for n, c in zip(size, center, strict=True):
        length = n * np.sqrt(area)
        first, end = round(n * c - length / 2), round(n * c + length / 2)
        place.append((max(first, 0), min(end, n)))
    return place


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("margins", [((0, 0), (0, 0)), ((6, 3), (0, 5))])
@pytest.mark.parametrize("masks", [(), (2,)])
def test_a_rectangle_of_the_next_example_is_pasted(share, margins, masks):
    batch = _batch(margins=margins, masks=masks)
    expected = {name: values.copy() for name, values in batch.items()}
    pasted = touching = 0
    for i, key in enumerate(KEYS):
        rectangle = _rectangle(key, (20, 32), share)
        if rectangle is None:
            continue
        window, whole = [], []
        for (first, end), n, (before, after) in zip(rectangle, (20, 32), margins, strict=True):
            window.append(slice(first, end))
            whole.append(slice(first + before if first else 0, end + before if end < n else n + before + after))
            touching += not first or end == n
        for name, values in batch.items():
            place = tuple(whole if name == "image" else window)
            expected[name][i][place] = values[(i + 1) % 16][place]
        pasted += 1
    found = cutmix.paste(KEYS, {name: jnp.asarray(x) for name, x in batch.items()}, share, margins)
    for name in batch:
        assert found[name].dtype == batch[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])
    assert touching and (pasted == 16 if share == 1 else 0 < pasted < 16)


def test_rectangles_have_any_size_and_place():
    keys = jax.random.split(jax.random.key(0), 4000)
    inside = np.asarray(jax.vmap(lambda key: cutmix.draw_rectangle(key, (24, 40), 0.75))(keys))
    drawn = inside.any((1, 2))
    assert abs(drawn.mean() - 0.75) < 0.03  # a few are smaller than a pixel
    # Sides of share s and centre c lie within the window, so the mean of what is left is that of (s - s^2 / 4)^2.
    area = np.random.default_rng(0).random(100_000)
    assert abs(inside[drawn].mean() - ((np.sqrt(area) - area / 4) ** 2).mean()) < 0.015
    of_pixel = inside[drawn].mean(0)
    np.testing.assert_allclose(of_pixel, of_pixel[::-1, ::-1], atol=0.05)
    assert of_pixel.max() > of_pixel[0, 0] > 0.1


SETTINGS = dict(
    flip_horizontal=True,
    flip_vertical=False,
    turns=True,
    rotate=20.0,
    scale=0.1,
    shift=0.1,
    elastic=1.0,
    elastic_grid=3,
    interpolation="bilinear",
    crop=(20, 24),
    brightness=0.1,
    contrast=0.1,
    gamma=0.1,
    hue=0.1,
    saturation=0.2,
    blur=0.7,
    noise=0.05,
    cutmix=0.7,
)


def _augment(batch, **settings):
    return augment.augment(KEYS, batch, SETTINGS | settings, ((3, 2), (0, 1)), 255)


def test_what_is_pasted_was_augmented_with_its_own_key():
    batch = _batch(height=32, width=32)
    without, found = _augment(batch, cutmix=0.0), _augment(batch)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, augment.CUTMIX))(KEYS)
    expected = cutmix.paste(keys, without, 0.7, ((3, 2), (0, 1)))
    for name in batch:
        np.testing.assert_array_equal(found[name], expected[name])
        assert (found[name] != without[name]).any()


@pytest.mark.parametrize("data, space", [(8, 1), (2, 4)])
def test_the_batch_is_the_same_on_one_device_and_on_eight(data, space):
    batch = _batch(height=32, width=32)
    one = jax.jit(_augment)(batch)
    mesh = sharding.create_mesh(data, space)
    many = jax.jit(_augment)(sharding.put_batch(mesh, batch))
    assert len(many["image"].sharding.device_set) == 8
    for name in batch:
        np.testing.assert_allclose(many[name], one[name], atol=1e-6)  # the compiler may fuse differently
    np.testing.assert_array_equal(many["label"], one["label"])
