"""Sampling images at fractional coordinates, in JAX: what augmentation and rotated prediction share.

Coordinates are in pixels, the centre of the first pixel at 0. Outside the image they are mirrored at the centre of its
border pixels, as in the overlap tiles of the U-Net paper.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

INTERPOLATION = ("bilinear", "cubic")


def mirror(index: jax.Array, length: int) -> jax.Array:
    """Reflects indices into 0..length-1 without repeating the border: -1 -> 1."""
    period = max(2 * (length - 1), 1)
    index = jnp.mod(index, period)
    return jnp.minimum(index, period - index) if length > 1 else jnp.zeros_like(index)


def sample(image: jax.Array, rows: jax.Array, columns: jax.Array, method: str) -> jax.Array:
    """Interpolates `image` `[H, W, C]` at source coordinates `[h, w]` -> `[h, w, C]`; exact at whole coordinates.

    `bilinear` takes 2x2 pixels; `cubic` takes 4x4 by the kernel of Keys 1981 (doi:10.1109/TASSP.1981.1163711) with
    a = -1/2, which may overshoot the range of the image.
    """
    height, width = image.shape[:2]
    top, down = _taps(rows, method)
    left, right = _taps(columns, method)
    total = 0.0
    for i, row_weight in enumerate(down):
        line = 0.0
        for j, column_weight in enumerate(right):
            line = line + image[mirror(top + i, height), mirror(left + j, width)] * column_weight[..., None]
        total = total + line * row_weight[..., None]
    return total


def _taps(coordinate: jax.Array, method: str) -> tuple[jax.Array, list[jax.Array]]:
    """The first pixel that counts along one axis, and the weights of it and of those after it."""
    first = jnp.floor(coordinate)
    t = coordinate - first
    if method == "bilinear":
        return first.astype(int), [1 - t, t]
    near = lambda x: ((1.5 * x - 2.5) * x) * x + 1
    far = lambda x: ((-0.5 * x + 2.5) * x - 4) * x + 2
    return first.astype(int) - 1, [far(1 + t), near(t), near(1 - t), far(2 - t)]


def nearest(values: jax.Array, rows: jax.Array, columns: jax.Array, outside) -> jax.Array:
    """Takes the nearest pixel of `values` `[H, W, ...]` at `[h, w]`; `outside` where that lies outside the image."""
    height, width = values.shape[:2]
    i, j = jnp.floor(rows + 0.5).astype(int), jnp.floor(columns + 0.5).astype(int)
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
    taken = values[jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1)]
    inside = inside.reshape(inside.shape + (1,) * (taken.ndim - 2))
    return jnp.where(inside, taken, jnp.asarray(outside, values.dtype))


def rotate(rows: jax.Array, columns: jax.Array, angle: jax.Array, zoom: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Source offsets `[h, w]` of the offsets (`rows` `[h]`, `columns` `[w]`) from a centre about which the image turns.

    The angle is in radians; a zoom above 1 enlarges.
    """
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    y, x = rows[:, None], columns[None, :]
    return cos * y - sin * x, sin * y + cos * x


def elastic(key: jax.Array, size: Sequence[int], sigma: float, grid: int) -> jax.Array:
    """A smooth random displacement field (Ronneberger et al. 2015, section 3.1).

    Vectors with components from N(0, sigma), in pixels, on a lattice of grid x grid points over the field, up-sampled
    by cubic interpolation.

    Returns:
      rows and columns, float `[2, *size]`, in pixels.
    """
    coarse = sigma * jax.random.normal(key, (2, grid, grid))
    return jax.image.resize(coarse, (2, *size), "cubic")
