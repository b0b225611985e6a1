"""`--mode=predict`: image files of any size in, label files of the same size out; needs the work directory alone."""

import functools
from collections.abc import Mapping

import numpy as np
from etils import epath

from unet_jax import data, paths
from unet_jax.data import pixel_sizes, reading
from unet_jax.data.source import shorten
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward, polygons, prediction_files, resize, scene_files, scenes, trained
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
    vector: str = "none",
) -> None:
    """Predicts image files.

    Writes for `a/x.jpg`, to `output`:
      a/x.png                      the label: a palette PNG whose values are the classes; for a multilabel task one file
                                   `x_<class>.png` for each, 0 and 255
      a/x_overlay.jpg              the image under the colours of its classes
      a/x_probability_<class>.png  16 bits, 65535 is 1; or x_probability.npy, float32 `[H, W, K]`; if wanted
      predictions.json             the settings, the share of each class in each image, the size (height, width) at
                                   which it was predicted, and which files could not be
    A TIFF with a georeference, which needs the extra `geo`, may be larger than the memory, unless it must be resized:
      a/x.tif                      the label: a GeoTIFF as the image, 255 where that has no data; for a multilabel task
                                   one file `x_<class>.tif` for each, 0 and 1
      a/x_overlay.jpg              a preview
      a/x_probability_<class>.tif  16 bits, 65535 is 1; if wanted, as `png` or as `npy`
      a/x.gpkg, a/x.geojson        polygons, if wanted, of all classes but the background; see `polygons.write`
    If it is stopped, the same command goes on.

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
      vector: one of `polygons.FORMATS`; all images must be georeferenced.

    Raises:
      UserError: no images; one that does not go with the options; an output that would overwrite something; or, after
        all others are predicted, images that cannot be read.
    """
    import tqdm

    if not 0 < threshold < 1:
        raise UserError(f"--threshold = {threshold} must be between 0 and 1")
    if tta is not None:
        check_choice("--tta", tta, forward.TTA)
    check_choice("--scale", scale, resize.SCALES)
    check_choice("--vector", vector, polygons.FORMATS)
    output = epath.Path(output)
    image_files, others = prediction_files.find(inputs, output)
    georeferenced = _find_georeferenced(image_files, vector)
    if georeferenced:
        paths.check_utf8("--output", output)
    network = trained.load(path, step)
    network.predicted_size(network.size, scale, (1, 1))  # an error, if it has no size to fit
    classes = network.classes
    sigmoid = classes.task != "multiclass"
    if threshold != 0.5 and not sigmoid:
        raise UserError("--threshold is for sigmoids (binary and multilabel tasks); this network has a softmax")
    tta = network.resolve_tta(tta)
    settings = {
        "workdir": str(path),
        "input": inputs,
        "step": network.step,
        "tta": tta,
        "scale": scale,
        "train_size": network.size,
        "source_sizes": network.source_sizes,
        "interpolation": interpolation,
        "threshold": threshold if sigmoid else None,
        "probabilities": probabilities,
        "vector": None if vector == "none" else vector,  # as where older versions were stopped
        "classes": classes.names,
    }
    done = prediction_files.claim(output, image_files, classes, settings)
    processes.print_on_main(
        f"{path}, step {network.step}: {len(image_files)} image(s), {_describe(network, scale)}; "
        f"test-time augmentation {tta}"
        + (f"; threshold {threshold}" if sigmoid else "")
        + (f"; {len(georeferenced)} georeferenced: GeoTIFF" if georeferenced else "")
    )
    if done:
        processes.print_on_main(f"{len(done)} already predicted by the run that was stopped")

    def predict_bands(image, factors):
        return network.predict_bands(image, scale, tta, interpolation, factors)

    turned = []  # photos that are to be turned, as their EXIF data say

    def write_image(file, place, is_done, factors):
        if is_done:
            label = prediction_files.read_label(place, classes)
        else:
            image = network.read_image(file)
            if network.config.data.orientation == "as_stored" and reading.read_header(file).orientation != 1:
                turned.append(file)
            picture, bands = network.picture(image), predict_bands(image, factors)
            label = prediction_files.write(place, picture, bands, classes, threshold, probabilities)
        return label.shape[:2], _shares(label, classes)

    def write_scene(file, place, is_done, factors):
        with scenes.opened(file, network) as scene:
            if not is_done:
                polygons.check(scene, vector)
                image, picture = scene.for_prediction(scale, factors), network.picture(scene.preview[0])
                options = threshold, probabilities != "none", vector
                scene_files.write(place, scene, predict_bands(image, factors), picture, classes, *options)
            return scene.shape[:2], scene_files.shares(place, classes)

    shares, resized, far, failures = {}, {}, [], [_reason(file) for file in others if reading.is_other_format(file)]
    for name, file in tqdm.tqdm(image_files.items(), "Predicting", unit=" images", disable=None):
        place = functools.partial(paths.file_below, output, name)
        try:
            write = write_scene if name in georeferenced else write_image
            factors = network.factors(file, scale)
            size, shares[str(file)] = write(file, place, name in done, factors)
        except UserError as error:
            failures.append(str(error))
            continue
        except OSError as error:
            raise UserError(f"--output={output}: cannot write the prediction of {file}: {error}") from error
        new = network.predicted_size(size, scale, factors)
        resized[str(file)] = {"size": size, "predicted_at": new, "in_tiles": new != network.size}
        if network.config.data.size:
            far.append(resize.excess(size, new, network.size, network.source_sizes))

    found = {"shares": shares, "images": resized, "failures": failures}
    files.write_json(output / prediction_files.SUMMARY, {**settings, **found})
    if shares:
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
    if turned:
        processes.print_on_main(
            f"note: the EXIF data of {len(turned)} photo(s) say they are rotated, e.g. {turned[0]}. They were "
            "predicted as they are stored, as in training (config.data.orientation)"
        )
    ignored = [file.name for file in others if not reading.is_other_format(file)]
    if ignored:
        processes.print_on_main(f"left alone, as they are no images: {shorten(ignored)}")
    if failures:
        shown = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(shares) + len(failures)} files could not be predicted:{shown}")


def _find_georeferenced(image_files: Mapping[str, epath.Path], vector: str) -> set[str]:
    """The names of the images that are georeferenced; a `UserError` if they cannot be read, or others made polygons."""
    found = {name for name, file in image_files.items() if scenes.is_georeferenced(file)}
    if found:
        try:
            scenes.optional("rasterio")
        except UserError as error:
            example = image_files[min(found)]
            raise UserError(f"{example} is georeferenced, which its prediction would lose: {error}") from error
    if vector != "none":
        plain = [file for name, file in image_files.items() if name not in found]
        if plain:
            raise UserError(
                f"--vector={vector} is for GeoTIFF files, which say where on the map they are; {plain[0]} does not: "
                "leave out --vector, or the file"
            )
        scenes.optional("geopandas")
    return found


def _reason(file: epath.Path) -> str:
    return f"{file}: {file.suffix} files are not supported; save it as PNG or TIFF"


def _describe(network: trained.Trained, scale: str) -> str:
    """How images are predicted, in words."""
    show = lambda size: f"{size[1]}x{size[0]}"
    to = show(network.size)
    if scale == "native" or (scale == "train" and not network.resizes):
        trained_at = pixel_sizes.describe(network.config.data)
        text = "at their own size" if scale == "native" else f"{trained_at} as in training"
    elif scale == "fit" or network.source_sizes is None:
        return f"resized to {to} and back"
    else:
        sizes = " to ".join(dict.fromkeys(map(show, network.source_sizes)))
        text = f"resized as in training ({sizes} became {to}) and back"
    return f"{text}, in tiles if that is not {to}"


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
