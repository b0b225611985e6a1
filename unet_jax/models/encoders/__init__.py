"""Encoders with published weights: networks that classify images, up to their last features.

To add one: a file in this folder with a table of `Encoder`, and its names in `NAMES`.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn

from unet_jax.errors import check_choice

NAMES = {  # name -> file of this folder
    "efficientnet_lite0": "efficientnet_lite",
    "efficientnet_lite1": "efficientnet_lite",
    "efficientnet_lite2": "efficientnet_lite",
    "resnet18": "resnet",
    "resnet34": "resnet",
    "resnet50": "resnet",
}


class Encoder(NamedTuple):
    """A network, and where its weights come from."""

    # With the fields of `layers.Settings`, a module: images `[B, H, W, C]`, H and W of any size, and whether it trains
    # -> features at strides 2, 4, 8, 16 and 32, each `[B, ceil(H / stride), ceil(W / stride), width]`.
    make: Callable[..., nn.Module]
    torch_name: Callable[[str], str]  # path of a variable of the module -> its name in files of PyTorch
    classifier: tuple[str, ...]  # prefixes of the names in such files that only the classifier needs
    imagenet: str  # where the weights are: `package:PACKAGE/FILE` or `hf://ORGANISATION/NAME`
    mean: tuple[float, ...]  # images of 0..255 become (image - mean) / scale; one number, or one per colour
    scale: tuple[float, ...]


def find(name: str) -> Encoder:
    """The encoder of `config.model.encoder`; a `UserError` for an unknown name."""
    check_choice("config.model.encoder", name, NAMES)
    return importlib.import_module(f"unet_jax.models.encoders.{NAMES[name]}").ENCODERS[name]
