"""CARLA street scenes: `CameraRGB/X.png` with `CameraMask/X.png` or `CameraSeg/X.png`, the class id in the red channel.

These folders are in `config.data.root`, or up to two levels below it (`dataA` .. `dataE`, `Train`). The root is a
folder, or the zip as published. A `sequences.csv` (columns frame, sequence) at the root names the drive of each frame.

TFDS prepares the frames once, in its data folder ($TFDS_DATA_DIR, else ~/tensorflow_datasets), under a fingerprint of
the files: if they change, they are prepared again.
"""

import csv
import dataclasses
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from unet_jax.data import pairing, reading
from unet_jax.data.images import Pair
from unet_jax.data.prepare import prepare, prepared_files
from unet_jax.data.source import Classes, Source, bullets, check_label
from unet_jax.errors import UserError, check_choice

# fmt: off
NAMES = ("unlabeled", "building", "fence", "other", "pedestrian", "pole", "road line", "road", "sidewalk",
         "vegetation", "vehicle", "wall", "traffic sign", "sky", "ground", "bridge", "rail track", "guard rail",
         "traffic light", "static", "dynamic", "water", "terrain")
PALETTE = ((0, 0, 0), (70, 70, 70), (100, 40, 40), (55, 90, 80), (220, 20, 60), (153, 153, 153), (157, 234, 50),
           (128, 64, 128), (244, 35, 232), (107, 142, 35), (0, 0, 142), (102, 102, 156), (220, 220, 0),
           (70, 130, 180), (81, 0, 81), (150, 100, 100), (230, 150, 140), (180, 165, 180), (250, 170, 30),
           (110, 190, 160), (170, 120, 50), (45, 60, 150), (145, 170, 100))
# fmt: on
NUM_CLASSES = {"carla23": 23, "lyft13": 13}  # the Lyft challenge uses the first 13
SPLITS = ("train", "validation", "all")
HELP = (
    "Put the CARLA frames there as CameraRGB/X.png and CameraMask/X.png (or CameraSeg/X.png), or give their zip: "
    "--config.data.root=PATH. configs/shapes.py needs no data."
)


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation` or `all`.

    Raises:
      UserError: no frames under `config.root`, or none for `split`; an image without mask or a mask without image; a
        frame without a drive, if drives are named; an unreadable file; different sizes; a label that is not a class.
    """
    meaning = classes(config)
    check_choice("--split", split, SPLITS)
    splits = split_pairs(find_pairs(config.root), read_sequences(config.root), config.validation)
    pairs = splits["train"] + splits["validation"] if split == "all" else splits[split]
    if not pairs:
        raise UserError(
            f"config.data.validation = {config.validation} of {len(splits['train'] + splits['validation'])} frames "
            f"leaves none for {split}: add frames or drives, or change config.data.validation"
        )
    builder = _prepare({name: frames for name, frames in splits.items() if frames}, len(meaning.names))
    data = builder.as_data_source(split=split)
    assert len(data) == len(pairs), f"{len(data)} frames prepared, {len(pairs)} found"

    def read(index):
        example = data[index]
        return example["image"], example["label"][..., 0]

    def read_size(index):
        return reading.read_header(pairs[index].image).size

    return Source(meaning, [pair.id for pair in pairs], read, files=prepared_files(builder), read_size=read_size)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.variant`."""
    count = NUM_CLASSES[check_choice("config.data.variant", config.variant, NUM_CLASSES)]
    return Classes("multiclass", NAMES[:count], PALETTE[:count])


def _open_root(root: str):
    """A path object for the folder, or for the content of the zip archive."""
    path = epath.Path(root)
    if not root or not path.exists():
        raise UserError(f"config.data.root = {root!r} does not exist. {HELP}")
    if path.is_dir():
        return path
    try:
        return zipfile.Path(io.BytesIO(path.read_bytes()) if "://" in root else root)
    except zipfile.BadZipFile as error:
        raise UserError(f"config.data.root = {root!r} is neither a folder nor a zip archive ({error})") from error


def find_pairs(root: str) -> list[Pair]:
    """All frames below `root`, ordered by folder and frame number; the id of a frame is its folder and stem."""
    opened = _open_root(root)
    pairs, unpaired = [], []
    for folder in _camera_folders(opened, depth=2):
        masks = next((d for d in (folder / "CameraMask", folder / "CameraSeg") if d.is_dir()), None)
        image_files = _png_files(folder / "CameraRGB")
        mask_files = _png_files(masks) if masks else {}
        unpaired += [f"image without mask: {image_files[s]}" for s in image_files.keys() - mask_files.keys()]
        unpaired += [f"mask without image: {mask_files[s]}" for s in mask_files.keys() - image_files.keys()]
        both = sorted(image_files.keys() & mask_files.keys(), key=_frame_number)
        inside = folder.at.strip("/") if isinstance(folder, zipfile.Path) else str(folder.relative_to(opened))
        prefix = "" if inside in ("", ".") else f"{inside}/"
        pairs += [Pair(prefix + stem, image_files[stem], mask_files[stem]) for stem in both]
    if unpaired:
        faults = bullets(sorted(unpaired))
        raise UserError(f"config.data.root = {root!r}: every image needs a mask of the same name.{faults}")
    if not pairs:
        raise UserError(f"config.data.root = {root!r} holds no CameraRGB folder with .png files. {HELP}")
    return pairs


def _camera_folders(path, depth: int) -> Iterator:
    """Folders that hold `CameraRGB`, down to `depth` levels below `path`, in order."""
    if (path / "CameraRGB").is_dir():
        yield path
    elif depth:
        for child in sorted(path.iterdir(), key=lambda p: p.name):
            if child.is_dir() and not child.name.startswith((".", "__MACOSX")):
                yield from _camera_folders(child, depth - 1)


def _png_files(folder) -> dict:
    """Stem -> file, without the hidden files that macOS leaves behind."""
    found = {}
    for file in folder.iterdir():
        if file.suffix.lower() == ".png" and not file.name.startswith("."):
            if file.stem in found:
                raise UserError(f"{file}: {found[file.stem].name} has the same name; remove or rename one of them")
            found[file.stem] = file
    return found


def _frame_number(stem: str) -> tuple[str, int]:
    """A sort key that puts `scene_9` before `scene_10`."""
    prefix, digits = re.fullmatch(r"(.*?)(\d*)", stem, re.DOTALL).groups()
    return prefix, int(digits or 0)


def read_sequences(root: str) -> dict[str, str] | None:
    """Frame id -> drive, from the columns of `sequences.csv`; None if there is no such file."""
    path = _open_root(root) / "sequences.csv"
    if not path.is_file():
        return None
    frames = list(csv.DictReader(io.StringIO(path.read_bytes().decode(errors="surrogateescape"))))
    if not frames or not {"frame", "sequence"} <= frames[0].keys():
        raise UserError(f"{path}: needs the columns frame and sequence")
    return {frame["frame"].removesuffix(".png"): frame["sequence"] for frame in frames}


def split_pairs(pairs: list[Pair], drives: dict[str, str] | None, fraction: float) -> dict[str, list[Pair]]:
    """Splits frames into `train` and `validation` so that no drive is in both.

    With drives, every (1 / fraction)-th drive in the order of recording is held out, so that the held-out drives are
    spread over all places; without drives, the last frames are held out, as one contiguous block.
    """
    if drives is None:
        count = round(fraction * len(pairs))
        chosen = {pair.id for pair in pairs[len(pairs) - count :]}
    else:
        missing = [pair.id for pair in pairs if pair.id not in drives]
        if missing:
            raise UserError(f"sequences.csv names no drive for {len(missing)} frames, the first is {missing[0]!r}")
        in_order = list(dict.fromkeys(drives[pair.id] for pair in pairs))
        # 1e-9 keeps rounding from making 0.2 * 5 less than 1.
        held_out = {d for i, d in enumerate(in_order) if int((i + 1) * fraction + 1e-9) > int(i * fraction + 1e-9)}
        chosen = {pair.id for pair in pairs if drives[pair.id] in held_out}
    train = [pair for pair in pairs if pair.id not in chosen]
    return {"train": train, "validation": [pair for pair in pairs if pair.id in chosen]}


@dataclasses.dataclass(eq=False, repr=False)
class CarlaConfig(tfds.core.BuilderConfig):
    """The frames of each split."""

    splits: dict[str, list[Pair]] = dataclasses.field(default_factory=dict)
    num_classes: int = 23


class Carla(tfds.core.GeneratorBasedBuilder):
    """RGB images with the class ids of their pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image, label = (tfds.features.Image(shape=(None, None, channels)) for channels in (3, 1))
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(pairs) for name, pairs in self.builder_config.splits.items()}

    def _generate_examples(self, pairs):
        for index, pair in enumerate(pairs):
            image, label = reading.read(pair.image, "RGB"), reading.read(pair.mask, "red")
            pairing.check_same_size(image, label, pair)
            check_label(label, self.builder_config.num_classes, str(pair.mask))
            yield index, {"image": _encode(image), "label": _encode(label)}


def _encode(array: np.ndarray) -> bytes:
    """A PNG with little compression: at the level that TFDS uses, compressing takes longer than everything else."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _prepare(splits: dict[str, list[Pair]], num_classes: int) -> Carla:
    """Writes the frames as a TFDS data set, unless they are already written."""
    # A fingerprint of names, sizes and times is enough, and quick: the files are only read if it is new.
    digest = hashlib.sha256(f"{num_classes}".encode())
    for name, pairs in splits.items():
        for pair in pairs:
            line = f"{name} {pair.id} {_fingerprint(pair.image)} {_fingerprint(pair.mask)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    config = CarlaConfig(name=digest.hexdigest()[:16], version=Carla.VERSION, splits=splits, num_classes=num_classes)
    return prepare(Carla(config=config, file_format="array_record"))


def _fingerprint(path) -> str:
    """Path, size and modification time of a file; in a zip archive, path and checksum."""
    if isinstance(path, zipfile.Path):
        return f"{path} {path.root.getinfo(path.at).CRC}"
    stat = path.stat()
    return f"{path} {stat.length} {stat.mtime}"
