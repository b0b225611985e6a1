"""The networks of `models/` as ONNX graphs, built from the same weights: one function for each, and their layers below.

A converter of traced functions would make this file unnecessary, but jax2onnx (0.13.0, with JAX 0.10) does not support
convolutions of symbolic height and width, and patches functions of JAX and Flax. The networks only need operators that
every runtime has. `tests/test_export.py` compares the two implementations in every setting.
"""

import dataclasses
from functools import partial
from itertools import count
from math import gcd

import numpy as np

from unet_jax.errors import UserError
from unet_jax.interop.onnx_graph import Graph
from unet_jax.models import encoders
from unet_jax.models.encoder_unet import EncoderUNet
from unet_jax.models.encoders import efficientnet_lite, resnet
from unet_jax.models.unet import UNet


def add_network(graph: Graph, model: UNet | EncoderUNet, weights: dict[str, np.ndarray], image: str) -> str:
    """Appends the nodes of the network to `graph`, and returns its logits, float32 `[B, num_outputs, H', W']`.

    Args:
      graph: the graph.
      model: the network.
      weights: arrays by path, such as `params/head/kernel`.
      image: float32 `[B, C, H, W]`, of a size that `model.output_size` accepts.

    Raises:
      UserError: an encoder that this file does not have.
    """
    add = _unet if isinstance(model, UNet) else _encoder_unet
    return add(Layers(graph, weights), model, image)


def _unet(layers: "Layers", model: UNet, x: str) -> str:
    padding = 1 if model.padding == "same" else 0
    shrinkage = 4 * (1 - padding)  # of the height and width, by two convolutions
    # `length` is the height of `x` for the smallest input. Skips are cropped by the same amount for images of any size.
    length, skips = model.smallest_input[0], []
    lowest, residual = len(model.features) - 1, model.block == "residual"
    for level in range(lowest):
        x, length = layers.block(x, f"down_{level}", padding, residual), length - shrinkage
        skips.append((x, length))
        x, length = layers.graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), length // 2
    x, length = layers.block(x, f"down_{lowest}", padding, residual), length - shrinkage
    for level in reversed(range(lowest)):
        x, length = layers.up(x, f"up_{level}", model.upsample), 2 * length
        skip, skip_length = skips.pop()
        if surplus := skip_length - length:
            starts, ends = np.array([surplus // 2] * 2), np.array([surplus // 2 - surplus] * 2)
            skip = layers.graph.add("Slice", skip, starts, ends, np.array([2, 3]))
        x = layers.graph.add("Concat", x, skip, axis=1)
        x, length = layers.block(x, f"merge_{level}", padding), length - shrinkage
    if model.extra_conv:
        x = layers.block(x, "extra", padding)
    return layers.conv(x, "head", 0)


def _encoder_unet(layers: "Layers", model: EncoderUNet, x: str) -> str:
    encoder = encoders.find(model.encoder_name).make()
    known = {efficientnet_lite.EfficientNetLite: _efficientnet_lite, resnet.ResNet: _resnet}
    if type(encoder) not in known:
        raise UserError(f"ONNX is not written for config.model.encoder = {model.encoder_name!r}; use StableHLO instead")
    *skips, x = known[type(encoder)](layers, encoder, x)
    for n in reversed(range(len(model.features))):
        x = layers.up(x, f"up_{n}", model.upsample)
        if level := model.head_level + n:
            x = layers.graph.add("Concat", x, skips[level - 1], axis=1)
        x = layers.block(x, f"merge_{n}", 1)
    x = layers.conv(x, "head", 0)
    for _ in range(model.head_level):
        x = layers.resize_2x(x, "bilinear")
    return x


def _efficientnet_lite(layers: "Layers", encoder: efficientnet_lite.EfficientNetLite, x: str) -> list[str]:
    """The features at strides 2 to 32."""
    layer = partial(layers.conv_norm, epsilon=efficientnet_lite.EPSILON, padding="SAME")
    relu6 = lambda x: layers.graph.add("Clip", x, np.float32(0), np.float32(6))
    x, features, index = relu6(layer(x, "encoder/stem", stride=2)), [], 0
    channels = layers.kernel("encoder/stem/conv").shape[-1]
    stages = zip(efficientnet_lite.STAGES, encoder.widths, encoder.depths, strict=True)
    for (_, first_stride, expansion), width, depth in stages:
        for stride in (first_stride,) + (1,) * (depth - 1):
            if stride == 2:
                features.append(x)
            skip, path = x, f"encoder/block_{index}"
            if expansion > 1:
                x = relu6(layer(x, f"{path}/expand"))
            x = relu6(layer(x, f"{path}/depthwise", stride=stride, depthwise=True))
            x = layer(x, f"{path}/project")
            if stride == 1 and width == channels:
                x = layers.graph.add("Add", x, skip)
            index, channels = index + 1, width
    return [*features, x]


def _resnet(layers: "Layers", encoder: resnet.ResNet, x: str) -> list[str]:
    """The features at strides 2 to 32."""
    layer, relu = partial(layers.conv_norm, epsilon=resnet.EPSILON), partial(layers.graph.add, "Relu")
    features = [relu(layer(x, "encoder/stem", padding=3, stride=2))]
    x = layers.graph.add("MaxPool", features[0], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, depth in enumerate(encoder.depths, 1):
        for i in range(depth):
            path, stride = f"encoder/layer{stage}_{i}", 2 if stage > 1 and i == 0 else 1
            if encoder.bottleneck:
                y = relu(layer(x, f"{path}/conv1", padding=0))
                y = relu(layer(y, f"{path}/conv2", padding=1, stride=stride))
                y = layer(y, f"{path}/conv3", padding=0)
            else:
                y = relu(layer(x, f"{path}/conv1", padding=1, stride=stride))
                y = layer(y, f"{path}/conv2", padding=1)
            if f"params/{path}/downsample/conv/kernel" in layers.weights:
                x = layer(x, f"{path}/downsample", padding=0, stride=stride)
            x = relu(layers.graph.add("Add", y, x))
        features.append(x)
    return features


@dataclasses.dataclass(frozen=True)
class Layers:
    """Appends layers to a graph: from a value `[B, C, H, W]` and the path of their weights to another value."""

    graph: Graph
    weights: dict[str, np.ndarray]  # by path, such as `params/head/kernel`

    def kernel(self, path: str) -> np.ndarray:
        """`[h, w, C, F]`."""
        return self.weights[f"params/{path}/kernel"]

    def conv(self, x: str, path: str, padding: str | int, stride: int = 1, depthwise: bool = False) -> str:
        """A convolution, with its bias if it has one.

        `padding` is rows and columns of zeros on each side, or TensorFlow's `SAME`, for sides that `stride` divides.
        """
        kernel = self.kernel(path).transpose(3, 2, 0, 1)
        bias = [self.weights[f"params/{path}/bias"]] if f"params/{path}/bias" in self.weights else []
        after = kernel.shape[-1] // 2 if padding == "SAME" else padding
        before = after + 1 - stride if padding == "SAME" else padding
        groups = len(kernel) if depthwise else 1
        return self.graph.add(
            "Conv", x, kernel, *bias, pads=[before, before, after, after], strides=[stride] * 2, group=groups
        )

    def conv_norm(self, x: str, path: str, epsilon: float, padding: str | int, **settings) -> str:
        """`encoders.layers.ConvNorm` without its activation; `settings` go to `conv`."""
        return self.batch_norm(self.conv(x, f"{path}/conv", padding, **settings), f"{path}/norm", epsilon)

    def batch_norm(self, x: str, path: str, epsilon: float) -> str:
        """Batch normalisation by the running averages."""
        affine = [self.weights[f"params/{path}/{name}"] for name in ("scale", "bias")]
        running = [self.weights[f"batch_stats/{path}/{name}"] for name in ("mean", "var")]
        return self.graph.add("BatchNormalization", x, *affine, *running, epsilon=epsilon)

    def group_norm(self, x: str, path: str) -> str:
        """Normalises each group as one long channel: GroupNormalization is newer, and half as exact in onnxruntime."""
        scale, bias = (self.weights[f"params/{path}/{name}"][:, None, None] for name in ("scale", "bias"))
        groups = gcd(8, scale.size)
        ones = np.ones(groups, np.float32)
        flat = self.graph.add("Reshape", x, np.array([0, groups, -1]))
        flat = self.graph.add("InstanceNormalization", flat, ones, 0 * ones, epsilon=1e-6)
        normalized = self.graph.add("Reshape", flat, self.graph.add("Shape", x))
        return self.graph.add("Add", self.graph.add("Mul", normalized, scale), bias)

    def block(self, x: str, path: str, padding: int, residual: bool = False) -> str:
        """`unet.ConvBlock`; the weights determine the number of convolutions and the normalisation."""
        entering, depth = x, next(i for i in count() if f"params/{path}/Conv_{i}/kernel" not in self.weights)
        for i in range(depth):
            x = self.norm(self.conv(x, f"{path}/Conv_{i}", padding), f"{path}/BatchNorm_{i}", f"{path}/GroupNorm_{i}")
            if not residual or i + 1 < depth:
                x = self.graph.add("Relu", x)
        if not residual:
            return x
        if f"params/{path}/shortcut/kernel" in self.weights:
            entering = self.norm(self.conv(entering, f"{path}/shortcut", 0), f"{path}/shortcut_norm")
        if crop := depth * (1 - padding):
            entering = self.graph.add("Slice", entering, np.array([crop] * 2), np.array([-crop] * 2), np.array([2, 3]))
        return self.graph.add("Relu", self.graph.add("Add", x, entering))

    def norm(self, x: str, *paths: str) -> str:
        """The normalisation, batch or group, that has weights at one of the paths; `x` itself if there is none."""
        for path in paths:
            if f"batch_stats/{path}/mean" in self.weights:
                return self.batch_norm(x, path, 1e-5)
            if f"params/{path}/scale" in self.weights:
                return self.group_norm(x, path)
        return x

    def up(self, x: str, path: str, upsample: str) -> str:
        """Up-sampling by two as `config.model.upsample` says; the plain U-Net has a convolution after a resize."""
        if not upsample.startswith("transposed"):
            return self.block(self.resize_2x(x, upsample), path, 1)  # padded even if model.padding is "valid"
        kernel = self.kernel(path)[::-1, ::-1].transpose(2, 3, 0, 1)  # ONNX rotates it by 180 degrees
        surplus = kernel.shape[-1] - 2  # a 3x3 kernel extends one past the last row and column
        bias = self.weights[f"params/{path}/bias"]
        return self.graph.add("ConvTranspose", x, kernel, bias, strides=[2, 2], pads=[0, 0, surplus, surplus])

    def resize_2x(self, x: str, method: str) -> str:
        """Doubles height and width, `nearest` or `bilinear`."""
        if method == "nearest":
            mode = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        else:
            mode = dict(mode="linear", coordinate_transformation_mode="half_pixel")
        return self.graph.add("Resize", x, "", np.array([1, 1, 2, 2], np.float32), **mode)
