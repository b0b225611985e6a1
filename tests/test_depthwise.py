import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from unet_jax.models.depthwise import depthwise_conv
from unet_jax.parallel import sharding
from unet_jax.training import program


def _plain(x, kernel, stride):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": x.shape[-1]}
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **options)


def _with_gradients(conv, stride, dtype=jnp.float32):
    """A jitted function: the convolution, and the gradients of a weighted sum of its output."""

    def run(x, kernel):
        y, transpose = jax.vjp(lambda x, kernel: conv(x.astype(dtype), kernel.astype(dtype), stride), x, kernel)
        weights = np.random.default_rng(2).normal(size=y.shape)
        return y, *transpose(jnp.asarray(weights, dtype))

    return jax.jit(run)


def _draw(size, height, width):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, height, width, 6), (size, size, 1, 6)))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients_equal_the_plain_ones(size, stride):
    for height, width in ((16, 12), (17, 16), (18, 7), (1, 2)):  # a whole number of blocks of columns, and not
        x, kernel = _draw(size, height, width)
        found, expected = (_with_gradients(conv, stride)(x, kernel) for conv in (depthwise_conv, _plain))
        for a, b in zip(found, expected, strict=True):  # float32 sums of at most 2 * 17 * 16 products
            np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_convolution_in_bfloat16_adds_up_in_float32():
    x, kernel = (array.astype(jnp.bfloat16).astype(jnp.float32) for array in _draw(5, 17, 16))
    found, expected = _with_gradients(depthwise_conv, 2, jnp.bfloat16)(x, kernel), _with_gradients(_plain, 2)(x, kernel)
    for a, b in zip(found, expected, strict=True):  # rounded once at the end, and the weights of the gradients once
        np.testing.assert_allclose(a, b, atol=0.01 * np.abs(b).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_devices_share_the_height(stride):
    mesh = sharding.create_mesh(2, 4)
    x, kernel = _draw(5, 16, 8)
    run = _with_gradients(depthwise_conv, stride)
    parted = run(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "space"))), kernel)
    for a, b in zip(parted, run(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
    assert not parted[0].sharding.is_fully_replicated


def test_one_exported_program_for_all_devices_and_sizes():
    _, kernel = _draw(3, 1, 1)
    b, h, w = export.symbolic_shape("b, 2*h, 2*w")
    function = jax.jit(lambda x: depthwise_conv(depthwise_conv(x, kernel, 2), kernel, 1))
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(function, platforms=platforms)(jax.ShapeDtypeStruct((b, h, w, 6), jnp.float32))
    x, _ = _draw(3, 20, 14)
    expected = _plain(_plain(x, kernel, 2), kernel, 1)
    np.testing.assert_allclose(exported.call(x), expected, atol=2e-6 * np.abs(expected).max())


def test_operations_are_counted_as_those_of_a_convolution():
    x, kernel = _draw(5, 16, 12)
    forward = 2 * 25 * 2 * 8 * 6 * 6
    assert program.flops(lambda x, kernel: depthwise_conv(x, kernel, 2), x, kernel) == forward
    loss = lambda x, kernel: (depthwise_conv(x, kernel, 2) ** 2).sum()
    assert program.flops(jax.grad(loss, (0, 1)), x, kernel) == 3 * forward
