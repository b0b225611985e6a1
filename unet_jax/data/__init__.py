"""Data sets, one module each, with `load(config.data, split) -> Source`.

To add one: a file in this folder, its name in `NAMES`, and a file in `configs/`.
"""

import importlib

from unet_jax.data import images
from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError, check_choice

NAMES = ("shapes", "carla", "oxford_iiit_pet", "isbi2012")

__all__ = ["NAMES", "Classes", "Source", "load"]


def load(config, split: str) -> Source:
    """The source of one split.

    Args:
      config: `config.data`.
      split: `train`, `validation`, `test` or `all`, as far as the data set has them.

    Raises:
      UserError: unknown data set or split; data missing or broken.
    """
    check_choice("config.data.name", config.name, NAMES)
    check_choice("config.data.resize", config.resize, images.RESIZE)
    if len(config.size) != 2 or not all(isinstance(n, int) and n > 0 for n in config.size):
        raise UserError(f"config.data.size = {config.size} must be (height, width) in pixels")
    if not 0 < config.validation < 1:
        raise UserError(f"config.data.validation = {config.validation} must be between 0 and 1")
    return importlib.import_module(f"unet_jax.data.{config.name}").load(config, split)
