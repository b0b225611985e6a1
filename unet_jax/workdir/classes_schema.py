"""What `classes.json` of a work directory may hold, checked when it is read."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from unet_jax.errors import UserError, did_you_mean, is_name
from unet_jax.workdir.schema import DAMAGED, is_int, is_list, is_number, is_text, shown

TASKS = ("multiclass", "binary", "multilabel")


def check_classes(file: epath.Path, values: Mapping[str, Any]) -> None:
    """Raises a `UserError` unless the fields are those of `data.Classes` and what is known of the training images."""
    for name, value in values.items():
        if name not in _CLASSES:
            raise UserError(
                f"{file}: there is no field {shown(name)}.{did_you_mean(name, _CLASSES)} Was it written by a "
                "newer version? Then update this one"
            )
        test, needed = _CLASSES[name]
        if not test(value):
            raise UserError(f"{file}: {name} = {shown(value)} must be {needed}. {DAMAGED}")
    missing = [name for name in _CLASSES if name not in values and name not in _OPTIONAL]
    if missing:
        raise UserError(f"{file}: the field {missing[0]!r} is missing. {DAMAGED}")
    task, count, channels = values["task"], len(values["names"]), values["channels"]
    if count < {"multiclass": 2, "binary": 2, "multilabel": 1}[task] or (task == "binary" and count > 2):
        raise UserError(f"{file}: names = {shown(values['names'])} cannot be those of a {task} task. {DAMAGED}")
    for name in ("palette", "class_counts"):
        if name in values and len(values[name]) != count:
            raise UserError(f"{file}: {name} has {len(values[name])} entries for {count} names. {DAMAGED}")
    labels = 2 if task == "multilabel" else count
    if values["ignore_label"] < labels:
        raise UserError(
            f"{file}: ignore_label = {values['ignore_label']} is also the label of a class, 0..{labels - 1}. {DAMAGED}"
        )
    for part in ("normalization", "values"):
        for name, numbers in values.get(part, {}).items():
            if len(numbers) not in ((1, channels) if part == "normalization" else (channels,)):
                found = f"{len(numbers)} numbers for {channels} channel(s)"
                raise UserError(f"{file}: {part}.{name} has {found}. {DAMAGED}")


def _is_name(value: Any) -> bool:
    """Whether a class can have this name."""
    return is_text(value) and bool(value.strip()) and is_name(value)


def _are_names(value: Any) -> bool:
    return is_list(value, _is_name, *range(1, 256)) and len(set(value)) == len(value)


def _is_size(value: Any) -> bool:
    return is_list(value, lambda n: is_int(n, 1), 2)


def _are_sizes(value: Any) -> bool:
    return is_list(value, _is_size, 2) and all(low <= high for low, high in zip(*value, strict=True))


def _is_normalization(value: Any) -> bool:
    if not _are_numbers(value) or value.keys() not in ({"mean", "scale"}, {"mean", "scale", "low", "high", "fill"}):
        return False
    low, high = value.get("low", (0,)), value.get("high", (255,))
    return min(value["scale"]) > 0 and len(low) == len(high) and all(a < b for a, b in zip(low, high, strict=True))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(is_list(numbers, is_number) and numbers for numbers in value.values())


_CLASSES = {  # field -> a test, and what passes it
    "task": (lambda value: value in TASKS, f"one of: {', '.join(TASKS)}"),
    "names": (_are_names, "1 to 255 different texts, not empty and without control characters"),
    "palette": (
        lambda value: is_list(value, lambda color: is_list(color, lambda n: is_int(n, 0, 255), 3)),
        "a list of [red, green, blue], each 0..255",
    ),
    "channels": (lambda value: is_int(value, 1), "a positive integer"),
    "ignore_label": (lambda value: is_int(value, 0, 255), "an integer in 0..255"),
    "dtype": (lambda value: value in ("uint8", "uint16", "float32"), "one of: uint8, uint16, float32"),
    "normalization": (
        _is_normalization,
        '{"mean": [...], "scale": [...]} of finite numbers, those of scale positive, or also "low", "high" and "fill"',
    ),
    "values": (
        lambda value: _are_numbers(value) and {"min", "max"} <= value.keys(),
        '{"min": [...], "max": [...], ...} of finite numbers',
    ),
    "image_size": (_is_size, "a positive height and width"),
    "image_sizes": (_are_sizes, "the smallest and the largest height and width, all positive"),
    "class_counts": (lambda value: is_list(value, lambda n: is_int(n, 0, 2**63 - 1)), "a list of integers >= 0"),
}
# Older versions, and imported weights, have none; counts are there if the class weights need them.
_OPTIONAL = ("dtype", "normalization", "values", "image_size", "image_sizes", "class_counts")
