"""Prediction of images of any size: mirrored borders, overlapping tiles, one compilation for all images."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod

import jax
import numpy as np

from unet_jax.data.source import Classes
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward
from unet_jax.parallel import processes, sharding


def check_image(image: np.ndarray, classes: Classes) -> None:
    """Raises a `UserError` unless `image` is `[H, W, C]` with the channels and the type of the images of `classes`."""
    if image.ndim != 3 or image.dtype != classes.dtype or 0 in image.shape or image.shape[-1] != classes.channels:
        raise UserError(
            f"an image must be {classes.dtype} [height, width, {classes.channels} channel(s)], not {image.dtype} "
            f"{image.shape}"
        )


def rounded(tile: Sequence[int], network: forward.Network, tta: str = "none") -> tuple[int, int]:
    """The (height, width) of tiles as they are predicted: whole multiples of the stride."""
    stride, fewest = network.model.stride, 1 if _is_seamless(network, tta) else 2
    return tuple(max(n // stride, fewest) * stride for n in tile)


def _is_seamless(network: forward.Network, tta: str) -> bool:
    """Whether tiles fit together; those that are rotated do not lie on the grid of the image."""
    return network.model.is_local and tta != "rotations"


class Predictor:
    """Predicts images of any size, tile by tile; holds no more than one row of tiles of the result in memory.

    A network without padding predicts each tile as it would the whole image: tiles begin at multiples of its stride,
    and their surroundings are read with them. A padded network sees the edge of each tile; there tiles overlap by a
    quarter and are blended.
    """

    def __init__(
        self,
        network: forward.Network,
        variables: Mapping | None,
        tile: Sequence[int],
        tta: str = "none",
        batch_size: int = 1,
    ):
        """Compiles lazily, on the first image.

        Args:
          network: the network, and `variables` its weights; None if they come with each image.
          tile: (height, width) predicted at a time; the attribute `tile` is rounded to a multiple of the stride.
          tta: test-time augmentation, one of `forward.VIEWS`.
          batch_size: tiles at a time, rounded up to a multiple of the devices that share a batch.

        Raises:
          UserError: an unknown `tta`, or a size that is not positive.
        """
        check_choice("tta", tta, forward.VIEWS)
        if min(*tile, batch_size) < 1:
            raise UserError(f"tile = {tuple(tile)} and batch_size = {batch_size} must be positive")
        self._classes, self._mesh, self._stride = network.classes, network.mesh, network.model.stride
        data_devices = self._mesh.shape["data"]
        self._batch_size = -(-batch_size // data_devices) * data_devices
        self.tile = rounded(tile, network, tta)
        seamless = _is_seamless(network, tta)
        self._overlap = [0 if seamless else ceil(n / 4 / self._stride) * self._stride for n in self.tile]
        self._margins = network.margins(self.tile, tta)
        self._variables = variables and jax.device_put(variables, sharding.replicated(self._mesh))

        def probability(variables, window):
            logits = network.window_logits(variables, window, self.tile, tta)
            return forward.to_probability(logits, network.task)

        self._step = sharding.jit_replicated(self._mesh, probability)

    def probability(self, image: np.ndarray, out: np.ndarray | None = None, progress: bool = False) -> np.ndarray:
        """Class probabilities of every pixel.

        Args:
          image: `[H, W, C]`, in memory or a memory-mapped file.
          out: where to write, float `[H, W, K]`, such as a memory-mapped file; None makes an array.
          progress: whether to draw a bar.

        Returns:
          `out`; float32 if it was None.

        Raises:
          UserError: an image of other channels or another type than the network's; an `out` of another shape.
        """
        check_image(image, self._classes)
        shape = (*image.shape[:2], self._classes.num_outputs)
        if out is None:
            out = np.empty(shape, np.float32)
        if out.shape != shape:
            raise UserError(f"out must be of shape {shape}, not {out.shape}")
        (height, width), (rows, columns) = image.shape[:2], self.tile
        if height < rows or width < columns:
            processes.print_on_main(f"An image of {height}x{width} pixels is mirrored up to a tile of {rows}x{columns}")
        for finished, band in self.bands(image, progress):
            out[finished] = band
        return out

    def bands(
        self, image: np.ndarray, progress: bool = False, variables: Mapping | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields rows and their probabilities float32 `[rows, W, K]`, from top to bottom; see `probability`.

        `variables` are other weights than those that the predictor was made with.
        """
        check_image(image, self._classes)
        size = image.shape[:2]
        starts = [self._starts(n, axis) for axis, n in enumerate(size)]
        weights = [self._weights(starts[axis], axis) for axis in (0, 1)]
        (height, width), left = self.tile, starts[1]
        band = np.zeros((height, left[-1] + width, self._classes.num_outputs), np.float32)
        places = itertools.product(range(len(starts[0])), range(len(left)))
        for (i, j), tile in zip(places, self._tiles(image, starts, progress, variables), strict=True):
            band[:, left[j] : left[j] + width] += weights[0][i][:, None, None] * weights[1][j][:, None] * tile
            if j + 1 == len(left):  # rows that the next row of tiles does not reach are finished
                top = starts[0][i]
                done = starts[0][i + 1] - top if i + 1 < len(starts[0]) else height
                yield slice(top, min(top + done, size[0])), band[: min(done, size[0] - top), : size[1]].copy()
                band[: height - done] = band[done:]
                band[height - done :] = 0

    def _starts(self, length: int, axis: int) -> list[int]:
        """Where tiles begin along an axis: at multiples of the stride, the last one at its end."""
        tile, overlap = self.tile[axis], self._overlap[axis]
        last = max(-(-length // self._stride) * self._stride - tile, 0)
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

    def _tiles(self, image, starts: list[list[int]], progress: bool, variables) -> Iterator[np.ndarray]:
        """The probabilities of each tile, row by row; the next batch is read while the device works."""
        import tqdm

        # The source pixel of each pixel of the image with its margins.
        index = [
            np.pad(np.arange(n), (before, begin[-1] + tile - n + after), mode="reflect")
            for n, begin, tile, (before, after) in zip(image.shape[:2], starts, self.tile, self._margins, strict=True)
        ]
        places = itertools.product(*starts)  # never all of them: a scene may have millions
        rows = sharding.process_rows(self._mesh, self._batch_size)
        pending: list = []
        with tqdm.tqdm(total=prod(map(len, starts)), desc="Predicting", unit=" tiles", disable=not progress) as bar:
            while chosen := list(itertools.islice(places, self._batch_size)):
                windows = [self._window(image, index, place) for place in chosen]
                windows += windows[:1] * (self._batch_size - len(chosen))
                batch = sharding.put_batch(self._mesh, {"image": np.stack(windows)[rows]})
                pending.append((len(chosen), self._step(variables or self._variables, batch["image"])))
                if len(pending) > 1:
                    yield from self._fetch(pending.pop(0), bar)
            yield from self._fetch(pending.pop(0), bar)

    def _fetch(self, step, bar) -> Iterator[np.ndarray]:
        count, result = step
        yield from np.asarray(result)[:count]
        bar.update(count)

    def _window(self, image: np.ndarray, index: Sequence[np.ndarray], place: tuple[int, int]) -> np.ndarray:
        """A tile with its margins; reads no more of `image` than that."""
        rows, columns = (
            one[start : start + before + tile + after]
            for one, start, tile, (before, after) in zip(index, place, self.tile, self._margins, strict=True)
        )
        top, left = rows.min(), columns.min()
        block = np.asarray(image[top : rows.max() + 1, left : columns.max() + 1])
        return block[(rows - top)[:, None], columns - left]
