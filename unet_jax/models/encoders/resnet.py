"""ResNet-18, 34 and 50 (He et al. 2015, arXiv:1512.03385).

As in torchvision and timm, the stride of a bottleneck is in its 3x3 convolution.
"""

from functools import partial

import jax
from flax import linen as nn

from unet_jax.models import ops
from unet_jax.models.encoders import Encoder
from unet_jax.models.encoders.layers import ConvNorm, Settings

SIZES = {  # blocks of each stage, and whether they are bottlenecks
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
EPSILON = 1e-5
conv_norm = partial(ConvNorm, epsilon=EPSILON)


class ResNet(nn.Module):
    """Features at strides 2 to 32; see `Encoder.make`."""

    depths: tuple[int, ...]
    bottleneck: bool
    settings: Settings

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> list[jax.Array]:
        stem = conv_norm(64, 7, self.settings, padding=3, stride=2, activation=nn.relu, name="stem")
        features = [stem(image, train)]
        x = ops.max_pool_3x3(features[0])
        for stage, depth in enumerate(self.depths, 1):
            block = nn.remat(Block, static_argnums=2) if stage + 1 in self.settings.remat else Block
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                arguments = (32 * 2**stage, stride, self.bottleneck, self.settings)
                x = block(*arguments, name=f"layer{stage}_{i}")(x, train)
            features.append(x)
        return features


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, beside a shortcut."""

    features: int
    stride: int
    bottleneck: bool
    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = partial(conv_norm, settings=self.settings)
        three = partial(layer, self.features, 3, padding=1)
        width = 4 * self.features if self.bottleneck else self.features
        if self.bottleneck:
            y = layer(self.features, 1, activation=nn.relu, name="conv1")(x, train)
            y = three(stride=self.stride, activation=nn.relu, name="conv2")(y, train)
            y = layer(width, 1, name="conv3")(y, train)
        else:
            y = three(stride=self.stride, activation=nn.relu, name="conv1")(x, train)
            y = three(name="conv2")(y, train)
        if x.shape != y.shape:
            x = layer(width, 1, padding=0, stride=self.stride, name="downsample")(x, train)
        return nn.relu(y + x)


def torch_name(path: str) -> str:
    """`params/layer1_0/conv1/conv/kernel` -> `layer1.0.conv1.weight`, as torchvision and timm have it."""
    *place, kind, leaf = path.split("/")[1:]
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}[leaf]
    if place == ["stem"]:
        return f"{'conv1' if kind == 'conv' else 'bn1'}.{leaf}"
    block, layer = place
    if layer == "downsample":
        layer = f"downsample.{0 if kind == 'conv' else 1}"
    elif kind == "norm":
        layer = layer.replace("conv", "bn")
    return f"{block.replace('_', '.')}.{layer}.{leaf}"


def _encoder(name: str) -> Encoder:
    return Encoder(
        make=lambda **settings: ResNet(*SIZES[name], Settings(**settings)),
        torch_name=torch_name,
        classifier=("fc.",),
        imagenet=f"hf://timm/{name}.tv_in1k",
        mean=(123.675, 116.28, 103.53),
        scale=(58.395, 57.12, 57.375),
    )


ENCODERS = {name: _encoder(name) for name in SIZES}
