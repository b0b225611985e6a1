"""What a work directory holds, for evaluation, prediction, export and notebooks alike."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn

from unet_jax import data, losses, models
from unet_jax.data import border, images, pixel_sizes, reading
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward, resize, tiles
from unet_jax.inference.normalization import check_values
from unet_jax.parallel import processes, sharding
from unet_jax.workdir import checkpoints, files, record


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, made by `load`."""

    config: Any  # the configuration that it was trained with
    classes: data.Classes  # task, class names, palette, and channels of the images
    network: forward.Network  # the network on its mesh, with its normalization
    variables: dict[str, Any]  # its weights, the EMA weights if enabled; whole on every device
    step: int  # of the checkpoint
    # The smallest and the largest (height, width) of the training images before they were resized, each axis by itself;
    # None if they were not recorded, as for imported weights.
    source_sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    class_counts: tuple[int, ...] | None = None  # pixels of each class in the training labels, if its loss needs them
    # The smallest and the largest value of each channel in the training images; None if they were not recorded.
    value_limits: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @functools.cached_property
    def _probability(self):
        return sharding.jit_replicated(self.mesh, self.network.probability, static_argnames="tta")

    @functools.cached_property
    def predictor(self) -> Callable[[str], tiles.Predictor]:
        """Test-time augmentation -> what predicts images in tiles of `size`; compiled once."""
        return functools.cache(lambda tta: tiles.Predictor(self.network, self.variables, self.size, tta))

    @property
    def model(self) -> nn.Module:
        """The Flax module."""
        return self.network.model

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that the weights lie on."""
        return self.network.mesh

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that training resized its images to, or of its windows if it kept them at their own size."""
        return tuple(self.config.data.size or self.config.augment.crop)

    @property
    def resizes(self) -> bool:
        """Whether images of other sizes must be resized, as they were, or may have been, in training."""
        return bool(self.config.data.size) and self.source_sizes != (self.size, self.size)

    @functools.cached_property
    def _warn_once(self):
        return functools.cache(processes.print_on_main)

    def resolve_tta(self, tta: str | None = None, field: str = "tta") -> str:
        """The set of `forward.VIEWS` that a choice of `forward.TTA` means for this network; None is `config.eval.tta`.

        `auto` is the most views that are all as training drew them. If others are asked for, it prints a warning, once.
        Raises a `UserError` that names the `field` of an unknown choice.
        """
        if tta is None:
            tta, field = self.config.eval.tta, "config.eval.tta"
        check_choice(field, tta, forward.TTA)
        augment = self.config.augment
        best = forward.best_tta(augment)
        if tta == "auto":
            return best
        if unseen := forward.unseen_views(tta, augment):
            self._warn_once(
                f"warning: test-time augmentation {tta!r} averages over views that training never drew "
                f"({', '.join(unseen)}), which can make it worse; here 'auto' means {best!r}"
            )
        return tta

    def predict(self, images, tta: str = "none") -> jax.Array:
        """Class probabilities of a batch at the size of the training; compiled once per shape. See `predict_image`.

        Args:
          images: `[B, H, W, C]` of the type `classes.dtype`, of the size `config.data.size`, to which training resized
            its images. If it did not resize them, of any size.
          tta: test-time augmentation, one of `forward.TTA`.

        Returns:
          float32 `[B, H, W, K]`; K = 1 for a binary task.

        Raises:
          UserError: images of another type, of other channels or of another size; an unknown `tta`.
        """
        tta = self.resolve_tta(tta)
        classes = self.classes
        if images.ndim != 4 or images.dtype != classes.dtype or images.shape[-1] != classes.channels:
            raise UserError(
                f"images must be {classes.dtype} [batch, height, width, {classes.channels} channel(s)], not "
                f"{images.dtype} {images.shape}"
            )
        if self.resizes and images.shape[1:3] != self.size:
            (height, width), (rows, columns) = images.shape[1:3], self.size
            raise UserError(
                f"images of {height}x{width} pixels (height x width), but this network is for images resized to "
                f"{rows}x{columns}: use predict_image, which resizes them and the result"
            )
        return self._probability(self.variables, images, tta=tta)

    def predict_image(
        self, image: np.ndarray | epath.PathLike, scale: str = "train", tta: str | None = None
    ) -> np.ndarray:
        """Class probabilities of one image of any size, as `--mode=predict` computes them.

        `forward.to_label(probability, classes.task)` is its label.

        Args:
          image: a file, or `[H, W, C]` of the type `classes.dtype`, in memory or a memory-mapped file. An array does
            not say how large its pixels are, which a network trained with `config.data.pixel_size` has to know.
          scale: at which size it is predicted, one of `resize.SCALES`; see `resize.predicted_size`.
          tta: test-time augmentation, one of `forward.TTA`; None is `config.eval.tta`.

        Returns:
          float32 `[H, W, K]`, at the image's own size; K = 1 for a binary task.

        Raises:
          UserError: a file that is not a readable image, or not like those of the training; another array; an unknown
            option.
        """
        factors = None
        if isinstance(image, str | os.PathLike):
            factors, image = self.factors(image, scale), self.read_image(image)
        bands = self.predict_bands(np.asarray(image), scale, tta, factors=factors)
        probability = np.empty((*image.shape[:2], self.classes.num_outputs), np.float32)
        for rows, band in bands:
            probability[rows] = band
        return probability

    def predict_bands(
        self,
        image: np.ndarray,
        scale: str = "train",
        tta: str | None = None,
        interpolation: str = "bilinear",
        factors: tuple[float, float] | None = None,
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """`predict_image`, so that the probabilities of a large image are never held whole.

        Args:
          image, scale, tta: see `predict_image`.
          interpolation: of the probabilities to the size of the image, one of `resize.INTERPOLATION`.
          factors: of the image, as `factors` returns them.

        Yields:
          rows and their probabilities float32 `[rows, W, K]`, from top to bottom.
        """
        tta = self.resolve_tta(tta)
        check_choice("scale", scale, resize.SCALES)
        check_choice("interpolation", interpolation, resize.INTERPOLATION)
        tiles.check_image(image, self.classes)
        size = image.shape[:2]
        new = self.predicted_size(size, scale, factors)
        small = images.resize_image(image, new, self.config.data.resize)
        if new == self.size and self.config.data.size:
            bands = [(slice(0, new[0]), np.asarray(self.predict(small[None], tta)[0]))]
        else:
            bands = self.predictor(tta).bands(small)
        return resize.resize_bands(bands, new, size, interpolation)

    def factors(self, file: epath.PathLike, scale: str) -> tuple[float, float] | None:
        """What height and width of an image file are multiplied by, as in training; None if that is not by its pixels.

        Raises:
          UserError: it does not say how large its pixels are, and training scaled images to one size of them.
        """
        if scale != "train" or not self.config.data.pixel_size:
            return None
        return pixel_sizes.factors(self.config.data, pixel_sizes.read(epath.Path(file)))

    def predicted_size(
        self, size: tuple[int, int], scale: str, factors: tuple[float, float] | None = None
    ) -> tuple[int, int]:
        """The (height, width) at which an image of `size` is predicted; see `resize.predicted_size` and `factors`.

        Raises:
          UserError: the network was trained on images at their own size and has none to `fit`, or scaled them by the
            size of their pixels, which is not known without `factors`.
        """
        if not self.config.data.size:
            if scale == "fit":
                raise UserError(
                    "the scale 'fit' is for networks trained on images resized to one size; this one was trained on "
                    "images at their own size: choose 'train'"
                )
            if scale == "native":
                return size
            if self.config.data.pixel_size and factors is None:
                raise UserError(
                    f"this network was trained on images {pixel_sizes.describe(self.config.data)}, which an array does "
                    "not tell: give the file, or choose 'native' if the image is at that scale"
                )
            return images.scaled_size(size, factors or pixel_sizes.factors(self.config.data, None), "the image")
        return resize.predicted_size(scale, size, self.size, self.source_sizes)

    def read_image(self, file: epath.PathLike) -> np.ndarray:
        """Reads an image file as training did: `[H, W, C]` of the type `classes.dtype`.

        Raises:
          UserError: it is not a readable image, or not like those of the training: of other channels, of another depth,
            or of other values altogether.
        """
        settings, nodata = self.config.data, self.classes.dtype == "float32"
        array = reading.read_channels(epath.Path(file), settings.pages, settings.orientation, nodata)
        image = self.as_input(array, file)
        self.check_values(image, file)
        return image

    def as_input(self, array: np.ndarray, file: epath.PathLike) -> np.ndarray:
        """An image as its file holds it, or a part of it, as the network takes it; see `reading.as_input`."""
        classes, value_range = self.classes, tuple(self.config.data.value_range)
        if (array.dtype, classes.dtype, value_range) == (np.uint16, "uint8", (0, 65535)):
            self._warn_once(
                "warning: 16-bit images are divided by 257. Older versions recorded this also where no training image "
                "had 16 bits: if so, convert these images to 8 bits as the training images were"
            )
        return reading.as_input(array, file, classes.channels, classes.dtype, value_range)

    def picture(self, image: np.ndarray) -> np.ndarray:
        """What people see of an image `[H, W, C]`: uint8 `[H, W, 1 or 3]`, the channels of `config.data.show`."""
        return self.network.normalization.picture(image, self.config.data.show)

    def check_values(self, image: np.ndarray, file: epath.PathLike) -> None:
        """Raises a `UserError` if the values of an image cannot be like those of the training; see `normalization`."""
        if self.value_limits is not None:
            check_values(image, self.value_limits, file)


def load(path: epath.PathLike, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Trained:
    """Loads a trained network from its work directory alone.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      mesh: the devices to put the weights on; None is all devices, see `sharding.create_eval_mesh`.

    Raises:
      UserError: no work directory, or no such checkpoint; or one of another network than `config.json` describes;
        or a file of it is damaged, or was changed after the checkpoint was saved.
    """
    path = epath.Path(path)
    config = files.read_config(path)
    if config.deterministic:
        sharding.use_deterministic_kernels()
    values = files.read_classes(path)
    classes = data.Classes.from_json(values)
    mesh = sharding.create_eval_mesh(config.mesh.data, config.mesh.space) if mesh is None else mesh
    normalization = forward.Normalization.from_json(values.get("normalization"))
    try:
        data.check_settings(config.data)
        check_choice("config.eval.tta", config.eval.tta, forward.TTA)
        losses.make(config.loss, classes.task, len(classes.names), values.get("class_counts"))
        border.pixel_weight_fn(config.loss, classes)
        network = forward.create_network(config.model, classes, mesh, normalization)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from error
    step, saved = checkpoints.read_variables(path, step, sharding.replicated(mesh))
    variables = checkpoints.evaluated(saved)
    differing = models.differing_shapes(network.model, classes.channels, variables)
    if differing:
        weight, (found, needed) = next(iter(differing.items()))
        raise UserError(
            f"{path}, step {step}: {weight} is {found or 'absent'}, but the network of config.json with "
            f"{len(classes.names)} classes and {classes.channels} channel(s) needs {needed or 'none'}: the files of "
            "this work directory do not belong together"
        )
    record.check(path, step, checkpoints.read_meta(path, step), record.make(config, values))
    held = values.get("values", {})
    limits = (tuple(held["min"]), tuple(held["max"])) if held else None
    return Trained(config, classes, network, variables, step, _source_sizes(values), values.get("class_counts"), limits)


def _source_sizes(values: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """See `Trained.source_sizes`; older work directories recorded the size of the first image alone."""
    first = values.get("image_size")
    sizes = values.get("image_sizes", first and [first, first])
    return sizes and tuple(tuple(map(int, size)) for size in sizes)
