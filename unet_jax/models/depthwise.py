"""Depthwise convolution in a form that is fast on CPUs, too.

XLA's own takes tens of times as long there. `tests/test_depthwise.py` holds ours against it, gradients included.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from unet_jax.models.ops import depth_to_space

# Of the gradient of the kernel: XLA's compiler vectorises the sums of so many taps over so many columns at a time.
TAPS, COLUMNS = 9, 8


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution of each channel by a kernel of its own, padded as TensorFlow's SAME.

    That is, with a pixel less at the top and left than at the bottom and right where an even side is halved.
    On CPUs it is a sum of shifted products, elsewhere XLA's convolution. `lax.platform_dependent` chooses, so that an
    exported program is fast on every device. Symbolic sides must be known to be even if the stride is 2.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[k, k, 1, C]`, k odd.
      stride: 1 or 2.

    Returns:
      `[B, ceil(H / stride), ceil(W / stride), C]`.
    """
    ours, plain = (partial(f, stride=stride) for f in (_products, _plain))
    return lax.platform_dependent(x, kernel, cpu=ours, default=plain)


def _forward(x, kernel, stride):
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
    ours, plain = (partial(f, stride=stride) for f in (_gradients, _plain_gradients))
    return lax.platform_dependent(*residuals, gradient, cpu=ours, default=plain)


depthwise_conv.defvjp(_forward, _backward)


def _plain(x, kernel, stride):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": x.shape[-1]}
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **options)


def _plain_gradients(x, kernel, gradient, stride):
    (x_gradient,) = jax.linear_transpose(lambda x: _plain(x, kernel, stride), x)(gradient)
    (kernel_gradient,) = jax.linear_transpose(lambda kernel: _plain(x, kernel, stride), kernel)(gradient)
    return x_gradient, kernel_gradient


def _same(x, kernel, stride):
    """Rows above and below, and columns left and right, that TensorFlow's SAME pads."""
    border = kernel.shape[0] // 2
    return [(border - (stride - 1) * (1 - length % 2), border) for length in x.shape[1:3]]


def _taps(x, kernel, stride):
    """What each value of a depthwise kernel is multiplied by, in row-major order, each as large as the output."""
    x = jnp.pad(x, ((0, 0), *_same(x, kernel, stride), (0, 0)))
    k = kernel.shape[0]
    part = lambda x, i, axis: lax.slice_in_dim(x, i, x.shape[axis] - k + 1 + i, stride, axis)
    return [part(part(x, i, 1), j, 2).astype(jnp.float32) for i in range(k) for j in range(k)]


def _products(x, kernel, stride):
    values = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    return sum(tap * value for tap, value in zip(_taps(x, kernel, stride), values, strict=True)).astype(x.dtype)


def _gradients(x, kernel, gradient, stride):
    return (
        _x_gradient(x, kernel, gradient, stride),
        _kernel_gradient(x, kernel, gradient, stride),
    )


def _kernel_gradient(x, kernel, gradient, stride):
    """A reduction that adds several taps up at once reads the images once for all of them."""
    b, h, w, channels = gradient.shape
    columns = w if w % COLUMNS else COLUMNS
    products = [
        (tap * gradient.astype(jnp.float32)).reshape(b, h, w // columns, columns, channels)
        for tap in _taps(x, kernel, stride)
    ]
    add = lambda sums, terms: [total + term for total, term in zip(sums, terms, strict=True)]
    sums = []
    for i in range(0, len(products), TAPS):
        taps = products[i : i + TAPS]
        sums += lax.reduce(taps, [jnp.float32(0)] * len(taps), add, (3,))
    return jnp.stack([array.sum((0, 1, 2)) for array in sums]).reshape(kernel.shape).astype(kernel.dtype)


def _x_gradient(x, kernel, gradient, stride):
    """Each of the stride**2 phases of `x` meets the taps of the kernel of one parity."""
    k, kernel = kernel.shape[0], kernel.astype(jnp.float32)
    height, width = gradient.shape[1:3]
    above, left = (before for before, _ in _same(x, kernel, stride))
    border = k // 2
    padded = jnp.pad(gradient, ((0, 0), (border, border), (border, border), (0, 0)))

    def taps(phase, before):  # of one axis: the indices into the kernel, and where the gradient begins
        return [(i, border + (phase + before - i) // stride) for i in range(k) if (phase + before - i) % stride == 0]

    phases = [
        sum(
            padded[:, top : top + height, start : start + width].astype(jnp.float32) * kernel[i, j, 0]
            for i, top in taps(a, above)
            for j, start in taps(b, left)
        ).astype(x.dtype)
        for a in range(stride)
        for b in range(stride)
    ]
    if stride == 1:
        return phases[0]
    return depth_to_space(jnp.stack(phases, axis=3))[:, : x.shape[1], : x.shape[2]]
