"""What a checkpoint remembers of `config.json` and `classes.json`, so that a later change of them is noticed.

Both are text that anybody can edit, and the checksums of a step do not cover them.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from unet_jax import defaults
from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import extension, files, schema

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Fields that say where files are. What is in the data is checked by other means; weights are read once, at the start.
PLACES = ("data.root", "init_from", "model.pretrained")


def make(config: "ConfigDict", classes: dict[str, Any]) -> dict[str, Any]:
    """The record of what `files.claim` writes, JSON values to be saved with a checkpoint.

    Fields at their defaults are left out, and those that may change.
    """
    changed = defaults.differing(defaults.flatten(json.loads(config.to_json())))
    fixed = {name: value for name, value in changed.items() if name not in (*files.FREE_FIELDS, *PLACES)}
    return {"config": fixed, "classes": json.loads(json.dumps(classes))}


def check(workdir: epath.Path, step: int, meta: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a `UserError` if `config.json` or `classes.json` is no longer what it was when a step was saved.

    Names and colours of the classes may be changed; that is printed.

    Args:
      workdir: the work directory, for messages.
      step: of the checkpoint.
      meta: what was saved beside it. Older versions saved no record, and then nothing is checked.
      now: the record of what the two files hold, or are about to hold.
    """
    differing, harmless = [], []
    if "config" in meta:
        extended = extension.may_differ(meta["config"], now["config"])
        of_config = sorted((meta["config"].keys() | now["config"].keys()) - {*extended})
        # A later version may have added fields to the classes.
        fields = [("config", name) for name in of_config] + [("classes", name) for name in meta["classes"]]
        for part, name in fields:
            default = defaults.fields().get(name, "absent") if part == "config" else "absent"
            here, there = (values[part].get(name, default) for values in (now, meta))
            if here != there:
                lines = harmless if part == "classes" and name in ("names", "palette") else differing
                lines.append(f"  {part}.json: {name} is {schema.shown(here)}, was {schema.shown(there)}")
    if differing:
        raise UserError(
            f"{workdir} was changed after step {step} was saved, and would give other results than its training. Put "
            "these values back:\n" + "\n".join(differing)
        )
    if harmless:
        processes.print_on_main(f"warning: {workdir} was changed after step {step} was saved:\n" + "\n".join(harmless))
