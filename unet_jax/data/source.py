"""What every data set returns: a random-access source of images and labels, and the meaning of the labels."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Classes:
    """The meaning of the labels; `classes.json` in a work directory."""

    task: str  # `multiclass` (softmax), `binary` (two classes, one sigmoid) or `multilabel` (K sigmoids, may overlap)
    names: tuple[str, ...]  # one per class
    palette: tuple[tuple[int, int, int], ...]  # one colour (red, green, blue) per class, 0..255
    channels: int = 3  # of the images, 1 or 3
    ignore_label: int = 255  # the label of pixels that are left out of the loss and the metrics

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
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        palette = tuple(tuple(map(int, color)) for color in values["palette"])
        return cls(**{**known, "names": tuple(map(str, values["names"])), "palette": palette})


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, in a fixed order.

    A source without `files` or `settings` is never cached: there would be no way to notice that its examples changed.
    """

    classes: Classes
    ids: Sequence[str]  # a unique name per example
    # Index -> image uint8 [h, w, C] and label uint8 [h, w], or [h, w, K] if multilabel. Called from several threads.
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    faults: tuple[str, ...] = ()  # one message for each problem with the files; training refuses a source that has any
    files: tuple[epath.PathLike, ...] | None = None  # all that are read, in a fixed order; () for generated examples
    settings: Mapping[str, Any] | None = None  # all else that determines the examples, JSON values; from `data.load`

    def __len__(self) -> int:
        return len(self.ids)


def check_label(label: np.ndarray, num_classes: int, file: str) -> None:
    """Raises a `UserError`, with the usual cause, if a value of a label, as read from `file`, is not a class."""
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
        )
        hint += "of another class table?"
    raise UserError(
        f"{file}: label {wrong[0]} is not in 0..{num_classes - 1} ({num_classes} classes). "
        f"Values found: {shorten(values)}. {hint}"
    )


def shorten(values: Sequence) -> str:
    """The first eight values on one line, with dots if there are more."""
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def bullets(faults: Sequence[str]) -> str:
    """The first ten faults, each on an indented line of its own, and how many more there are."""
    more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "".join(f"\n  {line}" for line in [*faults[:10], *more])
