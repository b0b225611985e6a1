"""Pooling, up-sampling and dropout in the forms that are exact and cheap on every device.

The plain forms are slow where it matters: the gradient of a windowed maximum is a select-and-scatter (half of a
training step on a CPU, and not deterministic on a GPU), and a strided transposed convolution multiplies mostly zeros.
`tests/test_ops.py` holds each function against the plain one, gradients included.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_3x3_on_cpu(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """3x3 convolution of stride 1 in the form that is fast on one CPU; XLA's own is up to four times slower there.

    Without padding: a padded convolution, cut. The gradient of the kernel: a few rows at a time, so that the matrix of
    their windows stays in the cache.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[3, 3, C, F]`.
      padding: `SAME` or `VALID`.
    """
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y if padding == "SAME" else y[:, 1:-1, 1:-1]


def conv_on_cpu(x, kernel, strides, padding, **others):
    """`conv_3x3_on_cpu` with the arguments that `flax.linen.Conv` gives."""
    del others  # neither dilated nor grouped
    assert kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1), (kernel.shape, strides)
    return conv_3x3_on_cpu(x, kernel, padding)


def _conv_forward(x, kernel, padding):
    return conv_3x3_on_cpu(x, kernel, padding), (x, kernel)


def _conv_backward(padding, residuals, gradient):
    x, kernel = residuals
    border = 1 if padding == "SAME" else 2
    (x_gradient,) = jax.linear_transpose(
        lambda x: lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")), x
    )(gradient)
    b, h, w, features = gradient.shape
    rows = min(max(1, 512 // (b * w)), h)  # at a time: enough for an efficient product
    blocks = -(-h // rows)
    below = blocks * rows - h  # zero gradients, which add nothing
    gradient = jnp.pad(gradient, ((0, 0), (0, below), (0, 0), (0, 0)))
    x = jnp.pad(x, ((0, 0), (2 - border, 2 - border + below), (2 - border, 2 - border), (0, 0)))

    def add_block(total, i):
        source = lax.dynamic_slice_in_dim(x, i * rows, rows + 2, 1)
        windows = [source[:, u : u + rows, v : v + w] for u in range(3) for v in range(3)]
        target = lax.dynamic_slice_in_dim(gradient, i * rows, rows, 1)
        product = lax.dot_general(
            jnp.concatenate(windows, -1).reshape(b * rows * w, -1),
            target.reshape(b * rows * w, features),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return total + product, None

    start = jnp.zeros((9 * x.shape[-1], features), jnp.float32)
    total, _ = lax.scan(add_block, start, jnp.arange(blocks))
    return x_gradient, total.reshape(kernel.shape).astype(kernel.dtype)


conv_3x3_on_cpu.defvjp(_conv_forward, _conv_backward)


@jax.custom_vjp
def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 max-pool of stride 2: `[B, H, W, C]` with even H and W -> `[B, H/2, W/2, C]`.

    The gradient goes to the first maximum of each window in row-major order, as in `flax.linen.max_pool`.
    """
    top_left, top_right, bottom_left, bottom_right = _window(x)
    return jnp.maximum(jnp.maximum(top_left, top_right), jnp.maximum(bottom_left, bottom_right))


def _window(x: jax.Array) -> list[jax.Array]:
    """The four members of every 2x2 window, in row-major order, each `[B, H/2, W/2, C]`."""
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _max_pool_forward(x):
    y = max_pool_2x2(x)
    return y, (x, y)


def _max_pool_backward(residuals, gradient):
    x, y = residuals
    free = jnp.ones(y.shape, bool)  # windows whose maximum has not been met yet
    parts = []
    for member in _window(x):
        first = free & (member == y)
        parts.append(jnp.where(first, gradient, 0))
        free &= ~first
    return (_depth_to_space(jnp.stack(parts, axis=3)),)


max_pool_2x2.defvjp(_max_pool_forward, _max_pool_backward)


def _depth_to_space(phases: jax.Array) -> jax.Array:
    """`[B, H, W, 4, C]`, the four members of each 2x2 window in row-major order -> `[B, 2H, 2W, C]`."""
    b, h, w, _, c = phases.shape
    return phases.reshape(b, h, w, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c)


def conv_transpose_2x(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution of stride 2 and SAME padding, for kernels of 2x2 and 3x3.

    Equal to `flax.linen.ConvTranspose` (kernel not transposed). Output row 2i+a depends on one or two input rows, so
    the four phases (a, b) are channels of one small dense convolution, which depth-to-space then interleaves.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[k, k, C, F]`, k = 2 or 3.

    Returns:
      `[B, 2H, 2W, F]`.
    """
    size, _, channels, features = kernel.shape
    if size == 2:  # row 2i+a takes x[i] by kernel row 1-a
        taps = jnp.flip(kernel, (0, 1))[None, None]  # [u=1, v=1, a, b, C, F]
    elif size == 3:  # row 2i takes x[i-1] by kernel row 0 and x[i] by row 2; row 2i+1 takes x[i] by row 1
        zero = jnp.zeros_like(kernel[0])
        rows = jnp.stack([jnp.stack([kernel[0], zero]), jnp.stack([kernel[2], kernel[1]])])  # [u, a, k, C, F]
        zero = jnp.zeros_like(rows[:, :, 0])
        columns = [jnp.stack([rows[:, :, 0], zero], 2), jnp.stack([rows[:, :, 2], rows[:, :, 1]], 2)]
        taps = jnp.stack(columns, 1)  # [u, v, a, b, C, F]
    else:
        raise ValueError(f"kernel size {size}: only 2 and 3 are known")
    reach = taps.shape[0]
    phases = lax.conv_general_dilated(
        x,
        taps.transpose(0, 1, 4, 2, 3, 5).reshape(reach, reach, channels, 4 * features),
        window_strides=(1, 1),
        padding=[(reach - 1, 0)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return _depth_to_space(phases.reshape(*phases.shape[:3], 4, features))


def repeat_2x(x: jax.Array) -> jax.Array:
    """Nearest-neighbour up-sampling: `[B, H, W, C]` -> `[B, 2H, 2W, C]`."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def resize_2x(x: jax.Array) -> jax.Array:
    """Bilinear up-sampling with half-pixel centres: `[B, H, W, C]` -> `[B, 2H, 2W, C]`.

    Equal to `jax.image.resize`, which multiplies by a matrix, so that devices that share the height would have to
    gather all of it; neighbours only need each other's border rows.
    """
    return _resize_axis(_resize_axis(x, 1), 2)


def _resize_axis(x: jax.Array, axis: int) -> jax.Array:
    length = x.shape[axis]
    part = lambda start, stop: lax.slice_in_dim(x, start, stop, axis=axis)
    before = jnp.concatenate([part(0, 1), part(0, length - 1)], axis)
    after = jnp.concatenate([part(1, length), part(length - 1, length)], axis)
    pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * length, *x.shape[axis + 1 :])


def dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout with one random key per example, so that no draw depends on who else is in the batch.

    Args:
      x: `[B, ...]`.
      keys: `[B]` random keys.
      rate: probability that a value is set to zero.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
