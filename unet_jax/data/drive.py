"""DRIVE: vessels in photographs of the retina, many of them one pixel wide.

Pixels outside of the field of view do not count. `config.data.root` holds `training/` as published (or is that folder),
with `images/NN_training.tif`, `1st_manual/NN_manual1.gif` and `mask/NN_training_mask.gif`, and maybe `test/` likewise.
"""

import re

import numpy as np
from etils import epath

from unet_jax.data import images, pairing, reading
from unet_jax.data.source import Classes, Source, bullets
from unet_jax.errors import UserError, check_choice

FOLDERS = {"images": "image", "1st_manual": "drawing of the vessels", "mask": "mask of the field of view"}
HELP = "It must hold training/images, training/1st_manual and training/mask, as published at drive.grand-challenge.org"


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation`, `test` or `all`, which is all but `test`.

    Raises:
      UserError: no images under `config.root`; an image without drawing or field of view; a missing or invalid list; an
        empty split.
    """
    check_choice("--split", split, pairing.SPLITS)
    root = epath.Path(config.root)
    part = "test" if split == "test" else "training"
    folder = root / part if (root / part).is_dir() or part == "test" else root
    missing = [folder / name for name in FOLDERS if not (folder / name).is_dir()]
    if not config.root or missing:
        absent = missing[0] if config.root else "it"
        raise UserError(f"config.data.root = {config.root!r}: {absent} is not a folder. {HELP}")
    files = {name: _files_by_number(folder / name) for name in FOLDERS}
    faults, pairs = [], []
    for number, file in sorted(files["images"].items()):
        absent = [kind for name, kind in FOLDERS.items() if number not in files[name]]
        if absent:
            faults.append(f"{file}: no {absent[0]} of that number")
        else:
            pairs.append(images.Pair(number, file, files["1st_manual"][number]))
    chosen = pairs if split == "test" else pairing.choose_split(pairs, config, split, faults)
    if not chosen:
        raise UserError(
            f"config.data.root = {config.root!r}: {len(pairs)} images leave none for {split}{bullets(faults)}"
        )
    fields = [files["mask"][pair.id] for pair in chosen]

    def read(index):
        pair, meaning = chosen[index], classes(config)
        image = reading.read(pair.image, "RGB")
        vessels, field = reading.read(pair.mask, "L"), reading.read(fields[index], "L")
        for mask, file in ((vessels, pair.mask), (field, fields[index])):
            pairing.check_same_size(image, mask, pair._replace(mask=file))
        return image, np.where(field > 127, vessels > 127, meaning.ignore_label).astype(np.uint8)

    read_size = lambda index: reading.read_header(chosen[index].image).size
    everything = tuple(file for pair, field in zip(chosen, fields, strict=True) for file in (*pair[1:], field))
    return Source(classes(config), [pair.id for pair in chosen], read, tuple(faults), everything, read_size=read_size)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.variant`."""
    task = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    return Classes(task, ("background", "vessel"), ((20, 20, 20), (230, 60, 60)), channels=3)


def _files_by_number(folder: epath.Path) -> dict[str, epath.Path]:
    """Number of the photograph, as `21` -> file."""
    found = {file: re.match(r"\d+(?=_)", file.name) for file in images.files_below(folder)}
    return {match[0]: file for file, match in found.items() if match}
