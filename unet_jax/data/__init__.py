"""Data sets, one module each, with `load(config.data, split) -> Source` and `classes(config.data) -> Classes`.

To add one: a file in this folder, its name in `NAMES`, and a file in `configs/`.
"""

import dataclasses
import importlib
from collections.abc import Callable

from unet_jax.data import images
from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError, check_choice

NAMES = ("shapes", "carla", "oxford_iiit_pet", "isbi2012", "folder")

__all__ = ["NAMES", "Classes", "Source", "classes", "load", "settle", "survey", "take_settled"]


def settle(config, say: Callable[[str], None] = print) -> None:
    """Fills in what `config.data` leaves open and the files tell, so that a work directory keeps it.

    Args:
      config: `config.data`; changed. Only `folder` leaves something open.
      say: is told what was found.

    Raises:
      UserError: the files do not tell.
    """
    if config.name == "folder":
        from unet_jax.data import folder

        folder.settle(config, say)


def take_settled(config, earlier) -> None:
    """As `settle`, by what was settled earlier for the same data, so that going on does not look at all files again.

    Args:
      config: `config.data`; changed.
      earlier: that of a work directory.
    """
    for field in ("labels", "channels", "value_range"):
        if config.name == earlier.name and not config[field]:
            config[field] = earlier[field]


def load(config, split: str) -> Source:
    """The source of one split.

    Args:
      config: `config.data`.
      split: `train`, `validation`, `test` or `all`, as far as the data set has them.

    Raises:
      UserError: unknown data set or split; data missing or broken.
    """
    source = survey(config, split)
    if source.faults:
        more = f"\n  and {len(source.faults) - 10} more" if len(source.faults) > 10 else ""
        raise UserError(
            f"config.data.root = {config.root!r}: {len(source.faults)} faulty file(s); --mode=check looks at all"
            + "".join(f"\n  {fault}" for fault in source.faults[:10])
            + more
        )
    return source


def survey(config, split: str) -> Source:
    """As `load`, but hands over what can be used beside `faults`."""
    source = _module(config).load(config, split)
    elsewhere = ("root", "cache_gib")  # the files tell where they are
    settings = {name: value for name, value in config.to_dict().items() if name not in elsewhere}
    return dataclasses.replace(source, settings={**settings, "split": split})


def classes(config) -> Classes:
    """What the labels mean, from the configuration alone; `settle` it before.

    Args:
      config: `config.data`.

    Raises:
      UserError: unknown data set, or a setting without meaning.
    """
    return _module(config).classes(config)


def _module(config):
    """The module of a data set; checks what concerns them all."""
    check_choice("config.data.name", config.name, NAMES)
    check_choice("config.data.resize", config.resize, images.RESIZE)
    if len(config.size) != 2 or not all(isinstance(n, int) and n > 0 for n in config.size):
        raise UserError(f"config.data.size = {config.size} must be (height, width) in pixels")
    if not 0 < config.validation < 1:
        raise UserError(f"config.data.validation = {config.validation} must be between 0 and 1")
    return importlib.import_module(f"unet_jax.data.{config.name}")
