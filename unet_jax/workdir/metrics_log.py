"""`metrics.jsonl` of a work directory: one JSON object a line.

It is only to look at, so that damage stops nothing: damaged lines are left out with a warning. A file that cannot be
written raises a `UserError` that names it.
"""

import json
from typing import Any

from etils import epath

from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import files, schema

MAX_BYTES = 2**30


def append(workdir: epath.Path, row: dict[str, Any]) -> None:
    """Adds a line."""
    path = workdir / "metrics.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """All intact lines; a last line torn by a crash is dropped, damaged ones with a warning."""
    rows, fault = _read(workdir)
    if fault:
        processes.print_on_main(f"warning: {fault}; it is left out")
    return rows


def rewind(workdir: epath.Path, step: int, evaluated: bool) -> None:
    """Drops the lines that a run resumed from `step` writes again; also the evaluation at `step` if not `evaluated`.

    A damaged file is set aside, and its intact lines are kept.
    """
    path, (rows, fault) = workdir / "metrics.jsonl", _read(workdir)
    if fault:
        files.set_aside(path, f"{fault}. The other lines are kept")
    rows = [row for row in rows if row["step"] <= step]
    if not evaluated:
        rows = [row for row in rows if row["step"] < step or "val/loss" not in row]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read(workdir: epath.Path) -> tuple[list[dict[str, Any]], str]:
    """The intact lines, and what is wrong with the others, if any."""
    path, rows, damaged = workdir / "metrics.jsonl", [], []
    if not schema.occupied(path):
        return [], ""
    try:
        *lines, last = schema.read_bytes(path, MAX_BYTES).split(b"\n")
    except UserError as error:
        return [], str(error)
    if last and not last.startswith(b"{"):  # it was not torn by a crash
        lines.append(last)
    for number, line in enumerate(lines, 1):
        try:
            row = schema.parse(line)
        except ValueError:
            row = None
        if schema.is_row(row):
            rows.append(row)
        else:
            damaged.append(number)
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return rows, f"{path} is damaged in line {damaged[0]}{more}" if damaged else ""
