"""What the files of a work directory may hold, checked when they are read: size, encoding, fields, types, ranges.

A file that does not keep to it raises one `UserError` that names the file, the field, its value and the remedy.
"""

import functools
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from unet_jax import defaults
from unet_jax.errors import UserError, did_you_mean

JSON_BYTES = 2**24  # the largest JSON file that is read; those of a work directory take a few KiB
DAMAGED = "It was changed or damaged after it was written: restore it from a copy"

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlevel = 3
shown = _repr.repr  # a value in a message, shortened


# Files.


def is_local(path: epath.Path) -> bool:
    """Whether a path is one of the file system, not of a bucket."""
    return "://" not in os.fspath(path)


def occupied(path: epath.Path) -> bool:
    """Whether anything stands at `path`, even a link that leads nowhere."""
    return os.path.lexists(path) if is_local(path) else path.exists()


def is_file(path: epath.Path) -> bool:
    """Whether `path` is a regular file, or leads to one: reading a pipe or a device may never end."""
    return os.path.isfile(path) if is_local(path) else path.is_file()


def read_bytes(path: epath.Path, limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; else a `UserError`."""
    try:
        if occupied(path) and not is_file(path):
            kind = "a folder" if path.is_dir() else "a pipe, a device, or a link that leads to no file"
            raise UserError(f"{path} cannot be read: it is {kind}, not a file")
        if is_local(path) and os.path.getsize(path) > limit:
            raise UserError(f"{path} cannot be read: it has more than {limit >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_object(path: epath.Path, remedy: str = "") -> dict[str, Any]:
    """Reads a JSON object, in UTF-8, whose fields differ and whose numbers are finite.

    Raises:
      UserError: there is none; `remedy` is the end of the message.
    """
    content, end = read_bytes(path), f". {remedy}" if remedy else ""
    try:
        values = parse(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}{end}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds {shown(values)}, which is no JSON object{end}")
    return values


def parse(content: bytes) -> Any:
    """Parses JSON in UTF-8; a `ValueError` says what is wrong with it."""
    try:
        text = content.decode("utf-8-sig")  # an editor may have added a byte order mark
        return json.loads(text, object_pairs_hook=_different, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the field {next(n for n in names if names.count(n) > 1)!r} twice")
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON number")


# Values.


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_int(value: Any, low: int = -(2**31), high: int = 2**31 - 1) -> bool:
    """Whether `value` is an integer in `low`..`high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_text(value: Any) -> bool:
    """Whether `value` is a text; no path or name has a NUL character."""
    return isinstance(value, str) and "\0" not in value


def is_list(value: Any, test: Callable[[Any], bool], *lengths: int) -> bool:
    """Whether `value` is a list of one of `lengths`, or of any, whose elements pass `test`."""
    return isinstance(value, list) and (not lengths or len(value) in lengths) and all(map(test, value))


# `config.json`.


def check_config(file: epath.Path, values: Mapping[str, Any]) -> None:
    """Raises a `UserError` unless each field is one of `configs/default.py` and has the type of its default.

    A missing field is one that was added later. Whether a value is one of the choices that there are is known to the
    packages that use it.
    """
    known = defaults.fields()
    groups = {name.partition(".")[0] for name in known if "." in name}
    if not values:
        raise UserError(f"{file} is damaged: it holds no fields. {DAMAGED}")
    for name, value in values.items():
        if name in groups and not isinstance(value, dict):
            raise UserError(f"{file}: config.{name} = {shown(value)} must be a group of fields. {DAMAGED}")
        of_group = {f"{name}.{inner}": v for inner, v in value.items()} if name in groups else {name: value}
        for field, held in of_group.items():
            if field not in known:
                raise UserError(
                    f"{file}: there is no field config.{field} (= {shown(held)}) in configs/default.py."
                    f"{did_you_mean(field, known)} Was it written by a newer version? Then update this one"
                )
            test, needed = _like(_ELEMENTS.get(field, known[field]))
            if not test(held):
                raise UserError(f"{file}: config.{field} = {shown(held)} must be {needed}. {DAMAGED}")


# An element of each list that is empty by default; one that is not here holds numbers or texts.
_ELEMENTS = {
    **dict.fromkeys(("keep", "data.labels", "data.lists", "optimizer.frozen", "init_parts"), ("",)),
    **dict.fromkeys(("data.value_range", "optimizer.decay_epochs", "train.extends"), (0.0,)),
    **dict.fromkeys(("model.remat", "augment.crop", "data.show"), (0,)),
}


def _like(default: Any) -> tuple[Callable[[Any], bool], str]:
    """A test for values of the type of a default, and what they must be."""
    if isinstance(default, bool):
        return lambda value: isinstance(value, bool), "true or false"
    if isinstance(default, int):
        return is_int, "an integer of 32 bits"
    if isinstance(default, float):
        return is_number, "a finite number"
    if isinstance(default, str):
        return is_text, "a text"
    either = lambda value: is_number(value) or is_text(value)
    test, needed = _like(default[0]) if default else (either, "a number or a text")
    return functools.partial(is_list, test=test), f"a list, and each element {needed}"


# What is only to look at: a training never stops for it.


def is_run(value: Any) -> bool:
    """Whether `value` is one of the `runs` of `environment.json`; more fields do no harm."""
    if not isinstance(value, dict) or not is_int(value.get("first_step"), 0):
        return False
    if not all(name in value and (value[name] is None or is_text(value[name])) for name in ("command", "commit")):
        return False
    if not is_text(value.get("devices")) or not is_text(value.get("platform")):
        return False
    return isinstance(value.get("versions"), dict) and all(map(is_text, value["versions"].values()))


def is_row(value: Any) -> bool:
    """Whether `value` is a line of `metrics.jsonl`."""
    if not isinstance(value, dict) or not is_int(value.get("step"), 0) or not is_number(value.get("epoch")):
        return False
    return all(number is None or is_number(number) for number in value.values())


def is_scores(value: Any, names: Sequence[str], per_class: Mapping[str, bool]) -> bool:
    """Whether `value` is what `eval.json` holds about classes of these `names`.

    `per_class` says of the key of each metric whether it has a value for each class.
    """
    if not isinstance(value, dict) or not all(is_text(value.get(name)) for name in ("split", "data_root", "tta")):
        return False
    if not all(is_int(value.get(name), 0) for name in ("step", "images")):
        return False
    is_score = lambda score: score is None or is_number(score)
    for key, of_classes in per_class.items():
        scores = value.get(key, {}) if of_classes else {names[0]: value.get(key)}
        if not isinstance(scores, dict) or not scores.keys() <= set(names) or not all(map(is_score, scores.values())):
            return False
    is_count = lambda count: is_int(count, 0, 2**63 - 1)
    is_pair = lambda pair: is_list(pair, is_count, 2)
    is_row = lambda row: is_list(row, is_count, len(names)) or is_list(row, is_pair, 2)
    return is_score(value.get("loss")) and is_list(value.get("confusion"), is_row, len(names))


# `checksums.json` of a step.


def find_fault_in_sums(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the names of files, each with its SHA-256 sum; None if nothing is."""
    for name, digest in values.items():
        if not name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            return f"names {shown(name)}, which is no file of the step"
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            return f"holds {shown(digest)} for {name}, which is no SHA-256 sum"
    return None
