"""Random changes of the values of one window, in JAX: functions of its key, the image and `config.augment`.

An image is float `[h, w, C]` in 0..1, and so is what becomes of it. A change whose settings are 0 returns its image as
it is.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Shares of red, green and blue in grey: ITU-R BT.601, as Pillow's `convert("L")` has them.
RED, GREEN, BLUE = 0.299, 0.587, 0.114


def color(key: jax.Array, image: jax.Array, settings: Mapping) -> jax.Array:
    """image ** g * c about the mean + b, clipped to 0..1; `image` is float `[h, w, C]` in 0..1.

    b, c and g are uniform in ± `brightness`, 1 ± `contrast` and 1 ± `gamma` of the settings.
    """
    brightness, contrast, gamma = (settings[name] for name in ("brightness", "contrast", "gamma"))
    b, c, g = jax.random.uniform(key, (3,), minval=-1, maxval=1)
    if gamma:
        image = image ** (1 + gamma * g)
    if contrast:
        mean = image.mean()
        image = (image - mean) * (1 + contrast * c) + mean
    if brightness:
        image = image + brightness * b
    return jnp.clip(image, 0, 1) if brightness or contrast else image


def hue(key: jax.Array, image: jax.Array, settings: Mapping) -> jax.Array:
    """Turns the colours of an RGB image `[h, w, 3]` about grey, by an angle uniform in ± `hue` of a full turn.

    The usual linear approximation, as `adjust_hsv_in_yiq` of TensorFlow Addons: a rotation of the chrominance of YIQ at
    constant luminance Y. It is a rotation of YUV too, as I and Q are V and U turned by 33 degrees, and these take no
    matrices: U = 0.492 (B - Y), V = 0.877 (R - Y).
    """
    if not settings["hue"]:
        return image
    angle = 2 * math.pi * settings["hue"] * jax.random.uniform(key, minval=-1, maxval=1)
    luminance = _grey(image)
    u, v = 0.492 * (image[..., 2] - luminance), 0.877 * (image[..., 0] - luminance)
    u, v = jnp.cos(angle) * u - jnp.sin(angle) * v, jnp.sin(angle) * u + jnp.cos(angle) * v
    red, blue = v / 0.877, u / 0.492  # all three without the luminance, so the grey of them is 0
    green = -(RED * red + BLUE * blue) / GREEN
    return jnp.clip(jnp.stack([red, green, blue], -1) + luminance[..., None], 0, 1)


def saturation(key: jax.Array, image: jax.Array, settings: Mapping) -> jax.Array:
    """Blends an RGB image `[h, w, 3]` with its grey, as `ImageEnhance.Color` of Pillow does.

    The factor on the difference from grey is uniform in 1 ± `saturation`.
    """
    if not settings["saturation"]:
        return image
    factor = 1 + settings["saturation"] * jax.random.uniform(key, minval=-1, maxval=1)
    grey = _grey(image)[..., None]
    return jnp.clip(grey + factor * (image - grey), 0, 1)


def _grey(image):
    # No matrix product: accelerators round the factors of those.
    return RED * image[..., 0] + GREEN * image[..., 1] + BLUE * image[..., 2]


def blur(key: jax.Array, image: jax.Array, settings: Mapping) -> jax.Array:
    """Convolves with a Gaussian whose standard deviation is uniform in 0..`blur` pixels; mirrored at the border.

    The kernel always has a radius of 3 `blur` pixels, rounded up: as many as the widest Gaussian needs.
    """
    if not settings["blur"]:
        return image
    sigma = settings["blur"] * jax.random.uniform(key)
    radius = math.ceil(3 * settings["blur"])
    weights = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / jnp.maximum(sigma, 1e-3)) ** 2)  # sigma may be 0
    weights = weights / weights.sum()
    # Sums of shifted images: a convolution with a kernel for each example takes 40 times as long on CPUs, and
    # accelerators round what they multiply in one.
    for axis, length in enumerate(image.shape[:2]):
        around = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        image = _sum_of_shifted(jnp.pad(image, around, mode="reflect"), weights, length, axis)
    return jnp.clip(image, 0, 1)


def _sum_of_shifted(image, weights, length, axis):
    """Sum of `weights[i]` times `length` rows or columns from the i-th on; a loop, as 60 unrolled terms are slow."""
    add = lambda i, total: total + weights[i] * jax.lax.dynamic_slice_in_dim(image, i, length, axis)
    first = weights[0] * jax.lax.slice_in_dim(image, 0, length, axis=axis)
    return jax.lax.fori_loop(1, len(weights), add, first)


def noise(key: jax.Array, image: jax.Array, settings: Mapping) -> jax.Array:
    """Adds to each value a normally distributed number, of a standard deviation uniform in 0..`noise`; clipped."""
    if not settings["noise"]:
        return image
    deviation_key, values_key = jax.random.split(key)
    deviation = settings["noise"] * jax.random.uniform(deviation_key)
    return jnp.clip(image + deviation * jax.random.normal(values_key, image.shape), 0, 1)
