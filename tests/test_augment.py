import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import augment
from unet_jax.errors import UserError

OFF = dict(
    flip_horizontal=False,
    flip_vertical=False,
    rotate=0.0,
    scale=0.0,
    shift=0.0,
    crop=(),
    brightness=0.0,
    contrast=0.0,
    gamma=0.0,
)
KEYS = jax.random.split(jax.random.key(0), 16)


def _blobs(count=16, size=64):
    """Labels 0/1 of large smooth regions, and the same as an image."""
    noise = np.random.default_rng(0).normal(size=(count, 4, 4))
    label = (np.asarray(jax.image.resize(noise, (count, size, size), "bicubic")) > 0).astype(np.uint8)
    return jnp.asarray(label[..., None], jnp.float32), jnp.asarray(label)


def _augment(**settings):
    image, label = _blobs()
    return (*augment.augment(KEYS, image, label, OFF | settings, 255), image, label)


def test_off_is_the_identity():
    image, label, image_before, label_before = _augment()
    assert (image == image_before).all() and (label == label_before).all()


@pytest.mark.parametrize(
    "settings", [dict(flip_horizontal=True), dict(flip_vertical=True), dict(crop=(24, 40))], ids=str
)
def test_flips_and_crops_move_image_and_label_together_exactly(settings):
    image, label, image_before, _ = _augment(**settings)
    assert (image[..., 0] == label).all()
    if "crop" in settings:
        assert label.shape == (16, 24, 40)
    else:
        changed = (image != image_before).any((1, 2, 3))
        assert 0 < changed.sum() < 16  # some are flipped, some are not


@pytest.mark.parametrize(
    "settings", [dict(rotate=45.0), dict(scale=0.4), dict(shift=0.3), dict(rotate=180.0, scale=0.3, shift=0.1)], ids=str
)
def test_warps_move_image_and_label_together(settings):
    image, label, image_before, _ = _augment(**settings)
    inside = np.asarray(label != 255)
    agree = np.asarray((image[..., 0] > 0.5) == (label == 1))[inside]
    assert agree.mean() > 0.99  # they differ only where bilinear and nearest round a border differently
    assert (image != image_before).any((1, 2, 3)).all()
    assert set(np.unique(label)) <= {0, 1, 255}  # labels never blend
    assert 0 < (~inside).mean() < 0.8  # new border pixels are ignored


def test_a_known_shift_moves_by_whole_pixels_and_ignores_what_comes_in():
    image, label = _blobs(1)
    rows, columns = jnp.meshgrid(jnp.arange(64.0) - 3, jnp.arange(64.0) + 5, indexing="ij")
    moved, moved_label = augment.warp(image[0], label[0], rows, columns, 255)
    assert (moved[3:, :59] == image[0, :61, 5:]).all()
    assert (moved_label[3:, :59] == label[0, :61, 5:]).all()
    assert (moved_label[:3] == 255).all() and (moved_label[:, 59:] == 255).all()
    assert (moved[2, :59] == image[0, 1, 5:]).all()  # mirrored, without repeating the border


def test_multilabel_masks_are_warped_as_one():
    image, label = _blobs()
    masks = jnp.stack([label, 1 - label], -1)
    _, warped = augment.augment(KEYS, image, masks, OFF | dict(rotate=30.0, shift=0.2), 255)
    assert ((warped == 255).all(-1) == (warped == 255).any(-1)).all()
    inside = warped[..., 0] != 255
    assert (warped.sum(-1, dtype=int)[inside] == 1).all()


@pytest.mark.parametrize("settings", [dict(brightness=0.3), dict(contrast=0.5), dict(gamma=0.5)], ids=str)
def test_color_leaves_labels_alone_and_stays_in_range(settings):
    image = jnp.broadcast_to(jnp.linspace(0, 1, 64)[None, None, :, None], (16, 64, 64, 1))
    label = _blobs()[1]
    changed, same = augment.augment(KEYS, image, label, OFF | settings, 255)
    assert (same == label).all()
    assert changed.min() >= 0 and changed.max() <= 1
    assert (jnp.abs(changed - image).max((1, 2, 3)) > 1e-3).all()


def test_an_example_does_not_depend_on_its_batch():
    settings = OFF | dict(flip_horizontal=True, rotate=30.0, crop=(32, 32), brightness=0.2, gamma=0.2)
    image, label = _blobs()
    whole = augment.augment(KEYS, image, label, settings, 255)
    part = augment.augment(KEYS[5:7], image[5:7], label[5:7], settings, 255)
    np.testing.assert_allclose(whole[0][5:7], part[0], atol=1e-6)  # a compiler may fuse differently
    assert (whole[1][5:7] == part[1]).all()


def test_ranges_without_meaning_are_named():
    with pytest.raises(UserError, match=r"config\.augment\.scale = 1\.5"):
        augment.check(OFF | dict(scale=1.5), (64, 64))
    with pytest.raises(UserError, match=r"config\.augment\.crop"):
        augment.check(OFF | dict(crop=(65, 64)), (64, 64))
    assert augment.check(OFF | dict(crop=(32, 48)), (64, 64)) == (32, 48)
