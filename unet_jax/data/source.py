"""What every data set returns: a random-access source of images and labels, and the meaning of the labels."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Classes:
    """The meaning of the labels; `classes.json` in a work directory.

    Attributes:
      task: `multiclass` (softmax), `binary` (two classes, one sigmoid) or `multilabel` (overlapping masks, K sigmoids).
      names: one per class.
      palette: one colour (red, green, blue) per class, 0..255.
      channels: of the images, 1 or 3.
      ignore_label: the label of pixels that are left out of the loss and the metrics.
    """

    task: str
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    channels: int = 3
    ignore_label: int = 255

    @property
    def num_outputs(self) -> int:
        """Channels of the logits."""
        return 1 if self.task == "binary" else len(self.names)

    def to_json(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Classes":
        """The inverse of `to_json`, after a round trip through JSON, which has no tuples. Skips unknown fields."""
        check_choice("task", values["task"], ("multiclass", "binary", "multilabel"))
        palette = tuple(tuple(int(part) for part in color) for color in values["palette"])
        tuples = {"names": tuple(map(str, values["names"])), "palette": palette}
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in {**values, **tuples}.items() if name in known})


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, in a fixed order.

    A source without `files` or `settings` is never cached: there would be no way to notice that its examples changed.

    Attributes:
      classes: the meaning of the labels.
      ids: a unique name per example.
      read: index -> image uint8 `[h, w, C]` and label uint8 `[h, w]`, or `[h, w, K]` for a multilabel task. Called from
        several threads.
      faults: one message for each problem with the files; training refuses a source that has any.
      files: all files that the examples are read from, in a fixed order; empty if the examples are generated.
      settings: everything else that determines the examples, as JSON values; set by `data.load`.
    """

    classes: Classes
    ids: Sequence[str]
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    faults: tuple[str, ...] = ()
    files: tuple[epath.PathLike, ...] | None = None
    settings: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def check_label(label: np.ndarray, num_classes: int, file: str) -> None:
    """Checks that every value of a label, as read from a file, is a class.

    Raises:
      UserError: some are not; names the file, the values and their usual cause.
    """
    values = np.unique(label).tolist()
    wrong = [value for value in values if not 0 <= value < num_classes]
    if not wrong:
        return
    if set(values) <= {0, 255}:
        hint = "A 0/255 mask: divide it by 255."
    elif wrong == [num_classes]:
        hint = "Off by one? If the labels start at 1, subtract 1."
    else:
        hint = (
            "Is this a coloured mask, a mask with the class ids in another channel (alpha is 255 in RGBA), or a mask "
            "of another class table?"
        )
    raise UserError(
        f"{file}: label {wrong[0]} is not in 0..{num_classes - 1} ({num_classes} classes). "
        f"Values found: {shorten(values)}. {hint}"
    )


def shorten(values: Sequence, limit: int = 8) -> str:
    """The first `limit` values on one line, with dots if there are more."""
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


def bullets(faults: Sequence[str], limit: int = 10) -> str:
    """The first `limit` faults, each on an indented line of its own, and how many more there are."""
    more = [f"and {len(faults) - limit} more"] if len(faults) > limit else []
    return "".join(f"\n  {line}" for line in [*faults[:limit], *more])
