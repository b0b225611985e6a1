"""The work directory, a contract between training and everything after it.

config.json             the configuration it was trained with
classes.json            task, class names, palette, channels; size of the first training image before it was resized
environment.json        command, versions and devices of the run, and of every later one that goes on otherwise
metrics.jsonl           one JSON object a line: step, epoch, train/..., val/...
checkpoints/<step>/     see checkpoint.py
panels/<step>/*.png     image, truth, prediction and error of a few validation images
history.png             curves
report.html             everything above on one page, for a browser
eval.json               the last `--mode=eval`
events.out.tfevents.*   TensorBoard
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

from unet_jax import processes
from unet_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Fields that change how a run is carried out but not what comes out; they may differ when a run goes on.
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

# Fields that older work directories do not have, with the JSON values that they were trained with.
LATER_FIELDS = {
    "model.kernel_init": "he",
    "augment.elastic": 0.0,
    "augment.elastic_grid": 3,
    "augment.interpolation": "bilinear",
    "loss.border_weight": 0.0,
    "loss.border_sigma": 5.0,
    "eval.em_scores": False,
    "eval.tta": "none",
    "init_from": "",
    "deterministic": False,
    "optimizer.frozen": [],
    "data.images": ["images"],
    "data.masks": ["masks"],
    "data.mask_suffix": "_mask",
    "data.labels": [],
    "data.channels": 0,
    "data.value_range": [],
    "data.lists": [],
    "data.group": "",
    "model.remat": [],
    "mesh.shard_optimizer": False,
    "train.accumulate": 1,
    "train.nonfinite": "stop",
}


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.parent / f"{path.name}.partial"
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file is missing or damaged; names it.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return values


def check(workdir: epath.Path, config: "ConfigDict") -> None:
    """Checks, before any work, that a run of `config` may write here.

    Raises:
      UserError: it cannot be written, holds something else, or belongs to another configuration.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(workdir, _read_config(path), json.loads(config.to_json()))
        else:
            others = sorted(p.name for p in workdir.iterdir() if not p.name.endswith(".partial"))
            if others:
                raise UserError(
                    f"--workdir={workdir} holds {others[0]!r} but no config.json, so it is no work directory: choose "
                    "another"
                )
        probe = workdir / "write.partial"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from error


def check_shared(workdir: epath.Path) -> None:
    """Checks that all processes see the same work directory.

    Raises:
      UserError: one does not.
    """
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
    """Writes what the run is, once everything has been found in order."""
    write_json(workdir / "config.json", json.loads(config.to_json()))  # first: `check` goes by it
    write_json(workdir / "classes.json", classes)


def _check_same(workdir: epath.Path, old: dict, new: dict) -> None:
    """Compares two configurations field by field."""
    old, new = _flat(old), _flat(new)
    fields = sorted((old.keys() | new.keys()) - set(FREE_FIELDS))
    differing = [
        f"  config.{field}: {old.get(field, 'absent')!r} there, {new.get(field, 'absent')!r} now"
        for field in fields
        if field not in old or field not in new or old[field] != new[field]
    ]
    if differing:
        raise UserError(
            f"--workdir={workdir} belongs to another configuration. Choose another --workdir, or the same values:\n"
            + "\n".join(differing)
        )


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_config(workdir: epath.Path) -> "ConfigDict":
    """The configuration of a work directory; never runs code.

    Raises:
      UserError: there is none.
    """
    from ml_collections import ConfigDict, FrozenConfigDict

    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} has no config.json: it is not the work directory of a training")
    return ConfigDict(FrozenConfigDict(_read_config(path)))  # frozen: lists become tuples again


def _read_config(path: epath.Path) -> dict[str, Any]:
    """The values of a `config.json`, with the fields that came later."""
    values = read_json(path)
    for name, value in LATER_FIELDS.items():
        group, _, field = name.rpartition(".")
        (values.setdefault(group, {}) if group else values).setdefault(field, value)
    return values


def read_classes(workdir: epath.Path) -> dict[str, Any]:
    """What `claim` was given as `classes`."""
    return read_json(workdir / "classes.json")


def record_environment(workdir: epath.Path, first_step: int, devices: str) -> None:
    """Adds to `environment.json` what a run is carried out with, unless the run before had the same.

    It holds no names of hosts, users or folders but those that the command was given.

    Args:
      workdir: the work directory.
      first_step: where the run begins; 0 for a new training.
      devices: how many of which kind.

    Raises:
      UserError: the file cannot be read or written.
    """
    path = workdir / "environment.json"
    runs = read_environment(workdir)
    run = {
        "command": _command(),
        "devices": devices,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _commit(),
        "versions": processes.versions(),
    }
    if not runs or {**runs[-1], "first_step": first_step} != {"first_step": first_step, **run}:
        write_json(path, {"runs": [*runs, {"first_step": first_step, **run}]})


def read_environment(workdir: epath.Path) -> list[dict[str, Any]]:
    """What the runs of a training were carried out with, first to last; empty where it was not recorded.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "environment.json"
    return read_json(path).get("runs", []) if path.exists() else []


def _command() -> str | None:
    """The command line, if it was one; a notebook has none that could be given again."""
    program, *flags = sys.argv
    is_main = pathlib.Path(program).parts[-2:] == (__package__, "main.py")
    return shlex.join(["python", "-m", f"{__package__}.main", *flags]) if is_main else None


def _commit() -> str | None:
    """The git commit of this code, with `-dirty` where files were changed; None where it is no checkout."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed code may lie below some other checkout
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def append_metrics(workdir: epath.Path, row: dict[str, Any]) -> None:
    """Adds a line to `metrics.jsonl`.

    Raises:
      UserError: it cannot be written.
    """
    path = workdir / "metrics.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line torn by a crash is left out.

    Raises:
      UserError: another line is no JSON.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def rewind_metrics(workdir: epath.Path, step: int, evaluated: bool) -> None:
    """Drops the lines that a run which goes on from `step` writes again; that of the evaluation too if not `evaluated`.

    Raises:
      UserError: the file cannot be read or written.
    """
    rows = [row for row in read_metrics(workdir) if row["step"] <= step]
    if not evaluated:
        rows = [row for row in rows if row["step"] < step or "val/loss" not in row]
    path = workdir / "metrics.jsonl"
    partial = workdir / "metrics.jsonl.partial"
    try:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
