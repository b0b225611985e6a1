"""ISBI 2012: slices of an electron-microscopy stack, membranes (0) and cells (255).

`config.data.root` holds the slices as PNG files, `train/image/K.png` and `train/label/K.png` (there or in `membrane/`),
or the stacks of the challenge, `train-volume.tif` and `train-labels.tif`. Neighbouring slices are nearly the same, so
the last slices are held out as one block. The labels of the challenge's own test slices are not public.

Variants: `multiclass`, two outputs and a softmax; `binary`, one sigmoid.
"""

import numpy as np
from etils import epath

from unet_jax.data import reading
from unet_jax.data.source import Classes, Source, shorten
from unet_jax.errors import UserError, check_choice

NAMES = ("membrane", "cell")
PALETTE = ((20, 20, 20), (240, 225, 170))
SPLITS = ("train", "validation", "all")
STACKS = ("train-volume.tif", "train-labels.tif")
HELP = (
    f"Put the slices there as train/image/K.png and train/label/K.png, or the stacks {' and '.join(STACKS)}. "
    "configs/shapes.py needs no data."
)
Slice = tuple[str, np.ndarray, np.ndarray]  # name, image uint8 [h, w, 1], label uint8 [h, w]


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation` or `all`.

    Raises:
      UserError: no slices under `config.root`; images without labels or labels without images; slices that are not
        8-bit grey; label values other than 0 and 255 (or 0 and 1).
    """
    meaning = classes(config)
    check_choice("--split", split, SPLITS)
    root = epath.Path(config.root)
    if not config.root or not root.is_dir():
        raise UserError(f"config.data.root = {config.root!r} is not a folder. {HELP}")
    folder = next((d for d in (root, root / "membrane") if (d / "train" / "image").is_dir()), None)
    if folder is not None:
        files, slices = _read_folders(folder / "train" / "image", folder / "train" / "label")
    elif all((root / name).exists() for name in STACKS):
        files = tuple(root / name for name in STACKS)
        slices = _read_stacks(*files)
    else:
        raise UserError(f"config.data.root = {config.root!r} holds no slices. {HELP}")

    held_out = round(config.validation * len(slices))
    if split != "all" and not 0 < held_out < len(slices):
        empty = "training" if held_out else "validation"
        raise UserError(f"config.data.validation = {config.validation} of {len(slices)} slices leaves none for {empty}")
    first = len(slices) - held_out
    chosen = {"train": slices[:first], "validation": slices[first:], "all": slices}[split]
    read, read_size = lambda index: chosen[index][1:], lambda index: chosen[index][1].shape[:2]
    return Source(meaning, [name for name, *_ in chosen], read, files=files, read_size=read_size)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.variant`."""
    task = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    return Classes(task, NAMES, PALETTE, channels=1)


def _read_folders(image_folder: epath.Path, label_folder: epath.Path) -> tuple[tuple[epath.Path, ...], list[Slice]]:
    """All files, and the slices in them, in numerical order."""
    image_files, label_files = map(_png_files, (image_folder, label_folder))
    unpaired = sorted(image_files.keys() ^ label_files.keys())
    if unpaired:
        file = (image_files | label_files)[unpaired[0]]
        raise UserError(
            f"{image_folder} has {len(image_files)} slices and {label_folder} {len(label_files)}: {file} has no partner"
        )
    if not image_files:
        raise UserError(f"{image_folder} holds no .png files. {HELP}")
    stems = sorted(image_files, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))
    slices = []
    for stem in stems:
        image, label = reading.read(image_files[stem], "grey"), reading.read(label_files[stem], "grey")
        slices.append((stem, *_convert(image, label, label_files[stem])))
    return tuple(file for stem in stems for file in (image_files[stem], label_files[stem])), slices


def _png_files(folder: epath.Path) -> dict[str, epath.Path]:
    """Stem -> file, without hidden ones; none of a folder that is missing."""
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.stem: file for file in files if file.suffix == ".png" and not file.name.startswith(".")}


def _read_stacks(image_file: epath.Path, label_file: epath.Path) -> list[Slice]:
    """The slices in two multi-page TIFF files."""
    image, label = _read_stack(image_file), _read_stack(label_file)
    if image.shape != label.shape:
        raise UserError(
            f"{image_file} holds {len(image)} slices of {image.shape[2]}x{image.shape[1]} pixels but {label_file} "
            f"{len(label)} of {label.shape[2]}x{label.shape[1]} (width x height)"
        )
    return [(f"{k:02d}", *_convert(image[k], label[k], f"{label_file}, slice {k}")) for k in range(len(image))]


def _read_stack(file: epath.Path) -> np.ndarray:
    """The slices in one multi-page TIFF file, uint8 `[slices, h, w]`."""
    import tifffile

    try:
        with file.open("rb") as opened, tifffile.TiffFile(opened) as tiff:
            num_stacks, photometric = len(tiff.series), tiff.pages[0].photometric
            stack = tiff.asarray()
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise UserError(f"{file}: not a readable TIFF stack ({type(error).__name__}: {error})") from error
    if num_stacks != 1:
        raise UserError(f"{file} holds {num_stacks} stacks, or pages of different sizes: save all slices as one stack")
    if photometric == tifffile.PHOTOMETRIC.RGB and stack.ndim == 4 and (stack == stack[..., :1]).all():
        stack = stack[..., 0]
    elif photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE):
        raise UserError(f"{file}: a {photometric.name} image; 8-bit grey slices are needed, convert it")
    if stack.dtype != np.uint8 or stack.ndim != 3:
        raise UserError(
            f"{file}: {stack.dtype} values of shape {stack.shape}; 8-bit grey slices are needed. Convert it, for "
            "example in Fiji with Image > Type > 8-bit, which scales the displayed range to 0..255"
        )
    return 255 - stack if photometric == tifffile.PHOTOMETRIC.MINISWHITE else stack


def _convert(image: np.ndarray, label: np.ndarray, file) -> tuple[np.ndarray, np.ndarray]:
    """A grey image and its label, both `[h, w]` -> image `[h, w, 1]` and label of classes 0 and 1; checks both."""
    if image.shape != label.shape:
        raise UserError(
            f"{file} is {label.shape[1]}x{label.shape[0]} pixels but its image is {image.shape[1]}x{image.shape[0]} "
            "(width x height)"
        )
    values = np.unique(label).tolist()
    if set(values) <= {0, 255}:
        label = label // 255
    elif not set(values) <= {0, 1}:
        raise UserError(
            f"{file}: labels must be 0 (membrane) and 255 (cell), or 0 and 1, but the values are {shorten(values)}. "
            "If the file was saved with smooth edges or as JPEG, threshold it"
        )
    return image[..., None], label
