"""`--mode=predict`: image files of any size in, label files of the same size out; needs the work directory alone."""

import collections
import functools
import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from unet_jax import data, paths
from unet_jax.data import colors, images
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward, resize, trained
from unet_jax.parallel import processes
from unet_jax.workdir import files

FAR = 2  # how many times further than in training `fit` may shrink an image before it warns


def predict_files(
    path: epath.PathLike,
    inputs: str,
    output: epath.PathLike,
    *,
    step: int | None = None,
    tta: str | None = None,
    scale: str = "train",
    interpolation: str = "bilinear",
    probabilities: str = "none",
    threshold: float = 0.5,
) -> None:
    """Predicts image files.

    Writes for `a/x.jpg`, to `output`:
      a/x.png                      the label: a palette PNG whose values are the classes; for a multilabel task one file
                                   `x_<class>.png` for each, 0 and 255
      a/x_overlay.jpg              the image under the colours of its classes
      a/x_probability_<class>.png  16 bits, 65535 is 1; or x_probability.npy, float32 `[H, W, K]`; if wanted
      predictions.json             the settings, the share of each class in each image, and the size (height, width) at
                                   which it was predicted

    Args:
      path: the work directory.
      inputs: an image file, a folder (with those below), or a pattern.
      output: a folder; nothing in it is overwritten.
      step: the checkpoint; None is the best.
      tta: test-time augmentation, one of `forward.TTA`; None is `config.eval.tta`.
      scale: at which size an image is predicted, one of `resize.SCALES`: `train` resizes it as training resized its
        images, larger ones by no more than that; `fit` to `config.data.size`; `native` not at all. What is then not of
        the size `Trained.size` is predicted in tiles of it, which overlap.
      interpolation: of probabilities to the size of the image, one of `resize.INTERPOLATION`.
      probabilities: `none`, `png` or `npy`.
      threshold: of the probability of a sigmoid.

    Raises:
      UserError: no images; an output that would overwrite something; or, after all others are predicted, images that
        cannot be read.
    """
    import tqdm

    if not 0 < threshold < 1:
        raise UserError(f"--threshold = {threshold} must be between 0 and 1")
    if tta is not None:
        check_choice("--tta", tta, forward.TTA)
    check_choice("--scale", scale, resize.SCALES)
    output = epath.Path(output)
    image_files = _find(inputs, output)
    network = trained.load(path, step)
    network.predicted_size(network.size, scale)  # an error, if it has no size to fit
    classes = network.classes
    sigmoid = classes.task != "multiclass"
    if threshold != 0.5 and not sigmoid:
        raise UserError("--threshold is for sigmoids (binary and multilabel tasks); this network has a softmax")
    tta = network.resolve_tta(tta)
    label_suffixes, map_suffixes = _suffixes(classes)
    _claim(output, image_files, [f"{suffix}.png" for suffix in label_suffixes + map_suffixes])
    processes.print_on_main(
        f"{path}, step {network.step}: {len(image_files)} image(s), {_describe(network, scale)}; "
        f"test-time augmentation {tta}" + (f"; threshold {threshold}" if sigmoid else "")
    )

    shares, resized, far, failures = {}, {}, [], []
    for name, file in tqdm.tqdm(image_files.items(), "Predicting", unit=" images", disable=None):
        try:
            image = network.read_image(file)
        except UserError as error:
            failures.append(str(error))
            continue
        size, bands = image.shape[:2], network.predict_bands(image, scale, tta, interpolation)
        try:
            place = functools.partial(paths.file_below, output, name)
            label = _write_prediction(place, image, bands, classes, threshold, probabilities)
        except OSError as error:
            raise UserError(f"--output={output}: cannot write the prediction of {file}: {error}") from error
        shares[str(file)] = _shares(label, classes)
        new = network.predicted_size(size, scale)
        resized[str(file)] = {"size": size, "predicted_at": new, "in_tiles": new != network.size}
        if network.config.data.size:
            far.append(resize.excess(size, new, network.size, network.source_sizes))

    if shares:
        settings = {
            "workdir": str(path),
            "step": network.step,
            "tta": tta,
            "scale": scale,
            "train_size": network.size,
            "source_sizes": network.source_sizes,
            "interpolation": interpolation,
            "threshold": threshold if sigmoid else None,
            "classes": classes.names,
            "shares": shares,
            "images": resized,
        }
        files.write_json(output / "predictions.json", settings)
        _warn_if_constant(shares)
        if max(far, default=1.0) > FAR:
            processes.print_on_main(
                f"warning: {sum(one > FAR for one in far)} image(s) were shrunk much further than any in training, one "
                f"{max(far):.1f} times as far, so that things in them look too small: see --scale=train"
            )
    in_tiles = sum(image["in_tiles"] for image in resized.values())
    sizes = [image["predicted_at"] for image in resized.values()]
    processes.print_on_main(
        f"{len(shares)} of {len(image_files)} images predicted, {in_tiles} of them in tiles, see {output}"
    )
    if scale == "train" and network.resizes and any(max(np.divide(new, network.size)) > 1 for new in sizes):
        processes.print_on_main(
            "Some are larger than any training image. If they show no more than those, only in more detail: --scale=fit"
        )
    if failures:
        shown = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(image_files)} files could not be read:{shown}")


def _describe(network: trained.Trained, scale: str) -> str:
    """How images are predicted, in words."""
    show = lambda size: f"{size[1]}x{size[0]}"
    to = show(network.size)
    if scale == "native" or (scale == "train" and not network.resizes):
        factor = network.config.data.scale
        text = "at their own size" if scale == "native" or factor == 1 else f"scaled by {factor:g} as in training"
    elif scale == "fit" or network.source_sizes is None:
        return f"resized to {to} and back"
    else:
        sizes = " to ".join(dict.fromkeys(map(show, network.source_sizes)))
        text = f"resized as in training ({sizes} became {to}) and back"
    return f"{text}, in tiles if that is not {to}"


def _find(inputs: str, output: epath.Path) -> dict[str, epath.Path]:
    """Name of the output, without suffix -> image file; checks that no output has the place of an input or another."""
    root = epath.Path(inputs)
    if root.is_dir():
        candidates = images.files_below(root)
    elif root.exists():
        candidates, root = [root], root.parent
    else:
        root, pattern = _split_pattern(inputs)
        candidates = [root / file for file in glob.glob(pattern, root_dir=root, recursive=True)]
    candidates = sorted(f for f in candidates if f.suffix.lower() in images.SUFFIXES and not f.name.startswith("."))
    found: dict[str, epath.Path] = {}
    for file, relative in zip(candidates, paths.names_below(root, candidates), strict=True):
        name = os.path.splitext(relative)[0]
        if name in found:
            raise UserError(f"{found[name]} and {file} would be written to the same file: predict them separately")
        if file.resolve().parent == paths.file_below(output, name, ".png").resolve().parent:
            raise UserError(f"--output={output} holds the inputs, and would overwrite them: choose another folder")
        found[name] = file
    if not found:
        raise UserError(f"--input={inputs} names no image ({', '.join(images.SUFFIXES)})")
    return found


def _split_pattern(inputs: str) -> tuple[epath.Path, str]:
    """The folder that a pattern starts with, whatever characters are in its name, and the pattern below it."""
    root, parts = epath.Path("/" if inputs.startswith("/") else "."), inputs.split("/")
    while len(parts) > 1 and (root / parts[0]).is_dir():
        root /= parts.pop(0)
    return root, "/".join(parts)


def _suffixes(classes: data.Classes) -> tuple[list[str], list[str]]:
    """The suffixes of label files and of probability maps; with the number of the class, if two names look the same."""
    names = classes.names[-classes.num_outputs :]
    safe = ["".join(c if c.isalnum() or c in "-." else "_" for c in name)[:40] for name in names]
    unique = [f"_{one}" if safe.count(one) == 1 else f"_{k}_{one}" for k, one in enumerate(safe)]
    if len(set(unique)) < len(unique):  # one is called as another is with its number
        unique = [f"_{k}_{one}" for k, one in enumerate(safe)]
    return unique if classes.task == "multilabel" else [""], [f"_probability{suffix}" for suffix in unique]


def _claim(output: epath.Path, files: Mapping[str, epath.Path], suffixes: Sequence[str]) -> None:
    """Makes the output folder, and checks that it is empty and that no two images would be written to the same file."""
    targets = collections.Counter(paths.file_below(output, name, suffix) for name in files for suffix in suffixes)
    (target, count), *_ = targets.most_common(1)
    if count > 1:
        called = target.relative_to(output)
        raise UserError(f"two outputs would be called {called}: rename an image, or predict them separately")
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = sorted(file.name for file in output.iterdir())
        if held:
            raise UserError(f"--output={output} is not empty, it holds {held[0]}: choose another folder, or empty it")
        (output / "predictions.json").write_text("")
        (output / "predictions.json").unlink()
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error


def _write_prediction(
    place: Callable[[str], epath.Path],  # suffix -> file
    image: np.ndarray,
    bands: Iterable[tuple[slice, np.ndarray]],
    classes: data.Classes,
    threshold: float,
    probabilities: str,
) -> np.ndarray:
    """Writes label, overlay and, if wanted, probabilities of an image; returns the label.

    The `bands`, rows and their probabilities float32 `[rows, W, K]`, together cover the image.
    """
    label_suffixes, map_suffixes = _suffixes(classes)
    place(".png").parent.mkdir(parents=True, exist_ok=True)
    shape, maps = (*image.shape[:2], classes.num_outputs), None
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
            _save(label[..., k] * 255, place(f"{suffix}.png"))
    else:
        _save(label, place(".png"), [part for color in classes.palette for part in color])
    if probabilities == "png":
        for k, suffix in enumerate(map_suffixes):
            _save(maps[..., k], place(f"{suffix}.png"))
    _save(colors.overlay(image, label, classes), place("_overlay.jpg"))
    return label


def _save(pixels: np.ndarray, file: epath.Path, palette: Sequence[int] = ()) -> None:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if palette:
        picture.putpalette(palette)
    with file.open("wb") as opened:
        picture.save(opened, "JPEG" if file.suffix == ".jpg" else "PNG")


def _shares(label: np.ndarray, classes: data.Classes) -> dict[str, float]:
    """The share of the pixels of each class."""
    if classes.task == "multilabel":
        return {name: float(label[..., k].mean()) for k, name in enumerate(classes.names)}
    counts = np.bincount(label.ravel(), minlength=len(classes.names))
    return {name: float(count / label.size) for name, count in zip(classes.names, counts, strict=True)}


def _warn_if_constant(shares: dict[str, dict[str, float]]) -> None:
    """A network that predicts the same everywhere is mostly untrained, or sees images unlike those of its training."""
    first, *others = shares.values()
    if any(share not in (0, 1) for share in first.values()) or any(other != first for other in others):
        return
    everywhere = [name for name, share in first.items() if share] or ["no class"]
    processes.print_on_main(
        f"warning: every pixel of every image is {', '.join(everywhere)}. Are these images like those of the training "
        "(channels, brightness, scale: see --scale)? Does --mode=eval find other classes?"
    )
