"""Networks, one file each, with `create(num_outputs, **settings) -> flax.linen.Module`.

To add one: a file in this folder and its name in `NAMES`. What the rest of the package asks of a network:

`__call__(image, keys=None)`  float images `[B, H, W, C]` -> float32 logits `[B, H', W', num_outputs]`, (H', W') =
                              `output_size((H, W))`; in training mode when `keys`, one random key per example, are
                              given: then maybe a tuple, see `deep_supervision`
`margins(size)`               (above, below), (left, right): what an image needs around it for all of it to be predicted
`output_size(size)`           height and width of the logits; raises a `UserError` for a size that it cannot take
`smallest_input`              height and width of the smallest image that it takes
`stride`                      input sizes are `smallest_input` plus multiples of it; tiles begin at multiples of it
`is_local`                    whether an output pixel depends only on its neighbourhood: tiles then have no seams
`remat`, `conv_impl`          fields: levels that are rematerialised; `plain`, or `cpu` for a single CPU device
`head`                        the name of the last layer, whose shape depends on the number of classes
`deep_supervision`            field: how many more logits, of H' / 2, H' / 4, ..., training mode returns; their layers
                              are called `deep_head_0`, `deep_head_1`, ...
`first_conv`                  the path below `params` of the kernel that meets the image
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unet_jax.errors import check_choice

NAMES = ("unet", "encoder_unet")


def create(name: str, num_outputs: int, *, conv_impl: str = "plain", **settings) -> nn.Module:
    """The network of `config.model`; a `UserError` for an unknown name or an invalid setting.

    Args:
      name: one of `NAMES`.
      num_outputs: channels of the logits.
      conv_impl: `plain`, or `cpu` for a single CPU device: another form of the convolution, with the same result.
      **settings: the other fields of `config.model`; a network ignores those of other networks.
    """
    check_choice("config.model.name", name, NAMES)
    return importlib.import_module(f"unet_jax.models.{name}").create(num_outputs, conv_impl=conv_impl, **settings)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A first convolution `[h, w, C, F]` for images of another number of channels, as `[h, w, channels, F]`.

    For one channel, the sum over the C: what the kernel gives where all channels are alike. For C' others, channel c
    has the kernel of channel c mod C times C / C', so that activations keep their size.
    """
    before = kernel.shape[2]
    if channels == before:
        return kernel
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    return kernel[:, :, np.arange(channels) % before] * np.float32(before / channels)


def abstract_variables(model: nn.Module, channels: int) -> dict[str, Any]:
    """Shapes and types of `params` and `batch_stats` for images of `channels`, without drawing them."""
    image = jnp.zeros((1, *model.smallest_input, channels))
    return {"batch_stats": {}, **jax.eval_shape(model.init, jax.random.key(0), image)}


def differing_shapes(model: nn.Module, channels: int, variables) -> dict[str, tuple]:
    """Path -> (shape in `variables`, shape that `model` needs) of each array that differs, in order; None if absent."""
    found, needed = shapes(variables), shapes(abstract_variables(model, channels))
    pairs = {path: (found.get(path), needed.get(path)) for path in sorted(found.keys() | needed.keys())}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by its path, as in `params/head/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
