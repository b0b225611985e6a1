"""Label maps: which value or colour in the mask files of a folder is which class."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from unet_jax.data.colors import distinct_colors
from unet_jax.data.source import Classes, shorten
from unet_jax.errors import UserError, is_name

IGNORE = 255
_ENTRY = re.compile(r"\s*(?P<value>\d+(?:-\d+|[ ,]+\d+[ ,]+\d+)?)\s*(?:->\s*(?P<id>\d+|ignore)\b)?\s*(?P<name>.*?)\s*")
HELP = (
    "One entry per value: '0 background', '255 -> 1 cell', '128-255 -> 1 cell' for all of these, '128 0 64 -> 2 car' "
    "for a colour, '11 -> ignore' for pixels that do not count"
)

Value = int | tuple[int, int, int]  # of a pixel in a mask file: a grey value, a palette index or a colour


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """The classes of the values in mask files."""

    ids: dict[Value, int]  # value -> class, `IGNORE` for ignored pixels; the values are all numbers or all colours
    names: tuple[str, ...]  # one per class

    @property
    def is_colored(self) -> bool:
        """Whether the values are colours."""
        return isinstance(next(iter(self.ids)), tuple)

    def classes(self, task: str, channels: int) -> Classes:
        """The classes, in the colours of the masks if these are coloured; a binary task must have two."""
        if task == "binary" and len(self.names) != 2:
            raise UserError(
                f"config.data.variant = 'binary' is for two classes, but config.data.labels has {len(self.names)}: "
                f"{', '.join(self.names)}. Set it to 'multiclass'"
            )
        palette = distinct_colors(len(self.names))
        if self.is_colored:
            palette = tuple(next(v for v, i in self.ids.items() if i == k) for k in range(len(self.names)))
        return Classes(task, self.names, palette, channels, IGNORE)

    def apply(self, mask: np.ndarray, file: str) -> np.ndarray:
        """Numbers `[h, w]` or colours `[h, w, 3]` -> classes uint8 `[h, w]`; a `UserError` names unknown values."""
        if mask.ndim == 3 and not self.is_colored:
            if (mask != mask[..., :1]).any():
                raise UserError(
                    f"{file}: a coloured mask, but config.data.labels lists grey values. Save it in grey, or list "
                    f"colours. {HELP}"
                )
            mask = mask[..., 0]
        if mask.ndim == 2 and self.is_colored:
            mask = np.repeat(mask[..., None], 3, -1)
        table = np.full(2**24 + 1 if self.is_colored else 2**16, -1, np.int16)  # the last is for colours of 16 bits
        table[[pack(np.array(value)) for value in self.ids]] = list(self.ids.values())
        label = table[pack(mask).clip(max=len(table) - 1)]
        if (unknown := label < 0).any():
            first = min(count_values(mask[unknown][None]))
            found = [format_value(value) for value in sorted(count_values(mask))]
            hint = " Smooth edges or JPEG make such values: save masks as PNG, without smoothing."
            raise UserError(
                f"{file}: label {format_value(first)} is not in config.data.labels ({join(self.ids)}). "
                f"Values found: {shorten(found)}.{hint if len(found) > len(self.ids) + 3 else ''}"
            )
        return label.astype(np.uint8)


def parse(entries: Sequence[str]) -> LabelMap:
    """Parses `config.data.labels`: each a value, optionally `-> CLASS` or `-> ignore`, optionally a name.

    Without an arrow, a number is its own class, and colours are numbered in order. A range of numbers needs an arrow.

    Raises:
      UserError: an invalid entry; a value listed twice; class numbers with gaps; a name used twice.
    """
    ids, names = {}, {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
        numbers = tuple(map(int, re.findall(r"\d+", match["value"]))) if match else ()
        is_color, is_range = len(numbers) == 3, len(numbers) == 2
        is_valid = numbers and is_name(match["name"]) and "->" not in match["name"]
        is_valid = is_valid and not (is_range and (match["id"] is None or numbers[0] > numbers[1]))
        if not is_valid or max(numbers) > (255 if is_color else 65535):
            raise UserError(f"config.data.labels: {entry!r} is not a valid entry. {HELP}")
        values = [numbers] if is_color else range(numbers[0], numbers[-1] + 1)
        if match["id"] == "ignore":
            index = IGNORE
        else:
            index = int(match["id"]) if match["id"] else (len(names) if is_color else values[0])
            if match["name"] or index not in names:
                names[index] = match["name"] or names.get(index) or f"class {index}"
        for value in values:
            if value in ids:
                raise UserError(f"config.data.labels lists the value {format_value(value)} twice")
            ids[value] = index
    if sorted(names) != list(range(len(names))) or not 2 <= len(names) <= 255:
        raise UserError(
            f"config.data.labels: the classes are {sorted(names)}, but must be 0, 1, ... without gaps, at least two. "
            + HELP
        )
    if len({isinstance(value, tuple) for value in ids}) > 1:
        raise UserError(f"config.data.labels mixes numbers and colours: {join(ids)}")
    if len(set(names.values())) < len(names):
        raise UserError(f"config.data.labels uses a name twice: {', '.join(names[k] for k in sorted(names))}")
    return LabelMap(ids, tuple(names[k] for k in range(len(names))))


def count_values(mask: np.ndarray) -> dict[Value, int]:
    """How many pixels of a mask `[h, w]` or `[h, w, 3]` have each of the numbers or colours that occur in it."""
    packed = pack(mask).ravel()
    starts = np.flatnonzero(np.diff(packed, prepend=-1))  # of runs of equal pixels: only these need sorting
    lengths = np.diff(starts, append=len(packed))
    values, which = np.unique(packed[starts], return_inverse=True)
    counts = np.bincount(which, lengths).astype(int).tolist()
    unpack = _unpack if mask.ndim == 3 else int
    return dict(zip(map(unpack, values.tolist()), counts, strict=True))


def find_areas(mask: np.ndarray) -> set[Value]:
    """The values that fill a cross of five pixels somewhere in a mask; thin lines and smooth edges do not."""
    packed = pack(mask)
    inner = packed[1:-1, 1:-1]
    around = packed[:-2, 1:-1], packed[2:, 1:-1], packed[1:-1, :-2], packed[1:-1, 2:]
    filled = inner[np.logical_and.reduce([inner == one for one in around])]
    return set(count_values(filled[None] if mask.ndim == 2 else np.stack(_unpack(filled), -1)[None]))


def pack(mask: np.ndarray) -> np.ndarray:
    """Colours `[3]` or `[h, w, 3]` as single numbers; numbers `[h, w]` as they are; int64."""
    mask = mask.astype(np.int64)
    return mask @ np.array([65536, 256, 1]) if mask.ndim in (1, 3) else mask


def _unpack(value: int) -> tuple[int, int, int]:
    """The colour of a number from `pack`."""
    return value >> 16, value >> 8 & 255, value & 255


def format_value(value: Value) -> str:
    """A value as it is written in `config.data.labels`."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def join(values: Iterable[Value]) -> str:
    """Values as they are listed, numbers that follow each other as a range."""
    found: list = []
    for value in values:
        is_next = found and not isinstance(value, tuple) and found[-1][1] == value - 1
        found[-1:] = [(found[-1][0], value)] if is_next else [*found[-1:], (value, value)]
    show = lambda a, b: f"{a}-{b}" if a != b and b - a > 1 else ", ".join(map(format_value, dict.fromkeys((a, b))))
    return ", ".join(show(*run) for run in found)
