"""Exports trained networks to files that other programs can run: StableHLO, ONNX, and plain weights.

The graphs of `to_stablehlo` and `to_onnx` have the same input and outputs, for any batch size and image size:

image        `[b, h, w, C]`, uint8, or of the type of the training images: uint16 or float32
label        uint8 `[b, h, w]`, the most probable class (binary: 0 or 1); multilabel: `[b, h, w, K]`, each 0 or 1
probability  float32 `[b, h, w, K]`, for thresholds other than 0.5; K = 1 for a binary task

They do what `--mode=predict` does, so that a caller cannot get any of it wrong: images are resized as training resized
them, normalised, and given mirrored margins, and probabilities are cut and resized back. But they predict all images
whole: one that `--mode=predict` would predict in tiles, as it is larger than those of the training (or so small that
it would be enlarged), is resized to `config.data.size` (`--scale=fit`). Networks that were trained on windows of images
at their own size resize nothing. Each export raises a `UserError` if a package that it needs is not installed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import export

from unet_jax.data import pixel_sizes
from unet_jax.errors import UserError, import_extra
from unet_jax.inference import forward
from unet_jax.inference.resize import triangle
from unet_jax.inference.trained import Trained
from unet_jax.metrics import confusion
from unet_jax.models.encoder_unet import EncoderUNet
from unet_jax.models.unet import UNet
from unet_jax.parallel import sharding

if TYPE_CHECKING:
    import onnx

PLATFORMS = ("cpu", "cuda", "tpu")  # that a StableHLO file can run on

optional = functools.partial(import_extra, extra="export")


def metadata(trained: Trained) -> dict[str, str]:
    """Describes the weights, as JSON: `config`, `classes`, `normalization`, `step`, and `image_sizes` of the training.

    Those are the smallest and the largest (height, width) before images were resized; null if they are not known.
    """
    return {
        "config": trained.config.to_json(),
        "classes": json.dumps(trained.classes.to_json()),
        "normalization": json.dumps(trained.network.normalization.to_json()),
        "step": str(trained.step),
        "image_sizes": json.dumps(trained.source_sizes),
    }


def graph_metadata(trained: Trained, resize: bool = True) -> dict[str, str]:
    """`metadata`, and as `input` which images the graph takes and what it does to them, in words."""
    return metadata(trained) | {"input": describe_input(trained, resize)}


def describe_input(trained: Trained, resize: bool = True) -> str:
    """Which images a graph takes, and what it does to them; see `to_stablehlo`."""
    to = "x".join(map(str, trained.size))
    text = f"image: {trained.classes.dtype} [batch, height, width, {trained.classes.channels}]"
    if trained.classes.dtype == "uint8" and tuple(trained.config.data.value_range) not in ((), (0, 65535)):
        low, high = trained.config.data.value_range
        text += f", 16-bit values {low}..{high} as 0..255"
    if not trained.resizes:
        scaled = pixel_sizes.describe(trained.config.data)
        return f"{text}, of any size, at the scale of the training images, which were {scaled}"
    if not resize:
        return f"{text}, which must be resized to {to} (height x width, {trained.config.data.resize}) as in training"
    text += f", of any size: resized to {to} (height x width), and the result back."
    if trained.source_sizes is None:
        return text
    smallest, largest = ("x".join(map(str, size)) for size in trained.source_sizes)
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    return f"{text} Training images were {sizes}: for larger ones prefer --mode=predict, which predicts them in tiles"


def to_safetensors(trained: Trained) -> bytes:
    """The weights by their paths, such as `params/head/kernel`, with `metadata` in the header."""
    weights = {path: np.ascontiguousarray(value) for path, value in _weights(trained).items()}
    return optional("safetensors.numpy").save(weights, metadata(trained))


def _weights(trained: Trained) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(jax.device_get(trained.variables), sep="/")


def to_stablehlo(trained: Trained, resize: bool = True) -> bytes:
    """The network with its weights, serialised by `jax.export` for CPU, CUDA and TPU.

    Without `resize`, images must be resized before, unless training did not resize its own.

    `jax.export.deserialize(data).call(image)` returns (label, probability) as described above, and compiles once per
    shape. JAX guarantees that the file can be read for six months.
    """
    optional("flatbuffers")  # which `jax.export` needs
    model = trained.model.clone(conv_impl="plain")  # the other implementation is slow on other devices
    mesh = sharding.create_mesh(1, 1, jax.devices()[:1])
    network = dataclasses.replace(trained.network, model=model, mesh=mesh)
    variables = jax.device_get(trained.variables)

    def run_resized(image):
        if image.dtype == jnp.float32:  # NaN would spread along its whole row and column
            image = jnp.where(jnp.isnan(image), np.float32(network.normalization.fill), image)
        small = resize_image(image, trained.size, trained.config.data.resize)
        probability = resize_bilinear(network.probability(variables, small), image.shape[1:3])
        return _most_probable(probability, network.task), probability

    def run(image):
        logits = network.window_logits(variables, reflect_pad(model, image), image.shape[1:3])
        return confusion.predict_label(logits, network.task), forward.to_probability(logits, network.task)

    shape = (*export.symbolic_shape("b, h, w"), trained.classes.channels)
    graph = run_resized if resize and trained.resizes else run
    exported = export.export(jax.jit(graph), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, trained.classes.dtype))
    return bytes(exported.serialize())


def _most_probable(probability: jax.Array, task: str) -> jax.Array:
    """`forward.to_label` in JAX."""
    label = probability.argmax(-1) if task == "multiclass" else probability > 0.5
    return (label[..., 0] if task == "binary" else label).astype(jnp.uint8)


def resize_image(image: jax.Array, size: Sequence[int], method: str) -> jax.Array:
    """`data.images.resize_image` of a batch `[B, h, w, C]` to `[B, *size, C]`, for symbolic h and w.

    Equal to Pillow's but for a grey level where its 22-bit weights round otherwise than float32, and for `nearest`
    where the centre of a pixel falls between two pixels.
    """
    if method == "bilinear":
        half_up, as_is = lambda x: jnp.floor(x + 0.5), lambda x: x
        resized = _resize(image.astype(jnp.float32), size, half_up if image.dtype == jnp.uint8 else as_is)
        return (jnp.rint(resized) if image.dtype == jnp.uint16 else resized).astype(image.dtype)
    for axis, new in enumerate(size, 1):
        image = jnp.take(image, (2 * jnp.arange(new) + 1) * image.shape[axis] // (2 * new), axis=axis)
    return image


def resize_bilinear(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Resizes float32 `[B, h, w, K]` to `[B, *size, K]`, which may be symbolic, as Pillow does."""
    return _resize(x, size, lambda x: x)


def _resize(x: jax.Array, size: Sequence[int], after_each_pass: Callable) -> jax.Array:
    for axis, equation in ((2, "ij,bhjc->bhic"), (1, "ij,bjwc->biwc")):  # Pillow's order
        old, new = x.shape[axis], size[axis - 1]
        weights = triangle(jnp.arange(new)[:, None], jnp.arange(old), old, new, jnp).astype(jnp.float32)
        weights = weights / weights.sum(1, keepdims=True)
        x = after_each_pass(jnp.einsum(equation, weights, x, precision="highest"))
    return x


def geometry(model: nn.Module) -> list[tuple[int, int, int]]:
    """The margins in closed form, for symbolic image sizes: (before, smallest, covered) for the height and the width.

    Output lengths grow by `stride` as input lengths do, so n pixels need an input of
    `smallest + ceil((n - covered) / stride) * stride` pixels, of which `before` precede the n.
    """
    smallest = model.smallest_input
    before = (before for before, _ in model.margins((1, 1)))
    return list(zip(before, smallest, model.output_size(smallest), strict=True))


def reflect_pad(model: nn.Module, image: jax.Array) -> jax.Array:
    """`forward.reflect_pad` with the margins of the network, for symbolic height and width."""
    for axis, (before, smallest, covered) in enumerate(geometry(model), 1):
        length = image.shape[axis]
        padded = smallest + (length - covered + model.stride - 1) // model.stride * model.stride
        # A triangle wave, so that margins longer than the image are reflected again and again.
        period = jnp.maximum(2 * (length - 1), 1)
        index = (jnp.arange(padded) - before) % period
        image = jnp.take(image, jnp.minimum(index, period - index), axis=axis)
    return image


def to_onnx(trained: Trained, resize: bool = True) -> "onnx.ModelProto":
    """The network as a float32 ONNX model, with `graph_metadata` in its `metadata_props`.

    Without `resize`, images must be resized before, unless training did not resize its own. Raises a `UserError` for a
    network or an encoder that `onnx_networks` does not have.
    """
    if not isinstance(trained.model, UNet | EncoderUNet):
        raise UserError(
            "ONNX is written only for config.model.name = 'unet' and 'encoder_unet', not for "
            f"{type(trained.model).__name__}; use StableHLO instead"
        )
    onnx = optional("onnx")
    from unet_jax.interop import onnx_graph, onnx_networks

    task, outputs, graph = trained.classes.task, trained.classes.num_outputs, onnx_graph.Graph()
    dtype, normalization, resize = trained.classes.dtype, trained.network.normalization, resize and trained.resizes
    if dtype == "float32":
        x = graph.add("Where", graph.add("IsNaN", "image"), np.float32(normalization.fill), "image")
    else:
        x = graph.add("Cast", "image", to=onnx.TensorProto.FLOAT)
    if resize:
        x = onnx_graph.resize_image(graph, x, np.array(trained.size), trained.config.data.resize, dtype)
    size = graph.add("Shape", x, start=1, end=3)
    x = _normalize_onnx(graph, normalization, x, dtype)
    x = graph.add("Transpose", _reflect_pad_onnx(graph, trained.model, x), perm=(0, 3, 1, 2))  # ONNX convolves NCHW
    x = onnx_networks.add_network(graph, trained.model, _weights(trained), x)
    logits = graph.add("Slice", graph.add("Transpose", x, perm=(0, 2, 3, 1)), np.array([0, 0]), size, np.array([1, 2]))
    activation = ("Softmax", dict(axis=-1)) if task == "multiclass" else ("Sigmoid", {})
    if resize:
        small = graph.add(activation[0], logits, **activation[1])
        own_size = graph.add("Shape", "image", start=1, end=3)
        decisive = onnx_graph.resize_bilinear(graph, small, own_size, output="probability")
    else:
        graph.add(activation[0], logits, **activation[1], output="probability")
        decisive = logits  # probabilities close to 1 can be equal where logits are not
    if task == "multiclass":
        label = graph.add("ArgMax", decisive, axis=-1, keepdims=0)
    else:
        label = graph.add("Greater", decisive, np.float32(0.5 if resize else 0))
        label = graph.add("Squeeze", label, np.array([-1])) if task == "binary" else label
    graph.add("Cast", label, to=onnx.TensorProto.UINT8, output="label")

    def tensor(name, kind, *channels):
        shape = ("batch", "height", "width", *channels)
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), shape)

    image = tensor("image", {"float32": "FLOAT"}.get(dtype, dtype.upper()), trained.classes.channels)
    label = tensor("label", "UINT8", *([outputs] if task == "multilabel" else []))
    probability = tensor("probability", "FLOAT", outputs)
    network = onnx.helper.make_graph(graph.nodes, "unet", [image], [label, probability], graph.constants)
    # Versions of 2022, which are sufficient: older runtimes reject newer ones.
    versions = dict(opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    proto = onnx.helper.make_model(network, **versions, producer_name="unet_jax")
    onnx.helper.set_model_props(proto, graph_metadata(trained, resize))
    return proto


def _normalize_onnx(graph, normalization: forward.Normalization, x: str, dtype: str) -> str:
    """`Normalization` of the values of a `dtype`, given as float32 without NaN, as ONNX nodes."""
    if normalization.has_limits or dtype != "uint8":
        low, high = np.float32(normalization.low), np.float32(normalization.high)
        x = graph.add("Div", graph.add("Sub", x, low), high - low)
        x = graph.add("Clip", x, np.float32(0), np.float32(1))
    else:
        x = graph.add("Div", x, np.float32(255))
    if (normalization.mean, normalization.scale) != ((0.0,), (255.0,)):
        x = graph.add("Sub", x, np.float32(normalization.mean) / np.float32(255))
        x = graph.add("Div", x, np.float32(normalization.scale) / np.float32(255))
    return x


def _reflect_pad_onnx(graph, model: nn.Module, x: str) -> str:
    """`reflect_pad` as ONNX nodes."""
    zero, one, two = np.arange(3)
    for axis, numbers in enumerate(geometry(model), 1):
        before, smallest, covered, stride = map(np.int64, (*numbers, model.stride))
        length = graph.add("Gather", graph.add("Shape", x), np.int64(axis))
        strides = graph.add("Div", graph.add("Add", length, stride - 1 - covered), stride)
        padded = graph.add("Add", graph.add("Mul", strides, stride), smallest)
        period = graph.add("Max", graph.add("Mul", graph.add("Sub", length, one), two), one)
        index = graph.add("Mod", graph.add("Sub", graph.add("Range", zero, padded, one), before), period)
        x = graph.add("Gather", x, graph.add("Min", index, graph.add("Sub", period, index)), axis=axis)
    return x
