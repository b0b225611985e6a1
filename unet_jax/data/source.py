"""What every data set hands over: a random-access source of images and labels, and what the labels mean."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the labels mean; `classes.json` in a work directory.

    Attributes:
      task: `multiclass` (softmax), `binary` (two classes, one sigmoid) or `multilabel` (overlapping masks, K sigmoids).
      names: one per class.
      palette: one (red, green, blue) per class, 0..255.
      channels: of the images, 1 or 3.
      ignore_label: the label of pixels that count neither in the loss nor in the metrics.
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
        """A dictionary that `from_json` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Classes":
        """The inverse of `to_json` after a round trip through JSON, which knows no tuples."""
        check_choice("task", values["task"], ("multiclass", "binary", "multilabel"))
        palette = tuple(tuple(int(part) for part in color) for color in values["palette"])
        lists = {"names": tuple(map(str, values["names"])), "palette": palette}
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in {**values, **lists}.items() if name in known})


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, in a fixed order.

    Without `files` or `settings` its examples are never cached: nothing would tell when they are others.

    Attributes:
      classes: what the labels mean.
      ids: a unique name per example.
      read: index -> image uint8 `[h, w, C]` and label uint8 `[h, w]`, or `[h, w, K]` for a multilabel task. Called from
        several threads.
      faults: what is wrong with files that could not be taken in, each named; nothing is trained beside faults.
      files: all that the examples are read from, in an order that tells which is whose; empty where they are computed.
      settings: what else determines the examples, as JSON has it; `data.load` sets it.
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
    """Checks that every value of a label as read from a file is a class.

    Raises:
      UserError: one is not; names the file, the values and what usually causes such values.
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
            "Is this a coloured mask, a mask with the ids in another channel (alpha is 255 in RGBA), or one of "
            "another class table?"
        )
    found = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    raise UserError(
        f"{file}: label {wrong[0]} is not in 0..{num_classes - 1} ({num_classes} classes). Values found: {found}. "
        f"{hint}"
    )
