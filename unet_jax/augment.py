"""Joint random transforms of image and label, in JAX, on the device.

One key per example: what happens to an example depends on nobody else in the batch, nor on the number of devices. All
geometry but flips and crop is one affine warp, so that an image is resampled at most once. Labels take the nearest
pixel and never blend; pixels from outside the image mirror it and get the ignore label.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from unet_jax.errors import UserError


def check(settings: Mapping, size: Sequence[int]) -> tuple[int, int]:
    """Checks `config.augment` for images of (height, width) `size`; returns the size after the crop.

    Raises:
      UserError: a range that has no meaning.
    """
    limits = {"rotate": 180, "scale": 0.9, "shift": 1, "brightness": 1, "contrast": 0.9, "gamma": 0.9}
    for name, most in limits.items():
        if not 0 <= settings[name] <= most:
            raise UserError(f"config.augment.{name} = {settings[name]} is not in 0..{most}")
    crop = tuple(settings["crop"]) or tuple(size)
    if len(crop) != 2 or not all(isinstance(c, int) and 0 < c <= s for c, s in zip(crop, size, strict=True)):
        raise UserError(f"config.augment.crop = {crop} must be (height, width) within config.data.size = {tuple(size)}")
    return crop


def augment(
    keys: jax.Array, image: jax.Array, label: jax.Array, settings: Mapping, ignore_label: int
) -> tuple[jax.Array, jax.Array]:
    """Transforms a batch.

    Args:
      keys: `[B]` random keys.
      image: float `[B, H, W, C]` in 0..1.
      label: integer `[B, H, W]` or `[B, H, W, K]`.
      settings: `config.augment`.
      ignore_label: the label of pixels from outside the image.

    Returns:
      image and label of the same types; `[B, h, w, ...]` where a crop (h, w) is set.
    """
    return jax.vmap(lambda k, x, y: _augment_one(k, x, y, settings, ignore_label))(keys, image, label)


def _augment_one(key, image, label, settings, ignore_label):
    keys = dict(zip(("flip", "warp", "crop", "color"), jax.random.split(key, 4), strict=True))
    horizontal, vertical = jax.random.bernoulli(keys["flip"], 0.5, (2,))
    if settings["flip_horizontal"]:
        image, label = (jnp.where(horizontal, x[:, ::-1], x) for x in (image, label))
    if settings["flip_vertical"]:
        image, label = (jnp.where(vertical, x[::-1], x) for x in (image, label))
    if settings["rotate"] or settings["scale"] or settings["shift"]:
        rows, columns = affine_coordinates(
            keys["warp"], image.shape[:2], settings["rotate"], settings["scale"], settings["shift"]
        )
        image, label = warp(image, label, rows, columns, ignore_label)
    if settings["crop"]:
        image, label = _crop(keys["crop"], image, label, settings["crop"])
    return _color(keys["color"], image, settings["brightness"], settings["contrast"], settings["gamma"]), label


def affine_coordinates(
    key: jax.Array, size: Sequence[int], rotate: float, scale: float, shift: float
) -> tuple[jax.Array, jax.Array]:
    """Where each output pixel comes from, under a random affine map about the centre.

    Args:
      key: random key.
      size: height and width.
      rotate: the angle is uniform in ±rotate degrees.
      scale: the zoom is uniform in 1 ± scale.
      shift: the displacement is uniform in ±shift of each side.

    Returns:
      source rows and columns, float `[H, W]`.
    """
    angle, zoom, down, right = jax.random.uniform(key, (4,), minval=-1, maxval=1)
    angle, zoom = jnp.deg2rad(rotate * angle), 1 + scale * zoom
    height, width = size
    y = jnp.arange(height)[:, None] - (height - 1) / 2 - down * shift * height
    x = jnp.arange(width)[None, :] - (width - 1) / 2 - right * shift * width
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    return cos * y - sin * x + (height - 1) / 2, sin * y + cos * x + (width - 1) / 2


def warp(
    image: jax.Array, label: jax.Array, rows: jax.Array, columns: jax.Array, ignore_label: int
) -> tuple[jax.Array, jax.Array]:
    """Samples image `[H, W, C]` (bilinear) and label `[H, W, ...]` (nearest) at source coordinates `[h, w]`."""
    height, width = image.shape[:2]
    top, left = jnp.floor(rows).astype(int), jnp.floor(columns).astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]

    def pixel(i, j):
        return image[_mirror(i, height), _mirror(j, width)]

    upper = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
    lower = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
    warped = upper * (1 - down) + lower * down

    i, j = jnp.floor(rows + 0.5).astype(int), jnp.floor(columns + 0.5).astype(int)
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
    nearest = label[jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1)]
    inside = inside.reshape(inside.shape + (1,) * (nearest.ndim - 2))
    return warped, jnp.where(inside, nearest, jnp.asarray(ignore_label, label.dtype))


def _mirror(index: jax.Array, length: int) -> jax.Array:
    """Reflects indices into 0..length-1 without repeating the border: -1 -> 1."""
    period = max(2 * (length - 1), 1)
    index = jnp.mod(index, period)
    return jnp.minimum(index, period - index) if length > 1 else jnp.zeros_like(index)


def _crop(key, image, label, size):
    """A window of (height, width) `size`, uniform over all places."""
    limit = jnp.array([image.shape[0] - size[0] + 1, image.shape[1] - size[1] + 1])
    start = jax.random.randint(key, (2,), 0, limit)
    return tuple(jax.lax.dynamic_slice(x, (*start, *[0] * (x.ndim - 2)), (*size, *x.shape[2:])) for x in (image, label))


def _color(key, image, brightness, contrast, gamma):
    """image ** g * c about the mean + b, clipped to 0..1, each factor uniform in its range."""
    b, c, g = jax.random.uniform(key, (3,), minval=-1, maxval=1)
    if gamma:
        image = image ** (1 + gamma * g)
    if contrast:
        mean = image.mean()
        image = (image - mean) * (1 + contrast * c) + mean
    if brightness:
        image = image + brightness * b
    return jnp.clip(image, 0, 1) if brightness or contrast else image
