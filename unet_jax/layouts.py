"""The layouts of other people's U-Nets: where each of our weights stands in their files.

A layout is a table from the names of our variables to an array of the file and the function that lays it out as ours.
It also fixes the settings of the network; only the widths come from the arrays.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from unet_jax.errors import UserError
from unet_jax.weights import KerasLayer, Weights

# The settings that a layout does not change; `config.model` without the widths.
PLAIN = {
    "padding": "same",
    "upsample": "transposed_2x2",
    "dropout": 0.0,
    "dropout_on_skip": False,
    "norm": "none",
    "extra_conv": False,
    "kernel_init": "he",
    "dtype": "float32",
}
KNOWN = (
    "Known are the PyTorch U-Net with e11, e12, ..., upconv1, d11, ..., outconv; milesial/Pytorch-UNet with "
    "inc.double_conv, down1.maxpool_conv, up1.up, ..., outc.conv; and the Keras U-Nets with UpSampling2D or "
    "Conv2DTranspose"
)
# What the layers of a Keras network of ours can be, one letter each.
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
    # Of which axis, or whether it is another operation on two inputs, shows in the channels that the next layer takes.
    ("M", "Concatenate", {}),
    ("M", "TFOpLambda", {"function": "concat"}),  # tf.concat in Keras 2
    ("M", "TensorFlowOpLayer", {}),  # tf.concat in TensorFlow 2.1, as the Keras seed has it
)

LayOut = Callable[[np.ndarray], np.ndarray]


class Layout(NamedTuple):
    """A recognised file.

    Attributes:
      name: of the source, for people.
      levels: how many there are.
      settings: of `config.model`, without the widths.
      table: our variable -> the array of the file, and how to lay it out.
      ignored: arrays that nothing is lost without.
      activation: of the head, where the file tells: `sigmoid`, `softmax` or `linear`; else empty.
    """

    name: str
    levels: int
    settings: dict[str, Any]
    table: dict[str, tuple[str, LayOut]]
    ignored: frozenset[str] = frozenset()
    activation: str = ""


def recognise(found: Weights, file: str) -> Layout:
    """Recognises a file by the names in it.

    Raises:
      UserError: it is of no known layout, or of a variant that no network of ours can be.
    """
    if found.layers is not None:
        return _keras(found.layers, file)
    if "e11.weight" in found.arrays:
        return _pytorch(found.arrays)
    if "inc.double_conv.0.weight" in found.arrays:
        return _milesial(found.arrays, file)
    raise UserError(f"{file} is of no known layout: it has {some(found.arrays)}. {KNOWN}")


def some(names: Iterable[str]) -> str:
    """The first few names, for messages."""
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _torch_conv(kernel: np.ndarray) -> np.ndarray:  # from [out, in, height, width]
    return kernel.transpose(2, 3, 1, 0)


def _torch_transposed(kernel: np.ndarray) -> np.ndarray:  # from [in, out, height, width]
    return kernel.transpose(2, 3, 0, 1)[::-1, ::-1]


def _keras_transposed(kernel: np.ndarray) -> np.ndarray:  # from [height, width, out, in]
    return kernel.transpose(0, 1, 3, 2)[::-1, ::-1]


def _skip_first(lay_out: LayOut, kernel: np.ndarray) -> np.ndarray:
    """For networks that concatenate [skip, up]: both are as wide, so half a turn makes it our [up, skip]."""
    kernel = lay_out(kernel)
    return np.roll(kernel, kernel.shape[2] // 2, axis=2)


def _torch(ours: str, source: str, lay_out: LayOut = _torch_conv) -> dict[str, tuple[str, LayOut]]:
    return {f"params/{ours}/kernel": (f"{source}.weight", lay_out), f"params/{ours}/bias": (f"{source}.bias", _same)}


def _pytorch(arrays: Mapping[str, np.ndarray]) -> Layout:
    """The PyTorch seed: encoder e<level><conv>, then upconv<n> and d<n><conv> from the bottom up."""
    levels = 1
    while f"e{levels + 1}1.weight" in arrays:
        levels += 1
    table = _torch("head", "outconv")
    for level in range(levels):
        for conv in (0, 1):
            table |= _torch(f"down_{level}/Conv_{conv}", f"e{level + 1}{conv + 1}")
    for level in range(levels - 1):
        n = levels - 1 - level
        table |= _torch(f"up_{level}", f"upconv{n}", _torch_transposed)
        for conv in (0, 1):
            table |= _torch(f"merge_{level}/Conv_{conv}", f"d{n}{conv + 1}")
    return Layout("the PyTorch U-Net (e11 ... outconv)", levels, PLAIN, table)


def _milesial(arrays: Mapping[str, np.ndarray], file: str) -> Layout:
    """milesial/Pytorch-UNet: batch normalisation after convolutions without bias, concatenated as [skip, up]."""
    if "up1.conv.double_conv.0.weight" in arrays and "up1.up.weight" not in arrays:
        raise UserError(
            f"{file} is the bilinear variant of milesial/Pytorch-UNet, which enlarges with aligned corners and without "
            "a convolution. No network here does so; only UNet(..., bilinear=False) can be imported"
        )
    levels = 1
    while f"down{levels}.maxpool_conv.1.double_conv.0.weight" in arrays:
        levels += 1
    table, ignored = _torch("head", "outc.conv"), set()

    def add_block(ours: str, source: str, first: LayOut) -> None:
        for i, lay_out in enumerate((first, _torch_conv)):
            norm = f"{source}.double_conv.{3 * i + 1}"
            table[f"params/{ours}/Conv_{i}/kernel"] = (f"{source}.double_conv.{3 * i}.weight", lay_out)
            table[f"params/{ours}/BatchNorm_{i}/scale"] = (f"{norm}.weight", _same)
            table[f"params/{ours}/BatchNorm_{i}/bias"] = (f"{norm}.bias", _same)
            table[f"batch_stats/{ours}/BatchNorm_{i}/mean"] = (f"{norm}.running_mean", _same)
            table[f"batch_stats/{ours}/BatchNorm_{i}/var"] = (f"{norm}.running_var", _same)
            ignored.add(f"{norm}.num_batches_tracked")

    for level in range(levels):
        add_block(f"down_{level}", f"down{level}.maxpool_conv.1" if level else "inc", _torch_conv)
    for level in range(levels - 1):
        source = f"up{levels - 1 - level}"
        table |= _torch(f"up_{level}", f"{source}.up", _torch_transposed)
        add_block(f"merge_{level}", f"{source}.conv", partial(_skip_first, _torch_conv))
    return Layout("milesial/Pytorch-UNet", levels, PLAIN | {"norm": "batch"}, table, frozenset(ignored))


def _keras(layers: Sequence[KerasLayer], file: str) -> Layout:
    """A Keras model of the seeds' kind, read as a sentence of one letter a layer."""
    sentence = "".join(_letter(layer, file) for layer in layers)
    rates = {layer.config["rate"] for layer in layers if layer.kind == "Dropout"}
    parts = re.fullmatch(r"I(?:CCP)*(?:CCPCC|CCDPCCD)((?:2MCC)+|(?:3MCC)+|(?:UCMCC)+)(C?)H", sentence)
    levels = sentence.count("P") + 1
    if not parts or sentence.count("M") != levels - 1 or len(rates) > 1:
        raise UserError(
            f"{file} is no U-Net of ours: its layers are {sentence} (C: 3x3 convolution, P: pooling, D: dropout, 2 and "
            "3: transposed convolution, U: up-sampling, M: concatenation, H: head), with dropout rates "
            f"{sorted(rates)}. Dropout, at one rate, can only stand at the end of the two lowest blocks. {KNOWN}"
        )
    up = parts[1][0]

    # Each layer takes the one before it, and a concatenation also the skip of its level.
    ends = [i - 1 for i, letter in enumerate(sentence) if letter == "P"]
    skips = [{layers[end].name} for end in ends]
    dropped = layers[ends[-1]].name if rates else None
    if rates:
        skips[-1].add(layers[ends[-1] - 1].name)
    level, swapped, dropout_on_skip = levels - 1, set(), False
    for before, layer, letter in zip(layers, layers[1:], sentence[1:], strict=False):
        others = set(layer.inputs)
        if letter == "M":
            level -= 1
            skip = others - {before.name}
            if len(layer.inputs) == 2 and len(skip) == 1 and skip <= skips[level]:
                others -= skip
                swapped |= {f"merge_{level}/Conv_0"} if layer.inputs[0] in skip else set()
                dropout_on_skip |= dropped in skip
        if others != {before.name}:
            raise UserError(f"{file}: layer {layer.name!r} takes {layer.inputs}, as in no U-Net of ours. {KNOWN}")

    ours = [f"down_{level}/Conv_{i}" for level in range(levels) for i in (0, 1)]
    for level in reversed(range(levels - 1)):
        ours += [f"up_{level}" + ("/Conv_0" if up == "U" else ""), f"merge_{level}/Conv_0", f"merge_{level}/Conv_1"]
    ours += ["extra/Conv_0"] * len(parts[2]) + ["head"]
    sources = [(layer.name, letter) for layer, letter in zip(layers, sentence, strict=True) if letter in "C23H"]
    table = {}
    for name, (source, letter) in zip(ours, sources, strict=True):
        lay_out = _keras_transposed if letter in "23" else _same
        table[f"params/{name}/kernel"] = (
            f"{source}/kernel",
            partial(_skip_first, lay_out) if name in swapped else lay_out,
        )
        table[f"params/{name}/bias"] = (f"{source}/bias", _same)
    settings = PLAIN | {
        "upsample": {"2": "transposed_2x2", "3": "transposed_3x3", "U": "nearest"}[up],
        "dropout": float(max(rates, default=0.0)),
        "dropout_on_skip": dropout_on_skip,
        "extra_conv": bool(parts[2]),
    }
    activation = layers[-1].config.get("activation")
    if activation not in ("linear", "sigmoid", "softmax"):
        raise UserError(f"{file}: the head ends in {activation!r}, not in a sigmoid, a softmax or nothing")
    return Layout("a Keras U-Net", levels, settings, table, activation=activation)


def _letter(layer: KerasLayer, file: str) -> str:
    # Settings that came with later versions of Keras are absent in files of older ones.
    has = lambda settings: all(layer.config.get(name, value) == value for name, value in settings.items())
    letter = next((letter for letter, kind, settings in LETTERS if layer.kind == kind and has(settings)), None)
    if letter and (letter != "D" or isinstance(layer.config.get("rate"), int | float)):
        return letter
    raise UserError(
        f"{file}: layer {layer.name!r}, {layer.kind} as it is set, is in no U-Net of ours (3x3 convolutions with ReLU "
        f"and padding, 2x2 pooling, up-sampling by two). {KNOWN}"
    )
