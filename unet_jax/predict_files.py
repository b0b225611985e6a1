"""`--mode=predict`: image files of any size in, label files of the same size out; needs the work directory alone."""

import collections
import glob
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from unet_jax import data, draw, mesh, predict, trained, workdir
from unet_jax.data import images
from unet_jax.errors import UserError, check_choice

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
      a/x_overlay.jpg              the image below the colours of its classes
      a/x_probability_<class>.png  16 bits, 65535 is 1; or x_probability.npy, float32 `[H, W, K]`; if wanted
      predictions.json             how it was made, and the share of each class in each image

    Args:
      path: the work directory.
      inputs: an image file, a folder (with those below), or a pattern.
      output: a folder; nothing in it is overwritten.
      step: the checkpoint; None is the best.
      tta: see `predict.logits`; None is `config.eval.tta`.
      scale: `fit` resizes each image to `config.data.size`, as training did, and the probabilities back; `native` takes
        it as it is, in overlapping tiles where it is larger. None is `native` if training did not resize.
      interpolation: of the probabilities, on their way back: `bilinear` or `nearest`.
      probabilities: `none`, `png` or `npy`.
      threshold: of the probability of a sigmoid.

    Raises:
      UserError: no images; an output that would overwrite something; or, after all others were predicted, images that
        cannot be read.
    """
    import tqdm

    if not 0 < threshold < 1:
        raise UserError(f"--threshold = {threshold} must be between 0 and 1")
    if tta is not None:
        check_choice("--tta", tta, predict.TTA)
    output = epath.Path(output)
    files = _find(inputs, output)
    network = trained.load(path, step)
    config, classes = network.config, network.classes
    sigmoid = classes.task != "multiclass"
    if threshold != 0.5 and not sigmoid:
        raise UserError("--threshold is for sigmoids (binary and multilabel tasks); this network has a softmax")
    tta = config.eval.tta if tta is None else tta
    height, width = config.data.size
    if scale is None:
        scale = "native" if network.image_size == (height, width) else "fit"
    label_suffixes = _suffixes(classes.names) if classes.task == "multilabel" else [""]
    kept_suffixes = [f"_probability{suffix}" for suffix in _suffixes(classes.names[-classes.num_outputs :])]
    _claim(output, files, [f"{suffix}.png" for suffix in (*label_suffixes, *kept_suffixes)])
    tiles = predict.Predictor(network.model, network.variables, classes, (height, width), tta, devices=network.devices)
    how = {
        "fit": f"resized to {width}x{height} and back ({interpolation})",
        "native": f"at their own size, in tiles of {tiles.tile[1]}x{tiles.tile[0]}",
    }
    mesh.say(
        f"{path}, step {network.step}: {len(files)} image(s), {how[scale]}; test-time augmentation {tta}"
        + (f"; threshold {threshold}" if sigmoid else "")
    )

    written, failures = {}, []
    for name, file in tqdm.tqdm(files.items(), "Predicting", unit=" images", disable=None):
        try:
            image = images.read_image(file, classes.channels, config.data.value_range)
        except UserError as error:
            failures.append(str(error))
            continue
        if scale == "fit":
            small = images.resize_image(image, (height, width), config.data.resize)
            whole = _resize(network.predict(small[None], tta)[0], image.shape, interpolation)
            parts = [(slice(0, len(image)), whole)]
        else:
            parts = tiles.bands(image)  # so that the probabilities of a large image are never held whole
        shape = image.shape[:2]
        label = np.empty((*shape, len(classes.names)) if classes.task == "multilabel" else shape, np.uint8)
        try:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            kept = _make_kept(output / name, (*shape, classes.num_outputs), probabilities)
            for rows, part in parts:
                label[rows] = predict.to_label(part, classes.task, threshold)
                if kept is not None:
                    kept[rows] = part if probabilities == "npy" else np.rint(part * 65535)
            for suffix, picture in zip(label_suffixes, _label_pictures(label, classes), strict=True):
                _save(picture, f"{output / name}{suffix}.png")
            if probabilities == "png":
                for k, suffix in enumerate(kept_suffixes):
                    _save(Image.fromarray(np.ascontiguousarray(kept[..., k])), f"{output / name}{suffix}.png")
            _save(Image.fromarray(draw.overlay(image, label, classes)), f"{output / name}_overlay.jpg")
        except OSError as error:
            raise UserError(f"--output={output}: cannot write what was predicted of {file}: {error}") from error
        written[str(file)] = _shares(label, classes)

    if written:
        made = {
            "workdir": str(path),
            "step": network.step,
            "tta": tta,
            "scale": scale,
            "interpolation": interpolation if scale == "fit" else None,
            "threshold": threshold if sigmoid else None,
            "classes": classes.names,
            "shares": written,
        }
        workdir.write_json(output / "predictions.json", made)
        _warn_if_constant(written, classes)
    mesh.say(f"{len(written)} of {len(files)} images are predicted in {output}")
    if failures:
        shown = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(files)} files could not be read:{shown}")


def _find(inputs: str, output: epath.Path) -> dict[str, epath.Path]:
    """Name of the output, without suffix -> image file.

    Raises:
      UserError: none; two of one name; an output that could overwrite an input.
    """
    root = epath.Path(inputs)
    if root.is_dir():
        files = images.files_below(root)
    elif root.exists():
        files, root = [root], root.parent
    else:
        files = [epath.Path(name) for name in glob.glob(inputs, recursive=True)]
        before, slash, _ = glob.escape(inputs).split("[")[0].rpartition("/")  # of what is before any wildcard
        root = epath.Path(before or slash or ".")
    files = sorted(file for file in files if file.suffix.lower() in images.SUFFIXES and not file.name.startswith("."))
    if not files:
        raise UserError(f"--input={inputs} names no image ({', '.join(images.SUFFIXES)})")
    found: dict[str, epath.Path] = {}
    for file in files:
        name = str(file.relative_to(root).with_suffix(""))
        if name in found:
            raise UserError(f"{found[name]} and {file} would be written to the same file: predict them one by one")
        if file.resolve().parent == (output / name).resolve().parent:
            raise UserError(
                f"--output={output} is where the inputs are, and would overwrite them: choose another folder"
            )
        found[name] = file
    return found


def _suffixes(names: Sequence[str]) -> list[str]:
    """What is added to file names for each class; its number too, where the letters alone would be the same."""
    safe = ["".join(c if c.isalnum() or c in "-." else "_" for c in name) for name in names]
    return [f"_{one}" if safe.count(one) == 1 else f"_{k}_{one}" for k, one in enumerate(safe)]


def _claim(output: epath.Path, files: Mapping[str, epath.Path], suffixes: Sequence[str]) -> None:
    """Makes the output folder, and sees that nothing will be overwritten.

    Raises:
      UserError: it cannot be written, holds something, or two images would be written to the same file.
    """
    targets = collections.Counter(name + suffix for name in files for suffix in suffixes)
    (target, count), *_ = targets.most_common(1)
    if count > 1:
        raise UserError(f"two outputs would be called {target}: rename an image, or predict them one by one")
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


def _make_kept(name: epath.Path, shape: tuple[int, ...], probabilities: str) -> np.ndarray | None:
    """Where the probabilities of an image are gathered."""
    if probabilities == "npy":
        return np.lib.format.open_memmap(f"{name}_probability.npy", "w+", np.float32, shape)
    return np.empty(shape, np.uint16) if probabilities == "png" else None


def _label_pictures(label: np.ndarray, classes: data.Classes) -> list[Image.Image]:
    """A picture with a palette; of a multilabel task one for each class, 0 and 255."""
    if classes.task == "multilabel":
        return [Image.fromarray(np.ascontiguousarray(label[..., k]) * 255) for k in range(len(classes.names))]
    picture = Image.fromarray(label)
    picture.putpalette([part for color in classes.palette for part in color])
    return [picture]


def _save(picture: Image.Image, file: str) -> None:
    with epath.Path(file).open("wb") as opened:
        picture.save(opened, "JPEG" if file.endswith(".jpg") else "PNG")


def _shares(label: np.ndarray, classes: data.Classes) -> dict[str, float]:
    """The share of the pixels of each class."""
    if classes.task == "multilabel":
        return {name: float(label[..., k].mean()) for k, name in enumerate(classes.names)}
    counts = np.bincount(label.ravel(), minlength=len(classes.names))
    return {name: float(count / label.size) for name, count in zip(classes.names, counts, strict=True)}


def _warn_if_constant(shares: dict[str, dict[str, float]], classes: data.Classes) -> None:
    """A network that says the same everywhere is mostly untrained, or fed with images unlike those of its training."""
    said = [tuple(round(share) if share in (0, 1) else None for share in one.values()) for one in shares.values()]
    if None in said[0] or len(set(said)) > 1:
        return
    everywhere = [name for name, share in zip(classes.names, said[0], strict=True) if share] or ["no class"]
    mesh.say(
        f"warning: every pixel of every image is {', '.join(everywhere)}. Are these images like those of the training "
        "(channels, brightness, scale: see --scale)? Does --mode=eval find other classes?"
    )
