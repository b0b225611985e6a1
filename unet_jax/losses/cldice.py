"""Centreline Dice, for vessels, roads, cracks and membranes: whether thin structures are connected, not how thick."""

from functools import reduce

import jax
import jax.numpy as jnp

from unet_jax.losses.terms import Pixels, Sums


def cldice(pixels: Pixels, iterations: float, smooth: float = 1.0) -> Sums:
    """Soft clDice loss of each image and mask (Shit et al. 2021, arXiv:2003.07311, section 3 and algorithm 1).

    1 - 2 P S / (P + S): P is the share of the predicted skeleton inside the label, S that of the label's skeleton
    inside the prediction. `iterations` must be at least half the width of the thickest structure in pixels. The mean
    over images; those without any counted pixel weigh nothing.
    """
    probability, target = pixels.by_class()
    target = target.astype(jnp.float32)
    share = lambda skeleton, area: ((skeleton * area).sum((1, 2)) + smooth) / (skeleton.sum((1, 2)) + smooth)
    precision = share(soft_skeleton(probability, int(iterations)), target)
    sensitivity = share(soft_skeleton(target, int(iterations)), probability)
    loss = 1 - 2 * precision * sensitivity / (precision + sensitivity)
    counted = pixels.counted()
    return loss.mean(-1) * counted, counted


def soft_skeleton(x: jax.Array, iterations: int) -> jax.Array:
    """Skeletons of masks in 0..1, `[B, H, W, K]`: what opening removes after each of the erosions."""
    skeleton = jax.nn.relu(x - _dilate(_erode(x)))

    def thin(carry, _):
        x, skeleton = carry
        x = _erode(x)
        removed = jax.nn.relu(x - _dilate(_erode(x)))
        return (x, skeleton + jax.nn.relu(removed - skeleton * removed)), None

    return jax.lax.scan(thin, (x, skeleton), length=iterations)[0][1]


def _erode(x: jax.Array) -> jax.Array:
    """The minimum of each pixel and its four neighbours; pixels outside the image do not count."""
    return jnp.minimum(_neighbours(x, 1, jnp.minimum, jnp.inf), _neighbours(x, 2, jnp.minimum, jnp.inf))


def _dilate(x: jax.Array) -> jax.Array:
    """The maximum of each pixel and its eight neighbours."""
    return _neighbours(_neighbours(x, 1, jnp.maximum, -jnp.inf), 2, jnp.maximum, -jnp.inf)


def _neighbours(x, axis, function, outside):
    """`function` of each pixel and its two neighbours along an axis."""
    width = [(0, 0)] * 4
    width[axis] = (1, 1)
    padded = jnp.pad(x, width, constant_values=outside)
    return reduce(function, (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(3)))
