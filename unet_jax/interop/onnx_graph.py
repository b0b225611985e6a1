"""An ONNX graph under construction, and the resizing in front of and behind the network.

Pillow resizes otherwise than the operator Resize, so that it takes arithmetic.
"""

import numpy as np
import onnx


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


def resize_image(graph: Graph, image: str, size: np.ndarray, method: str, dtype: str) -> str:
    """`export.resize_image`: float32 `[B, h, w, C]`, the values of a `dtype`, to `[B, *size, C]`; returns its name."""
    if method == "bilinear":
        resized = _resize(graph, image, size, rounds=dtype == "uint8")
        return graph.add("Round", resized) if dtype == "uint16" else resized
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
