"""Windows of images at their own size: where they lie, and the pixels around them.

An epoch has as many windows of each image as cover it. Each lies anywhere in its image with the same probability, or,
for a share of them, is centred on a pixel of a class, drawn evenly among the classes of that image: so a class that
few pixels have is seen often. No window without a labelled pixel is drawn.

What is drawn is a function of the seed and of the place of the window in the order of all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from unet_jax.data.source import Classes
from unet_jax.errors import UserError

Size = tuple[int, int]  # height, width
INDEXED = 10_000  # pixels of each class of an image that windows can be centred on, at most
ATTEMPTS = 10  # windows drawn anywhere, before one is centred on a labelled pixel


@dataclasses.dataclass(frozen=True)
class Windows:
    """How the windows of a training are drawn."""

    size: Size
    reach: Size  # pixels that are read above and below, and left and right of a window, for what moves pixels
    foreground: float  # share of the windows that are centred on a pixel of a class

    @property
    def extent(self) -> Size:
        """Of a window with what surrounds it."""
        return tuple(size + 2 * reach for size, reach in zip(self.size, self.reach, strict=True))

    def draw(self, key: Sequence[int], example: Mapping[str, np.ndarray], classes: Classes) -> Size:
        """The first row and column of a window; negative where the image is smaller than a window.

        Args:
          key: two integers, the seed and the place of the window in the order.
          example: `label`, with its `pixels` and `ends`, see `index_pixels`; at least one pixel is labelled.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        choose = lambda count: int(rng.random() * count)
        label, (*of_classes, labelled) = example["label"], np.split(example["pixels"], example["ends"])[:-1]
        if rng.random() < self.foreground:
            found = [pixels for pixels in (of_classes[1:] if classes.task == "binary" else of_classes) if len(pixels)]
            if found:
                pixels = found[choose(len(found))]
                return self._around(pixels[choose(len(pixels))], label.shape)
        for _ in range(ATTEMPTS):
            rows, columns = (
                choose(n - w + 1) if n > w else (n - w) // 2 for n, w in zip(label.shape, self.size, strict=False)
            )
            inside = label[max(rows, 0) : rows + self.size[0], max(columns, 0) : columns + self.size[1]]
            if (inside != classes.ignore_label).any():
                return rows, columns
        return self._around(labelled[choose(len(labelled))], label.shape)

    def _around(self, pixel: int, shape: Sequence[int]) -> Size:
        """The window with a pixel in the middle, or as near to it as it can be inside the image."""
        place = divmod(int(pixel), shape[1])
        return tuple(
            int(np.clip(p - w // 2, 0, n - w)) if n > w else (n - w) // 2
            for p, w, n in zip(place, self.size, shape, strict=False)
        )

    def cut(self, example: Mapping[str, np.ndarray], start: Size, ignore_label: int) -> dict[str, np.ndarray]:
        """A window and what surrounds it: `image`, `label` and maybe `weight`, each `[size + 2 reach, ...]`.

        Outside of the image it is mirrored, and there the label is the `ignore_label`, and the weight 0.
        """
        height, width = example["label"].shape[:2]
        rows, columns = (
            np.arange(first - reach, first + size + reach)
            for first, size, reach in zip(start, self.size, self.reach, strict=True)
        )
        outside = ((rows < 0) | (rows >= height))[:, None] | ((columns < 0) | (columns >= width))
        place = mirror(rows, height)[:, None], mirror(columns, width)
        found = {name: example[name][place] for name in ("image", "label", "weight") if name in example}
        for name, value in (("label", ignore_label), ("weight", 0)):
            if name in found and outside.any():
                found[name][outside] = value
        return found


def check_size(crop: Sequence[int]) -> Size:
    """The size of the windows, if `config.augment.crop` is one; else a `UserError`."""
    if len(crop) != 2 or not all(isinstance(n, int) and n > 0 for n in crop):
        raise UserError(
            f"config.data.size = () keeps images at their own size, so config.augment.crop = {tuple(crop)} must be the "
            "(height, width) of the windows to train on, such as (256, 256)"
        )
    return tuple(crop)


def per_image(sizes: Sequence[Size], window: Size) -> np.ndarray:
    """How many windows of one size cover each of some images: in an epoch it is drawn as often; int64 `[n]`."""
    return np.prod([-(-np.array(sizes)[:, axis] // window[axis]) for axis in (0, 1)], axis=0)


def index_pixels(label: np.ndarray, classes: Classes) -> dict[str, np.ndarray]:
    """Pixels of each class in a label `[H, W]` or `[H, W, K]`, and those that count at all.

    Of more than `INDEXED`, as many are chosen at random, always the same.

    Returns:
      `pixels` int32: the numbers, row by row, of the pixels of each class, and of all that count; `ends` int32
      `[K + 1]`: where those of each end.
    """
    count, is_multilabel = len(classes.names), classes.task == "multilabel"
    counted = label != classes.ignore_label
    rng = np.random.Generator(np.random.Philox(0))
    chosen = []
    for k in range(count + 1):
        if k == count:
            mask = counted.any(-1) if is_multilabel else counted
        else:
            mask = label[..., k] == 1 if is_multilabel else label == k
        pixels = np.flatnonzero(mask)
        if len(pixels) > INDEXED:
            pixels = np.sort(pixels[(rng.random(INDEXED) * len(pixels)).astype(int)])
        chosen.append(pixels.astype(np.int32))
    return {"pixels": np.concatenate(chosen), "ends": np.cumsum([len(pixels) for pixels in chosen], dtype=np.int32)}


def mirror(index: np.ndarray, length: int) -> np.ndarray:
    """Reflects indices into 0..length-1 without repeating the border: -1 -> 1."""
    period = max(2 * (length - 1), 1)
    index = index % period
    return np.minimum(index, period - index) if length > 1 else np.zeros_like(index)
