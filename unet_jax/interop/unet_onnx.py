"""The U-Net of `models/unet.py` as an ONNX graph, built from the same weights.

A converter of traced functions would make this file unnecessary, but jax2onnx (0.13.0, with JAX 0.10) does not support
convolutions of symbolic height and width, and patches functions of JAX and Flax. A U-Net needs only ten operators that
every runtime has; resizing as Pillow does, which the operator Resize does not, only arithmetic. `tests/test_export.py`
compares the two implementations in every setting.
"""

from itertools import count
from math import gcd

import numpy as np
import onnx

from unet_jax.models.unet import UNet


class Graph:
    """A graph under construction; its values are the names of node outputs."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []  # in order of execution
        self.constants: list[onnx.TensorProto] = []  # the arrays among their inputs

    def add(self, operator: str, *inputs: str | np.ndarray, output: str = "", **attributes) -> str:
        """Appends a node and returns the name of its output, by default a new one; arrays become constants."""
        output = output or f"{operator}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append(onnx.helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def _constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name


def resize_image(graph: Graph, image: str, size: np.ndarray, method: str) -> str:
    """`export.resize_image`: float32 `[B, h, w, C]` of whole numbers to `[B, *size, C]`; returns its name."""
    if method == "bilinear":
        return _resize(graph, image, size, rounds=True)
    for axis, new in enumerate(size, 1):
        old = graph.add("Gather", graph.add("Shape", image), np.int64(axis))
        index = graph.add("Div", graph.add("Mul", 2 * np.arange(new) + 1, old), 2 * new)
        image = graph.add("Gather", image, index, axis=axis)
    return image


def resize_bilinear(graph: Graph, x: str, size: str, output: str) -> str:
    """`export.resize_bilinear`: float32 `[B, h, w, K]` to `output`, of the height and width in `size`, int64 `[2]`."""
    return _resize(graph, x, size, rounds=False, output=output)


def _resize(graph: Graph, x: str, size: str | np.ndarray, rounds: bool, output: str = "") -> str:
    """As `export`: the width, then the height, each by a matrix of triangles, rounded to whole numbers if `rounds`."""
    half_up = lambda x: graph.add("Floor", graph.add("Add", x, np.float32(0.5))) if rounds else x
    x = graph.add("Transpose", x, perm=(0, 3, 1, 2))
    shape = graph.add("Shape", x)
    across, down = (
        _triangles(graph, graph.add("Gather", shape, np.int64(2 + k)), graph.add("Gather", size, np.int64(k)))
        for k in (1, 0)
    )
    x = half_up(graph.add("MatMul", x, graph.add("Transpose", across, perm=(1, 0))))
    x = half_up(graph.add("MatMul", down, x))
    return graph.add("Transpose", x, perm=(0, 2, 3, 1), output=output)


def _triangles(graph: Graph, old: str, new: str) -> str:
    """The matrix float32 `[new, old]` that resizes an axis of int64 lengths, see `inference.resize.triangle`."""
    zero, one, two = np.arange(3)
    odd = lambda length: graph.add("Add", graph.add("Mul", graph.add("Range", zero, length, one), two), one)
    column = graph.add("Unsqueeze", graph.add("Mul", odd(new), old), np.array([1]))
    distance = graph.add("Abs", graph.add("Sub", graph.add("Mul", odd(old), new), column))
    reach = graph.add("Mul", graph.add("Max", old, new), two)
    weights = graph.add("Cast", graph.add("Max", graph.add("Sub", reach, distance), zero), to=onnx.TensorProto.FLOAT)
    return graph.add("Div", weights, graph.add("ReduceSum", weights, np.array([1])))


def add_unet(graph: Graph, model: UNet, weights: dict[str, np.ndarray], image: str) -> str:
    """Appends the nodes of the network to `graph`, and returns its logits, float32 `[B, num_outputs, H', W']`.

    Args:
      weights: arrays by path, such as `params/head/kernel`.
      image: float32 `[B, C, H, W]`, of a size that `model.output_size` accepts.
    """
    padding = 1 if model.padding == "same" else 0
    shrinkage = 4 * (1 - padding)  # of the height and width, by two convolutions
    # `length` is the height of `x` for the smallest input. Skips are cropped by the same amount for images of any size.
    x, length, skips = image, model.smallest_input[0], []
    lowest = len(model.features) - 1
    for level in range(lowest):
        x, length = _block(graph, weights, x, f"down_{level}", padding), length - shrinkage
        skips.append((x, length))
        x, length = graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), length // 2
    x, length = _block(graph, weights, x, f"down_{lowest}", padding), length - shrinkage
    for level in reversed(range(lowest)):
        x, length = _up(graph, weights, x, f"up_{level}", model.upsample), 2 * length
        skip, skip_length = skips.pop()
        if surplus := skip_length - length:
            starts, ends = np.array([surplus // 2] * 2), np.array([surplus // 2 - surplus] * 2)
            skip = graph.add("Slice", skip, starts, ends, np.array([2, 3]))
        x = graph.add("Concat", x, skip, axis=1)
        x, length = _block(graph, weights, x, f"merge_{level}", padding), length - shrinkage
    if model.extra_conv:
        x = _block(graph, weights, x, "extra", padding)
    return _conv(graph, weights, x, "head", 0)


def _conv(graph: Graph, weights: dict[str, np.ndarray], x: str, path: str, padding: int) -> str:
    kernel = weights[f"params/{path}/kernel"].transpose(3, 2, 0, 1)
    bias = [weights[f"params/{path}/bias"]] if f"params/{path}/bias" in weights else []
    return graph.add("Conv", x, kernel, *bias, pads=[padding] * 4)


def _block(graph: Graph, weights: dict[str, np.ndarray], x: str, path: str, padding: int) -> str:
    """`unet.ConvBlock`; the weights determine the number of convolutions and the normalisation."""
    for i in count():
        if f"params/{path}/Conv_{i}/kernel" not in weights:
            return x
        x = _conv(graph, weights, x, f"{path}/Conv_{i}", padding)
        batch, group = f"{path}/BatchNorm_{i}", f"{path}/GroupNorm_{i}"
        if f"params/{batch}/scale" in weights:
            affine = [weights[f"params/{batch}/{name}"] for name in ("scale", "bias")]
            running = [weights[f"batch_stats/{batch}/{name}"] for name in ("mean", "var")]
            x = graph.add("BatchNormalization", x, *affine, *running, epsilon=1e-5)
        elif f"params/{group}/scale" in weights:
            scale, bias = (weights[f"params/{group}/{name}"][:, None, None] for name in ("scale", "bias"))
            x = graph.add("Add", graph.add("Mul", _normalize_groups(graph, x, gcd(8, scale.size)), scale), bias)
        x = graph.add("Relu", x)


def _normalize_groups(graph: Graph, x: str, groups: int) -> str:
    """Normalises each group as one long channel: GroupNormalization is newer, and half as exact in onnxruntime 1.31."""
    flat = graph.add("Reshape", x, np.array([0, groups, -1]))
    ones = np.ones(groups, np.float32)
    flat = graph.add("InstanceNormalization", flat, ones, 0 * ones, epsilon=1e-6)
    return graph.add("Reshape", flat, graph.add("Shape", x))


def _up(graph: Graph, weights: dict[str, np.ndarray], x: str, path: str, upsample: str) -> str:
    if upsample.startswith("transposed"):
        kernel = weights[f"params/{path}/kernel"][::-1, ::-1].transpose(2, 3, 0, 1)  # ONNX rotates it by 180 degrees
        surplus = kernel.shape[-1] - 2  # a 3x3 kernel extends one past the last row and column
        bias = weights[f"params/{path}/bias"]
        return graph.add("ConvTranspose", x, kernel, bias, strides=[2, 2], pads=[0, 0, surplus, surplus])
    if upsample == "nearest":
        mode = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    else:
        mode = dict(mode="linear", coordinate_transformation_mode="half_pixel")
    x = graph.add("Resize", x, "", np.array([1, 1, 2, 2], np.float32), **mode)
    return _block(graph, weights, x, path, 1)  # padded even if model.padding is "valid"
