"""Your own images: folders of images and of masks, paired by name.

`config.data.root` holds `images/` and `masks/` (or what `config.data.images` and `config.data.masks` name), with any
folders below. `images/a/x.jpg` belongs to `masks/a/x.png`, or `x_mask.png`. Images are PNG, JPEG, TIFF (8 or 16 bits)
or GIF, grey or in colours; masks are PNG, TIFF or GIF, grey, with a palette, or in colours.

What stands in the masks is `config.data.labels`; where it is not given, `settle` looks at all masks, and says what it
takes it for.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.data import images, labels
from unet_jax.data.source import Source
from unet_jax.errors import UserError, check_choice

SPLITS = ("train", "validation", "test", "all")
HELP = (
    "Put images into images/ and their masks, by the same names, into masks/, or name the folders: "
    "--config.data.images=\"('photos',)\" --config.data.masks=\"('labels',)\". configs/shapes.py needs no data."
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of one example."""

    id: str
    image: epath.Path
    mask: epath.Path


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation`, `test` (by lists only) or `all`.

    Raises:
      UserError: no images under `config.root`; a label map, list or group without meaning; an empty split.
    """
    check_choice("--split", split, SPLITS)
    task = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    if not config.labels or not config.channels:
        raise UserError("config.data.labels and config.data.channels are not settled")
    label_map = labels.parse(config.labels)
    pairs, faults = find(config)
    chosen = split_pairs(pairs, config, split)
    if not chosen:
        raise UserError(
            f"config.data.root = {config.root!r}: {len(pairs)} pairs leave none for {split}. Add images or groups, or "
            f"change config.data.validation = {config.validation}"
        )

    def read(index):
        pair = chosen[index]
        image = images.read_image(pair.image, config.channels, config.value_range)
        mask = images.read_any(pair.mask, indices=not label_map.colored)
        check_sizes(image, mask, pair)
        return image, label_map.apply(mask, str(pair.mask))

    return Source(label_map.classes(task, config.channels), [pair.id for pair in chosen], read, tuple(faults))


def check_sizes(image: np.ndarray, mask: np.ndarray, pair: Pair) -> None:
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
    if config.labels:
        labels.parse(config.labels)
    if config.labels and config.channels and config.value_range:
        return
    pairs, _ = find(config)
    if not config.labels:
        config.labels = _guess_labels(pairs, say)
    if not config.channels or not config.value_range:
        grey, histogram = _look_at([pair.image for pair in pairs])
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


def _guess_labels(pairs: Sequence[Pair], say: Callable[[str], None]) -> tuple[str, ...]:
    def look(pair):
        try:
            mask = images.read_any(pair.mask, indices=True)
            return labels.values(mask), mask.ndim == 3, _palette(pair.mask, mask)
        except UserError:  # named where the example is read
            return None

    seen = [found for found in each(look, pairs, "Reading masks") if found]
    if not seen:
        raise UserError("none of the masks can be read: see --mode=check")
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
    return {int(i): tuple(colors[i]) for i in np.unique(mask)} if colors is not None else {}


def _look_at(files: Sequence[epath.Path]) -> tuple[list[bool], np.ndarray]:
    """Which of the readable images are grey, and the counts of all values of the 16-bit ones, int64 `[65536]`."""

    def look(file):
        try:
            kind = images.kind(file)
            deep = images.read_any(file) if kind.deep else None
        except UserError:
            return None
        return kind.grey, None if deep is None else np.bincount(deep.ravel(), minlength=65536)

    seen = [found for found in each(look, files, "Looking at images") if found]
    if not seen:
        raise UserError("none of the images can be read: see --mode=check")
    counts = [count for _, count in seen if count is not None]
    return [grey for grey, _ in seen], sum(counts, np.zeros(65536, np.int64))


def each(function: Callable, items: Iterable, title: str) -> list[Any]:
    """The results of `function` on all items, in order, computed in parallel below a progress bar."""
    import tqdm

    items = list(items)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm.tqdm(pool.map(function, items), title, len(items), leave=False, delay=1))


def find(config) -> tuple[list[Pair], list[str]]:
    """All pairs below `config.root` in the order of their names, and what is wrong with the other files.

    Raises:
      UserError: there are none.
    """
    root = epath.Path(config.root)
    if not config.root or not root.is_dir():
        raise UserError(f"config.data.root = {config.root!r} is not a folder. {HELP}")
    if len(config.images) != len(config.masks) or not config.images:
        raise UserError(
            f"config.data.images = {config.images} and config.data.masks = {config.masks} must name as many folders"
        )
    pairs, faults = [], []
    for image_folder, mask_folder in zip(config.images, config.masks, strict=True):
        folders = root / image_folder, root / mask_folder
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing and not config.lists:  # lists name every example themselves
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
            raise UserError(f"{missing[0]} is not a folder; folders in {root}: {there}. {HELP}")
        if missing:
            continue
        image_files, mask_files = (_files(folder, faults) for folder in folders)
        suffix = config.mask_suffix
        mask_of = {
            stem: mask_files.get(stem + suffix) if stem + suffix in mask_files else mask_files.get(stem)
            for stem in image_files
        }
        used = {mask for mask in mask_of.values() if mask}
        faults += [
            f"{image_files[stem]}: no mask of that name in {folders[1]}" for stem in mask_of if not mask_of[stem]
        ]
        faults += [f"{m}: no image of that name in {folders[0]}" for m in mask_files.values() if m not in used]
        prefix = f"{image_folder}/" if len(config.images) > 1 else ""
        for stem in sorted(stem for stem in mask_of if mask_of[stem]):
            if mask_of[stem].suffix.lower() in (".jpg", ".jpeg"):
                faults.append(
                    f"{mask_of[stem]}: a JPEG mask: compression smears labels. Save it as PNG, without smoothing"
                )
            else:
                pairs.append(Pair(prefix + stem, image_files[stem], mask_of[stem]))
    if not pairs:
        shown = "".join(f"\n  {fault}" for fault in faults[:10])
        raise UserError(f"config.data.root = {config.root!r} holds no image with a mask. {HELP}{shown}")
    return pairs, faults


def _files(folder: epath.Path, faults: list[str]) -> dict[str, epath.Path]:
    """Name relative to `folder`, without suffix -> file, of all images below it; a name met twice is a fault."""
    found = {}
    for path, folders, names in folder.walk():
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            file = path / name
            if name.startswith(".") or file.suffix.lower() not in images.SUFFIXES:
                continue
            stem = str(file.relative_to(folder).with_suffix(""))
            if stem in found:
                faults.append(f"{file}: {found[stem].name} has the same name; remove or rename one of them")
            else:
                found[stem] = file
    return found


def split_pairs(pairs: Sequence[Pair], config, split: str) -> list[Pair]:
    """The pairs of `split`.

    With `config.lists`, those that its file names. Else a share `config.validation` of the groups is held out, drawn
    by a hash of their names, so that added images move few others. A group is what `config.group`, a regular
    expression, finds in the name (its first bracket, or all of it); without, every image is one.

    Raises:
      UserError: a list that is missing, or names what is not there; a name without group; no `test` without lists.
    """
    if config.lists:
        return _listed(pairs, config, split)
    if split == "all":
        return list(pairs)
    if split == "test":
        raise UserError("there is a test split only where config.data.lists names three files; try --split=validation")
    groups = {pair.id: _group(pair.id, config.group) for pair in pairs}
    drawn = sorted(set(groups.values()), key=lambda group: hashlib.sha256(group.encode()).digest())
    held_out = set(drawn[: max(1, round(config.validation * len(drawn)))]) if len(drawn) > 1 else set()
    return [pair for pair in pairs if (groups[pair.id] in held_out) == (split == "validation")]


def _group(name: str, pattern: str) -> str:
    if not pattern:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"config.data.group = {pattern!r} is no regular expression: {error}") from error
    if match is None:
        raise UserError(f"config.data.group = {pattern!r} finds nothing in the name {name!r}")
    return match[1] if match.re.groups else match[0]


def _listed(pairs: Sequence[Pair], config, split: str) -> list[Pair]:
    """The pairs named by a list file, one a line: a name or a path, of which the longest known end counts."""
    if not 2 <= len(config.lists) <= 3:
        raise UserError(f"config.data.lists = {config.lists} must name files for training, validation and maybe test")
    files = dict(zip(("train", "validation", "test"), config.lists, strict=False))
    if split == "all":
        there = [part for part in files if (epath.Path(config.root) / files[part]).exists()]
        chosen = {pair.id: pair for part in there for pair in _listed(pairs, config, part)}
        return list(chosen.values())
    if split not in files:
        raise UserError("config.data.lists names no file for test: give three of them, or try --split=validation")
    by_end = collections.defaultdict(list)
    for pair in pairs:
        parts = pair.image.with_suffix("").parts
        for length in range(1, len(parts)):
            by_end["/".join(parts[-length:])].append(pair)
    file = epath.Path(config.root) / files[split]
    if not file.exists():
        raise UserError(f"config.data.lists: there is no {file}")
    chosen = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        parts = epath.Path(line.split()[0]).with_suffix("").parts
        ends = ("/".join(parts[-length:]) for length in range(len(parts), 0, -1))
        found = next((by_end[end] for end in ends if end in by_end), [])
        if len(found) != 1:
            raise UserError(f"{file}, line {number}: {line.split()[0]!r} is {len(found) or 'none'} of the pairs found")
        chosen[found[0].id] = found[0]
    return list(chosen.values())
