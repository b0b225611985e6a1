"""The default of every configuration field: `configs/default.py`, in a checkout or installed with the package.

One rule rests on them: a field at its default is treated as if it were missing. So a field that is added later changes
neither the key of a cached data set nor a work directory written before it existed, if its default means "as before".
"""

import functools
import json
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any


@functools.cache
def fields() -> Mapping[str, Any]:
    """Dotted name -> default, as JSON has it: `{"seed": 0, "train.batch_size": 16, "data.size": [96, 96], ...}`."""
    package = pathlib.Path(__file__).parent
    places = [folder / "configs" / "default.py" for folder in (package, package.parent)]  # installed, or a checkout
    file = next(place for place in places if place.exists())
    return flatten(json.loads(runpy.run_path(str(file))["get_config"]().to_json()))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups -> dotted names: `{"train": {"epochs": 1}}` -> `{"train.epochs": 1}`."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def differing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` (dotted name -> value, as JSON has it) that are not at their default."""
    return {name: value for name, value in values.items() if name not in fields() or fields()[name] != value}
