"""One score."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Record:
    """One score, with all that a log, a table or a page has to know of it."""

    key: str  # in `metrics.jsonl`, behind `val/`, and in `eval.json`
    title: str  # for people
    value: float | None | dict[str, float | None]  # or one per class by its name; None if there is nothing to measure
    higher_is_better: bool = True  # or else lower is
    note: str = ""  # printed below the table, if any
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # also in `eval.json`, as `<key>_<name>`
    foreground: str | None = None  # a class whose value also stands for all classes together, see `metrics.summary`

    @property
    def per_class(self) -> bool:
        """Whether there is a value per class."""
        return isinstance(self.value, dict)
