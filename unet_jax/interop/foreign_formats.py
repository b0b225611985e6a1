"""Foreign weight formats: which array of another project's file holds each variable of our U-Net.

A format is a table from the path of each of our variables to the name of an array in the file and a function that
transposes it to our layout. It also determines the settings of the network, except the widths, which the arrays give.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from unet_jax.errors import UserError
from unet_jax.weights.files import Weights
from unet_jax.weights.keras_files import KerasLayer

# `config.model` without the widths; each format changes some of these settings.
BASE_SETTINGS = {
    "name": "unet",
    "padding": "same",
    "upsample": "transposed_2x2",
    "dropout": 0.0,
    "dropout_on_skip": False,
    "norm": "none",
    "extra_conv": False,
    "block": "plain",
    "kernel_init": "he",
    "dtype": "float32",
}
SUPPORTED = (
    "Supported are the PyTorch U-Net with e11, e12, ..., upconv1, d11, ..., outconv; milesial/Pytorch-UNet with "
    "inc.double_conv, down1.maxpool_conv, up1.up, ..., outc.conv; and the Keras U-Nets with UpSampling2D or "
    "Conv2DTranspose"
)
# The layers that a Keras U-Net may consist of, each with its letter, class, and settings.
CONVOLUTION = {"data_format": "channels_last", "dilation_rate": [1, 1], "groups": 1}
CONV_3X3 = CONVOLUTION | {"kernel_size": [3, 3], "strides": [1, 1], "padding": "same", "activation": "relu"}
TRANSPOSED = CONVOLUTION | {"strides": [2, 2], "padding": "same", "output_padding": None, "activation": "linear"}
POOLING = {"data_format": "channels_last", "pool_size": [2, 2], "strides": [2, 2]}
RESIZE = {"data_format": "channels_last", "size": [2, 2], "interpolation": "nearest"}
LETTERS = (
    ("I", "InputLayer", {}),
    ("C", "Conv2D", CONV_3X3),
    ("H", "Conv2D", CONVOLUTION | {"kernel_size": [1, 1], "strides": [1, 1]}),
    ("2", "Conv2DTranspose", TRANSPOSED | {"kernel_size": [2, 2]}),
    ("3", "Conv2DTranspose", TRANSPOSED | {"kernel_size": [3, 3]}),
    ("P", "MaxPooling2D", POOLING),
    ("U", "UpSampling2D", RESIZE),
    ("D", "Dropout", {}),
    # A concatenation along another axis, or another operation on two inputs, would change the shape of the next kernel.
    ("M", "Concatenate", {}),
    ("M", "TFOpLambda", {"function": "concat"}),  # tf.concat in Keras 2
    ("M", "TensorFlowOpLayer", {}),  # tf.concat in TensorFlow 2.1
)

ToOurLayout = Callable[[np.ndarray], np.ndarray]  # kernels become [height, width, in, out]
Table = dict[str, tuple[str, ToOurLayout]]  # path of our variable -> (name of the array in the file, its transposition)
_unchanged = lambda array: array
_torch_conv = lambda kernel: kernel.transpose(2, 3, 1, 0)  # from [out, in, height, width]
_torch_transposed = lambda kernel: kernel.transpose(2, 3, 0, 1)[::-1, ::-1]  # from [in, out, height, width]
_keras_transposed = lambda kernel: kernel.transpose(0, 1, 3, 2)[::-1, ::-1]  # from [height, width, out, in]


class ForeignFormat(NamedTuple):
    """The format of a file, as recognised by `recognise`."""

    name: str  # of the network it comes from, for messages
    levels: int  # number of resolutions
    settings: dict[str, Any]  # `config.model` without the widths
    table: Table
    ignored: frozenset[str] = frozenset()  # arrays that are not needed
    activation: str = ""  # of the last layer, if the file specifies it: `sigmoid`, `softmax` or `linear`; else empty


def recognise(weights: Weights, file: str) -> ForeignFormat:
    """Recognises the format of a file from the names of its arrays.

    An unknown format, or a variant that our U-Net has no settings for, is a `UserError`.
    """
    if weights.layers is not None:
        return _keras(weights.layers, file)
    if "e11.weight" in weights.arrays:
        return _pytorch(weights.arrays)
    if "inc.double_conv.0.weight" in weights.arrays:
        return _milesial(weights.arrays, file)
    raise UserError(f"{file} has an unknown format: it holds {some(weights.arrays)}. {SUPPORTED}")


def some(names: Iterable[str]) -> str:
    """The first few names, for messages."""
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _skip_first(to_our_layout: ToOurLayout, kernel: np.ndarray) -> np.ndarray:
    """For networks that concatenate [skip, up], each half of the channels: reorders them as in ours, [up, skip]."""
    kernel = to_our_layout(kernel)
    return np.roll(kernel, kernel.shape[2] // 2, axis=2)


def _torch_layer(ours: str, theirs: str, kernel: ToOurLayout = _torch_conv) -> Table:
    """The table entries of a layer with kernel and bias."""
    weight, bias = (f"{theirs}.weight", kernel), (f"{theirs}.bias", _unchanged)
    return {f"params/{ours}/kernel": weight, f"params/{ours}/bias": bias}


def _pytorch(arrays: Mapping[str, np.ndarray]) -> ForeignFormat:
    """A PyTorch U-Net with encoder layers e<level><conv>, then upconv<n> and d<n><conv> from the lowest level up."""
    levels = next(n for n in count(1) if f"e{n + 1}1.weight" not in arrays)
    table = _torch_layer("head", "outconv")
    for level in range(levels):
        for conv in (0, 1):
            table |= _torch_layer(f"down_{level}/Conv_{conv}", f"e{level + 1}{conv + 1}")
    for level in range(levels - 1):
        n = levels - 1 - level
        table |= _torch_layer(f"up_{level}", f"upconv{n}", _torch_transposed)
        for conv in (0, 1):
            table |= _torch_layer(f"merge_{level}/Conv_{conv}", f"d{n}{conv + 1}")
    return ForeignFormat("the PyTorch U-Net (e11 ... outconv)", levels, BASE_SETTINGS, table)


def _milesial(arrays: Mapping[str, np.ndarray], file: str) -> ForeignFormat:
    """milesial/Pytorch-UNet: convolutions without bias, batch normalisation, and concatenation as [skip, up]."""
    if "up1.conv.double_conv.0.weight" in arrays and "up1.up.weight" not in arrays:
        raise UserError(
            f"{file} is the bilinear variant of milesial/Pytorch-UNet, which up-samples with aligned corners and "
            "without a convolution. That is not supported; only UNet(..., bilinear=False) can be imported"
        )
    levels = next(n for n in count(1) if f"down{n}.maxpool_conv.1.double_conv.0.weight" not in arrays)
    table, ignored = _torch_layer("head", "outc.conv"), set()

    def add_block(ours: str, theirs: str, first_kernel: ToOurLayout) -> None:
        for i, kernel in enumerate((first_kernel, _torch_conv)):
            norm = f"{theirs}.double_conv.{3 * i + 1}"
            table[f"params/{ours}/Conv_{i}/kernel"] = (f"{theirs}.double_conv.{3 * i}.weight", kernel)
            table[f"params/{ours}/BatchNorm_{i}/scale"] = (f"{norm}.weight", _unchanged)
            table[f"params/{ours}/BatchNorm_{i}/bias"] = (f"{norm}.bias", _unchanged)
            table[f"batch_stats/{ours}/BatchNorm_{i}/mean"] = (f"{norm}.running_mean", _unchanged)
            table[f"batch_stats/{ours}/BatchNorm_{i}/var"] = (f"{norm}.running_var", _unchanged)
            ignored.add(f"{norm}.num_batches_tracked")

    for level in range(levels):
        add_block(f"down_{level}", f"down{level}.maxpool_conv.1" if level else "inc", _torch_conv)
    for level in range(levels - 1):
        theirs = f"up{levels - 1 - level}"
        table |= _torch_layer(f"up_{level}", f"{theirs}.up", _torch_transposed)
        add_block(f"merge_{level}", f"{theirs}.conv", partial(_skip_first, _torch_conv))
    return ForeignFormat("milesial/Pytorch-UNet", levels, BASE_SETTINGS | {"norm": "batch"}, table, frozenset(ignored))


def _keras(layers: Sequence[KerasLayer], file: str) -> ForeignFormat:
    """A Keras U-Net, recognised by a regular expression over one letter per layer."""
    letters = "".join(_letter(layer, file) for layer in layers)
    rates = {layer.config["rate"] for layer in layers if layer.class_name == "Dropout"}
    match = re.fullmatch(r"I(?:CCP)*(?:CCPCC|CCDPCCD)((?:2MCC)+|(?:3MCC)+|(?:UCMCC)+)(C?)H", letters)
    levels = letters.count("P") + 1
    if not match or letters.count("M") != levels - 1 or len(rates) > 1:
        raise UserError(
            f"{file} is not a supported U-Net: its layers are {letters} (C: 3x3 convolution, P: pooling, D: dropout, "
            "2 and 3: transposed convolution, U: up-sampling, M: concatenation, H: head), with dropout rates "
            f"{sorted(rates)}. Dropout must have a single rate, and end the two lowest encoder blocks. {SUPPORTED}"
        )
    up, has_extra_conv = match[1][0], bool(match[2])
    swapped, dropout_on_skip = _check_connections(layers, letters, bool(rates), file)

    ours = [f"down_{level}/Conv_{i}" for level in range(levels) for i in (0, 1)]
    for level in reversed(range(levels - 1)):
        ours += [f"up_{level}" + ("/Conv_0" if up == "U" else ""), f"merge_{level}/Conv_0", f"merge_{level}/Conv_1"]
    ours += ["extra/Conv_0"] * has_extra_conv + ["head"]
    theirs = [(layer.name, letter) for layer, letter in zip(layers, letters, strict=True) if letter in "C23H"]
    table = {}
    for path, (name, letter) in zip(ours, theirs, strict=True):
        kernel = _keras_transposed if letter in "23" else _unchanged
        kernel = partial(_skip_first, kernel) if path in swapped else kernel
        table[f"params/{path}/kernel"] = (f"{name}/kernel", kernel)
        table[f"params/{path}/bias"] = (f"{name}/bias", _unchanged)
    settings = BASE_SETTINGS | {
        "upsample": {"2": "transposed_2x2", "3": "transposed_3x3", "U": "nearest"}[up],
        "dropout": float(max(rates, default=0.0)),
        "dropout_on_skip": dropout_on_skip,
        "extra_conv": has_extra_conv,
    }
    activation = layers[-1].config.get("activation")
    if activation not in ("linear", "sigmoid", "softmax"):
        raise UserError(f"{file}: the last activation is {activation!r}; supported are linear, sigmoid and softmax")
    return ForeignFormat("a Keras U-Net", levels, settings, table, activation=activation)


def _letter(layer: KerasLayer, file: str) -> str:
    # Files of older Keras versions lack settings that were added later.
    has = lambda settings: all(layer.config.get(name, value) == value for name, value in settings.items())
    letter = next((letter for letter, kind, settings in LETTERS if layer.class_name == kind and has(settings)), None)
    if letter and (letter != "D" or isinstance(layer.config.get("rate"), int | float)):
        return letter
    raise UserError(
        f"{file}: layer {layer.name!r}, {layer.class_name} with these settings, is not supported (3x3 convolutions "
        f"with padding and ReLU, 2x2 pooling, up-sampling by two). {SUPPORTED}"
    )


def _check_connections(layers, letters: str, has_dropout: bool, file: str) -> tuple[set[str], bool]:
    """Checks that each layer takes the previous one as input, and each concatenation also the skip of its level.

    Returns the convolutions that take [skip, up] in this order, and whether the lowest skip is taken after its dropout.
    """
    ends = [i - 1 for i, letter in enumerate(letters) if letter == "P"]  # the last layer of each encoder block
    skips = [{layers[end].name} for end in ends]
    if has_dropout:  # the lowest skip may be taken before the dropout as well
        skips[-1].add(layers[ends[-1] - 1].name)
    level, swapped, dropout_on_skip = len(ends), set(), False
    for previous, layer, letter in zip(layers, layers[1:], letters[1:], strict=False):
        others = set(layer.inputs)
        if letter == "M":
            level -= 1
            skip = others - {previous.name}
            if len(layer.inputs) == 2 and len(skip) == 1 and skip <= skips[level]:
                others -= skip
                swapped |= {f"merge_{level}/Conv_0"} if layer.inputs[0] in skip else set()
                dropout_on_skip |= has_dropout and layers[ends[-1]].name in skip
        if others != {previous.name}:
            raise UserError(f"{file}: layer {layer.name!r} takes unsupported inputs: {layer.inputs}. {SUPPORTED}")
    return swapped, dropout_on_skip
