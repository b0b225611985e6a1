"""Trained networks as files that other programs run: StableHLO, ONNX, and plain weights.

`to_stablehlo` and `to_onnx` keep one contract, for any batch and any size of image:

image        uint8 `[b, h, w, C]`
label        uint8 `[b, h, w]`, the likeliest class (binary: 0 or 1); multilabel: `[b, h, w, K]`, each 0 or 1
probability  float32 `[b, h, w, K]`, for thresholds other than one half; K = 1 for a binary task

Scaling to 0..1, mirrored margins, crop and labels are inside: whoever runs the file can get none of them wrong.
"""

import importlib
import json
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from unet_jax import metrics, predict
from unet_jax.errors import UserError
from unet_jax.models.unet import UNet
from unet_jax.trained import Trained

if TYPE_CHECKING:
    import onnx

PLATFORMS = ("cpu", "cuda", "tpu")  # that a StableHLO file runs on


def optional(name: str):
    """Imports a package of the `export` extra.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"the package {package} is needed, but not installed: run scripts/install.sh export") from error


def metadata(trained: Trained) -> dict[str, str]:
    """What the weights mean: `config` and `classes` (task, names, palette, channels) as JSON, and `step`."""
    classes = json.dumps(trained.classes.to_json())
    return {"config": trained.config.to_json(), "classes": classes, "step": str(trained.step)}


def to_stablehlo(trained: Trained) -> bytes:
    """The network with its weights as `jax.export` serialises it, for CPU, CUDA and TPU.

    `jax.export.deserialize(data).call(image)` returns (label, probability) as described above; each new shape is
    compiled once. JAX promises to read the file for six months.

    Raises:
      UserError: flatbuffers, which `jax.export` writes with, is not installed.
    """
    optional("flatbuffers")
    model = trained.model.clone(one_cpu=False)  # that form is slow on all else
    variables, task = jax.device_get(trained.variables), trained.classes.task

    def run(image):
        logits = predict.logits(model, variables, _surround(model, image), image.shape[1:3], task)
        return metrics.predict_label(logits, task), predict.to_probability(logits, task)

    shape = (*export.symbolic_shape("b, h, w"), trained.classes.channels)
    exported = export.export(jax.jit(run), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    return bytes(exported.serialize())


def _surround(model: UNet, image: jax.Array) -> jax.Array:
    """`predict.surround_image` for images whose height and width are symbols."""
    x = predict.as_float(image)
    before, smallest, covered, grid = _geometry(model)
    for axis, length in enumerate(image.shape[1:3], 1):
        side = smallest + (length - covered + grid - 1) // grid * grid
        # A triangle wave: a margin longer than the image runs back and forth in it.
        period = jnp.maximum(2 * (length - 1), 1)
        index = (jnp.arange(side) - before) % period
        x = jnp.take(x, jnp.minimum(index, period - index), axis=axis)
    return x


def _geometry(model: UNet) -> tuple[int, int, int, int]:
    """What `UNet.margins` finds by search, in closed form.

    Lengths that the network takes are its smallest and multiples of the pooling grid more, and the output grows with
    them: n pixels need the input `smallest + ceil((n - covered) / grid) * grid`, which begins `before` their first.

    Returns:
      before, smallest, covered, grid.
    """
    (before, _), _ = model.margins((1, 1))
    smallest = model.smallest_input
    return before, smallest[0], model.output_size(smallest)[0], 2 ** (len(model.features) - 1)


def to_safetensors(trained: Trained) -> bytes:
    """The weights by their paths, as in `params/head/kernel`, with `metadata` in the header.

    Raises:
      UserError: safetensors is not installed.
    """
    weights = {name: np.ascontiguousarray(value) for name, value in _weights(trained).items()}
    return optional("safetensors.numpy").save(weights, metadata(trained))


def _weights(trained: Trained) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(trained.variables))[0]
    return {"/".join(key.key for key in path): value for path, value in leaves}


def to_onnx(trained: Trained) -> "onnx.ModelProto":
    """The network as an ONNX model, with `metadata` in its `metadata_props`; float32 whatever its dtype.

    Raises:
      UserError: onnx is not installed.
    """
    onnx = optional("onnx")
    from unet_jax.models import unet_onnx

    task, outputs, graph = trained.classes.task, trained.classes.num_outputs, unet_onnx.Graph()
    x = graph.add("Div", graph.add("Cast", "image", to=onnx.TensorProto.FLOAT), np.float32(255))
    x = graph.add("Transpose", _surround_onnx(graph, trained.model, x), perm=(0, 3, 1, 2))  # ONNX convolves NCHW
    x = unet_onnx.add_unet(graph, trained.model, _weights(trained), x)
    size = graph.add("Shape", "image", start=1, end=3)
    logits = graph.add("Slice", graph.add("Transpose", x, perm=(0, 2, 3, 1)), np.array([0, 0]), size, np.array([1, 2]))
    if task == "multiclass":
        graph.add("Softmax", logits, axis=-1, output="probability")
        label = graph.add("ArgMax", logits, axis=-1, keepdims=0)
    else:
        graph.add("Sigmoid", logits, output="probability")
        label = graph.add("Greater", logits, np.float32(0))
        label = graph.add("Squeeze", label, np.array([-1])) if task == "binary" else label
    graph.add("Cast", label, to=onnx.TensorProto.UINT8, output="label")

    def tensor(name, kind, *channels):
        shape = ("batch", "height", "width", *channels)
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), shape)

    image = tensor("image", "UINT8", trained.classes.channels)
    label = tensor("label", "UINT8", *([outputs] if task == "multilabel" else []))
    probability = tensor("probability", "FLOAT", outputs)
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "unet", [image], [label, probability], graph.constants),
        # Of 2022: older runtimes refuse what is newer, and nothing here is.
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="unet_jax",
    )
    onnx.helper.set_model_props(proto, metadata(trained))
    return proto


def _surround_onnx(graph, model: UNet, x: str) -> str:
    """`_surround`, step by step."""
    before, smallest, covered, grid = map(np.int64, _geometry(model))
    zero, one, two = np.arange(3)
    for axis in (1, 2):
        length = graph.add("Gather", graph.add("Shape", "image"), np.int64(axis))
        steps = graph.add("Div", graph.add("Add", length, grid - 1 - covered), grid)
        side = graph.add("Add", graph.add("Mul", steps, grid), smallest)
        period = graph.add("Max", graph.add("Mul", graph.add("Sub", length, one), two), one)
        index = graph.add("Mod", graph.add("Sub", graph.add("Range", zero, side, one), before), period)
        x = graph.add("Gather", x, graph.add("Min", index, graph.add("Sub", period, index)), axis=axis)
    return x
