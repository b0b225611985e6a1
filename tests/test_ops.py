import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from unet_jax.models import ops


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_max_pool_and_its_gradient_equal_those_of_flax_even_with_ties():
    x = jnp.round(2 * _normal(2, 8, 6, 5))  # few values, so many ties
    weights = _normal(2, 4, 3, 5, seed=1)
    plain = lambda x: nn.max_pool(x, (2, 2), strides=(2, 2))
    assert (ops.max_pool_2x2(x) == plain(x)).all()
    ties = (x.reshape(2, 4, 2, 3, 2, 5) == plain(x)[:, :, None, :, None]).sum((2, 4)) > 1
    assert ties.sum() > 10
    gradients = [jax.grad(lambda x: (pool(x) * weights).sum())(x) for pool in (ops.max_pool_2x2, plain)]
    assert (gradients[0] == gradients[1]).all()


NARROW, WIDE = (4, 6), (64, 128)  # channels and features; wide convolutions are computed by Winograd's algorithm


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    "height, width, batch, channels",
    [(37, 40, 1, NARROW), (6, 8, 9, NARROW), (3, 3, 1, NARROW), (20, 22, 1, WIDE), (18, 16, 3, WIDE[::-1])],
)
def test_convolution_for_one_cpu_and_its_gradients_equal_the_plain_one(padding, height, width, batch, channels):
    _check_convolution(padding, (batch, height, width, channels[0]), channels[1], winograd=channels != NARROW)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolution_in_blocks_of_rows_equals_the_plain_one(padding, monkeypatch):
    monkeypatch.setattr(ops, "WINOGRAD_BLOCK", 4 * 2 * 8 * 128)  # 4 rows of tiles of the smaller output
    _check_convolution(padding, (2, 26, 18, 128), 64, winograd=True)  # 12 or 13 rows: the last block is not full


def _check_convolution(padding, shape, features, winograd):
    x, kernel = _normal(*shape), _normal(3, 3, shape[-1], features, seed=1)
    plain = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    ours = lambda x, kernel: ops.conv_3x3_on_cpu(x, kernel, padding)
    # float32 sums of up to 9000 products of size one in another order, after Winograd's sums and differences.
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    close(ours(x, kernel), plain(x, kernel))
    weights = _normal(*plain(x, kernel).shape, seed=2)
    found, expected = (
        jax.grad(lambda x, kernel, f=f: (f(x, kernel) * weights).sum(), (0, 1))(x, kernel) for f in (ours, plain)
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert ("dot_general" in str(jax.make_jaxpr(ours)(x, kernel))) == winograd


def test_1x1_convolution_for_one_cpu_and_its_gradients_equal_the_plain_one():
    x, kernel, weights = _normal(2, 5, 4, 3), _normal(1, 1, 3, 6, seed=1), _normal(2, 5, 4, 6, seed=2)
    plain = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for a, b in zip(*(jax.vjp(f, x, kernel)[1](weights) for f in (ops.conv_1x1_on_cpu, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums of at most 40 products of size one
    np.testing.assert_allclose(ops.conv_1x1_on_cpu(x, kernel), plain(x, kernel), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 1, 3)])
def test_convolution_of_doubled_features_and_its_gradients_equal_those_of_copied_pixels(shape):
    x, kernel = _normal(*shape), _normal(3, 3, 3, 6, seed=1)
    plain = lambda x, kernel: jax.lax.conv_general_dilated(
        ops.repeat_2x(x), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = plain(x, kernel)
    # Sums of at most 27 products of size one, kernels added first, and of at most 160 in the gradients.
    np.testing.assert_allclose(ops.doubled_conv_3x3_on_cpu(x, kernel), expected, atol=1e-5)
    weights = _normal(*expected.shape, seed=2)
    for a, b in zip(*(jax.vjp(f, x, kernel)[1](weights) for f in (ops.doubled_conv_3x3_on_cpu, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_transposed_convolution_and_its_gradients_equal_those_of_flax(size):
    x, kernel = _normal(2, 5, 4, 3), _normal(size, size, 3, 6, seed=1)
    layer = nn.ConvTranspose(6, (size, size), strides=(2, 2), padding="SAME", use_bias=False)
    plain = lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)
    weights = _normal(2, 10, 8, 6, seed=2)
    # Sums of at most 4 * 3 products of size one: float32 rounding stays below 1e-5.
    np.testing.assert_allclose(ops.conv_transpose_2x(x, kernel), plain(x, kernel), atol=1e-5)
    gradients = [
        jax.grad(lambda x, k: (conv(x, k) * weights).sum(), (0, 1))(x, kernel)
        for conv in (ops.conv_transpose_2x, plain)
    ]
    chex.assert_trees_all_close(*gradients, atol=1e-4)


def test_repeat_equals_nearest_resize():
    x = _normal(2, 3, 4, 5)
    assert (ops.repeat_2x(x) == jax.image.resize(x, (2, 6, 8, 5), "nearest")).all()


def test_bilinear_resize_and_its_gradient_equal_those_of_jax():
    x, weights = _normal(2, 3, 4, 5), _normal(2, 6, 8, 5, seed=1)
    plain = lambda x: jax.image.resize(x, (2, 6, 8, 5), "bilinear")
    # Sums of four products of size one, in another order.
    np.testing.assert_allclose(ops.resize_2x(x), plain(x), atol=2e-6)
    found, expected = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ops.resize_2x, plain))
    np.testing.assert_allclose(found, expected, atol=4e-6)
    one = _normal(1, 1, 1, 2)
    np.testing.assert_allclose(ops.resize_2x(one), jnp.broadcast_to(one, (1, 2, 2, 2)), atol=1e-6)


def test_dropout_keeps_the_mean_and_depends_only_on_the_key_of_the_example():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 50, 50, 2))
    y = ops.dropout(x, keys, 0.3)
    assert abs(float((y == 0).mean()) - 0.3) < 0.01
    np.testing.assert_allclose(y[y > 0], 1 / 0.7, rtol=1e-6)
    assert (ops.dropout(x[2:3], keys[2:3], 0.3) == y[2:3]).all()
    assert (y[0] != y[1]).any()
