"""What the values in mask files mean, where `config.data.labels` does not say it.

Each mask is looked at by itself, then how many masks and pixels speak for a value. Whatever could mean two things is a
question, a `UserError` that names the files and the flags that answer it: a training with the wrong classes would run
without complaint.
"""

import collections
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from unet_jax.data import labels, reading
from unet_jax.data.labels import IGNORE, Value, format_value
from unet_jax.data.source import shorten
from unet_jax.errors import UserError

MAX_VALUES = 64  # masks with more distinct values were smoothed or compressed, or are not masks
STRAY = 10  # pixels: a value that has no more of them in all masks may be a stray one
FEW = 5  # masks, below which one of them says as much as any other
LEAST_OBJECTS, MANY_OBJECTS = 4, 8  # values of one region each in one mask that may, and very likely do, number them

Entries = tuple[str, ...]  # of `config.data.labels`


class Mask(NamedTuple):
    """What is known of one mask file."""

    file: epath.Path
    is_colored: bool
    pixels: dict[Value, int]  # how many have each value
    areas: frozenset[Value]  # values that somewhere fill a cross of five pixels; lines and smooth edges do not
    regions: int  # connected, of one value other than 0 and 255; 0 if the mask holds one or two values
    palette: frozenset[tuple[int, ...]]  # (index, red, green, blue) of the values; empty without a palette


def inspect(file: epath.Path) -> Mask:
    """Reads a mask file; a `UserError` names one that is no image."""
    mask = reading.read_any(file, indices=True)
    pixels = labels.count_values(mask)
    regions = 0
    if len(pixels) > 2:
        from skimage import measure

        packed = labels.pack(mask)
        regions = measure.label(np.where(packed == IGNORE, 0, packed), background=0, return_num=True)[1]
    palette, colors = reading.read_header(file).palette, frozenset()
    if palette is not None:
        colors = frozenset((i, *palette[i].tolist()) for i in pixels if i < len(palette))
    return Mask(file, mask.ndim == 3, pixels, frozenset(labels.find_areas(mask)), regions, colors)


def guess(masks: Sequence[Mask]) -> tuple[Entries, dict[Value, int]]:
    """Entries of `config.data.labels`, and in how many masks each value is.

    Two values are background and foreground; small numbers are themselves the classes, and 255 beside them is ignored;
    other numbers and colours are numbered in order.

    Raises:
      UserError: masks that hold one value, or none of a kind that could be labels; or a question.
    """
    _check_palettes(masks)
    if all(len({*value}) == 1 for mask in masks if mask.is_colored for value in mask.pixels):
        masks = [_as_grey(mask) for mask in masks]
    # A few masks of another kind than most, or with smooth edges, do not count here: reading them will name them.
    kind = max(([m for m in masks if m.is_colored == is_colored] for is_colored in (False, True)), key=len)
    usual = [mask for mask in kind if len(mask.pixels) <= MAX_VALUES]
    if len(usual) * 2 < len(kind):
        usual = kind
    held = collections.Counter(value for mask in usual for value in mask.pixels)
    if len(held) < 2:
        raise UserError(f"all masks hold nothing but {labels.join(sorted(held))}: there is nothing to learn")
    _ask_if_objects(usual, max(value for mask in kind for value in mask.pixels if value != IGNORE))
    if not usual[0].is_colored:
        _ask_if_smooth(usual, held)
    if len(held) > MAX_VALUES:
        raise UserError(
            f"the masks hold {len(held)} values ({labels.join(sorted(held)[:6])}, ...): they have smooth edges, were "
            f"saved as JPEG, or are not label masks. If they are, list the values in config.data.labels. {labels.HELP}"
        )
    is_apart = held.keys() == {0, 1, IGNORE} and not any({1, IGNORE} <= mask.pixels.keys() for mask in usual)
    if is_apart and (min(held[1], held[IGNORE]) > 1 or len(usual) < FEW):
        return ("0 background", "1 foreground", "255 -> 1"), held  # some saved as 0 and 1, some as 0 and 255
    _ask_if_foreground(usual, held)
    _ask_if_few(usual, held)
    _ask_if_sparse(held)
    return entries(held), held


def _as_grey(mask: Mask) -> Mask:
    """A mask whose colours are all grey, by their grey values."""
    if not mask.is_colored:
        return mask
    pixels = {value[0]: count for value, count in mask.pixels.items()}
    return mask._replace(is_colored=False, pixels=pixels, areas=frozenset(value[0] for value in mask.areas))


def entries(values: Collection[Value]) -> Entries:
    """The entries for values whose meaning is clear; see `guess`."""
    values = sorted(values)
    if len(values) == 2:
        return f"{format_value(values[0])} -> 0 background", f"{format_value(values[1])} -> 1 foreground"
    if _are_small(values) and 0 in values:
        largest = max(value for value in values if value != IGNORE)
        ignored = (f"{IGNORE} -> ignore",) if IGNORE in values else ()
        return (*(f"{value} class {value}" for value in range(largest + 1)), *ignored)
    return _in_order(values)


def _in_order(values: Collection[Value]) -> Entries:
    """Entries that number the classes in the order of the values."""
    ignored = [value for value in values if value == IGNORE and len(values) > 2 and _are_small(values)]
    numbered = enumerate(sorted(set(values) - set(ignored)))
    named = (f"{format_value(value)} -> {index} class {index}" for index, value in numbered)
    return (*named, *(f"{value} -> ignore" for value in ignored))


def _are_small(values: Collection[Value]) -> bool:
    """Whether values may be the numbers of classes themselves, 255 aside."""
    return all(not isinstance(value, tuple) and (value < MAX_VALUES or value == IGNORE) for value in values)


def _check_palettes(masks: Sequence[Mask]) -> None:
    """An index into a palette says nothing without it: raises a `UserError` unless all palettes agree."""
    colors = collections.defaultdict(set)
    for mask in masks:
        for index, *color in mask.palette:
            colors[index].add(tuple(color))
    if any(len(found) > 1 for found in colors.values()):
        raise UserError(
            "the masks have different palettes, so their indices mean different things: list the colours in "
            f"config.data.labels, or the numbers if these agree all the same. {labels.HELP}"
        )
    with_palette = [mask for mask in masks if mask.palette]
    grey = [mask for mask in masks if not mask.palette and not mask.is_colored]
    if with_palette and grey and any(set(found) != {(index,) * 3} for index, found in colors.items()):
        shown = ", ".join(f"{index} is {format_value(*found)}" for index, found in sorted(colors.items())[:4])
        raise UserError(
            f"some masks have a palette, {_files(with_palette)}, and some are grey, {_files(grey)}: is a number an "
            f"index into the palette (where {shown}) in the grey ones as well? If so, list the numbers in "
            f"config.data.labels, else the colours, grey ones too. {labels.HELP}"
        )


def _ask_if_objects(masks: Sequence[Mask], last: Value) -> None:
    """Asks if values, up to `last`, seem to number objects: one region each, counted from 1 or used only once."""
    background = (0, 0, 0) if masks[0].is_colored else 0
    objects = [set(mask.pixels) - {background, IGNORE} for mask in masks]
    held = collections.Counter(value for numbers in objects for value in numbers)
    several = [(mask, numbers) for mask, numbers in zip(masks, objects, strict=True) if len(mask.pixels) > 2]
    most = max((len(numbers) for _, numbers in several), default=0)
    if most < LEAST_OBJECTS or not any(background in mask.pixels for mask in masks):
        return
    if sum(mask.regions for mask, _ in several) > 1.1 * sum(len(numbers) for _, numbers in several):
        return
    counted = [numbers == set(range(1, len(numbers) + 1)) for numbers in objects if numbers]
    is_same = 2 * sum(len(numbers) == most for numbers in objects) >= len(masks)  # rather classes that some lack
    is_counted = sum(counted) >= 0.9 * len(counted) and (most >= MANY_OBJECTS or not is_same)
    is_unique = len(masks) > 1 and sum(count == 1 for count in held.values()) > 0.8 * len(held)
    if not is_counted and not is_unique:
        return
    finding = (
        f"the masks hold up to {most} values beside the background, each of one connected region, in {_files(masks)}: "
        "do they number objects?"
    )
    if masks[0].is_colored:
        _ask(
            f"{finding} If so, draw those of one class in one colour; if not, list the colours in config.data.labels.",
            {},
        )
    is_ignored = last < IGNORE and any(IGNORE in mask.pixels for mask in masks)
    ignored = (f"{IGNORE} -> ignore",) if is_ignored else ()
    answers = {"They number objects of one class": ("0 background", f"1-{last} -> 1 object", *ignored)}
    if len(held) < MAX_VALUES:
        answers["They are classes"] = entries({background, *held, *([IGNORE] if is_ignored else [])})
    _ask(finding, answers)


def _ask_if_smooth(masks: Sequence[Mask], held: dict[Value, int]) -> None:
    """Asks if values between two others seem to be smooth edges: they nowhere fill an area, or there are many."""
    low, high = min(held), max(held)
    areas = frozenset.union(*(mask.areas for mask in masks))
    numbers = [value for value in held if value != IGNORE]
    if max(numbers) - min(numbers) + 1 == len(numbers) <= MAX_VALUES:
        return  # classes one after another, of which some may be thin, as borders are
    between = {value for value in held if low < value < high and (value not in areas or len(held) > MAX_VALUES)}
    of_mask = [sum(count for value, count in mask.pixels.items() if value in between) for mask in masks]
    smooth = [mask for mask, count in zip(masks, of_mask, strict=True) if count]
    share = sum(of_mask) / max(sum(sum(mask.pixels.values()) for mask in smooth), 1)
    if not between or (len(held) > MAX_VALUES and share > 0.2):
        return
    answers = {}
    if len(held) - len(between) == 2:
        middle = (low + high + 1) // 2
        ranges = f"{low}-{middle - 1} -> 0 background", f"{middle}-{high} -> 1 foreground"
        answers["They are smooth edges between two classes"] = ranges
    if len(held) <= MAX_VALUES:
        answers["They are classes"] = entries(held)
    _ask(
        f"{len(between)} value(s) between {low} and {high}, such as {shorten(sorted(between))}, in {_files(smooth)}, "
        f"are {share:.2%} of the pixels there and fill no area: smooth edges? Masks that are saved as PNG without "
        "smoothing, and resized by the nearest pixel, have none; else list ranges, as '0-63 -> 0 background'.",
        answers,
    )


def _ask_if_foreground(masks: Sequence[Mask], held: dict[Value, int]) -> None:
    """Asks if 255 beside small numbers may be a foreground: most masks that hold it hold nothing but 0 besides."""
    if IGNORE not in held or not _are_small(held) or len(held) == 2:
        return
    alone = [mask for mask in masks if mask.pixels.keys() <= {0, IGNORE} and IGNORE in mask.pixels]
    others = [mask for mask in masks if mask.pixels.keys() - {0, IGNORE}]
    is_rare = len(alone) * 2 <= held[IGNORE] or len(alone) <= len(others)
    if is_rare and len(alone) < held[IGNORE]:  # it is beside other numbers, too
        return
    _ask(
        f"of the masks {len(alone)} hold only 0 and 255 ({_files(alone)}), and {len(others)} other numbers as well "
        f"({_files(others)}): is 255 the foreground, or to be ignored?",
        {
            "It is the foreground, and so are they": ("0 background", f"1-{IGNORE} -> 1 foreground"),
            "It is, and they do not count": (*entries((0, IGNORE)), f"1-{IGNORE - 1} -> ignore"),
            "It is ignored": entries(held),
        },
    )


def _ask_if_few(masks: Sequence[Mask], held: dict[Value, int]) -> None:
    """Asks about values of few pixels, or in one of several masks."""
    classes = {value for value in held if value != IGNORE or not _are_small(held)}
    if len(held) == 2 or len(classes) < 3:
        return
    pixels = collections.Counter()
    for mask in masks:
        pixels.update(mask.pixels)
    few = {value for value in classes if pixels[value] <= STRAY or (held[value] == 1 and len(masks) >= FEW)}
    rest = sorted(held.keys() - few)
    if not few or len(classes - few) < 2:
        return
    shown = "; ".join(
        f"{format_value(value)} has {pixels[value]} pixel(s) in {_files([m for m in masks if value in m.pixels])}"
        for value in sorted(few)[:4]
    )
    kept = entries(rest) if len(rest) == 2 else _in_order(rest)
    _ask(
        f"{len(few)} of the {len(held)} values have few pixels, or are in one mask only: {shown}.",
        {
            "They do not count": (*kept, *(f"{format_value(value)} -> ignore" for value in sorted(few))),
            "They are classes": entries(held),
        },
    )


def _ask_if_sparse(held: dict[Value, int]) -> None:
    """Asks if most of the numbers up to the largest do not occur, or some are above those of 8 bits."""
    if len(held) == 2 or isinstance(next(iter(held)), tuple):
        return
    numbers = sorted(held.keys() - {IGNORE}) if _are_small(held) else sorted(held)
    answers = {"These are all classes there are": _in_order(held)}
    if _are_small(held) and numbers[-1] + 1 > 2 * len(numbers):
        some = f"There are {numbers[-1] + 1} classes, some of which do not occur in these masks"
        _ask(
            f"of the numbers 0 to {numbers[-1]}, the masks hold only {labels.join(numbers)}.",
            {**answers, some: entries(held)},
        )
    if numbers[-1] > 255:
        objects = {"They number objects of one class": ("0 background", f"1-{numbers[-1]} -> 1 object")}
        _ask(f"the masks hold {labels.join(numbers)}.", {**answers, **(objects if numbers[0] == 0 else {})})


def _ask(finding: str, answers: dict[str, Entries]) -> None:
    """Raises a `UserError` with what was found, and the flags for what it may mean."""
    lines = [f"what the masks mean is not clear: {finding}{' Choose one:' * bool(answers)}"]
    lines += [f'  {meaning}:\n    --config.data.labels="{chosen!r}"' for meaning, chosen in answers.items()]
    raise UserError("\n".join(lines))


def _files(masks: Sequence[Mask]) -> str:
    """The first three files, and how many more there are."""
    more = f" and {len(masks) - 3} more" if len(masks) > 3 else ""
    return ", ".join(str(mask.file) for mask in masks[:3]) + more
