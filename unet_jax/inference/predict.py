"""`--mode=predict`: image files of any size in, label files of the same size out; needs the work directory alone."""

import collections
import glob
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from unet_jax import data
from unet_jax.data import colors, images
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward, tiles, trained
from unet_jax.parallel import processes
from unet_jax.workdir import files

INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


def predict_files(
    path: epath.PathLike,
    inputs: str,
    output: epath.PathLike,
    *,
    step: int | None = None,
    tta: str | None = None,
    scale: str | None = None,
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
      predictions.json             the settings, and the share of each class in each image

    Args:
      path: the work directory.
      inputs: an image file, a folder (with those below), or a pattern.
      output: a folder; nothing in it is overwritten.
      step: the checkpoint; None is the best.
      tta: test-time augmentation, one of `forward.TTA`; None is `config.eval.tta`.
      scale: `fit` resizes each image to `config.data.size`, as training did, and the probabilities back; `native`
        predicts it at its own size, in overlapping tiles if it is larger. None is `native` if training did not resize.
      interpolation: of the probabilities when they are resized back: `bilinear` or `nearest`.
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
    output = epath.Path(output)
    image_files = _find(inputs, output)
    network = trained.load(path, step)
    config, classes = network.config, network.classes
    sigmoid = classes.task != "multiclass"
    if threshold != 0.5 and not sigmoid:
        raise UserError("--threshold is for sigmoids (binary and multilabel tasks); this network has a softmax")
    tta = config.eval.tta if tta is None else tta
    height, width = config.data.size
    if scale is None:
        scale = "native" if network.source_size == (height, width) else "fit"
    label_suffixes, map_suffixes = _suffixes(classes)
    _claim(output, image_files, [f"{suffix}.png" for suffix in label_suffixes + map_suffixes])
    predictor = tiles.Predictor(network.network, network.variables, (height, width), tta)
    described = {
        "fit": f"resized to {width}x{height} and back ({interpolation})",
        "native": f"at their own size, in tiles of {predictor.tile[1]}x{predictor.tile[0]}",
    }
    processes.print_on_main(
        f"{path}, step {network.step}: {len(image_files)} image(s), {described[scale]}; test-time augmentation {tta}"
        + (f"; threshold {threshold}" if sigmoid else "")
    )

    shares, failures = {}, []
    for name, file in tqdm.tqdm(image_files.items(), "Predicting", unit=" images", disable=None):
        try:
            image = images.read_image(file, classes.channels, config.data.value_range)
        except UserError as error:
            failures.append(str(error))
            continue
        if scale == "fit":
            small = images.resize_image(image, (height, width), config.data.resize)
            whole = _resize(network.predict(small[None], tta)[0], image.shape, interpolation)
            bands = [(slice(0, len(image)), whole)]
        else:
            bands = predictor.bands(image)  # so that the probabilities of a large image are never held whole
        try:
            label = _write_prediction(output / name, image, bands, classes, threshold, probabilities)
        except OSError as error:
            raise UserError(f"--output={output}: cannot write the prediction of {file}: {error}") from error
        shares[str(file)] = _shares(label, classes)

    if shares:
        settings = {
            "workdir": str(path),
            "step": network.step,
            "tta": tta,
            "scale": scale,
            "interpolation": interpolation if scale == "fit" else None,
            "threshold": threshold if sigmoid else None,
            "classes": classes.names,
            "shares": shares,
        }
        files.write_json(output / "predictions.json", settings)
        _warn_if_constant(shares)
    processes.print_on_main(f"{len(shares)} of {len(image_files)} images predicted, see {output}")
    if failures:
        shown = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(image_files)} files could not be read:{shown}")


def _find(inputs: str, output: epath.Path) -> dict[str, epath.Path]:
    """Name of the output, without suffix -> image file; checks that no output has the place of an input or another."""
    root = epath.Path(inputs)
    if root.is_dir():
        candidates = images.files_below(root)
    elif root.exists():
        candidates, root = [root], root.parent
    else:
        candidates = map(epath.Path, glob.glob(inputs, recursive=True))
        before, slash, _ = glob.escape(inputs).split("[")[0].rpartition("/")  # the part before any wildcard
        root = epath.Path(before or slash or ".")
    found: dict[str, epath.Path] = {}
    for file in sorted(candidates):
        if file.suffix.lower() not in images.SUFFIXES or file.name.startswith("."):
            continue
        name = str(file.relative_to(root).with_suffix(""))
        if name in found:
            raise UserError(f"{found[name]} and {file} would be written to the same file: predict them separately")
        if file.resolve().parent == (output / name).resolve().parent:
            raise UserError(f"--output={output} holds the inputs, and would overwrite them: choose another folder")
        found[name] = file
    if not found:
        raise UserError(f"--input={inputs} names no image ({', '.join(images.SUFFIXES)})")
    return found


def _suffixes(classes: data.Classes) -> tuple[list[str], list[str]]:
    """The suffixes of label files and of probability maps; with the number of the class, if two names look the same."""
    names = classes.names[-classes.num_outputs :]
    safe = ["".join(c if c.isalnum() or c in "-." else "_" for c in name) for name in names]
    unique = [f"_{one}" if safe.count(one) == 1 else f"_{k}_{one}" for k, one in enumerate(safe)]
    return unique if classes.task == "multilabel" else [""], [f"_probability{suffix}" for suffix in unique]


def _claim(output: epath.Path, files: Mapping[str, epath.Path], suffixes: Sequence[str]) -> None:
    """Makes the output folder, and checks that it is empty and that no two images would be written to the same file."""
    targets = collections.Counter(name + suffix for name in files for suffix in suffixes)
    (target, count), *_ = targets.most_common(1)
    if count > 1:
        raise UserError(f"two outputs would be called {target}: rename an image, or predict them separately")
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = sorted(file.name for file in output.iterdir())
        if held:
            raise UserError(f"--output={output} is not empty, it holds {held[0]}: choose another folder, or empty it")
        (output / "predictions.json").write_text("")
        (output / "predictions.json").unlink()
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error


def _resize(probability, shape: Sequence[int], interpolation: str) -> np.ndarray:
    """Probabilities `[h, w, K]` -> float32 `[*shape[:2], K]`."""
    size, method = (shape[1], shape[0]), INTERPOLATION[interpolation]
    channels = np.moveaxis(np.asarray(probability), -1, 0)
    return np.stack([np.asarray(Image.fromarray(one).resize(size, method)) for one in channels], -1)


def _write_prediction(
    stem: epath.Path,
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
    stem.parent.mkdir(parents=True, exist_ok=True)
    shape, maps = (*image.shape[:2], classes.num_outputs), None
    if probabilities == "npy":
        maps = np.lib.format.open_memmap(f"{stem}_probability.npy", "w+", np.float32, shape)
    elif probabilities == "png":
        maps = np.empty(shape, np.uint16)
    label = np.empty(shape if classes.task == "multilabel" else shape[:2], np.uint8)
    for rows, band in bands:
        label[rows] = forward.to_label(band, classes.task, threshold)
        if maps is not None:
            maps[rows] = band if probabilities == "npy" else np.rint(band * 65535)

    if classes.task == "multilabel":
        for k, suffix in enumerate(label_suffixes):
            _save(label[..., k] * 255, f"{stem}{suffix}.png")
    else:
        _save(label, f"{stem}.png", [part for color in classes.palette for part in color])
    if probabilities == "png":
        for k, suffix in enumerate(map_suffixes):
            _save(maps[..., k], f"{stem}{suffix}.png")
    _save(colors.overlay(image, label, classes), f"{stem}_overlay.jpg")
    return label


def _save(pixels: np.ndarray, file: str, palette: Sequence[int] = ()) -> None:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if palette:
        picture.putpalette(palette)
    with epath.Path(file).open("wb") as opened:
        picture.save(opened, "JPEG" if file.endswith(".jpg") else "PNG")


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
