"""Data sets, one module each, with `load(config.data, split) -> Source` and `classes(config.data) -> Classes`.

README.md in this folder describes the data sets and how to add one.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable

from unet_jax import defaults
from unet_jax.data import images
from unet_jax.data.source import Classes, Source, bullets
from unet_jax.errors import UserError, check_choice

UNCACHED = (
    "data.root",
    "data.cache_gib",
    "data.foreground",
    "data.normalize",
    "data.show",
)  # settings that do not change the examples
NAMES = ("shapes", "carla", "oxford_iiit_pet", "isbi2012", "drive", "folder")

__all__ = ["NAMES", "Classes", "Source", "check_settings", "check_show", "classes"]
__all__ += ["infer_settings", "load", "load_with_faults", "reuse_settings"]


def infer_settings(config, notify: Callable[[str], None] = print) -> None:
    """Infers from the files the settings that are left open, so that a work directory records them.

    Args:
      config: `config.data`; changed in place. Only the data set `folder` leaves settings open.
      notify: called with a text for each setting that was inferred.

    Raises:
      UserError: the files are missing, unreadable or ambiguous.
    """
    check_settings(config)
    if config.name == "folder":
        from unet_jax.data import folder

        folder.infer_settings(config, notify)


def reuse_settings(config, earlier) -> None:
    """Copies what `infer_settings` found from `earlier`, the `config.data` of a work directory, into `config`.

    So resuming need not read all files again; both are of the same data set.
    """
    check_settings(config)
    for field in ("labels", "channels", "dtype", "value_range"):
        if not config[field]:
            config[field] = earlier[field]


def load(config, split: str) -> Source:
    """The source of a split of `config.data`: `train`, `validation`, `test` (not of every data set) or `all`.

    Raises:
      UserError: unknown data set or split; missing or faulty files.
    """
    source = load_with_faults(config, split)
    if source.faults:
        raise UserError(
            f"config.data.root = {config.root!r}: {len(source.faults)} faulty file(s); --mode=check lists them all"
            + bullets(source.faults)
        )
    return source


def load_with_faults(config, split: str) -> Source:
    """Like `load`, but returns the usable examples even if there are faulty files; see `Source.faults`."""
    source = _module(config).load(config, split)
    # A field at its default is left out, so that the key of a cached split stays the same when a field is added. Where
    # the files are, how many may be cached and what is drawn from them does not change the examples.
    settings = defaults.differing(defaults.flatten(json.loads(config.to_json()), "data."))
    settings = {name: value for name, value in settings.items() if name not in UNCACHED}
    factors = source.factors if config.pixel_size else lambda index: (config.scale, config.scale)
    return dataclasses.replace(source, settings={**settings, "split": split}, factors=factors)


def classes(config) -> Classes:
    """The meaning of the labels, from `config.data` alone; call `infer_settings` first.

    Raises:
      UserError: unknown data set or an invalid setting.
    """
    return _module(config).classes(config)


def check_settings(config) -> None:
    """Raises a `UserError` for an invalid value of the settings that all data sets share."""
    check_choice("config.data.name", config.name, NAMES)
    check_choice("config.data.resize", config.resize, images.RESIZE)
    if len(config.size) not in (0, 2) or not all(isinstance(n, int) and n > 0 for n in config.size):
        raise UserError(
            f"config.data.size = {config.size} must be (height, width) in pixels, or () for images at their own size"
        )
    if not 0 < config.scale < math.inf:
        raise UserError(f"config.data.scale = {config.scale} must be positive")
    if not 0 <= config.pixel_size < math.inf:
        raise UserError(f"config.data.pixel_size = {config.pixel_size} must be positive, or 0 to keep the pixels")
    if config.pixel_size and (config.name != "folder" or config.scale != 1):
        raise UserError(
            f"config.data.pixel_size = {config.pixel_size} is for images of config.data.name='folder', instead of "
            f"config.data.scale; here they are {config.name!r} and {config.scale}"
        )
    for field, default in (("scale", 1), ("pixel_size", 0)):
        if config.size and config[field] != default:
            raise UserError(
                f"config.data.{field} = {config[field]} is for images at their own size, not for config.data.size = "
                f"{tuple(config.size)}"
            )
    if not 0 <= config.foreground <= 1:
        raise UserError(f"config.data.foreground = {config.foreground} is a share, in 0..1")
    if not 0 < config.validation < 1:
        raise UserError(f"config.data.validation = {config.validation} must be between 0 and 1")
    if config.value_range and not (len(config.value_range) == 2 and config.value_range[0] < config.value_range[1]):
        raise UserError(
            f"config.data.value_range = {config.value_range} must be (low, high), or () for the range of the training "
            "images"
        )
    check_choice("config.data.normalize", config.normalize, ("", "range", "percentile", "standard", "network"))
    check_choice("config.data.orientation", config.orientation, ("as_stored", "upright"))
    check_choice("config.data.pages", config.pages, ("", "channels"))
    check_choice("config.data.dtype", config.dtype, ("", "uint8", "uint16", "float32"))
    if len(config.show) not in (0, 1, 3) or not all(isinstance(n, int) and n >= 0 for n in config.show):
        raise UserError(f"config.data.show = {config.show} must be the numbers of one or three channels, from 0, or ()")


def check_show(config, classes: Classes) -> None:
    """Raises a `UserError` if `config.data.show` names a channel that images of `classes` do not have."""
    if any(channel >= classes.channels for channel in config.show):
        raise UserError(
            f"config.data.show = {tuple(config.show)} names a channel that the images do not have: they have "
            f"{classes.channels}, from 0 to {classes.channels - 1}"
        )


def _module(config):
    """The module of a data set."""
    check_settings(config)
    return importlib.import_module(f"unet_jax.data.{config.name}")
