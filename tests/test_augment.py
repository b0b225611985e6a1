import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, folder
from unet_jax.errors import UserError
from unet_jax.training import augment

OFF = dict(
    flip_horizontal=False,
    flip_vertical=False,
    rotate=0.0,
    scale=0.0,
    shift=0.0,
    elastic=0.0,
    elastic_grid=3,
    interpolation="bilinear",
    crop=(),
    brightness=0.0,
    contrast=0.0,
    gamma=0.0,
    hue=0.0,
    saturation=0.0,
    blur=0.0,
    noise=0.0,
    turns=False,
    cutmix=0.0,
    strength=0.0,
)
NO_MARGINS = ((0, 0), (0, 0))
KEYS = jax.random.split(jax.random.key(0), 16)


def _blobs(count=16, size=64):
    """Labels 0/1 of large smooth regions, and the same as an image."""
    noise = np.random.default_rng(0).normal(size=(count, 4, 4))
    label = (np.asarray(jax.image.resize(noise, (count, size, size), "bicubic")) > 0).astype(np.uint8)
    return jnp.asarray(label[..., None], jnp.float32), jnp.asarray(label)


def _apply(keys, image, label, settings, margins=NO_MARGINS, **weight):
    batch = {"image": image, "label": label, **weight}
    after = augment.augment(keys, batch, OFF | settings, margins, 255)
    return tuple(after[name] for name in batch)


def _augment(**settings):
    image, label = _blobs()
    return (*_apply(KEYS, image, label, settings), image, label)


def test_without_augmentation_nothing_changes():
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
    "settings",
    [
        dict(rotate=45.0),
        dict(scale=0.4),
        dict(shift=0.3),
        dict(elastic=4.0),
        dict(rotate=180.0, scale=0.3, shift=0.1, elastic=2.0, elastic_grid=4, interpolation="cubic"),
    ],
    ids=str,
)
def test_warps_move_image_and_label_together(settings):
    image, label, image_before, _ = _augment(**settings)
    inside = np.asarray(label != 255)
    agree = np.asarray((image[..., 0] > 0.5) == (label == 1))[inside]
    assert agree.mean() > 0.99  # bilinear and nearest may round a border differently
    assert (image != image_before).any((1, 2, 3)).all()
    assert set(np.unique(label)) <= {0, 1, 255}  # labels never blend
    assert 0 < (~inside).mean() < 0.8  # new border pixels are ignored


@pytest.mark.parametrize("interpolation", ["bilinear", "cubic"])
def test_a_warp_by_nothing_changes_nothing(monkeypatch, interpolation):
    monkeypatch.setattr(augment.resample, "elastic", lambda key, size, sigma, grid: jnp.zeros((2, *size)))
    image, label, image_before, label_before = _augment(elastic=1.0, interpolation=interpolation)
    assert (label == label_before).all() and (image == image_before).all()


def test_turns_are_multiples_of_90_degrees_of_image_label_and_weight():
    image, label = _blobs()
    flips, weight = dict(flip_horizontal=True, flip_vertical=True), label / 2
    flipped = _apply(KEYS, image, label, flips, weight=weight)
    turned = _apply(KEYS, image, label, flips | dict(turns=True), weight=weight)
    quarters = [int(jax.random.randint(jax.random.fold_in(key, augment.TURN), (), 0, 4)) for key in KEYS]
    assert set(quarters) == {0, 1, 2, 3}
    for before, after in zip(flipped, turned, strict=True):
        for i, k in enumerate(quarters):
            np.testing.assert_array_equal(after[i], np.rot90(before[i], k))


@pytest.mark.parametrize(
    "settings", [dict(crop=(24, 40)), dict(rotate=30.0, shift=0.2, elastic=2.0, crop=(24, 40))], ids=str
)
def test_an_image_is_turned_before_its_window_is_cut(settings):
    image, label = _blobs()
    margins = ((4, 2), (3, 1))
    turned = _apply(KEYS, image, label, dict(turns=True))
    in_two = _apply(KEYS, *turned, settings, margins)
    for found, expected in zip(_apply(KEYS, image, label, settings | dict(turns=True), margins), in_two, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("settings", [dict(), dict(rotate=30.0, scale=0.2, elastic=2.0)], ids=str)
def test_a_square_window_that_was_cut_before_is_turned_with_what_surrounds_it(settings):
    settings, margins = OFF | settings | dict(crop=(24, 24), turns=True), ((5, 9), (5, 9))
    (reach, other) = augment.reach(settings, margins)
    assert reach == other
    image, label = _blobs(size=24 + 2 * reach)
    apply = lambda batch, **others: augment.augment(KEYS, batch, settings | others, margins, 255, is_cut=True)
    found = apply({"image": image, "label": label})
    assert found["image"].shape == (16, 38, 38, 1) and found["label"].shape == (16, 24, 24)
    turned = augment.augment(KEYS, {"image": image, "label": label}, OFF | dict(turns=True), NO_MARGINS, 255)
    expected = apply(turned, turns=False)
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_weights_move_with_their_labels():
    image, label = _blobs()
    weight = label.astype(jnp.float32) + jnp.arange(64 * 64.0).reshape(64, 64) / 64**2 / 2  # unique to each pixel
    for settings in (dict(rotate=90.0, elastic=3.0), dict(flip_horizontal=True, crop=(32, 40))):
        _, moved, moved_weight = _apply(KEYS, image, label, settings, weight=weight)
        inside = moved != 255
        assert moved_weight.shape == moved.shape and inside.any()
        assert (jnp.floor(moved_weight) == moved)[inside].all()  # nearest, never blended
        assert (moved_weight[~inside] == 0).all()


@pytest.mark.parametrize("settings", [dict(), dict(rotate=1e-6)], ids=["cut", "warped"])
def test_a_window_has_margins_from_the_image_mirrored_at_its_border(settings):
    image, label = _blobs()
    margins = ((40, 44), (8, 8))
    window, target = _apply(KEYS, image, label, dict(crop=(32, 48)) | settings, margins)
    assert window.shape == (16, 32 + 84, 48 + 16, 1) and target.shape == (16, 32, 48)
    assert (target == label[:, :32, :48]).mean() < 0.99  # windows are placed at random
    np.testing.assert_allclose(window[:, 40:72, 8:56, 0], target, atol=1e-3)
    whole, _ = _apply(KEYS, image, label, settings, margins)
    mirrored = np.pad(image, ((0, 0), *margins, (0, 0)), mode="reflect")
    np.testing.assert_allclose(whole, mirrored, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(shift=0.5),
        dict(rotate=180.0, scale=0.3, flip_horizontal=True),
        dict(rotate=20.0, scale=0.5, interpolation="cubic"),
    ],
    ids=str,
)
def test_what_surrounds_a_window_that_was_cut_before_is_enough(settings):
    settings, margins = OFF | settings | dict(crop=(24, 40)), ((3, 1), (0, 4))
    reach = augment.reach(settings, margins)
    keys = jax.random.split(jax.random.key(1), 200)

    def apply(reach):
        height, width = 24 + 2 * reach[0], 40 + 2 * reach[1]
        ramp = jnp.linspace(0, 0.5, height)[:, None] + jnp.linspace(0, 0.5, width)
        image = jnp.broadcast_to(ramp[None, ..., None], (200, height, width, 1))
        batch = {"image": image, "label": jnp.zeros((200, height, width), jnp.uint8)}
        return augment.augment(keys, batch, settings, margins, 255, is_cut=True), ramp

    batch, ramp = apply(reach)
    assert batch["image"].shape == (200, 28, 44, 1) and batch["label"].shape == (200, 24, 40)
    assert (batch["label"] == 0).all()
    for axis in (1, 2):  # still a plane: nothing is mirrored
        assert jnp.abs(jnp.diff(batch["image"], 2, axis)).max() < 1e-5
    if settings["rotate"]:
        less, _ = apply([round(0.8 * n) for n in reach])
        assert jnp.abs(jnp.diff(less["image"], 2, 1)).max() > 1e-3  # so it is not much more than enough
    else:
        top, left = (n - before for n, (before, _) in zip(reach, margins, strict=True))
        np.testing.assert_array_equal(batch["image"][0, ..., 0], ramp[top : top + 28, left : left + 44])


def test_multilabel_masks_are_warped_together():
    image, label = _blobs()
    masks = jnp.stack([label, 1 - label], -1)
    _, warped = _apply(KEYS, image, masks, dict(rotate=30.0, shift=0.2))
    assert ((warped == 255).all(-1) == (warped == 255).any(-1)).all()
    inside = warped[..., 0] != 255
    assert (warped.sum(-1, dtype=int)[inside] == 1).all()


@pytest.mark.parametrize("settings", [dict(brightness=0.3), dict(contrast=0.5), dict(gamma=0.5)], ids=str)
def test_color_changes_no_label_and_stays_in_range(settings):
    image = jnp.broadcast_to(jnp.linspace(0, 1, 64)[None, None, :, None], (16, 64, 64, 1))
    label = _blobs()[1]
    changed, same = _apply(KEYS, image, label, settings)
    assert (same == label).all()
    assert changed.min() >= 0 and changed.max() <= 1
    assert (jnp.abs(changed - image).max((1, 2, 3)) > 1e-3).all()


def test_an_example_does_not_depend_on_its_batch():
    settings = dict(flip_horizontal=True, rotate=30.0, elastic=2.0, crop=(32, 32), brightness=0.2, gamma=0.2)
    image, label = _blobs()
    whole = _apply(KEYS, image, label, settings)
    part = _apply(KEYS[5:7], image[5:7], label[5:7], settings)
    np.testing.assert_allclose(whole[0][5:7], part[0], atol=1e-6)  # the compiler may fuse differently
    assert (whole[1][5:7] == part[1]).all()


def test_flips_and_windows_are_those_of_version_0_1_0():
    """Exact in floating-point numbers, so its bits are known for any processor."""
    label = jnp.asarray((np.arange(16 * 64 * 64) * 7919 % 251).astype(np.uint8).reshape(16, 64, 64))
    settings = dict(flip_horizontal=True, flip_vertical=True, crop=(24, 40))
    image, label = _apply(KEYS, label[..., None] / jnp.float32(256), label, settings, ((4, 2), (0, 3)))
    assert [zlib.crc32(np.asarray(x).tobytes()) for x in (image, label)] == [2812775567, 216591499]


def test_every_field_is_off_by_default():
    fields = json.loads(default.get_config().augment.to_json())
    assert fields == json.loads(json.dumps(OFF))


def test_a_setting_that_does_not_suit_the_images_or_the_batch_is_an_error():
    augment.check(OFF | dict(turns=True, hue=0.1, saturation=0.1, cutmix=0.5), (64, 64), channels=3, batch_size=2)
    augment.check(OFF | dict(turns=True, crop=(24, 40)), (64, 64))  # the image is turned, not the window
    with pytest.raises(UserError, match=r"turns = True .* config\.data\.size = \(48, 64\): make it a square, or set"):
        augment.check(OFF | dict(turns=True, crop=(32, 32)), (48, 64))
    with pytest.raises(UserError, match=r"turns = True .* config\.augment\.crop = \(48, 64\): make it a square"):
        augment.check(OFF | dict(turns=True, crop=(48, 64)), ())
    for name in ("hue", "saturation"):
        for channels in (1, 4):
            with pytest.raises(UserError, match=rf"augment\.{name} = 0\.1 .*have {channels} channel\(s\): set it to 0"):
                augment.check(OFF | {name: 0.1}, (64, 64), channels, 8)
    with pytest.raises(UserError, match=r"config\.augment\.cutmix = 0\.5 .*batch_size = 1: set it to 2"):
        augment.check(OFF | dict(cutmix=0.5), (64, 64), 1, 1)


@pytest.mark.parametrize("name, value", [("noise", 1.5), ("blur", -1.0), ("hue", 0.6), ("saturation", 2.0)])
def test_the_limits_of_changes_of_values(name, value):
    with pytest.raises(UserError, match=rf"config\.augment\.{name} = {value} is not in 0\.\."):
        augment.check(OFF | {name: value}, (64, 64), 3, 8)
    with pytest.raises(UserError, match=r"config\.augment\.cutmix = 1\.5 is not in 0\.\.1"):
        augment.check(OFF | dict(cutmix=1.5), (64, 64), 3, 8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_strength_sets_what_is_off(strength, channels):
    config = default.get_config()
    config.augment.strength, config.augment.rotate = strength, 3.0
    before = config.augment.to_dict()
    augment.apply_strength(config.augment, channels)
    found = config.augment.to_dict()
    changed = {name for name in found if found[name] != before[name]}
    colors = set() if channels == 3 else {"hue", "saturation"}
    assert changed == (augment.STRENGTH.keys() - {"rotate"} - colors if strength else set())
    for name in changed:
        assert found[name] == (True if name == "flip_horizontal" else strength * augment.STRENGTH[name])
    augment.apply_strength(config.augment, channels)
    assert config.augment.to_dict() == found
    augment.check(config.augment, (64, 64), channels, 8)  # all within their limits


def test_strength_has_the_values_of_the_configuration_for_own_images():
    recommended = folder.get_config().augment
    differing = {name for name, value in augment.STRENGTH.items() if recommended[name] not in (value, 0)}
    assert not differing


@pytest.mark.parametrize("strength", [-0.5, 2.5, float("nan")])
def test_a_strength_out_of_range_is_an_error(strength):
    config = default.get_config()
    config.augment.strength = strength
    with pytest.raises(UserError, match=r"config\.augment\.strength = .* is not in 0\.\.2"):
        augment.apply_strength(config.augment, 3)
    with pytest.raises(UserError, match=r"config\.augment\.strength = .* is not in 0\.\.2"):
        augment.check(config.augment, (64, 64))


def test_a_setting_out_of_range_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"config\.augment\.scale = 1\.5"):
        augment.check(OFF | dict(scale=1.5), (64, 64))
    with pytest.raises(UserError, match=r"config\.augment\.crop"):
        augment.check(OFF | dict(crop=(65, 64)), (64, 64))
    with pytest.raises(UserError, match=r"config\.augment\.elastic_grid = 1"):
        augment.check(OFF | dict(elastic_grid=1), (64, 64))
    with pytest.raises(UserError, match=r"interpolation = 'cubik'.*Did you mean 'cubic'"):
        augment.check(OFF | dict(interpolation="cubik"), (64, 64))
    assert augment.check(OFF | dict(crop=(32, 48)), (64, 64)) == (32, 48)
    assert augment.check(OFF | dict(crop=(32, 48)), ()) == (32, 48)
    with pytest.raises(UserError, match=r"config\.data\.size = \(\).*so config\.augment\.crop = \(\) must be"):
        augment.check(OFF, ())


def test_numbered_keys_draw_what_earlier_versions_drew():
    """Version 0.1.0 split the key of an example in five, so results trained by it can be reproduced."""
    assert (augment.FLIP, augment.AFFINE, augment.CROP, augment.COLOR, augment.ELASTIC) == (0, 1, 2, 3, 4)
    others = (augment.TURN, augment.HUE, augment.SATURATION, augment.BLUR, augment.NOISE, augment.CUTMIX)
    assert others == (5, 6, 7, 8, 9, 10)
    for number, key in enumerate(jax.random.split(KEYS[0], 5)):
        assert jax.random.key_data(jax.random.fold_in(KEYS[0], number)).tolist() == jax.random.key_data(key).tolist()


# A new augmentation: one function with a number of its own, its limit, and its field in `config.augment`.

GRAIN = 11


def grain(key, image, settings):
    """Adds Gaussian noise of one size; `settings["grain"]` is its standard deviation."""
    return jnp.clip(image + settings["grain"] * jax.random.normal(key, image.shape), 0, 1)


@pytest.fixture
def with_grain(monkeypatch):
    monkeypatch.setitem(augment.LIMITS, "grain", 0.5)
    monkeypatch.setattr(augment, "INTENSITY", (*augment.INTENSITY, (GRAIN, grain)))


EVERYTHING = dict(
    flip_horizontal=True,
    flip_vertical=True,
    rotate=30.0,
    scale=0.2,
    shift=0.1,
    elastic=2.0,
    interpolation="cubic",
    crop=(40, 48),
    brightness=0.2,
    contrast=0.2,
    gamma=0.2,
    turns=True,
    blur=1.0,
    noise=0.05,
)


def test_a_new_augmentation_changes_no_draw_of_the_others(request):
    image, label = _blobs()
    weight = jnp.broadcast_to(jnp.linspace(0, 1, 64), label.shape)
    before = _apply(KEYS, image, label, EVERYTHING, ((4, 4), (2, 2)), weight=weight)
    request.getfixturevalue("with_grain")
    after = _apply(KEYS, image, label, EVERYTHING | dict(grain=0.1), ((4, 4), (2, 2)), weight=weight)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, GRAIN))(KEYS)
    expected = jax.vmap(lambda key, image: grain(key, image, dict(grain=0.1)))(keys, before[0])
    assert (after[0] == expected).all() and (after[0] != before[0]).any((1, 2, 3)).all()
    assert (after[1] == before[1]).all() and (after[2] == before[2]).all()


@pytest.mark.usefixtures("with_grain")
def test_the_limit_of_a_new_augmentation_is_checked():
    augment.check(OFF | dict(grain=0.5), (64, 64))
    with pytest.raises(UserError, match=r"config\.augment\.grain = 0\.6 is not in 0\.\.0\.5"):
        augment.check(OFF | dict(grain=0.6), (64, 64))
