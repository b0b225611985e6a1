"""The label map of a folder of masks: which value or colour in a mask file is which class."""

import colorsys
import dataclasses
import re
from collections.abc import Collection, Sequence

import numpy as np

from unet_jax.data.source import Classes
from unet_jax.errors import UserError

IGNORE = 255
MANY = 64  # masks with more values than this are smeared, not labelled
_ENTRY = re.compile(r"\s*(?P<value>\d+(?:[ ,]+\d+[ ,]+\d+)?)\s*(?:->\s*(?P<id>\d+|ignore)\b)?\s*(?P<name>.*?)\s*")
HELP = (
    "One entry a value: '0 background', '255 -> 1 cell', '128 0 64 -> 2 car' for a colour, '11 -> ignore' for pixels "
    "that do not count"
)

Value = int | tuple[int, int, int]  # what stands in a mask: a grey value or palette index, or a colour


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """Values of mask files and the classes that they stand for.

    Attributes:
      ids: value -> class, 255 where it is ignored; the values are all numbers or all colours.
      names: one per class.
    """

    ids: dict[Value, int]
    names: tuple[str, ...]

    @property
    def colored(self) -> bool:
        """Whether the values are colours."""
        return isinstance(next(iter(self.ids)), tuple)

    def classes(self, task: str, channels: int) -> Classes:
        """The classes, in the colours of the masks where these have any.

        Raises:
          UserError: a binary task of other than two classes.
        """
        if task == "binary" and len(self.names) != 2:
            raise UserError(
                f"config.data.variant = 'binary' is for two classes, but config.data.labels has {len(self.names)}: "
                f"{', '.join(self.names)}. Set it to 'multiclass'"
            )
        palette = distinct_colors(len(self.names))
        if self.colored:
            palette = tuple(next(v for v, i in self.ids.items() if i == k) for k in range(len(self.names)))
        return Classes(task, self.names, palette, channels, IGNORE)

    def apply(self, mask: np.ndarray, file: str) -> np.ndarray:
        """Values `[h, w]` or colours `[h, w, 3]` -> classes uint8 `[h, w]`.

        Raises:
          UserError: a value that the map lacks; names the file and the values.
        """
        if mask.ndim == 3 and not self.colored:
            if (mask != mask[..., :1]).any():
                raise UserError(
                    f"{file}: a coloured mask, but config.data.labels names grey values. Save it in grey, or give "
                    "colours. " + HELP
                )
            mask = mask[..., 0]
        if mask.ndim == 2 and self.colored:
            mask = np.repeat(mask[..., None], 3, -1)
        if self.colored:
            packed = _pack(mask)
            known = np.array(sorted(_pack(np.array(color))[()] for color in self.ids))
            ids = {_pack(np.array(color))[()]: index for color, index in self.ids.items()}
            place = np.searchsorted(known, packed).clip(max=len(known) - 1)
            label = np.where(known[place] == packed, np.array([ids[color] for color in known.tolist()])[place], -1)
        else:
            table = np.full(65536, -1, np.int16)
            table[list(self.ids)] = list(self.ids.values())
            label = table[mask]
        if (wrong := label < 0).any():
            first = sorted(values(mask[wrong][None]))[0]
            found = sorted(values(mask))
            smeared = " Smooth edges or JPEG make such values: save masks as PNG, without smoothing." * (
                len(found) > len(self.ids) + 3
            )
            raise UserError(
                f"{file}: label {show(first)} is not in config.data.labels ({', '.join(map(show, self.ids))}). "
                f"Values found: {', '.join(map(show, found[:8]))}{', ...' if len(found) > 8 else ''}.{smeared}"
            )
        return label.astype(np.uint8)


def parse(entries: Sequence[str]) -> LabelMap:
    """Reads `config.data.labels`.

    Args:
      entries: a value, maybe `-> class` or `-> ignore`, maybe a name. Without an arrow a number is its own class, and
        colours are counted.

    Raises:
      UserError: an entry without meaning; a value twice; classes that leave gaps; names used twice.
    """
    ids, names = {}, {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
        if match is None:
            raise UserError(f"config.data.labels: {entry!r} is no entry. {HELP}")
        numbers = tuple(map(int, re.findall(r"\d+", match["value"])))
        value = numbers if len(numbers) == 3 else numbers[0]
        if match["name"].startswith("->") or max(numbers) > (255 if len(numbers) == 3 else 65535):
            raise UserError(f"config.data.labels: {entry!r} is no entry. {HELP}")
        if match["id"] == "ignore":
            index = IGNORE
        else:
            index = int(match["id"]) if match["id"] else (len(names) if len(numbers) == 3 else value)
            if match["name"] or index not in names:
                names[index] = match["name"] or names.get(index) or f"class {index}"
        if value in ids:
            raise UserError(f"config.data.labels: {show(value)} stands there twice")
        ids[value] = index
    if sorted(names) != list(range(len(names))) or not 2 <= len(names) <= 255:
        raise UserError(
            f"config.data.labels: the classes are {sorted(names)}, but must be 0, 1, ... without a gap, at least two. "
            + HELP
        )
    if len({isinstance(value, tuple) for value in ids}) > 1:
        raise UserError(f"config.data.labels mixes numbers and colours: {', '.join(map(show, ids))}")
    if len(set(names.values())) < len(names):
        raise UserError(f"config.data.labels: a name is used twice: {', '.join(names[k] for k in sorted(names))}")
    return LabelMap(ids, tuple(names[k] for k in range(len(names))))


def guess(found: Collection[Value]) -> tuple[str, ...]:
    """Entries for the values that occur in all masks.

    Two values are background and foreground; small numbers are classes themselves, beside which 255 is ignored; other
    numbers and colours are counted in order.

    Raises:
      UserError: only one value, or so many that the masks must have been smeared.
    """
    found = sorted(found)
    if len(found) < 2:
        raise UserError(f"all masks hold nothing but {', '.join(map(show, found))}: there is nothing to learn")
    if len(found) > MANY:
        raise UserError(
            f"the masks hold {len(found)} values ({', '.join(map(show, found[:6]))}, ...): they have smooth edges, "
            f"went through JPEG, or are no label masks. Or say what they mean by config.data.labels. {HELP}"
        )
    if len(found) == 2:
        return f"{show(found[0])} -> 0 background", f"{show(found[1])} -> 1 foreground"
    if not isinstance(found[0], tuple):
        classes = [value for value in found if value != IGNORE]
        if classes[-1] < MANY:
            ignored = (f"{IGNORE} -> ignore",) if IGNORE in found else ()
            return (*(f"{value} class {value}" for value in range(classes[-1] + 1)), *ignored)
    return tuple(f"{show(value)} -> {index} class {index}" for index, value in enumerate(found))


def values(mask: np.ndarray) -> set[Value]:
    """The values or colours that occur in a mask `[h, w]` or `[h, w, 3]`."""
    packed = _pack(mask)
    starts = np.ones(packed.shape, bool)  # of runs of equal pixels along a row, so that few have to be sorted
    starts[:, 1:] = packed[:, 1:] != packed[:, :-1]
    return {_unpack(value, mask.ndim == 3) for value in np.unique(packed[starts]).tolist()}


def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Black, then hues that are far from those before them."""
    golden = (5**0.5 - 1) / 2
    hues = [colorsys.hsv_to_rgb((0.6 + k * golden) % 1, 0.75 - 0.3 * (k % 3 == 2), 0.95) for k in range(count - 1)]
    return ((20, 20, 20), *(tuple(round(255 * part) for part in hue) for hue in hues))


def _pack(mask: np.ndarray) -> np.ndarray:
    """Colours `[..., 3]` as single numbers; numbers as they are."""
    mask = mask.astype(np.int64)
    return mask @ np.array([65536, 256, 1]) if mask.ndim in (1, 3) else mask


def _unpack(value: int, colored: bool) -> Value:
    return (int(value) >> 16, int(value) >> 8 & 255, int(value) & 255) if colored else int(value)


def show(value: Value) -> str:
    """A value as an entry of `config.data.labels` gives it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
