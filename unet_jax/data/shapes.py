"""Generated shapes, after the test of the PyTorch U-Net: six kinds, white on black, one of each per image.

Variants: `multilabel`, six masks that may overlap; `multiclass`, background and six classes, where shapes overlap the
later one. Every image is a function of (seed, split, index).
"""

import numpy as np

from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError, check_choice

SHAPES = ("square", "circle", "triangle", "ring", "mesh", "plus")
PALETTE = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180))
SPLITS = ("train", "validation", "test")


def load(config, split: str) -> Source:
    """The source of `split`: `config.shapes_train` images for training, `config.shapes_validation` for the others.

    Raises:
      UserError: an unknown variant or split; images too small to hold a shape.
    """
    meaning = classes(config)
    check_choice("--split", split, (*SPLITS, "all"))
    if min(config.size) < 48:
        raise UserError(f"config.data.size = {config.size}: shapes need at least 48x48 pixels")
    for name in ("shapes_train", "shapes_validation", "shapes_seed"):
        if config[name] < (name != "shapes_seed"):
            raise UserError(f"config.data.{name} = {config[name]} is too small")
    counts = {"train": config.shapes_train}
    examples = [
        (name, i)
        for name in (SPLITS if split == "all" else (split,))
        for i in range(counts.get(name, config.shapes_validation))
    ]

    def read(index):
        name, i = examples[index]
        image, masks = generate(tuple(config.size), [config.shapes_seed, SPLITS.index(name), i])
        if meaning.task == "multilabel":
            return image, masks
        label = np.zeros(masks.shape[:2], np.uint8)
        for k in range(len(SHAPES)):
            label[masks[..., k] > 0] = k + 1
        return image, label

    return Source(meaning, [f"{name}_{i:05d}" for name, i in examples], read, files=())


def classes(config) -> Classes:
    """What the labels mean, by `config.variant`.

    Raises:
      UserError: an unknown variant.
    """
    if check_choice("config.data.variant", config.variant, ("multiclass", "multilabel")) == "multilabel":
        return Classes("multilabel", SHAPES, PALETTE, channels=1)
    return Classes("multiclass", ("background", *SHAPES), ((0, 0, 0), *PALETTE), channels=1)


def generate(size: tuple[int, int], seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One image uint8 `[H, W, 1]` (0 or 255) and its masks uint8 `[H, W, 6]` (0 or 1)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]

    def place(zoom):
        """Offsets from a random centre, and a random size, in pixels."""
        y, x = (int(side * rng.uniform(0.1, 0.9)) for side in size)
        return rows - y, columns - x, int(min(size) * rng.uniform(0.06, 0.12) * zoom)

    y, x, s = place(0.8)
    square = np.maximum(abs(y), abs(x)) <= s // 2
    y, x, s = place(0.5)
    circle = y**2 + x**2 < s**2
    y, x, s = place(1.0)
    triangle = (x + s // 2 >= 0) & (x <= y) & (y + s // 2 < s)  # the lower left half of a square
    y, x, s = place(0.7)
    ring = (y**2 + x**2 < s**2) & (y**2 + x**2 >= (0.7 * s) ** 2)
    y, x, s = place(1.0)
    mesh = (np.maximum(abs(y), abs(x)) <= s // 2) & (rows % 2 == 1) & (columns % 2 == 1)
    y, x, s = place(1.2)
    bar = lambda along, across: (abs(along) <= s // 2) & (across >= -1) & (across < 1)
    plus = bar(y, x) | bar(x, y)

    masks = np.stack([square, circle, triangle, ring, mesh, plus], axis=-1)
    return masks.any(-1, keepdims=True).astype(np.uint8) * 255, masks.astype(np.uint8)
