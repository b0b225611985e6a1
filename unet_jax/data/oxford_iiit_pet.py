"""Oxford-IIIT Pet: cats and dogs with trimaps, prepared by the builder of TFDS.

Variants: `trimap` (pet, background, border) and `binary` (pet or background; the border is ignored). `config.data.root`
may name the folder of the two archives, or of their content (`images/`, `annotations/`); if empty, TFDS downloads them.

Splits: `test` is the official one; `validation` is the end of the official trainval, `train` the rest of it.
"""

import contextlib
import dataclasses
import hashlib
import io
import socket

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as tfds_pets

from unet_jax.data import pairing, reading
from unet_jax.data.images import Pair
from unet_jax.data.prepare import prepare, prepared_files
from unet_jax.data.source import Classes, Source, check_label
from unet_jax.errors import UserError, check_choice

SERVER = "thor.robots.ox.ac.uk"
ARCHIVES = ("images.tar.gz", "annotations.tar.gz")
SPLITS = ("train", "validation", "test", "all")


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation`, `test` or `all`.

    Raises:
      UserError: neither data nor network (says where to put the archives); a missing or faulty file.
    """
    meaning = classes(config)
    check_choice("--split", split, SPLITS)
    builder = _prepare(config.root)
    cut = round(100 * (1 - config.validation))
    tfds_splits = {"train": f"train[:{cut}%]", "validation": f"train[{cut}%:]", "test": "test", "all": "all"}
    if split == "test" and "test" not in builder.info.splits:
        raise UserError(f"config.data.root = {config.root!r} has no annotations/test.txt, so no test split")
    data = builder.as_data_source(split=tfds_splits[split])
    if not len(data):
        raise UserError(f"config.data.validation = {config.validation} leaves no images for {split}")
    # The class of each value in a trimap: 1 is the pet, 2 the background, 3 the border.
    classes_of = np.array([255, 0, 1, 2] if meaning.task == "multiclass" else [255, 1, 0, 255], np.uint8)

    def read(index):
        example = data[index]
        trimap = example["segmentation_mask"][..., 0]
        check_label(trimap.astype(np.int16) - 1, 3, f"trimap of {example['file_name'].decode()}, minus 1")
        return example["image"], classes_of[trimap]

    skip = tfds.decode.SkipDecoding()
    encoded = builder.as_data_source(split=tfds_splits[split], decoders={"image": skip, "segmentation_mask": skip})

    def read_size(index):
        with Image.open(io.BytesIO(encoded[index]["image"])) as image:
            return image.height, image.width

    ids = [f"{split}_{i:05d}" for i in range(len(data))]
    return Source(meaning, ids, read, files=prepared_files(builder), read_size=read_size)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.variant`."""
    if check_choice("config.data.variant", config.variant, ("trimap", "binary")) == "trimap":
        return Classes("multiclass", ("pet", "background", "border"), ((230, 90, 40), (40, 60, 110), (250, 220, 60)))
    return Classes("binary", ("background", "pet"), ((40, 60, 110), (230, 90, 40)))


@dataclasses.dataclass(eq=False, repr=False)
class FolderConfig(tfds.core.BuilderConfig):
    """The file in the folder `annotations` that lists the examples of each split."""

    lists: dict[str, epath.Path] = dataclasses.field(default_factory=dict)


class PetFolder(tfds_pets.Builder):
    """The examples of the TFDS builder, from an unpacked folder."""

    name = "oxford_iiit_pet_folder"
    pkg_dir_path = tfds_pets.Builder.pkg_dir_path

    def _split_generators(self, dl_manager):
        lists = self.builder_config.lists
        return {n: self._generate_examples(f.parent.parent / "images", f.parent, f) for n, f in lists.items()}


def _prepare(root: str):
    """The TFDS builder of the pets, prepared."""
    folder = epath.Path(root) if root else None
    if folder and not folder.is_dir():
        raise UserError(f"config.data.root = {root!r} is not a folder")
    if folder and (folder / "images").is_dir():
        return _prepare_folder(folder)
    if folder and not all((folder / name).exists() for name in ARCHIVES):
        raise UserError(
            f"config.data.root = {root!r} holds neither {' and '.join(ARCHIVES)} nor images/ and annotations/. If "
            "config.data.root is empty, the pets are downloaded; configs/shapes.py needs no data."
        )
    builder = tfds.builder("oxford_iiit_pet", file_format="array_record")
    if not builder.data_path.exists():
        manual = epath.Path(tfds.core.constants.DATA_DIR) / "downloads" / "manual"
        found = folder or (manual if all((manual / name).exists() for name in ARCHIVES) else None)
        if found is None and not _reachable():
            raise UserError(
                f"Oxford-IIIT Pet has not been downloaded, and {SERVER} cannot be reached. Put "
                f"{' and '.join(ARCHIVES)} (from https://www.robots.ox.ac.uk/~vgg/data/pets/) into {manual}, or name "
                "the folder they are in: --config.data.root=DIR. configs/shapes.py needs no data."
            )
        prepare(builder, found)
    return builder


def _reachable() -> bool:
    with contextlib.suppress(OSError), socket.create_connection((SERVER, 443), timeout=5):
        return True
    return False


def _prepare_folder(folder: epath.Path):
    """The same examples from an unpacked folder, with those of its two lists that exist; prepared."""
    lists = {"train": folder / "annotations/trainval.txt", "test": folder / "annotations/test.txt"}
    lists = {name: path for name, path in lists.items() if path.exists()}
    if "train" not in lists:
        raise UserError(f"{folder}: annotations/trainval.txt is missing")
    stems = {name: _read_list(path) for name, path in lists.items()}
    both = dict.fromkeys(stem for names in stems.values() for stem in names)
    pairs = [Pair(s, folder / f"images/{s}.jpg", folder / f"annotations/trimaps/{s}.png") for s in both]
    digest = hashlib.sha256(f"{folder.resolve()} {stems}".encode("utf-8", "surrogateescape"))
    for file in (file for pair in pairs for file in (pair.image, pair.mask)):
        if not file.exists():
            raise UserError(f"{folder}/annotations names {file.stem!r}, but there is no {file}")
        digest.update(f"{file.stat().length} {file.stat().mtime}".encode())
    config = FolderConfig(name=digest.hexdigest()[:16], version=PetFolder.VERSION, lists=lists)
    builder = PetFolder(config=config, file_format="array_record")
    if not builder.data_path.exists():
        for pair in pairs:  # the TFDS builder copies the files without decoding them
            image, trimap = reading.read(pair.image, "RGB"), reading.read(pair.mask, "L")
            pairing.check_same_size(image, trimap, pair)
            check_label(trimap.astype(np.int16) - 1, 3, f"{pair.mask}, minus 1")
    return prepare(builder)


def _read_list(path: epath.Path) -> list[str]:
    """The names in a list of the data set, one `NAME CLASS SPECIES BREED` per line."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        _, *numbers = line.split(" ")
        if len(numbers) != 3 or not all(field.isdigit() for field in numbers):
            raise UserError(f"{path}, line {number}: {line!r} is not NAME CLASS SPECIES BREED")
    return [line.split(" ")[0] for line in lines]
