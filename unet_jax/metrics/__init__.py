"""Metrics: functions of what an evaluation has counted that return records.

To add one: a function like those of `METRICS`, and its place there. The log, the table, `eval.json`, the report,
TensorBoard, the notebook and the choice of the best checkpoint (`config.eval.best_metric`) iterate over records.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax.metrics import confusion, isbi2012
from unet_jax.metrics.record import Record

__all__ = ["METRICS", "Counts", "Record", "describe", "flatten", "records", "summary", "value_of"]


class Counts(NamedTuple):
    """What metrics are computed from."""

    confusion: np.ndarray  # int64 `[K, K]`, or `[K, 2, 2]` for overlapping masks; rows are the ground truth
    names: Sequence[str]  # of the K classes
    # For the scores of ISBI 2012: probability of cells `[H, W]` and label `[H, W]` of each slice; None if they are off.
    cells: Sequence[tuple[np.ndarray, np.ndarray]] | None = None
    ignore_label: int = 255  # of the labels in `cells`


def _pixel_scores(counts: Counts) -> list[Record]:
    return confusion.records(counts.confusion, counts.names)


def _isbi2012_scores(counts: Counts) -> list[Record]:
    return [] if counts.cells is None else isbi2012.records(counts.cells, counts.ignore_label)


METRICS = (_pixel_scores, _isbi2012_scores)


def records(counts: Counts) -> list[Record]:
    """All records of a split, in the order in which they are shown."""
    return [record for metric in METRICS for record in metric(counts)]


def describe(names: Sequence[str], task: str = "multiclass", cells: bool = False) -> list[Record]:
    """The records that an evaluation will have, without values: keys, titles and directions.

    `names` are those of the classes of a `task`; `cells` is for the scores of ISBI 2012.
    """
    size = len(names)
    shape = (size, 2, 2) if task == "multilabel" else (size, size)
    return records(Counts(np.zeros(shape, np.int64), names, [] if cells else None))


def summary(found: Iterable[Record]) -> list[Record]:
    """The scores of all classes together, each of one value, in the order in which they are shown.

    A record with a value per class is left out, or is there with that of its `foreground`, by the key that `flatten`
    gives it.
    """
    shown = []
    for record in found:
        if record.foreground is not None:
            key, title = f"{record.key}/{record.foreground}", f"{record.title} of {record.foreground}"
            record = dataclasses.replace(record, key=key, title=title, value=record.value[record.foreground])
        if not record.per_class:
            shown.append(record)
    return shown


def flatten(found: Iterable[Record]) -> dict[str, float | None]:
    """Key -> value, with `<key>/<class>` for a record with a value per class."""
    flat: dict[str, Any] = {}
    for record in found:
        if isinstance(record.value, dict):
            flat |= {f"{record.key}/{name}": value for name, value in record.value.items()}
        else:
            flat[record.key] = record.value
    return flat


def value_of(key: str, found: Sequence[Record]) -> float | None:
    """The value of one flattened key, negated where lower is better: the higher, the better."""
    record = next(r for r in found if r.key == key or key.startswith(f"{r.key}/"))
    value = flatten(found)[key]
    return value if value is None or record.higher_is_better else -value
