"""`metrics.jsonl` of a work directory: one JSON object a line.

A file that is damaged or cannot be written raises a `UserError` that names it.
"""

import json
from typing import Any

from etils import epath

from unet_jax.errors import UserError
from unet_jax.workdir import files


def append(workdir: epath.Path, row: dict[str, Any]) -> None:
    """Adds a line."""
    path = workdir / "metrics.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """All lines; a last line torn by a crash is dropped."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def rewind(workdir: epath.Path, step: int, evaluated: bool) -> None:
    """Drops the lines that a run resumed from `step` writes again; also the evaluation at `step` if not `evaluated`."""
    rows = [row for row in read(workdir) if row["step"] <= step]
    if not evaluated:
        rows = [row for row in rows if row["step"] < step or "val/loss" not in row]
    files.write_text(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
