"""Images and masks in folders: which belong together, and which are for training, validation and test."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Collection, Sequence

from etils import epath
from PIL import Image

from unet_jax.data import images
from unet_jax.errors import UserError

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
        if image_folder == mask_folder and suffix:  # x.png and x_mask.png side by side
            mask_files = {stem: file for stem, file in mask_files.items() if stem.endswith(suffix)}
            image_files = {stem: file for stem, file in image_files.items() if not stem.endswith(suffix)}
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
    return pairs, list(dict.fromkeys(faults))


def _files(folder: epath.Path, faults: list[str]) -> dict[str, epath.Path]:
    """Name relative to `folder`, without suffix -> file, of all images below it; others are faults."""
    found = {}
    for file in images.files_below(folder):
        suffix = file.suffix.lower()
        stem = str(file.relative_to(folder).with_suffix(""))
        if suffix not in images.SUFFIXES:
            if suffix in Image.registered_extensions():
                faults.append(f"{file}: {suffix} files are not read; save it as PNG")
        elif stem in found:
            faults.append(f"{file}: {found[stem].name} has the same name; remove or rename one of them")
        else:
            found[stem] = file
    return found


def split(pairs: Sequence[Pair], config, part: str, faults: list[str]) -> list[Pair]:
    """The pairs of one split, `part`.

    With `config.lists`, those that its file names. Else a share `config.validation` of the groups is held out, drawn
    by a hash of their names, so that added images move few others. A group is what `config.group`, a regular
    expression, finds in the name (its first bracket, or all of it); without, every image is one.

    Args:
      pairs: of `find`.
      config: `config.data`.
      part: `train`, `validation`, `test` (by lists only) or `all`.
      faults: gets the lines of a list that name no pair.

    Raises:
      UserError: a list that is missing; a name without group; no `test` without lists.
    """
    if config.lists:
        return _listed(pairs, config, part, faults)
    if part == "all":
        return list(pairs)
    if part == "test":
        raise UserError("there is a test split only where config.data.lists names three files; try --split=validation")
    groups = {pair.id: _group(pair.id, config.group) for pair in pairs}
    drawn = sorted(set(groups.values()), key=lambda group: hashlib.sha256(group.encode()).digest())
    held_out = set(drawn[: max(1, round(config.validation * len(drawn)))]) if len(drawn) > 1 else set()
    return [pair for pair in pairs if (groups[pair.id] in held_out) == (part == "validation")]


def _group(name: str, pattern: str) -> str:
    if not pattern:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"config.data.group = {pattern!r} is no regular expression: {error}") from error
    if match is None or (match.re.groups and match[1] is None):
        raise UserError(f"config.data.group = {pattern!r} finds nothing in the name {name!r}")
    return match[1] if match.re.groups else match[0]


def _listed(pairs: Sequence[Pair], config, part: str, faults: list[str]) -> list[Pair]:
    """The pairs named by a list file, one a line: a name or a path, of which the longest known end counts."""
    if not 2 <= len(config.lists) <= 3:
        raise UserError(f"config.data.lists = {config.lists} must name files for training, validation and maybe test")
    files = {name: epath.Path(config.root) / file for name, file in zip(SPLITS, config.lists, strict=False)}
    if part == "all":
        there = [name for name in files if files[name].exists()]
        chosen = {pair.id: pair for name in there for pair in _listed(pairs, config, name, faults)}
        return list(chosen.values())
    if part not in files:
        raise UserError("config.data.lists names no file for test: give three of them, or try --split=validation")
    try:
        lines = files[part].read_bytes().decode("utf-8-sig").replace("\\", "/").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.lists: {files[part]} cannot be read as text ({error})") from error
    stops = {epath.Path(folder).name for folder in config.images}
    by_end = collections.defaultdict(list)
    for pair in pairs:
        for end in _ends(str(pair.image)):
            by_end[end].append(pair)
    chosen = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # Of two paths the second is the mask; but a name may hold spaces.
        ends = [_ends(line.strip(), stops)[0], *_ends(line.split()[0], stops), *_ends(line.strip(), stops)]
        found = next((by_end[end] for end in ends if end in by_end), [])
        if len(found) == 1:
            chosen[found[0].id] = found[0]
        else:
            several = f"{len(found)} pairs have that name" if found else "no image with a mask has that name"
            faults.append(f"{files[part]}, line {number}: {line.strip()!r}: {several}")
    return list(chosen.values())


def _ends(path: str, stops: Collection[str] = ()) -> list[str]:
    """A path without the suffix of an image, then less and less of its first folders, down to one of `stops`."""
    parts = path.strip("/").split("/")
    stem, _, suffix = parts[-1].rpartition(".")
    parts[-1] = stem if f".{suffix.lower()}" in images.SUFFIXES else parts[-1]
    last = next((i for i, part in enumerate(parts[:-1]) if part in stops), len(parts) - 1)
    return ["/".join(parts[i:]) for i in range(last + 1)]
