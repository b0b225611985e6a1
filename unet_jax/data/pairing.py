"""Pairs of images and masks in folders, and which of them are for training, validation and test."""

import codecs
import collections
import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Sequence

import numpy as np
from etils import epath

from unet_jax import paths
from unet_jax.data import images, reading
from unet_jax.data.images import Pair
from unet_jax.data.source import bullets
from unet_jax.errors import UserError

SPLITS = ("train", "validation", "test", "all")
HELP = (
    "Put images into images/ and their masks, with the same names, into masks/, or name the folders: "
    "--config.data.images=\"('photos',)\" --config.data.masks=\"('labels',)\". configs/shapes.py needs no data."
)


def find(config) -> tuple[list[Pair], list[str]]:
    """All pairs in the folders of `config.data`, in order, and the faults of the other files.

    The id of a pair is the path of its image, without suffix, below the one folder of `config.images`. Of several, the
    folder comes first, as it is written. If one of several is absolute or has `..` in it, the ids are paths below the
    root; if one lies outside of the root, below the deepest folder that holds them all.
    """
    root = epath.Path(config.root)
    if not config.root or not root.is_dir():
        raise UserError(f"config.data.root = {config.root!r} is not a folder. {HELP}")
    if len(config.images) != len(config.masks) or not config.images:
        named = f"config.data.images = {config.images} and config.data.masks = {config.masks}"
        raise UserError(f"{named} must name the same number of folders")
    pairs, faults, known = [], [], set()
    prefixes = _prefixes(root, config.images)
    for image_folder, mask_folder, prefix in zip(config.images, config.masks, prefixes, strict=True):
        folders = root / image_folder, root / mask_folder
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing and not config.lists:  # the lists complain about any example that is missing
            existing = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
            raise UserError(f"{missing[0]} is not a folder; folders in {root}: {existing}. {HELP}")
        if missing:
            continue
        image_files, mask_files = (_files_by_name(folder, faults) for folder in folders)
        suffix = config.mask_suffix
        if image_folder == mask_folder and suffix:  # x.png and x_mask.png side by side
            mask_files = {name: file for name, file in mask_files.items() if name.endswith(suffix)}
            image_files = {name: file for name, file in image_files.items() if not name.endswith(suffix)}
        mask_of = {name: mask_files.get(name + suffix) or mask_files.get(name) for name in image_files}
        used = set(mask_of.values())
        spare = {_composed(name): file for name, file in mask_files.items() if file not in used}
        for name in (name for name, mask in mask_of.items() if not mask):
            mask_of[name] = spare.get(_composed(name + suffix)) or spare.get(_composed(name))
        used = set(mask_of.values())
        faults += _other_suffix(image_files.keys(), [name for name, mask in mask_files.items() if mask not in used])
        faults += [f"{image_files[n]}: no mask of that name in {folders[1]}" for n, mask in mask_of.items() if not mask]
        faults += [f"{mask}: no image of that name in {folders[0]}" for mask in mask_files.values() if mask not in used]
        for name, mask in sorted((name, mask) for name, mask in mask_of.items() if mask):
            image = image_files[name]
            place = os.path.normpath(os.fspath(image))
            if mask.suffix.lower() in reading.LOSSY:
                faults.append(
                    f"{mask}: a {mask.suffix} mask: compression may change labels. Save it as PNG, without smoothing"
                )
            elif place in known:
                faults.append(f"{image}: two of config.data.images = {config.images} hold it. Name each folder once")
            else:
                known.add(place)
                pairs.append(Pair(prefix + name, image, mask))
    if not pairs:
        raise UserError(f"config.data.root = {config.root!r} holds no image with a mask. {HELP}{bullets(faults)}")
    return pairs, list(dict.fromkeys(faults))


def _prefixes(root: epath.Path, folders: Sequence[str]) -> list[str]:
    """What stands before the name of an image in its id, for each of the image folders; see `find`."""
    if len(folders) == 1:
        return [""]
    if any(os.path.isabs(folder) or "://" in folder or ".." in folder.split("/") for folder in folders):
        folders = paths.names_below(root, [root / folder for folder in folders])
    return [f"{folder}/" for folder in folders]


def _files_by_name(folder: epath.Path, faults: list[str]) -> dict[str, epath.Path]:
    """Name relative to `folder`, without suffix -> file, for all images below it; adds the other files to `faults`."""
    files = {}
    for file in images.files_below(folder):
        suffix = file.suffix.lower()
        name = str(file.relative_to(folder).with_suffix(""))
        if suffix not in reading.SUFFIXES:
            if reading.is_other_format(file):
                faults.append(f"{file}: {suffix} files are not supported; save it as PNG or TIFF")
        elif name in files:
            faults.append(f"{file}: {files[name].name} has the same name; remove or rename one of them")
        else:
            files[name] = file
    return files


def _composed(name: str) -> str:
    """A name in one spelling of Unicode: macOS and some archives write a letter and its accent as two characters."""
    return unicodedata.normalize("NFC", name)


def _other_suffix(image_names: Collection[str], mask_names: Collection[str]) -> list[str]:
    """A fault, if most images have masks whose names are theirs with one more suffix."""
    ends = ((mask, mask[: len(mask) - k], mask[len(mask) - k :]) for mask in mask_names for k in range(1, len(mask)))
    suffixes = collections.Counter(end for mask, start, end in ends if start in image_names)
    for suffix, count in suffixes.most_common(1):
        if count > 1 and 2 * count > len(image_names):
            return [f"{count} masks have the name of their image and {suffix!r}: --config.data.mask_suffix={suffix}"]
    return []


def choose_split(pairs: Sequence[Pair], config, split: str, faults: list[str]) -> list[Pair]:
    """The pairs of one split.

    With `config.lists`, those that the list file of the split names. Otherwise a share `config.validation` of the
    groups is held out, chosen by a hash of their names, so that adding images moves few of the others. A group is what
    `config.group`, a regular expression, matches in the name (its first bracket, or all of it); without `config.group`,
    every image is a group of its own.

    Args:
      pairs: as returned by `find`.
      config: `config.data`.
      split: `train`, `validation`, `test` (only with lists) or `all`.
      faults: the lines of a list that name no pair are added to it.
    """
    if config.lists:
        return _read_split_list(pairs, config, split, faults)
    if split == "all":
        return list(pairs)
    if split == "test":
        raise UserError("there is a test split only if config.data.lists names three files; try --split=validation")
    groups = {pair.id: _group(pair.id, config.group) for pair in pairs}
    digest = lambda group: hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()
    shuffled = sorted(set(groups.values()), key=digest)
    held_out = set(shuffled[: max(1, round(config.validation * len(shuffled)))]) if len(shuffled) > 1 else set()
    return [pair for pair in pairs if (groups[pair.id] in held_out) == (split == "validation")]


def split_remedy(pairs: Sequence[Pair], config) -> str:
    """What helps if `choose_split` without lists leaves nothing for a split."""
    found = {_group(pair.id, config.group) for pair in pairs}
    if len(pairs) > 1 and len(found) == 1:
        return (
            f" config.data.group = {config.group!r} matches {found.pop()!r} in all of their names, so they are one "
            "group, which stays together: it must match what tells groups apart, as '(.*)_' does all up to the last "
            "underscore, and '([^/]*)/' the folder"
        )
    return f" Add images{' or groups' * bool(config.group)}, or change config.data.validation = {config.validation}"


def _group(name: str, pattern: str) -> str:
    """The group of an image, see `choose_split`."""
    if not pattern:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"config.data.group = {pattern!r} is not a regular expression: {error}") from error
    if match is None or (match.re.groups and match[1] is None):
        raise UserError(f"config.data.group = {pattern!r} matches nothing in the name {name!r}")
    return match[1] if match.re.groups else match[0]


def _read_split_list(pairs: Sequence[Pair], config, split: str, faults: list[str]) -> list[Pair]:
    """The pairs that a list file names, one per line: by a name, or by a path whose end is that of one image."""
    if not 2 <= len(config.lists) <= 3:
        raise UserError(
            f"config.data.lists = {config.lists} must name files for training, validation and optionally test"
        )
    files = {name: epath.Path(config.root) / file for name, file in zip(SPLITS, config.lists, strict=False)}
    if split == "all":
        existing = [name for name in files if files[name].exists()]
        chosen = {pair.id: pair for name in existing for pair in _read_split_list(pairs, config, name, faults)}
        # Other images than those of the training need no list.
        return list(chosen.values()) if existing else list(pairs)
    if split not in files:
        raise UserError("config.data.lists names no file for test: name three files, or try --split=validation")
    try:
        content = files[split].read_bytes()
    except OSError as error:
        raise UserError(f"config.data.lists: {files[split]} cannot be read ({error})") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"config.data.lists: {files[split]} cannot be read as text: it is UTF-16, save it as UTF-8")
    # As file names are decoded, so that any name can be listed but one with a line break or a space at its end.
    lines = re.split(r"\r\n|\r|\n", content.decode("utf-8-sig", "surrogateescape"))
    image_folders = {epath.Path(folder).name for folder in config.images}
    pairs_by_ending = collections.defaultdict(list)
    for pair in pairs:
        for ending in _endings(str(pair.image)):
            pairs_by_ending[ending].append(pair)
    pairs_by_composed = collections.defaultdict(list)
    for ending, found in pairs_by_ending.items():
        pairs_by_composed[_composed(ending)] += found
    chosen = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        # In a line of two paths the second is the mask; but a name may contain spaces, so first try the whole line. It
        # may also contain backslashes, which lists from Windows have between names.
        endings = []
        for path in (line, line.replace("\\", "/")):
            endings += [_endings(path)[0], *_endings(path.split()[0], image_folders), *_endings(path, image_folders)]
        matches = next((pairs_by_ending[ending] for ending in endings if ending in pairs_by_ending), [])
        composed = [ending for ending in map(_composed, endings) if ending in pairs_by_composed]
        matches = matches or next((pairs_by_composed[ending] for ending in composed), [])
        if len(matches) == 1:
            chosen[matches[0].id] = matches[0]
        else:
            problem = f"{len(matches)} pairs have that name" if matches else "no image with a mask has that name"
            faults.append(f"{files[split]}, line {number}: {line!r}: {problem}")
    return list(chosen.values())


def _endings(path: str, image_folders: Collection[str] = ()) -> list[str]:
    """A path without its image suffix, then with one folder fewer at the front each time, down to the name.

    If one of `image_folders` is in the path, it ends with that one: `train/9` must not match `val/9`.
    """
    parts = path.strip("/").split("/")
    stem, _, suffix = parts[-1].rpartition(".")
    parts[-1] = stem if f".{suffix.lower()}" in reading.SUFFIXES else parts[-1]
    last = next((i for i, part in enumerate(parts[:-1]) if part in image_folders), len(parts) - 1)
    return ["/".join(parts[i:]) for i in range(last + 1)]


def check_same_size(image: np.ndarray, mask: np.ndarray, pair: Pair, settings=None) -> None:
    """Raises a `UserError` that names both files if an image `[h, w, ...]` and its mask differ in size.

    `settings` are `config.data`, if `pages` and `orientation` count.
    """
    if image.shape[:2] == mask.shape[:2]:
        return
    orientation = reading.read_header(pair.image, settings.pages if settings else "").orientation
    hint = ""
    if orientation != 1 and settings:
        other = "as_stored" if settings.orientation == "upright" else "upright"
        hint = f" The EXIF data of the photo say it is rotated ({orientation}): try config.data.orientation={other!r}."
    raise UserError(
        f"{pair.image} is {image.shape[1]}x{image.shape[0]} pixels but its mask {pair.mask} is "
        f"{mask.shape[1]}x{mask.shape[0]} (width x height).{hint}"
    )
