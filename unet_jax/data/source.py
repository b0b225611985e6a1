"""What every data set returns: a random-access source of images and labels, and the meaning of the labels."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.data import images
from unet_jax.errors import UserError, check_choice, is_name


@dataclasses.dataclass(frozen=True)
class Classes:
    """The meaning of the labels; `classes.json` in a work directory."""

    task: str  # `multiclass` (softmax), `binary` (two classes, one sigmoid) or `multilabel` (K sigmoids, may overlap)
    names: tuple[str, ...]  # one per class
    palette: tuple[tuple[int, int, int], ...]  # one colour (red, green, blue) per class, 0..255
    channels: int = 3  # of the images
    ignore_label: int = 255  # the label of pixels that are left out of the loss and the metrics
    dtype: str = "uint8"  # of the images: uint8, uint16 or float32

    def __post_init__(self):
        for name in self.names:
            if not is_name(name):
                raise UserError(f"{name!r} cannot be the name of a class: it holds control characters")

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
    # Index -> image [h, w, C] and label uint8 [h, w], or [h, w, K] if multilabel. Called from several threads.
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    faults: tuple[str, ...] = ()  # one message for each problem with the files; training refuses a source that has any
    files: tuple[epath.PathLike, ...] | None = None  # all that are read, in a fixed order; () for generated examples
    settings: Mapping[str, Any] | None = None  # all else that determines the examples, JSON values; from `data.load`
    # Index -> height and width of its image, without decoding it; None if there is no such way.
    read_size: Callable[[int], tuple[int, int]] | None = None
    # Index -> what height and width of its image are multiplied by, if images keep their own size; from `data.load`.
    factors: Callable[[int], tuple[float, float]] = lambda index: (1.0, 1.0)

    def __len__(self) -> int:
        return len(self.ids)

    def ids_digest(self) -> str:
        """A hash of the ids, by which a checkpoint knows the examples again that it was trained on."""
        return hashlib.sha256(repr(list(self.ids)).encode()).hexdigest()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What `read` returns, checked: a `UserError` names the example if a value of its label has no meaning."""
        image, label = self.read(index)
        num_values = 2 if self.classes.task == "multilabel" else len(self.classes.names)
        check_label(label, num_values, f"example {self.ids[index]!r}", self.classes.ignore_label)
        return image, label

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) of each image."""
        read_size = self.read_size or (lambda index: self.read(index)[0].shape[:2])
        return images.map_parallel(read_size, range(len(self)), "Reading sizes")

    def size_range(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The smallest and the largest (height, width) of the images, each axis by itself.

        If `read_size` cannot tell, of 32 images spread evenly: enough where all are of one size, or of any.
        """
        if self.read_size is not None:
            sizes = self.sizes()
        else:
            chosen = np.unique(np.linspace(0, len(self) - 1, 32).astype(int)).tolist()
            sizes = images.map_parallel(lambda index: self.read(index)[0].shape[:2], chosen, "Reading sizes")
        return tuple(np.min(sizes, 0).tolist()), tuple(np.max(sizes, 0).tolist())


def check_label(label: np.ndarray, num_classes: int, file: str, ignore_label: int | None = None) -> None:
    """Raises a `UserError`, with the usual cause, if a value of a label is neither a class nor `ignore_label`.

    `file` is that, or the example, which the label comes from.
    """
    known = (label >= 0) & (label < num_classes)
    if ignore_label is not None:
        known |= label == ignore_label
    if known.all():
        return
    values, wrong = np.unique(label).tolist(), np.unique(label[~known]).tolist()
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
        f"{file}: label {wrong[0]} is not in 0..{num_classes - 1} ({num_classes} classes)"
        + (". " if ignore_label is None else f", and not {ignore_label}, which is ignored. ")
        + f"Values found: {shorten(values)}. {hint}"
    )


def shorten(values: Sequence) -> str:
    """The first eight values on one line, with dots if there are more."""
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def bullets(faults: Sequence[str]) -> str:
    """The first ten faults, each on an indented line of its own, and how many more there are."""
    more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "".join(f"\n  {line}" for line in [*faults[:10], *more])
