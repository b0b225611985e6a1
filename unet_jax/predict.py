"""Prediction for images of any size: mirrored borders, overlap tiles, test-time augmentation.

`logits` predicts a window of an image inside a jitted step. `Predictor` covers an image of any size with such windows,
one compilation for all images, and holds no more than one row of tiles of the result in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, hypot, sqrt

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unet_jax import data, mesh, resample
from unet_jax.errors import UserError, check_choice

TTA = ("none", "flips", "dihedral", "rotations")  # 1, 4, 8 and 7 predictions averaged
ROTATIONS = 7  # of the paper's ISBI 2012 score; the angles, which it does not give, are spread evenly over the circle


def as_float(image: jax.Array) -> jax.Array:
    """uint8 images as float32 in 0..1, the range the network is trained on."""
    return image.astype(jnp.float32) / 255


def margins(model: nn.Module, size: Sequence[int], tta: str = "none") -> list[tuple[int, int]]:
    """How many pixels `logits` wants around a window of (height, width) `size`: (above, below), (left, right)."""
    if tta != "rotations":
        return list(model.margins(size))
    side, ((before, after), _) = _canvas(model, size)
    radius = ceil(sqrt(2) * (max(before, after) + side / 2 + 1)) + 2  # two pixels for the cubic kernel
    return [(radius - n // 2, radius - n + n // 2) for n in size]


def surround(image: jax.Array, around: Sequence[tuple[int, int]]) -> jax.Array:
    """`[B, H, W, C]` with mirrored margins, as in figure 2 of the paper."""
    return jnp.pad(image, ((0, 0), *around, (0, 0)), mode="reflect")


def surround_image(model: nn.Module, image: jax.Array, tta: str = "none") -> jax.Array:
    """Whole uint8 images `[B, H, W, C]` as floats, mirrored at their borders as far as `logits` wants it."""
    return surround(as_float(image), margins(model, image.shape[1:3], tta))


def logits(
    model: nn.Module, variables: Mapping, window: jax.Array, size: Sequence[int], task: str, tta: str = "none"
) -> jax.Array:
    """Predicts every pixel of windows of (height, width) `size`.

    Args:
      model: the network.
      variables: its weights.
      window: float `[B, H, W, C]`, the pixels of `size` with `margins` around them.
      size: of what is predicted.
      task: `multiclass`, `binary` or `multilabel`.
      tta: `none`; `flips`, mean probability over the four flips; `dihedral`, over flips and quarter turns; `rotations`,
        over seven rotations.

    Returns:
      float32 `[B, *size, K]`; with `tta`, the logits of the mean probability.
    """
    cut = lambda x: x[:, : size[0], : size[1]]
    if tta == "none":
        return cut(model.apply(variables, window))
    probability = lambda x: to_probability(model.apply(variables, x), task)
    if tta == "rotations":
        mean = _mean_over_rotations(model, probability, window, size)
    else:
        turns = (0, 2) if tta == "flips" else (0, 1, 2, 3)
        views = [(turn, mirrored) for turn in turns for mirrored in (False, True)]
        mean = cut(sum(_unview(probability(_view(window, *view)), *view) for view in views)) / len(views)
    tiny = jnp.finfo(mean.dtype).tiny
    log_mean = jnp.log(mean.clip(tiny))
    return log_mean if task == "multiclass" else log_mean - jnp.log((1 - mean).clip(tiny))


def to_probability(logits: jax.Array, task: str) -> jax.Array:
    """Softmax, or sigmoids."""
    return jax.nn.softmax(logits) if task == "multiclass" else jax.nn.sigmoid(logits)


def to_label(probability: np.ndarray, task: str, threshold: float = 0.5) -> np.ndarray:
    """Probabilities `[..., K]` -> class uint8 `[...]`, or masks uint8 `[..., K]` for a multilabel task.

    Args:
      probability: of each class; K = 1 for a binary task.
      task: `multiclass`, `binary` or `multilabel`.
      threshold: a sigmoid predicts its class where the probability exceeds it.
    """
    if task == "multiclass":
        return probability.argmax(-1).astype(np.uint8)
    positive = (probability > threshold).astype(np.uint8)
    return positive[..., 0] if task == "binary" else positive


def _view(x: jax.Array, turn: int, mirrored: bool) -> jax.Array:
    x = jnp.rot90(x, turn, (1, 2))
    return x[:, :, ::-1] if mirrored else x


def _unview(x: jax.Array, turn: int, mirrored: bool) -> jax.Array:
    return jnp.rot90(x[:, :, ::-1] if mirrored else x, -turn, (1, 2))


def _canvas(model: nn.Module, size: Sequence[int]) -> tuple[int, Sequence[tuple[int, int]]]:
    """The side of a square that holds a window of `size` at any angle, and the margins around the square."""
    side = ceil(hypot(*size)) + 2
    return side, model.margins((side, side))


def _mean_over_rotations(model, probability, window, size):
    side, ((before, after), _) = _canvas(model, size)
    center = [margin + n // 2 for (margin, _), n in zip(margins(model, size, "rotations"), size, strict=True)]
    offset = jnp.arange(-before, side + after) - side // 2
    sample = jax.vmap(resample.sample, (0, None, None, None))
    total = 0.0
    for angle in np.arange(ROTATIONS) * 2 * np.pi / ROTATIONS:
        rows, columns = resample.rotate(offset, offset, angle, 1.0)
        turned = sample(window, rows + center[0], columns + center[1], "cubic").clip(0, 1)
        predicted = probability(turned)[:, :side, :side]
        rows, columns = resample.rotate(*(jnp.arange(n) - n // 2 for n in size), -angle, 1.0)
        total = total + sample(predicted, rows + side // 2, columns + side // 2, "bilinear")
    return total / ROTATIONS


class Predictor:
    """Predicts images of any size, tile by tile.

    A network without padding predicts each tile as it would the whole image: tiles begin at multiples of its pooling
    grid, and their surroundings are read with them. A padded network sees the edge of each tile; there tiles overlap by
    a quarter and are blended.

    Attributes:
      tile: height and width predicted at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping,
        classes: data.Classes,
        tile: Sequence[int],
        tta: str = "none",
        batch_size: int = 1,
        devices: jax.sharding.Mesh | None = None,
    ):
        """Nothing is compiled before the first image.

        Args:
          model: the network.
          variables: its weights.
          classes: what it predicts.
          tile: (height, width), made a multiple of the pooling grid, 2^poolings.
          tta: see `logits`.
          batch_size: tiles at a time; made a multiple of the devices that share a batch.
          devices: a mesh; None is all devices.

        Raises:
          UserError: an unknown `tta`, a size that has no meaning.
        """
        check_choice("tta", tta, TTA)
        if min(*tile, batch_size) < 1:
            raise UserError(f"tile = {tuple(tile)} and batch_size = {batch_size} must be positive")
        self._devices = mesh.create(0, 1) if devices is None else devices
        ways = self._devices.shape["data"]
        self._batch_size = -(-batch_size // ways) * ways
        self._grid = 2 ** (len(model.features) - 1)
        # Rotated tiles do not lie on the pooling grid of the image, so they have seams to hide as well.
        seamless = model.is_local and tta != "rotations"
        self.tile = tuple(max(n // self._grid, 1 if seamless else 2) * self._grid for n in tile)
        self._overlap = [0 if seamless else ceil(n / 4 / self._grid) * self._grid for n in self.tile]
        self._margins = margins(model, self.tile, tta)
        self._classes = classes
        self._variables = jax.device_put(variables, mesh.replicated(self._devices))

        def probability(variables, image):
            window = mesh.split_height(self._devices, as_float(image))
            return to_probability(logits(model, variables, window, self.tile, classes.task, tta), classes.task)

        self._step = mesh.jit_replicated(self._devices, probability)

    def probability(self, image: np.ndarray, out: np.ndarray | None = None, progress: bool = False) -> np.ndarray:
        """Class probabilities of every pixel.

        Args:
          image: uint8 `[H, W, C]`, in memory or a memory-mapped file.
          out: where to write, float `[H, W, K]`, such as a memory-mapped file; None makes an array.
          progress: whether to draw a bar.

        Returns:
          `out`, float32 where it was made.

        Raises:
          UserError: no uint8 `[H, W, C]` with the channels that the network takes; an `out` of another shape.
        """
        self._check(image)
        shape = (*image.shape[:2], self._classes.num_outputs)
        if out is None:
            out = np.empty(shape, np.float32)
        if out.shape != shape:
            raise UserError(f"out must be of shape {shape}, not {out.shape}")
        (height, width), (rows, columns) = image.shape[:2], self.tile
        if height < rows or width < columns:
            mesh.say(f"An image of {height}x{width} pixels is mirrored up to a tile of {rows}x{columns}")
        for rows, band in self.bands(image, progress):
            out[rows] = band
        return out

    def _check(self, image: np.ndarray) -> None:
        channels = self._classes.channels
        if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape or image.shape[-1] != channels:
            raise UserError(
                f"an image must be uint8 [height, width, {channels} channel(s)], not {image.dtype} {image.shape}"
            )

    def bands(self, image: np.ndarray, progress: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields rows and their probabilities float32 `[rows, W, K]`, from the top to the bottom.

        Raises:
          UserError: no uint8 `[H, W, C]` with the channels that the network takes.
        """
        self._check(image)
        size = image.shape[:2]
        starts = [self._starts(n, axis) for axis, n in enumerate(size)]
        weights = [self._weights(starts[axis], axis) for axis in (0, 1)]
        (height, width), left = self.tile, starts[1]
        band = np.zeros((height, left[-1] + width, self._classes.num_outputs), np.float32)
        places = [(i, j) for i in range(len(starts[0])) for j in range(len(left))]
        for (i, j), tile in zip(places, self._tiles(image, starts, progress), strict=True):
            band[:, left[j] : left[j] + width] += weights[0][i][:, None, None] * weights[1][j][:, None] * tile
            if j + 1 == len(left):  # what the next row of tiles does not reach is finished
                top = starts[0][i]
                done = starts[0][i + 1] - top if i + 1 < len(starts[0]) else height
                yield slice(top, min(top + done, size[0])), band[: min(done, size[0] - top), : size[1]].copy()
                band[: height - done] = band[done:]
                band[height - done :] = 0

    def _starts(self, length: int, axis: int) -> list[int]:
        """Where tiles begin along an axis: on the pooling grid, the last one at its end."""
        tile, overlap = self.tile[axis], self._overlap[axis]
        last = max(-(-length // self._grid) * self._grid - tile, 0)
        return [*range(0, last, tile - overlap), last]

    def _weights(self, starts: list[int], axis: int) -> list[np.ndarray]:
        """The share of each tile in the result along an axis, float32 `[tile]`; the shares of a pixel add up to one."""
        tile, overlap = self.tile[axis], self._overlap[axis]
        ramp = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)) ** 2
        window = np.ones(tile)
        window[:overlap] *= ramp
        window[tile - overlap :] *= ramp[::-1]
        total = np.zeros(starts[-1] + tile)
        for start in starts:
            total[start : start + tile] += window
        return [(window / total[start : start + tile]).astype(np.float32) for start in starts]

    def _tiles(self, image: np.ndarray, starts: list[list[int]], progress: bool) -> Iterator[np.ndarray]:
        """The probabilities of each tile, row by row; the next batch is read while the device works."""
        import tqdm

        # The pixel that stands at each place of the image with its margins.
        index = [
            np.pad(np.arange(n), (before, begin[-1] + tile - n + after), mode="reflect")
            for n, begin, tile, (before, after) in zip(image.shape[:2], starts, self.tile, self._margins, strict=True)
        ]
        places = [(top, left) for top in starts[0] for left in starts[1]]
        pending: list = []
        with tqdm.tqdm(total=len(places), desc="Predicting", unit=" tiles", disable=not progress) as bar:
            for first in range(0, len(places), self._batch_size):
                chosen = places[first : first + self._batch_size]
                windows = [self._window(image, index, place) for place in chosen]
                windows += windows[:1] * (self._batch_size - len(chosen))
                batch = mesh.put_batch(self._devices, {"image": np.stack(windows)})
                pending.append((len(chosen), self._step(self._variables, batch["image"])))
                if len(pending) > 1:
                    yield from self._fetch(pending.pop(0), bar)
            yield from self._fetch(pending.pop(0), bar)

    def _fetch(self, step, bar) -> Iterator[np.ndarray]:
        count, result = step
        yield from np.asarray(result)[:count]
        bar.update(count)

    def _window(self, image: np.ndarray, index: Sequence[np.ndarray], place: tuple[int, int]) -> np.ndarray:
        """A tile with its margins, uint8; reads no more of `image` than it shows."""
        rows, columns = (
            one[start : start + before + tile + after]
            for one, start, tile, (before, after) in zip(index, place, self.tile, self._margins, strict=True)
        )
        top, left = rows.min(), columns.min()
        block = np.asarray(image[top : rows.max() + 1, left : columns.max() + 1])
        return block[(rows - top)[:, None], columns - left]
