"""Joint random transforms of image, label and loss weights, in JAX, on the device.

One key per example: what happens to an example depends neither on the rest of the batch nor on the number of devices.
Only CutMix, which comes last, takes pixels from the next example of the batch.

Window, rotation, zoom, shift and elastic deformation are one map of coordinates, so that an image is resampled at most
once. Labels and weights take the nearest pixel and never blend. Outside the image the label is the ignore label, while
the image is mirrored: a valid network looks beyond the window that it predicts.

Where images keep their own size, windows of them are drawn before, see `data/windows.py`, and come with as much around
them as the transforms can `reach`: then the window is not drawn here, but in the middle.

To add one: its field in `config.augment`, its limit in `LIMITS`, and a function in `intensity.py` with the next free
number in `INTENSITY` (or a step in `_window`, if it moves pixels).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from unet_jax.data import windows
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import resample
from unet_jax.training import cutmix, intensity

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# The key of an augmentation is fold_in(key of the example, its number). No number is used twice, so that a new
# augmentation changes no draw of the others.
FLIP, AFFINE, CROP, COLOR, ELASTIC, TURN, HUE, SATURATION, BLUR, NOISE, CUTMIX = range(11)

# Changes of the values of a window, in this order: (number of the key, function of key, image and settings).
INTENSITY = (
    (COLOR, intensity.color),
    (HUE, intensity.hue),
    (SATURATION, intensity.saturation),
    (BLUR, intensity.blur),
    (NOISE, intensity.noise),
)

LIMITS = {  # from 0
    "strength": 2,
    "rotate": 180,
    "scale": 0.9,
    "shift": 1,
    "brightness": 1,
    "contrast": 0.9,
    "gamma": 0.9,
    "hue": 0.5,
    "saturation": 1,
    "blur": 10,  # the kernel grows with it
    "noise": 1,
    "cutmix": 1,
}

# What `config.augment.strength = 1` sets, see `apply_strength`. Not among them is what only some images allow: those
# without an up and down (flip_vertical, turns), and those whose objects may be cut in pieces (cutmix).
STRENGTH = {
    "flip_horizontal": True,
    "rotate": 15.0,
    "scale": 0.2,
    "shift": 0.05,
    "brightness": 0.1,
    "contrast": 0.2,
    "gamma": 0.2,
    "hue": 0.02,
    "saturation": 0.2,
    "blur": 0.5,
    "noise": 0.02,
}
COLORS_ONLY = ("hue", "saturation")  # only for images of 3 channels


def apply_strength(settings: "ConfigDict", channels: int, kept: Sequence[str] = ()) -> None:
    """Sets each field that is off to `config.augment.strength` times its value in `STRENGTH`; 0 changes nothing.

    A field that is on keeps its value, so a second call changes nothing. `hue` and `saturation` stay off unless images
    have 3 channels.

    Args:
      settings: `config.augment`, changed in place.
      channels: of the images.
      kept: `config.keep`, the dotted names of fields that stay off.

    Raises:
      UserError: a strength out of its range.
    """
    strength = settings["strength"]
    _check_limit(settings, "strength", LIMITS["strength"])
    for name, value in STRENGTH.items():
        if f"augment.{name}" in kept or (name in COLORS_ONLY and channels != 3):
            continue
        if strength and not settings[name]:
            settings[name] = value if isinstance(value, bool) else strength * value


def check(
    settings: Mapping, size: Sequence[int], channels: int | None = None, batch_size: int | None = None
) -> tuple[int, int]:
    """Checks `config.augment`; returns the size of the window.

    Args:
      settings: `config.augment`.
      size: height and width of the images; empty if they keep their own.
      channels: of the images; None does not check whether the settings suit them.
      batch_size: of the global batch; None likewise.

    Raises:
      UserError: a setting that is out of its range, or that does not suit the images or the batch.
    """
    field = "config.data.size" if size else "config.augment.crop"
    crop = tuple(settings["crop"]) or tuple(size)
    size = tuple(size) or windows.check_size(crop)
    for name, limit in {**LIMITS, "elastic": min(size)}.items():
        _check_limit(settings, name, limit)
    if not 2 <= settings["elastic_grid"] <= min(size):
        raise UserError(f"config.augment.elastic_grid = {settings['elastic_grid']} is not in 2..{min(size)}")
    check_choice("config.augment.interpolation", settings["interpolation"], resample.INTERPOLATION)
    if len(crop) != 2 or not all(isinstance(c, int) and 0 < c <= s for c, s in zip(crop, size, strict=True)):
        raise UserError(f"config.augment.crop = {crop} must be (height, width) within config.data.size = {tuple(size)}")
    if settings["turns"] and size[0] != size[1]:
        raise UserError(
            f"config.augment.turns = True turns images by 90 degrees, so they must be square, but {field} = {size}: "
            "make it a square, or set config.augment.turns to False"
        )
    for name in COLORS_ONLY:
        if settings[name] and channels not in (3, None):
            raise UserError(
                f"config.augment.{name} = {settings[name]} changes red, green and blue, but the images have {channels} "
                "channel(s): set it to 0"
            )
    if settings["cutmix"] and batch_size == 1:
        raise UserError(
            f"config.augment.cutmix = {settings['cutmix']} pastes from other images of the batch, but "
            "config.train.batch_size = 1: set it to 2 or more, or config.augment.cutmix to 0"
        )
    return crop


def _check_limit(settings, name, limit):
    if not 0 <= settings[name] <= limit:
        raise UserError(f"config.augment.{name} = {settings[name]} is not in 0..{limit}")


def reach(settings: Mapping, margins: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """How far beyond a window of `config.augment.crop` its pixels can come from: (above and below, left and right).

    Displacements are normally distributed: three standard deviations of them count, and beyond is mirrored.

    Args:
      settings: `config.augment`.
      margins: how many pixels the image extends beyond the window: (above, below), (left, right).
    """
    if not any(settings[name] for name in ("rotate", "scale", "elastic")):
        return tuple(map(max, margins))
    half = [size / 2 + max(margin) for size, margin in zip(settings["crop"], margins, strict=True)]
    found = []
    for own, other, size in zip(half, half[::-1], settings["crop"], strict=True):
        angle = min(math.radians(settings["rotate"]), math.atan2(other, own))  # the corner is furthest there
        turned = math.cos(angle) * own + math.sin(angle) * other
        taps = 2  # of cubic interpolation
        found.append(math.ceil(turned / (1 - settings["scale"]) - size / 2 + 3 * settings["elastic"]) + taps)
    return tuple(found)


def augment(
    keys: jax.Array,
    batch: Mapping[str, jax.Array],
    settings: Mapping,
    margins: Sequence[tuple[int, int]],
    ignore_label: int,
    is_cut: bool = False,
) -> dict[str, jax.Array]:
    """Transforms a batch by the `settings` of `config.augment`; pixels from outside the image get the `ignore_label`.

    Args:
      keys: `[B]` random keys.
      batch: `image` float `[B, H, W, C]` in 0..1; `label` integer `[B, H, W]` or `[B, H, W, K]`; maybe `weight` float
        `[B, H, W]`.
      margins: how many pixels the image extends beyond the window: (above, below), (left, right).
      is_cut: whether the images are windows already, with `reach` around them.

    With `turns`, H and W must be the same.

    Returns:
      the same fields and types; labels and weights `[B, h, w, ...]` of the window, images with the margins around it.
    """
    one = lambda key, example: _augment_one(key, example, settings, margins, ignore_label, is_cut)
    batch = jax.vmap(one)(keys, dict(batch))
    if settings["cutmix"]:
        cutmix_keys = jax.vmap(lambda key: jax.random.fold_in(key, CUTMIX))(keys)
        batch = cutmix.paste(cutmix_keys, batch, settings["cutmix"], margins)
    return batch


def _augment_one(key, example, settings, margins, ignore_label, is_cut):
    horizontal, vertical = jax.random.bernoulli(jax.random.fold_in(key, FLIP), 0.5, (2,))
    if settings["flip_horizontal"]:
        example = jax.tree.map(lambda x: jnp.where(horizontal, x[:, ::-1], x), example)
    if settings["flip_vertical"]:
        example = jax.tree.map(lambda x: jnp.where(vertical, x[::-1], x), example)
    if settings["turns"]:
        quarters = jax.random.randint(jax.random.fold_in(key, TURN), (), 0, 4)
        example = jax.tree.map(lambda x: _turn(x, quarters), example)
    example = _window(key, example, settings, margins, ignore_label, is_cut)
    image = example["image"]
    for number, change in INTENSITY:
        image = change(jax.random.fold_in(key, number), image, settings)
    return {**example, "image": image}


def _turn(x, quarters):
    """`jnp.rot90(x, quarters)` of a square, for a number of quarters that is only known when it runs."""
    x = jnp.where(quarters % 2 == 1, x.swapaxes(0, 1), x)
    x = jnp.where((quarters == 1) | (quarters == 2), x[::-1], x)
    return jnp.where(quarters >= 2, x[:, ::-1], x)


def _window(key, example, settings, margins, ignore_label, is_cut):
    """Cuts the window out of the transformed image, with its margins."""
    image = example["image"]
    size = image.shape[:2]
    crop = tuple(settings["crop"]) or size
    if is_cut:
        settings = {**settings, "shift": 0.0}  # it lies anywhere in its image
    warps = any(settings[name] for name in ("rotate", "scale", "shift", "elastic"))
    if not warps and crop == size and not any(map(sum, margins)):
        return example
    count = jnp.array([s - c + 1 for s, c in zip(size, crop, strict=True)])
    start = (count - 1) // 2 if is_cut else jax.random.randint(jax.random.fold_in(key, CROP), (2,), 0, count)
    rows, columns = (
        first - before + jnp.arange(before + length + after)
        for first, length, (before, after) in zip(start, crop, margins, strict=True)
    )
    if not warps:
        whole = image[resample.mirror(rows, size[0])[:, None], resample.mirror(columns, size[1])]
        cut = lambda x: jax.lax.dynamic_slice(x, (*start, *[0] * (x.ndim - 2)), (*crop, *x.shape[2:]))
        return {name: whole if name == "image" else cut(x) for name, x in example.items()}

    rows, columns = affine_coordinates(jax.random.fold_in(key, AFFINE), rows, columns, size, settings)
    if settings["elastic"]:
        elastic_key = jax.random.fold_in(key, ELASTIC)
        down, right = resample.elastic(elastic_key, rows.shape, settings["elastic"], settings["elastic_grid"])
        rows, columns = rows + down, columns + right
    inner = tuple(slice(before, before + length) for length, (before, _) in zip(crop, margins, strict=True))
    outside = {"label": ignore_label, "weight": 0}
    warped = {n: resample.nearest(example[n], rows[inner], columns[inner], outside[n]) for n in example if n in outside}
    image = resample.sample(image, rows, columns, settings["interpolation"])
    return {**warped, "image": jnp.clip(image, 0, 1)}  # cubic overshoots


def affine_coordinates(
    key: jax.Array, rows: jax.Array, columns: jax.Array, size: Sequence[int], settings: Mapping
) -> tuple[jax.Array, jax.Array]:
    """Where output pixels come from, under a random affine map about the centre of the image.

    Args:
      rows, columns: of the output pixels, `[h]` and `[w]`.
      size: height and width of the image.
      settings: `rotate`, the angle is uniform in ± that many degrees; `scale`, the zoom is uniform in 1 ± scale;
        `shift`, the displacement is uniform in ± that share of each side.

    Returns:
      source rows and columns, float `[h, w]`.
    """
    angle, zoom, down, right = jax.random.uniform(key, (4,), minval=-1, maxval=1)
    height, width = size
    center = (height - 1) / 2, (width - 1) / 2
    y, x = resample.rotate(
        rows - center[0] - down * settings["shift"] * height,
        columns - center[1] - right * settings["shift"] * width,
        jnp.deg2rad(settings["rotate"] * angle),
        1 + settings["scale"] * zoom,
    )
    return y + center[0], x + center[1]
