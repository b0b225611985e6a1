"""The scores of a split, and how they are shown and kept: a table for people, JSON, and CSV with a line per image."""

import csv
import dataclasses
import hashlib
import io
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from unet_jax import metrics
from unet_jax.errors import UserError
from unet_jax.metrics import confusion
from unet_jax.workdir import files, metrics_log


class Evaluation(NamedTuple):
    """The scores of a split."""

    loss: float  # of the whole split
    records: list[metrics.Record]  # see `metrics.records`
    confusion: np.ndarray  # counts of each image, int64 `[N, K, K]`, or `[N, K, 2, 2]` of overlapping masks, in order
    names: Sequence[str]  # of the classes
    losses: Sequence[float]  # of each image
    # The same counts at the images' own sizes, see `own_size.count`; None if not counted, or all have the size above.
    own_size: np.ndarray | None = None

    @property
    def pixels(self) -> dict[str, int]:
        """Pixels of each class in the ground truth."""
        return _pixels(self.names, self.confusion)

    @property
    def is_telling(self) -> bool:
        """Whether the labels hold what the scores are about: two classes, or any of overlapping masks."""
        return sum(map(bool, self.pixels.values())) > (self.confusion.ndim == 3)

    def image_records(self) -> list[list[metrics.Record]]:
        """The metrics of each image alone."""
        return [metrics.records(metrics.Counts(counts, self.names)) for counts in self.confusion]


def _pixels(names: Sequence[str], counts: np.ndarray) -> dict[str, int]:
    return dict(zip(names, confusion.pixel_counts(counts.sum(0)).tolist(), strict=True))


def to_json(result: Evaluation) -> dict[str, Any]:
    """The scores as they are in `eval.json`; JSON has no number for a loss that is not finite.

    Those at the images' own sizes, if they were counted, are nested in `own_size`.
    """
    loss = result.loss if math.isfinite(result.loss) else None
    values = {"loss": loss, **_counts_to_json(result.records, result.names, result.confusion)}
    if result.own_size is None:
        return values
    records = metrics.records(metrics.Counts(result.own_size.sum(0), result.names))
    return {**values, "own_size": _counts_to_json(records, result.names, result.own_size)}


def _counts_to_json(records: Sequence[metrics.Record], names: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in records:
        values[record.key] = record.value
        values |= {f"{record.key}_{name}": detail for name, detail in record.details.items()}
    return {**values, "pixels": _pixels(names, counts), "confusion": counts.sum(0).tolist()}


def to_csv(result: Evaluation, ids: Sequence[str]) -> str:
    """A line for each image: id, counted pixels (of all overlapping masks), loss, and the scores by their keys.

    What is absent, or of no pixels, is empty. An id is written as it is, except that one which a spreadsheet would run
    as a formula gets an apostrophe in front.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    rows = [metrics.flatten(records) for records in result.image_records()]
    writer.writerow(["id", "pixels", "loss", *rows[0]])
    for name, counts, loss, row in zip(ids, result.confusion, result.losses, rows, strict=True):
        pixels = int(counts.sum())
        shown = f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
        writer.writerow([shown, pixels, loss if pixels else None, *row.values()])
    return file.getvalue()


def format_evaluation(result: Evaluation) -> str:
    """The scores as text: a table, and one more at the images' own sizes if they were counted."""
    table = format_table(result.loss, result.records, result.pixels)
    if result.own_size is None:
        return table
    records = metrics.records(metrics.Counts(result.own_size.sum(0), result.names))
    own_table = _table(records, _pixels(result.names, result.own_size))
    return f"{table}\n\nat the images' own sizes, as --mode=predict writes them:\n{own_table}"


def format_table(loss: float | None, records: Sequence[metrics.Record], pixels: Mapping[str, int]) -> str:
    """The scores as text: a line per class, then those of the whole split; `pixels` are those of the ground truth."""
    return _table(records, pixels, f"loss {number(loss)}")


def _table(records: Sequence[metrics.Record], pixels: Mapping[str, int], *more: str) -> str:
    total = sum(pixels.values())
    width = max(map(len, (*pixels, "class")))
    columns = [record for record in records if record.per_class]
    lines = [f"{'class':{width}}" + "".join(f"   {record.title:>6}" for record in columns) + "   share of pixels"]
    for name, count in pixels.items():
        share = "" if not count else f"   {count / total:8.3%}"
        lines.append(f"{name:{width}}" + "".join(f"   {number(r.value[name]):>6}" for r in columns) + share)
    scalars = [f"{r.title} {number(r.value)}{_threshold(r)}" for r in metrics.summary(records)]
    scalars += [f"(over {sum(map(bool, pixels.values()))} classes present)", *more]
    notes = {f"({record.note})": None for record in records if record.note}
    return "\n".join([*lines, "   ".join([*scalars, *notes])])


def number(value: float | None) -> str:
    """A score as text."""
    return "absent" if value is None else f"{value:.4f}"


def _threshold(record: metrics.Record) -> str:
    threshold = record.details.get("threshold")
    return "" if threshold is None else f" at threshold {threshold}"


def read_logged(
    workdir: epath.Path, step: int, described: Sequence[metrics.Record]
) -> tuple[float | None, list[metrics.Record]] | None:
    """Loss and records of the validation split as `metrics.jsonl` has them for a step; None if it has not.

    A record, see `metrics.describe`, keeps its details to itself there.
    """
    for row in metrics_log.read(workdir):
        if row["step"] == step and "val/loss" in row:
            return row["val/loss"], [_as_logged(record, row) for record in described]
    return None


def _as_logged(record: metrics.Record, row: Mapping[str, float]) -> metrics.Record:
    """The record with its value in a line of `metrics.jsonl`; None for a missing key."""
    key = f"val/{record.key}"
    value = {name: row.get(f"{key}/{name}") for name in record.value} if record.per_class else row.get(key)
    return dataclasses.replace(record, value=value)


def file_stem(data: str, split: str, step: int, tta: str) -> str:
    """The name, without suffix, of the files in `eval/` for the scores of a split of `data`, see `data_name`."""
    return f"{data}-{split}-{step}-{tta}"


def data_name(root: str, trained_root: str, data_set: str) -> str:
    """A short name, safe for a file, of the images in `root`; no other folder has it.

    It is the last part of the path, or else the name of the data set. Roots other than that of the training, which may
    end alike, are told apart by a hash of the whole path.
    """
    place, trained_place = (r if "://" in r else os.path.abspath(r) for r in (root, trained_root))
    last = pathlib.PurePath(place).name if root else data_set
    name = re.sub(r"[^\w.-]+", "_", last, flags=re.ASCII).strip(".")[:40] or data_set
    return name if place == trained_place else f"{name}_{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def write(workdir: epath.Path, stem: str, described: Mapping[str, Any], result: Evaluation, ids: Sequence[str]) -> None:
    """Writes `eval/<stem>.json` and `eval/<stem>.csv`, and `eval.json`, which always holds the latest scores.

    `described` says what was scored. Raises a `UserError` if a file cannot be written.
    """
    folder = workdir / "eval"
    try:
        files.make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error}") from error
    values = {**described, **to_json(result)}
    # A name that is not UTF-8 has no other form in a text file that is.
    table = to_csv(result, ids).encode("utf-8", "backslashreplace").decode()
    files.write_text(folder / f"{stem}.csv", table)
    files.write_json(folder / f"{stem}.json", values)
    files.write_json(workdir / "eval.json", values)
