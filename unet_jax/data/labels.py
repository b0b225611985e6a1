"""Label maps: which value or colour in the mask files of a folder is which class."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from unet_jax.data.colors import distinct_colors
from unet_jax.data.source import Classes, shorten
from unet_jax.errors import UserError, is_name

IGNORE = 255
MAX_VALUES = 64  # masks with more distinct values were smoothed or compressed, or are not masks
_ENTRY = re.compile(r"\s*(?P<value>\d+(?:[ ,]+\d+[ ,]+\d+)?)\s*(?:->\s*(?P<id>\d+|ignore)\b)?\s*(?P<name>.*?)\s*")
HELP = (
    "One entry per value: '0 background', '255 -> 1 cell', '128 0 64 -> 2 car' for a colour, '11 -> ignore' for pixels "
    "that do not count"
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
        table[[_pack(np.array(value)) for value in self.ids]] = list(self.ids.values())
        label = table[_pack(mask).clip(max=len(table) - 1)]
        if (unknown := label < 0).any():
            first = min(distinct_values(mask[unknown][None]))
            found = [format_value(value) for value in sorted(distinct_values(mask))]
            hint = " Smooth edges or JPEG make such values: save masks as PNG, without smoothing."
            raise UserError(
                f"{file}: label {format_value(first)} is not in config.data.labels ({_join(self.ids)}). "
                f"Values found: {shorten(found)}.{hint if len(found) > len(self.ids) + 3 else ''}"
            )
        return label.astype(np.uint8)


def parse(entries: Sequence[str]) -> LabelMap:
    """Parses `config.data.labels`: each a value, optionally `-> CLASS` or `-> ignore`, optionally a name.

    Without an arrow, a number is its own class, and colours are numbered in order.

    Raises:
      UserError: an invalid entry; a value listed twice; class numbers with gaps; a name used twice.
    """
    ids, names = {}, {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
        numbers = tuple(map(int, re.findall(r"\d+", match["value"]))) if match else ()
        is_color = len(numbers) == 3
        is_valid = numbers and is_name(match["name"]) and not match["name"].startswith("->")
        if not is_valid or max(numbers) > (255 if is_color else 65535):
            raise UserError(f"config.data.labels: {entry!r} is not a valid entry. {HELP}")
        value = numbers if is_color else numbers[0]
        if match["id"] == "ignore":
            index = IGNORE
        else:
            index = int(match["id"]) if match["id"] else (len(names) if is_color else value)
            if match["name"] or index not in names:
                names[index] = match["name"] or names.get(index) or f"class {index}"
        if value in ids:
            raise UserError(f"config.data.labels lists the value {format_value(value)} twice")
        ids[value] = index
    if sorted(names) != list(range(len(names))) or not 2 <= len(names) <= 255:
        raise UserError(
            f"config.data.labels: the classes are {sorted(names)}, but must be 0, 1, ... without gaps, at least two. "
            + HELP
        )
    if len({isinstance(value, tuple) for value in ids}) > 1:
        raise UserError(f"config.data.labels mixes numbers and colours: {_join(ids)}")
    if len(set(names.values())) < len(names):
        raise UserError(f"config.data.labels uses a name twice: {', '.join(names[k] for k in sorted(names))}")
    return LabelMap(ids, tuple(names[k] for k in range(len(names))))


def guess(values: Collection[Value]) -> tuple[str, ...]:
    """Entries of `config.data.labels` for the values that occur in all masks.

    Two values are background and foreground; small numbers are themselves the classes, and 255 beside them is ignored;
    other numbers and colours are numbered in order.

    Raises:
      UserError: only one value, or so many that the masks must have been smoothed.
    """
    values = sorted(values)
    if len(values) < 2:
        raise UserError(f"all masks hold nothing but {_join(values)}: there is nothing to learn")
    if len(values) > MAX_VALUES:
        raise UserError(
            f"the masks hold {len(values)} values ({_join(values[:6])}, ...): they have "
            "smooth edges, were saved as JPEG, or are not label masks. If they are, list the values in "
            f"config.data.labels. {HELP}"
        )
    if len(values) == 2:
        return f"{format_value(values[0])} -> 0 background", f"{format_value(values[1])} -> 1 foreground"
    largest = max(value for value in values if value != IGNORE)
    if not isinstance(largest, tuple) and largest < MAX_VALUES:
        ignored = (f"{IGNORE} -> ignore",) if IGNORE in values else ()
        return (*(f"{value} class {value}" for value in range(largest + 1)), *ignored)
    return tuple(f"{format_value(value)} -> {index} class {index}" for index, value in enumerate(values))


def distinct_values(mask: np.ndarray) -> set[Value]:
    """The numbers or colours that occur in a mask `[h, w]` or `[h, w, 3]`."""
    packed = _pack(mask)
    starts = np.ones(packed.shape, bool)  # first pixels of runs of equal pixels in a line: only these need sorting
    starts[:, 1:] = packed[:, 1:] != packed[:, :-1]
    values = np.unique(packed[starts]).tolist()
    return {(value >> 16, value >> 8 & 255, value & 255) for value in values} if mask.ndim == 3 else set(values)


def _pack(mask: np.ndarray) -> np.ndarray:
    """Colours `[3]` or `[h, w, 3]` as single numbers; numbers `[h, w]` as they are; int64."""
    mask = mask.astype(np.int64)
    return mask @ np.array([65536, 256, 1]) if mask.ndim in (1, 3) else mask


def format_value(value: Value) -> str:
    """A value as it is written in `config.data.labels`."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _join(values: Iterable[Value]) -> str:
    return ", ".join(map(format_value, values))
