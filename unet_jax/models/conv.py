"""The convolution of every layer but the heads, in the form that suits its shape and the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from unet_jax.models import ops
from unet_jax.models.depthwise import depthwise_conv


class Conv(nn.Module):
    """A convolution of `[B, H, W, C]`; the parameters of `flax.linen.Conv`."""

    features: int
    kernel_size: int
    padding: str | int = "SAME"  # `SAME` as in TensorFlow, `VALID`, or rows and columns of zeros on each side
    stride: int = 1
    depthwise: bool = False  # whether each channel has a kernel of its own; always with SAME
    doubled: bool = False  # whether it sees twice the height and width of its input, by nearest neighbour
    use_bias: bool = False
    kernel_init: Callable = nn.initializers.he_normal()
    conv_impl: str = "plain"  # see `unet_jax.models`
    dtype: str = "float32"  # of the computation; parameters are float32

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        """`x`, doubled first if `doubled`, and the channels of a `skip` of its size go through the convolution."""
        channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
        k, inputs = self.kernel_size, 1 if self.depthwise else channels
        kernel = self.param("kernel", self.kernel_init, (k, k, inputs, self.features))
        y = self.convolve(x, skip, kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y

    def convolve(self, x: jax.Array, skip: jax.Array | None, kernel: jax.Array) -> jax.Array:
        k, on_cpu = self.kernel_size, self.conv_impl == "cpu"
        same = "SAME" if k == 3 and self.stride == 1 and self.padding in ("SAME", 1) else None
        if self.doubled and on_cpu and same:
            y = ops.doubled_conv_3x3_on_cpu(x, kernel[:, :, : x.shape[-1]])
            return y if skip is None else y + ops.conv_3x3_on_cpu(skip, kernel[:, :, x.shape[-1] :], same)
        if self.doubled:
            x = ops.repeat_2x(x)
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        if self.depthwise:
            return depthwise_conv(x, kernel, self.stride)
        if on_cpu and (same or (k == 3 and self.stride == 1 and self.padding == "VALID")):
            return ops.conv_3x3_on_cpu(x, kernel, same or "VALID")
        if on_cpu and k == 1:
            return ops.conv_1x1_on_cpu(x[:, :: self.stride, :: self.stride], kernel)
        padding = self.padding if isinstance(self.padding, str) else [(self.padding, self.padding)] * 2
        return lax.conv_general_dilated(
            x, kernel, [self.stride] * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
