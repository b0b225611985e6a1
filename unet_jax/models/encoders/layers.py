"""What the encoders are built of."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from unet_jax.models import ops
from unet_jax.models.batch_norm import BatchNorm
from unet_jax.models.depthwise import depthwise_conv


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `Encoder.make` is given."""

    frozen: bool = False  # whether normalisation is fixed: its averages, and its scale and bias
    remat: tuple[int, ...] = ()  # levels whose blocks are rematerialised; level n has the stride 2**n
    conv_impl: str = "plain"  # see `unet_jax.models`
    dtype: str = "float32"  # of the computation


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation and an activation: `[B, H, W, C]` -> `[B, H', W', features]`."""

    features: int
    kernel_size: int
    settings: Settings
    epsilon: float  # of the normalisation
    padding: str | int = "SAME"  # TensorFlow's SAME, or rows and columns of zeros on each side
    stride: int = 1
    depthwise: bool = False  # whether each channel has a kernel of its own; always with SAME
    activation: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(
            self.features, self.kernel_size, self.settings, self.padding, self.stride, self.depthwise, name="conv"
        )(x)
        if self.settings.frozen:
            x = FrozenNorm(self.epsilon, self.settings.dtype, name="norm")(x)
            return x if self.activation is None else self.activation(x)
        return BatchNorm(not train, self.epsilon, self.activation, self.settings.dtype, name="norm")(x)


class Conv(nn.Module):
    """The convolution of `ConvNorm`, in the form that suits its shape."""

    features: int
    kernel_size: int
    settings: Settings
    padding: str | int
    stride: int
    depthwise: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, inputs = self.kernel_size, 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (k, k, inputs, self.features))
        kernel = kernel.astype(self.settings.dtype)
        if self.depthwise:
            return depthwise_conv(x, kernel, self.stride)
        if self.settings.conv_impl == "cpu" and k == 3 and self.stride == 1 and self.padding in ("SAME", 1):
            return ops.conv_3x3_on_cpu(x, kernel, "SAME")
        if self.settings.conv_impl == "cpu" and k == 1:
            return ops.conv_1x1_on_cpu(x[:, :: self.stride, :: self.stride], kernel)
        padding = self.padding if isinstance(self.padding, str) else [(self.padding, self.padding)] * 2
        return lax.conv_general_dilated(
            x, kernel, [self.stride] * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class FrozenNorm(nn.Module):
    """Batch normalisation with the variables of `flax.linen.BatchNorm`, none of which training changes."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean, var = (
            self.variable("batch_stats", name, init, shape).value
            for name, init in (("mean", jnp.zeros), ("var", jnp.ones))
        )
        factor = scale * lax.rsqrt(var + self.epsilon)
        factor, offset = lax.stop_gradient((factor, bias - mean * factor))
        return x * factor.astype(self.dtype) + offset.astype(self.dtype)
