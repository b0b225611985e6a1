"""What the encoders are built of."""

import dataclasses
from collections.abc import Callable

import jax
from flax import linen as nn

from unet_jax.models.batch_norm import BatchNorm
from unet_jax.models.conv import Conv


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
            self.features,
            self.kernel_size,
            self.padding,
            self.stride,
            self.depthwise,
            conv_impl=self.settings.conv_impl,
            dtype=self.settings.dtype,
            name="conv",
        )(x)
        return BatchNorm(
            not train,
            self.epsilon,
            self.activation,
            self.settings.dtype,
            self.settings.frozen,
            name="norm",
        )(x)
