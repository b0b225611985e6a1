"""Your own images: folders of images and of masks, paired by name.

`config.data.root` holds `images/` and `masks/` (or what `config.data.images` and `config.data.masks` name), with any
folders below. `images/a/x.jpg` belongs to `masks/a/x.png`, or `x_mask.png`. Images are PNG, JPEG, TIFF (8 or 16 bits)
or GIF, grey or in colours; masks are PNG, TIFF or GIF, grey, with a palette, or in colours.

What stands in the masks is `config.data.labels`; where it is not given, `settle` looks at all masks, and says what it
takes it for.
"""

import collections
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.data import images, labels
from unet_jax.data import pairs as pairs_of
from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError, check_choice


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation`, `test` (by lists only) or `all`.

    Raises:
      UserError: no images under `config.root`; a label map, list or group without meaning; an empty split.
    """
    check_choice("--split", split, pairs_of.SPLITS)
    meaning, label_map = classes(config), labels.parse(config.labels)
    pairs, faults = pairs_of.find(config)
    chosen = pairs_of.split(pairs, config, split, faults)
    if not chosen:
        remedy = f"Add images or groups, or change config.data.validation = {config.validation}"
        if config.lists:
            remedy = "".join(f"\n  {fault}" for fault in faults[:10])
        raise UserError(f"config.data.root = {config.root!r}: {len(pairs)} pairs leave none for {split}. {remedy}")

    def read(index):
        pair = chosen[index]
        image = images.read_image(pair.image, config.channels, config.value_range)
        mask = images.read_any(pair.mask, indices=not label_map.colored)
        check_sizes(image, mask, pair)
        return image, label_map.apply(mask, str(pair.mask))

    files = tuple(file for pair in chosen for file in (pair.image, pair.mask))
    return Source(meaning, [pair.id for pair in chosen], read, tuple(faults), files)


def classes(config) -> Classes:
    """What the labels mean, by `config.labels`, `config.channels` and `config.variant`.

    Raises:
      UserError: they are not settled, or have no meaning.
    """
    task = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    if not config.labels or not config.channels:
        raise UserError("config.data.labels and config.data.channels are not settled")
    _check(config)
    return labels.parse(config.labels).classes(task, config.channels)


def _check(config) -> None:
    """Checks `channels` and `value_range`."""
    if config.channels not in (0, 1, 3):
        raise UserError(f"config.data.channels = {config.channels} must be 1 (grey), 3 (colours), or 0 to find out")
    if config.value_range and not (len(config.value_range) == 2 and 0 <= config.value_range[0] < config.value_range[1]):
        raise UserError(f"config.data.value_range = {config.value_range} must be (low, high), or () to find out")


def check_sizes(image: np.ndarray, mask: np.ndarray, pair: pairs_of.Pair) -> None:
    """Checks that an image and its mask are of one size.

    Raises:
      UserError: they are not; names both.
    """
    if image.shape[:2] == mask.shape[:2]:
        return
    turned = images.kind(pair.image).orientation
    hint = f" The photo is marked as turned (EXIF orientation {turned}): turn its pixels." if turned != 1 else ""
    raise UserError(
        f"{pair.image} is {image.shape[1]}x{image.shape[0]} pixels but its mask {pair.mask} is "
        f"{mask.shape[1]}x{mask.shape[0]} (width x height).{hint}"
    )


def settle(config, say: Callable[[str], None]) -> None:
    """Sets `labels`, `channels` and `value_range` of `config`, where they are not given, by what is in the files.

    Args:
      config: `config.data`; changed.
      say: is told what was found.

    Raises:
      UserError: no images, or masks that cannot be understood.
    """
    _check(config)
    if config.labels:
        labels.parse(config.labels)
    if config.labels and config.channels and config.value_range:
        return
    pairs, _ = pairs_of.find(config)
    if not config.labels:
        config.labels = _guess_labels(pairs, say)
    if not config.channels or not config.value_range:
        grey, turned, histogram = _look_at([pair.image for pair in pairs])
        if turned:
            say(
                f"note: {len(turned)} photo(s) are marked as turned (EXIF), as {turned[0]}. Pixels count as stored: "
                "if the masks were drawn on the turned view, turn the pixels"
            )
        if not config.channels:
            config.channels = 1 if all(grey) else 3
            mixed = f" ({sum(grey)} of {len(grey)} are grey)" if any(grey) and not all(grey) else ""
            say(f"Images of {config.channels} channel(s){mixed}")
        if not config.value_range and histogram.any():
            share = histogram.cumsum() / histogram.sum()
            low, high = (int(np.searchsorted(share, part)) for part in (0.001, 0.999))
            config.value_range = (low, max(high, low + 1))
            say(
                f"16-bit images: values {config.value_range[0]} to {config.value_range[1]} become 0 to 255; all but "
                "0.2 % of the pixels lie there. Set config.data.value_range to change it"
            )
        elif not config.value_range:
            config.value_range = (0, 65535)


def _guess_labels(pairs: Sequence[pairs_of.Pair], say: Callable[[str], None]) -> tuple[str, ...]:
    def look(pair):
        mask = images.read_any(pair.mask, indices=True)
        return labels.values(mask), mask.ndim == 3, _palette(pair.mask, mask)

    seen = _readable(look, pairs, "Reading masks")
    palettes = [palette for _, _, palette in seen if palette]
    colors = collections.defaultdict(set)
    for index, color in (item for palette in palettes for item in palette.items()):
        colors[index].add(color)
    if any(len(found) > 1 for found in colors.values()):
        raise UserError(
            "the masks have palettes that differ, so that their indices mean different things: say what the colours "
            f"mean by config.data.labels. {labels.HELP}"
        )
    # A mask of another kind than most, or a smeared one, is named where it is read.
    plain = [found for found, colored, _ in seen if not colored and len(found) <= labels.MANY]
    colored = [found for found, colored, _ in seen if colored and len(found) <= labels.MANY]
    usual = max(plain, colored, key=len)
    if len(usual) * 2 < len(seen):
        usual = [set.union(*(found for found, is_colored, _ in seen if is_colored == seen[0][1]))]
    counts = collections.Counter(value for found in usual for value in found)
    if counts.keys() == {0, 1, 255} and not any({1, 255} <= found for found in usual):
        guessed = "0 background", "1 foreground", "255 -> 1"  # some masks were written as 0 and 1, some as 0 and 255
    else:
        guessed = labels.guess(counts)
    say(
        "Labels, as guessed from the masks; to change them, or to name the classes, set\n"
        f'  --config.data.labels="{guessed!r}"\n'
        + "\n".join(
            f"  {labels.show(value)} is in {count} of {len(seen)} masks" for value, count in sorted(counts.items())
        )
    )
    return guessed


def _palette(path: epath.Path, mask: np.ndarray) -> dict[int, tuple]:
    """The colours of the indices that occur in a mask with a palette."""
    colors = images.kind(path).palette
    return {int(i): tuple(colors[i]) for i in np.unique(mask) if i < len(colors)} if colors is not None else {}


def _look_at(files: Sequence[epath.Path]) -> tuple[list[bool], list[epath.Path], np.ndarray]:
    """Which of the readable images are grey; those turned by EXIF; counts of all 16-bit values, int64 `[65536]`."""

    histogram, lock = np.zeros(65536, np.int64), threading.Lock()

    def look(file):
        kind = images.kind(file)
        if kind.deep:
            counts = np.bincount(images.read_any(file).ravel(), minlength=65536)
            with lock:
                np.add(histogram, counts, out=histogram)
        return kind.grey, file if kind.orientation != 1 else None

    seen = _readable(look, files, "Looking at images")
    return [grey for grey, _ in seen], [file for _, file in seen if file], histogram


def _readable(look: Callable, items: Iterable, title: str) -> list[Any]:
    """As `each`, without the files that cannot be read: these are named where their example is.

    Raises:
      UserError: none can be read; names the first.
    """

    def try_to(item):
        try:
            return look(item), None
        except UserError as error:
            return None, error

    found = each(try_to, items, title)
    if all(error for _, error in found):
        raise UserError(f"not one of {len(found)} files can be read: {found[0][1]}")
    return [value for value, error in found if error is None]


def each(function: Callable, items: Iterable, title: str) -> list[Any]:
    """The results of `function` on all items, in order, computed in parallel below a progress bar."""
    import tqdm

    items = list(items)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm.tqdm(pool.map(function, items), title, len(items), leave=False, delay=1))
