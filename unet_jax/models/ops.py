"""Convolution, pooling, up-sampling and dropout in forms that are exact and cheap on every device.

The plain forms are slow where it matters: the gradient of a windowed maximum is a select-and-scatter (half of a
training step on a CPU, and not deterministic on a GPU), and a strided transposed convolution multiplies mostly zeros.
`tests/test_ops.py` holds each function against the plain one, gradients included.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def doubled_conv_3x3_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`conv_3x3(repeat_2x(x), kernel)` with SAME padding in 16 products for 36, before `x` is doubled.

    Of three rows under the kernel two are copies of the same: output row 2i takes x[i-1] by kernel row 0 and x[i] by
    the sum of rows 1 and 2, row 2i+1 x[i] by the sum of rows 0 and 1 and x[i+1] by row 2. Columns likewise.

    `x` `[B, H, W, C]`, `kernel` `[3, 3, C, F]` -> `[B, 2H, 2W, F]`.
    """
    pairs = lambda k: ([k[0], k[1] + k[2]], [k[0] + k[1], k[2]])
    phases = []
    for a, rows in enumerate(pairs(kernel)):
        for b, taps in enumerate(pairs(jnp.stack(rows, axis=1))):  # [column, row, C, F]
            padding = [(1 - a, a), (1 - b, b)]
            taps = jnp.stack(taps, axis=1)
            phases.append(lax.conv_general_dilated(x, taps, (1, 1), padding, dimension_numbers=_DIMENSIONS))
    return depth_to_space(jnp.stack(phases, axis=3))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_3x3_on_cpu(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """3x3 convolution of stride 1 in the form that is fast on one CPU; the same sums as the plain form, reordered.

    Wide layers take Winograd's minimal filtering F(2x2, 3x3) with 16 products for 36 (Lavin and Gray 2016,
    arXiv:1509.09308, section 4.1), also in the gradient of the image. The gradient of the kernel pads the image first
    if the batch is small: XLA's own is up to five times slower then.

    `x` is `[B, H, W, C]`, `kernel` `[3, 3, C, F]`, `padding` `SAME` or `VALID`.
    """
    border = _BORDER[padding]
    if _winograd_pays(x, kernel, border):
        return _winograd(x, _both(_transform_kernel, kernel), border, 0)
    return _conv(x, kernel, border)


_BORDER = {"SAME": 1, "VALID": 0}  # rows and columns of zeros on each side
WINOGRAD_BLOCK = 2**19  # tiles x channels


def _conv(x, kernel, border):
    padding = [(border, border)] * 2
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_DIMENSIONS)


def _pad(x, border, below=0):
    return jnp.pad(x, ((0, 0), (border, border + below), (border, border), (0, 0)))


def _conv_forward(x, kernel, padding):
    return conv_3x3_on_cpu(x, kernel, padding), (x, kernel)


def _conv_backward(padding, residuals, gradient):
    x, kernel = residuals
    border = _BORDER[padding]
    if _winograd_pays(x, kernel, border):
        transformed = _both(_transform_kernel, kernel)  # below in the order of a kernel turned by 180 degrees
        turned = [[transformed[i][j] for j in (3, 1, 2, 0)] for i in (3, 1, 2, 0)]
        x_gradient = _winograd(gradient, turned, 2 - border, 1)
    else:
        (x_gradient,) = jax.linear_transpose(lambda x: _conv(x, kernel, border), x)(gradient)
    if border and x.shape[0] < 8:
        x, border = _pad(x, border), 0
    (kernel_gradient,) = jax.linear_transpose(lambda kernel: _conv(x, kernel, border), kernel)(gradient)
    return x_gradient, kernel_gradient


conv_3x3_on_cpu.defvjp(_conv_forward, _conv_backward)


def _winograd_pays(x, kernel, border) -> bool:
    """Where the products saved outweigh the transforms, as measured; tiles have even sides."""
    b, h, w, channels = x.shape
    narrow, wide = sorted((channels, kernel.shape[-1]))
    output = b * (h + 2 * border - 2) * (w + 2 * border - 2)
    return x.dtype == jnp.float32 and h % 2 == w % 2 == 0 and narrow >= 64 and wide >= 128 and output >= 256


def _winograd(x, transformed, border, contracted):
    """The convolution of `x` by a kernel `[4][4]` of `[C, F]`, whose axis `contracted` meets the channels of `x`.

    Some rows of tiles at a time, so that input and output of the products fill 64 MiB at most.
    """
    b, h, w, channels = x.shape
    features = transformed[0][0].shape[1 - contracted]
    tiles_down, tiles_across = (h + 2 * border - 2) // 2, (w + 2 * border - 2) // 2
    rows = min(max(1, WINOGRAD_BLOCK // (b * tiles_across * max(channels, features))), tiles_down)
    blocks = -(-tiles_down // rows)
    rows = -(-tiles_down // blocks)
    x = _pad(x, border, below=2 * (blocks * rows - tiles_down))

    def convolve(x):
        """`[b, 2 * rows + 2, ...]` -> `[b, 2 * rows, ...]`."""
        member = lambda i, j: x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * tiles_across - 1 : 2]
        tiles = _both(_transform_input, [[member(i, j) for j in range(4)] for i in range(4)])
        multiply = lambda tile, kernel: lax.dot_general(tile, kernel, (((3,), (contracted,)), ((), ())))
        y = _both(_transform_output, [list(map(multiply, *pair)) for pair in zip(tiles, transformed, strict=True)])
        return depth_to_space(jnp.stack([member for row in y for member in row], axis=3))

    if blocks == 1:
        return convolve(x)

    def put_block(i, y):
        block = lax.dynamic_slice_in_dim(x, 2 * rows * i, 2 * rows + 2, 1)
        return lax.dynamic_update_slice_in_dim(y, convolve(block), 2 * rows * i, 1)

    y = jnp.zeros((b, 2 * rows * blocks, 2 * tiles_across, features), x.dtype)
    return lax.fori_loop(0, blocks, put_block, y)[:, : 2 * tiles_down]


# The matrices B^T, G and A^T of the paper's section 4.1, one column at a time.
def _transform_input(d):
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_kernel(g):
    return [g[0], 0.5 * (g[0] + g[1] + g[2]), 0.5 * (g[0] - g[1] + g[2]), g[2]]


def _transform_output(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _both(transform, grid):
    """Transforms a grid of arrays along both of its axes."""
    across = [transform(row) for row in grid]
    return [list(row) for row in zip(*map(transform, zip(*across, strict=True)), strict=True)]


@jax.custom_vjp
def conv_1x1_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` `[B, H, W, C]`, `kernel` `[1, 1, C, F]` -> `[B, H, W, F]`, in the form that is fast on one CPU.

    For the kernel's gradient, XLA's convolution takes up to five times as long and the product that JAX derives nine.
    """
    return x @ kernel[0, 0]


def _conv_1x1_backward(residuals, gradient):
    x, kernel = residuals
    rows, row_gradients = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    return gradient @ kernel[0, 0].T, lax.dot_general(rows, row_gradients, (((0,), (0,)), ((), ())))[None, None]


conv_1x1_on_cpu.defvjp(lambda x, kernel: (conv_1x1_on_cpu(x, kernel), (x, kernel)), _conv_1x1_backward)


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
    free = jnp.ones(y.shape, bool)  # windows whose maximum has not been found yet
    parts = []
    for member in _window(x):
        first = free & (member == y)
        parts.append(jnp.where(first, gradient, 0))
        free &= ~first
    return (depth_to_space(jnp.stack(parts, axis=3)),)


max_pool_2x2.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 max-pool of stride 2 with a border of one: `[B, H, W, C]` -> `[B, ceil(H/2), ceil(W/2), C]`.

    As comparisons of shifted rows, then columns, whose gradient is no select-and-scatter; equal maxima share it.
    """
    for axis in (1, 2):
        length = x.shape[axis]
        width = [(0, 0)] * 4
        width[axis] = (1, 1)
        padded = jnp.pad(x, width, constant_values=-jnp.inf)
        shifted = (lax.slice_in_dim(padded, i, i + length, 2, axis) for i in range(3))
        x = reduce(jnp.maximum, shifted)
    return x


def depth_to_space(phases: jax.Array) -> jax.Array:
    """`[B, H, W, 4, C]`, the four members of each 2x2 window in row-major order -> `[B, 2H, 2W, C]`."""
    b, h, w, _, c = phases.shape
    return phases.reshape(b, h, w, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c)


def conv_transpose_2x(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution of stride 2 and SAME padding, for kernels of 2x2 and 3x3.

    Equal to `flax.linen.ConvTranspose` (kernel not transposed). Output row 2i+a depends on one or two input rows by as
    many kernel rows, so each of the four phases (a, b) is a small dense convolution; depth-to-space interleaves them.

    `x` `[B, H, W, C]`, `kernel` `[k, k, C, F]` -> `[B, 2H, 2W, F]`.
    """
    if kernel.shape[0] == 2:  # row 2i+a takes x[i] by kernel row 1-a
        b, h, w, channels = x.shape
        taps = jnp.flip(kernel, (0, 1)).transpose(2, 0, 1, 3)  # one product for all phases
        return depth_to_space((x @ taps.reshape(channels, -1)).reshape(b, h, w, 4, -1))
    if kernel.shape[0] != 3:
        raise ValueError(f"kernel size {kernel.shape[0]}: only 2 and 3 are supported")
    # Row 2i takes x[i-1] by kernel row 0 and x[i] by row 2; row 2i+1 takes x[i] by row 1.
    taps, before = (slice(0, 3, 2), slice(1, 2)), (1, 0)
    phases = [
        lax.conv_general_dilated(
            x,
            kernel[taps[a], taps[b]],
            window_strides=(1, 1),
            padding=[(before[a], 0), (before[b], 0)],
            dimension_numbers=_DIMENSIONS,
        )
        for a in (0, 1)
        for b in (0, 1)
    ]
    return depth_to_space(jnp.stack(phases, axis=3))


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
    """Inverted dropout with one random key per example, so that no draw depends on the rest of the batch.

    `rate` is the probability that a value of `x` `[B, ...]` is set to zero; `keys` is `[B]`.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
