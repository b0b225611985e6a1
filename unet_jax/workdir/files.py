"""The JSON files of a work directory: configuration, classes, environment.

A file that is missing, damaged (see `schema.py`) or cannot be written raises a `UserError` that names it. Damage to
what is only to look at stops nothing: with a warning, it is set aside and written anew.
"""

import json
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from unet_jax import defaults, paths
from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import classes_schema, extension, lock, schema

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Fields that change how a run is carried out but not what comes out; they may differ when it is resumed.
FREE_FIELDS = (
    "keep",
    "mesh.data",
    "mesh.space",
    "mesh.shard_optimizer",
    "model.remat",
    "data.cache_gib",
    "train.log_every_steps",
    "train.patience",
    "train.nonfinite",
    "eval.tta",
)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all; sets aside what else stands there. Characters that UTF-8 lacks are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all; sets aside what else stands there."""
    partial = path.parent / f"{path.name}.partial"
    try:
        _set_aside_no_file(partial)
        partial.unlink(missing_ok=True)  # a link would be followed
        partial.write_bytes(content)
        _set_aside_no_file(path)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Writes a JSON object whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def set_aside(path: epath.Path, reason: str) -> None:
    """Renames what stands at `path` to the first free of `<name>.damaged`, `<name>.damaged_2`...; prints the reason.

    Nothing of a user is deleted. Raises a `UserError` if it cannot be renamed.
    """
    number, target = 1, path.parent / f"{path.name}.damaged"
    while schema.occupied(target):
        number += 1
        target = path.parent / f"{path.name}.damaged_{number}"
    try:
        path.rename(target)
    except OSError as error:
        raise UserError(f"{path} is in the way ({reason}) and cannot be renamed: {error}") from error
    processes.print_on_main(f"warning: {path} is set aside as {target.name}: {reason}")


def _set_aside_no_file(path: epath.Path) -> None:
    if schema.occupied(path) and not schema.is_file(path):
        set_aside(path, "it is no file")


def make_folder(path: epath.Path) -> None:
    """Makes a folder, unless it exists; sets aside what else stands there."""
    if schema.occupied(path) and not path.is_dir():
        set_aside(path, "it is a file, not a folder")
    path.mkdir(exist_ok=True)


def check(workdir: epath.Path, config: "ConfigDict") -> None:
    """Raises a `UserError` if a folder cannot be written, or holds other files or a run of another configuration."""
    paths.check_workdir(workdir)
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(workdir, _read_config(path), json.loads(config.to_json()))
        else:
            ours = lambda name: name.endswith(".partial") or name == lock.NAME
            others = sorted(p.name for p in workdir.iterdir() if not ours(p.name))
            if others:
                raise UserError(
                    f"--workdir={workdir} holds {others[0]!r} but no config.json, so it is not a work directory: "
                    "choose another"
                )
        probe = workdir / "write.partial"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from error


def check_shared(workdir: epath.Path) -> None:
    """Raises a `UserError` unless all processes see the same work directory."""
    import jax

    if jax.process_count() == 1:
        return
    probe = workdir / "shared.partial"
    if jax.process_index() == 0:
        probe.write_text("")
    processes.wait_for_all("probe written", processes.START_TIMEOUT)
    until = time.monotonic() + 10  # a network file system may be slow to show it
    while not (workdir.exists() and probe.name in {found.name for found in workdir.iterdir()}):
        if time.monotonic() > until:
            raise UserError(
                f"--workdir={workdir} is not the same folder on process {jax.process_index()} as on process 0: use one "
                "that all of them see"
            )
        time.sleep(0.5)
    processes.wait_for_all("probe seen", processes.START_TIMEOUT)
    if jax.process_index() == 0:
        probe.unlink()


def claim(workdir: epath.Path, config: "ConfigDict", classes: dict[str, Any]) -> None:
    """Writes what the run is, once everything has been checked."""
    config_file, classes_file = workdir / "config.json", workdir / "classes.json"
    values, classes = json.loads(config.to_json()), json.loads(json.dumps(classes))  # with lists for tuples
    schema.check_config(config_file, values)
    classes_schema.check_classes(classes_file, classes)
    write_json(config_file, values)  # first: `check` looks for it
    write_json(classes_file, classes)
    panels = workdir / "panels"
    if schema.occupied(panels) and not panels.is_dir():
        set_aside(panels, "it is a file, not a folder")


def _check_same(workdir: epath.Path, old: dict, new: dict) -> None:
    """Compares two configurations field by field; a field at its default is treated as missing."""
    old, new = (defaults.differing(defaults.flatten(values)) for values in (old, new))
    value = lambda values, field: values.get(field, defaults.fields().get(field, "absent"))
    free = {*FREE_FIELDS, "data.root", *extension.may_differ(old, new)}  # images may move, see `training.setup`
    differing = [
        f"  config.{field}: {value(old, field)!r} there, {value(new, field)!r} now"
        for field in sorted((old.keys() | new.keys()) - free)
        if value(old, field) != value(new, field)
    ]
    if differing:
        raise UserError(
            f"--workdir={workdir} belongs to another configuration. Choose another --workdir, or the same values:\n"
            + "\n".join(differing)
        )


def read_config(workdir: epath.Path) -> "ConfigDict":
    """The configuration of a work directory; runs no code of it."""
    from ml_collections import ConfigDict

    paths.check_workdir(workdir)
    path = workdir / "config.json"
    if not schema.occupied(path):
        raise UserError(f"--workdir={workdir} has no config.json: it is not the work directory of a training")
    values = _read_config(path)
    for name, default in defaults.fields().items():  # fields that were added later
        group, _, field = name.rpartition(".")
        (values.setdefault(group, {}) if group else values).setdefault(field, default)
    return ConfigDict(values)


def _read_config(path: epath.Path) -> dict[str, Any]:
    values = schema.read_object(path, schema.DAMAGED)
    schema.check_config(path, values)
    return values


def read_classes(workdir: epath.Path) -> dict[str, Any]:
    """The `classes` that `claim` was given."""
    path = workdir / "classes.json"
    values = schema.read_object(path, schema.DAMAGED)
    classes_schema.check_classes(path, values)
    return values


def record_environment(workdir: epath.Path, first_step: int, devices: str) -> None:
    """Adds the environment of a run to `environment.json`, unless the run before had the same.

    It names no host, user or folder beside those in the command. `first_step` is that of the run, 0 for a new training;
    `devices` is how many of which kind.
    """
    path = workdir / "environment.json"
    runs, fault = _read_runs(path)
    if fault:
        set_aside(path, fault)
    run = {
        "first_step": first_step,
        "command": _command(),
        "devices": devices,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _commit(),
        "versions": processes.versions(),
    }
    if not runs or {**runs[-1], "first_step": first_step} != run:
        write_json(path, {"runs": [*runs, run]})


def read_environment(workdir: epath.Path) -> list[dict[str, Any]]:
    """The environments of the runs of a training, first to last; empty if none was recorded, or they are damaged."""
    runs, fault = _read_runs(workdir / "environment.json")
    if fault:
        processes.print_on_main(f"warning: {fault}. It is only to look at, and left out")
    return runs


def _read_runs(path: epath.Path) -> tuple[list[dict[str, Any]], str]:
    """The runs of `environment.json`, and what is wrong with it, if anything."""
    if not schema.occupied(path):
        return [], ""
    try:
        runs = schema.read_object(path).get("runs")
    except UserError as error:
        return [], str(error)
    if not schema.is_list(runs, schema.is_run):
        return [], f"{path} is damaged: it lists no runs"
    return runs, ""


def read_scores(path: epath.Path, names: Sequence[str], per_class: Mapping[str, bool]) -> dict[str, Any] | None:
    """What `eval.json` or a file like it holds, see `schema.is_scores`; None, with a warning, if it is damaged."""
    try:
        values = schema.read_object(path)
    except UserError as error:
        fault = str(error)
    else:
        if schema.is_scores(values, names, per_class):
            return values
        fault = f"{path} is damaged: it holds no scores of these classes"
    processes.print_on_main(f"warning: {fault}. It is left out")
    return None


def _command() -> str | None:
    """The command line; None in a notebook, which has none that could be repeated."""
    program, *flags = sys.argv
    is_main = pathlib.Path(program).parts[-2:] == ("unet_jax", "main.py")
    return shlex.join(["python", "-m", "unet_jax.main", *flags]) if is_main else None


def _commit() -> str | None:
    """The git commit of this code, with `-dirty` if files were changed; None if it is not a checkout."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed code may lie below some other checkout
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
