"""The files of `--mode=predict`: which images are meant, and what is written of each."""

import collections
import functools
import glob
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from unet_jax import data, paths
from unet_jax.data import colors, images, reading
from unet_jax.errors import UserError
from unet_jax.inference import forward
from unet_jax.workdir import files as workdir_files

SUMMARY = "predictions.json"
OVERLAY = "_overlay.jpg"


def find(inputs: str, output: epath.Path) -> tuple[dict[str, epath.Path], list[epath.Path]]:
    """The images to predict, by the names of their outputs without suffix, and the other files that are there.

    Raises:
      UserError: no images; an output that would have the place of an input, or of another.
    """
    root = epath.Path(inputs)
    if root.is_dir():
        candidates = images.files_below(root)
    elif root.exists():
        candidates, root = [root], root.parent
    else:
        root, pattern = _split_pattern(inputs)
        candidates = [root / file for file in glob.glob(pattern, root_dir=root, recursive=True)]
    files = sorted(file for file in candidates if not file.name.startswith(".") and file.is_file())
    candidates = [file for file in files if file.suffix.lower() in reading.SUFFIXES]
    found: dict[str, epath.Path] = {}
    for file, relative in zip(candidates, paths.names_below(root, candidates), strict=True):
        name = os.path.splitext(relative)[0]
        if name in found:
            raise UserError(f"{found[name]} and {file} would be written to the same file: predict them separately")
        if file.resolve().parent == paths.file_below(output, name, ".png").resolve().parent:
            raise UserError(f"--output={output} holds the inputs, and would overwrite them: choose another folder")
        found[name] = file
    if not found:
        raise UserError(f"--input={inputs} names no image ({', '.join(reading.SUFFIXES)})")
    return found, [file for file in files if file.suffix.lower() not in reading.SUFFIXES]


def _split_pattern(inputs: str) -> tuple[epath.Path, str]:
    """The folder that a pattern starts with, whatever characters are in its name, and the pattern below it."""
    root, parts = epath.Path("/" if inputs.startswith("/") else "."), inputs.split("/")
    while len(parts) > 1 and (root / parts[0]).is_dir():
        root /= parts.pop(0)
    return root, "/".join(parts)


def suffixes(classes: data.Classes) -> tuple[list[str], list[str]]:
    """The suffixes of label files and of probability maps; with the number of the class, if two names look the same."""
    names = classes.names[-classes.num_outputs :]
    safe = ["".join(c if c.isalnum() or c in "-." else "_" for c in name)[:40] for name in names]
    unique = [f"_{one}" if safe.count(one) == 1 else f"_{k}_{one}" for k, one in enumerate(safe)]
    if len(set(unique)) < len(unique):  # one is called as another is with its number
        unique = [f"_{k}_{one}" for k, one in enumerate(safe)]
    return unique if classes.task == "multilabel" else [""], [f"_probability{suffix}" for suffix in unique]


def claim(
    output: epath.Path, files: Mapping[str, epath.Path], classes: data.Classes, settings: Mapping[str, Any]
) -> set[str]:
    """Makes the output folder, or goes on with a prediction that was stopped; returns the names that are done.

    Raises:
      UserError: two images would be written to the same file; the folder holds other files, or a prediction that was
        begun with other settings; it cannot be written.
    """
    endings = [f"{suffix}.png" for group in suffixes(classes) for suffix in group]
    targets = collections.Counter(paths.file_below(output, name, ending) for name in files for ending in endings)
    (target, count), *_ = targets.most_common(1)
    if count > 1:
        called = target.relative_to(output)
        raise UserError(f"two outputs would be called {called}: rename an image, or predict them separately")
    settings = json.loads(json.dumps(settings))  # with lists for tuples
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = sorted(file.name for file in output.iterdir())
        begun = _read_begun(output / SUMMARY) if SUMMARY in held else None
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error
    if held and begun is None:
        raise UserError(f"--output={output} is not empty, it holds {held[0]}: choose another folder, or empty it")
    if begun is not None:
        differing = [
            f"{key} {begun.get(key)!r}, now {value!r}" for key, value in settings.items() if begun.get(key) != value
        ]
        if differing:
            raise UserError(
                f"--output={output} holds a prediction that was stopped, with other settings: {'; '.join(differing)}. "
                "Choose another folder, or the same settings"
            )
        return {name for name in files if _is_whole(output, name, classes)}
    workdir_files.write_json(output / SUMMARY, {"unfinished": True, **settings})
    return set()


def _read_begun(file: epath.Path) -> dict[str, Any] | None:
    """What `claim` wrote of a prediction that has not ended; None if it is another file, or it has."""
    try:
        values = json.loads(file.read_text())
    except ValueError:
        return None
    return values if isinstance(values, dict) and values.get("unfinished") is True else None


def _is_whole(output: epath.Path, name: str, classes: data.Classes) -> bool:
    """Whether all files of an image are there and the last, the overlay, was written to the end marker of JPEG."""
    place = functools.partial(paths.file_below, output, name)
    has_label = lambda suffix: any(place(f"{suffix}{kind}").exists() for kind in (".png", ".tif"))  # see `scene_files`
    overlay = place(OVERLAY)
    is_written = overlay.exists() and overlay.read_bytes()[-2:] == b"\xff\xd9"
    return is_written and all(map(has_label, suffixes(classes)[0]))


def write(
    place: Callable[[str], epath.Path],  # suffix -> file
    picture: np.ndarray,
    bands: Iterable[tuple[slice, np.ndarray]],
    classes: data.Classes,
    threshold: float,
    probabilities: str,
) -> np.ndarray:
    """Writes label, overlay (the last) and, if wanted, probabilities of an image; returns the label.

    The `picture` is the image as people see it, uint8 `[H, W, 1 or 3]`. The `bands`, rows and their probabilities
    float32 `[rows, W, K]`, together cover the image.
    """
    label_suffixes, map_suffixes = suffixes(classes)
    place(".png").parent.mkdir(parents=True, exist_ok=True)
    shape, maps = (*picture.shape[:2], classes.num_outputs), None
    if probabilities == "npy":
        maps = np.lib.format.open_memmap(place("_probability.npy"), "w+", np.float32, shape)
    elif probabilities == "png":
        maps = np.empty(shape, np.uint16)
    label = np.empty(shape if classes.task == "multilabel" else shape[:2], np.uint8)
    for rows, band in bands:
        label[rows] = forward.to_label(band, classes.task, threshold)
        if maps is not None:
            maps[rows] = band if probabilities == "npy" else np.rint(band * 65535)

    if classes.task == "multilabel":
        for k, suffix in enumerate(label_suffixes):
            save(label[..., k] * 255, place(f"{suffix}.png"))
    else:
        save(label, place(".png"), [part for color in classes.palette for part in color])
    if probabilities == "png":
        for k, suffix in enumerate(map_suffixes):
            save(maps[..., k], place(f"{suffix}.png"))
    save(colors.overlay(picture, label, classes), place(OVERLAY))
    return label


def read_label(place: Callable[[str], epath.Path], classes: data.Classes) -> np.ndarray:
    """The label that `write` wrote: uint8 `[H, W]`, or `[H, W, K]` if multilabel."""
    if classes.task != "multilabel":
        return reading.read_any(place(".png"), indices=True)
    parts = [reading.read_any(place(f"{suffix}.png")) for suffix in suffixes(classes)[0]]
    return np.stack([part > 0 for part in parts], -1).astype(np.uint8)


def save(pixels: np.ndarray, file: epath.Path, palette: Sequence[int] = ()) -> None:
    """Writes a JPEG file if it is called so, else a PNG file, with a palette of red, green, blue, red... if given."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if palette:
        picture.putpalette(palette)
    with file.open("wb") as opened:
        picture.save(opened, "JPEG" if file.suffix == ".jpg" else "PNG")
