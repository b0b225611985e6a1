"""ISBI 2012: slices of an electron-microscopy stack, membranes (0) and cells (255).

`config.data.root` holds the slices as PNG, `train/image/K.png` and `train/label/K.png` (or these two folders below
`membrane/`), or the challenge's stacks `train-volume.tif` and `train-labels.tif`. Neighbouring slices are alike, so
that the last ones, as one block, are held out. The labels of the challenge's own test slices are not public.

Variants: `multiclass`, two outputs and a softmax; `binary`, one sigmoid.
"""

import numpy as np
from etils import epath

from unet_jax.data import images
from unet_jax.data.source import Classes, Source
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
        8-bit grey; labels other than 0 and 255 (or 0 and 1).
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
    if not 0 < held_out < len(slices):
        raise UserError(
            f"config.data.validation = {config.validation} of {len(slices)} slices leaves none for "
            f"{'training' if held_out else 'validation'}"
        )
    first = len(slices) - held_out
    chosen = {"train": slices[:first], "validation": slices[first:], "all": slices}[split]
    return Source(meaning, [name for name, *_ in chosen], lambda index: chosen[index][1:], files=files)


def classes(config) -> Classes:
    """What the labels mean, by `config.variant`.

    Raises:
      UserError: an unknown variant.
    """
    variant = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    return Classes(variant, NAMES, PALETTE, channels=1)


def _read_folders(image_folder: epath.Path, label_folder: epath.Path) -> tuple[tuple[epath.Path, ...], list[Slice]]:
    """All files, and the slices in them, in order."""
    files = [{f.stem: f for f in d.glob("*.png")} if d.is_dir() else {} for d in (image_folder, label_folder)]
    lonely = sorted(files[0].keys() ^ files[1].keys())
    if lonely:
        file = files[0].get(lonely[0]) or files[1][lonely[0]]
        raise UserError(
            f"{image_folder} has {len(files[0])} slices and {label_folder} {len(files[1])}: {file} has no partner"
        )
    if not files[0]:
        raise UserError(f"{image_folder} holds no .png files. {HELP}")
    stems = sorted(files[0], key=lambda stem: (not stem.isdigit(), int(stem) if stem.isdigit() else 0, stem))
    slices = [
        (stem, *_check(images.read(files[0][stem], "grey"), images.read(files[1][stem], "grey"), files[1][stem]))
        for stem in stems
    ]
    return tuple(of[stem] for stem in stems for of in files), slices


def _read_stacks(*files: epath.Path) -> list[Slice]:
    """The slices in two multi-page TIFF files."""
    image, label = (_read_stack(file) for file in files)
    if image.shape != label.shape:
        raise UserError(
            f"{files[0]} holds {len(image)} slices of {image.shape[2]}x{image.shape[1]} pixels but {files[1]} "
            f"{len(label)} of {label.shape[2]}x{label.shape[1]} (width x height)"
        )
    return [
        (f"{k:02d}", *_check(x, y, f"{files[1]}, slice {k}")) for k, (x, y) in enumerate(zip(image, label, strict=True))
    ]


def _read_stack(file: epath.Path) -> np.ndarray:
    """uint8 `[slices, h, w]`."""
    import tifffile

    try:
        with file.open("rb") as opened, tifffile.TiffFile(opened) as tiff:
            parts, photometric = len(tiff.series), tiff.pages[0].photometric
            stack = tiff.asarray()
    except Exception as error:  # whatever damaged files make of it
        raise UserError(f"{file}: not a readable TIFF stack ({type(error).__name__}: {error})") from error
    if parts != 1:
        raise UserError(f"{file} holds {parts} stacks, or pages of several sizes: save all its slices as one stack")
    if photometric == tifffile.PHOTOMETRIC.RGB and stack.ndim == 4 and (stack == stack[..., :1]).all():
        stack = stack[..., 0]
    elif photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE):
        raise UserError(f"{file}: a {photometric.name} image; 8-bit grey slices are needed, convert it")
    if stack.dtype != np.uint8 or stack.ndim != 3:
        raise UserError(
            f"{file}: {stack.dtype} values of shape {stack.shape}; 8-bit grey slices are needed. Convert it, for "
            "example in Fiji by Image > Type > 8-bit, which shows the range that is kept"
        )
    return 255 - stack if photometric == tifffile.PHOTOMETRIC.MINISWHITE else stack


def _check(image: np.ndarray, label: np.ndarray, file) -> tuple[np.ndarray, np.ndarray]:
    if image.shape != label.shape:
        raise UserError(
            f"{file} is {label.shape[1]}x{label.shape[0]} pixels but its image is {image.shape[1]}x{image.shape[0]} "
            "(width x height)"
        )
    values = np.unique(label).tolist()
    if set(values) <= {0, 255}:
        label = label // 255
    elif not set(values) <= {0, 1}:
        shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        raise UserError(
            f"{file}: labels must be 0 (membrane) and 255 (cell), or 0 and 1, but the values are {shown}. If the file "
            "was saved with smooth edges or as JPEG, threshold it"
        )
    return image[..., None], label
