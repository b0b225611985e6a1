"""The JSON files of a work directory: configuration, classes, environment.

A file that is missing, damaged or cannot be written raises a `UserError` that names it.
"""

import json
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from etils import epath

from unet_jax import defaults
from unet_jax.errors import UserError
from unet_jax.parallel import processes

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Fields that change how a run is carried out but not what comes out; they may differ when it is resumed.
FREE_FIELDS = (
    "mesh.data",
    "mesh.space",
    "mesh.shard_optimizer",
    "model.remat",
    "data.cache_gib",
    "train.log_every_steps",
    "train.nonfinite",
    "eval.tta",
)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.parent / f"{path.name}.partial"
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Writes a JSON object whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return values


def check(workdir: epath.Path, config: "ConfigDict") -> None:
    """Raises a `UserError` if a folder cannot be written, or holds other files or a run of another configuration."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(workdir, read_json(path), json.loads(config.to_json()))
        else:
            others = sorted(p.name for p in workdir.iterdir() if not p.name.endswith(".partial"))
            if others:
                raise UserError(
                    f"--workdir={workdir} holds {others[0]!r} but no config.json, so it is not a work directory: "
                    "choose another"
                )
        probe = workdir / "write.partial"
        probe.write_text("")
        probe.unlink()
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
    write_json(workdir / "config.json", json.loads(config.to_json()))  # first: `check` looks for it
    write_json(workdir / "classes.json", classes)


def _check_same(workdir: epath.Path, old: dict, new: dict) -> None:
    """Compares two configurations field by field; a field at its default is treated as missing."""
    old, new = (defaults.differing(defaults.flatten(values)) for values in (old, new))
    value = lambda values, field: values.get(field, defaults.fields().get(field, "absent"))
    differing = [
        f"  config.{field}: {value(old, field)!r} there, {value(new, field)!r} now"
        for field in sorted((old.keys() | new.keys()) - set(FREE_FIELDS))
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

    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} has no config.json: it is not the work directory of a training")
    values = read_json(path)
    for name, default in defaults.fields().items():  # fields that were added later
        group, _, field = name.rpartition(".")
        (values.setdefault(group, {}) if group else values).setdefault(field, default)
    return ConfigDict(values)


def read_classes(workdir: epath.Path) -> dict[str, Any]:
    """The `classes` that `claim` was given."""
    return read_json(workdir / "classes.json")


def record_environment(workdir: epath.Path, first_step: int, devices: str) -> None:
    """Adds the environment of a run to `environment.json`, unless the run before had the same.

    It names no host, user or folder beside those in the command. `first_step` is that of the run, 0 for a new training;
    `devices` is how many of which kind.
    """
    runs = read_environment(workdir)
    run = {
        "first_step": first_step,
        "command": _command(),
        "devices": devices,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _commit(),
        "versions": processes.versions(),
    }
    if not runs or {**runs[-1], "first_step": first_step} != run:
        write_json(workdir / "environment.json", {"runs": [*runs, run]})


def read_environment(workdir: epath.Path) -> list[dict[str, Any]]:
    """The environments of the runs of a training, first to last; empty if none was recorded."""
    path = workdir / "environment.json"
    return read_json(path).get("runs", []) if path.exists() else []


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
