"""Generated shapes, after the test data of the PyTorch U-Net: six kinds, white on black, one of each per image.

Variants: `multilabel`, six masks that may overlap; `multiclass`, background and six classes, where the later shape
covers the earlier one. Every image is a function of (seed, split, index).
"""

import numpy as np

from unet_jax.data.source import Classes, Source
from unet_jax.errors import UserError, check_choice

SHAPES = ("square", "circle", "triangle", "ring", "mesh", "plus")
PALETTE = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180))
SPLITS = ("train", "validation", "test")


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation`, `test` or `all`.

    `train` has `config.shapes_train` images, `validation` and `test` have `config.shapes_validation` each.

    Raises:
      UserError: an unknown variant or split; images too small for the shapes; no images.
    """
    meaning = classes(config)
    check_choice("--split", split, (*SPLITS, "all"))
    if not config.size or min(config.size) < 48:
        raise UserError(f"config.data.size = {config.size}: shapes need at least 48x48 pixels")
    for name, smallest in (("shapes_train", 1), ("shapes_validation", 1), ("shapes_seed", 0)):
        if config[name] < smallest:
            raise UserError(f"config.data.{name} = {config[name]} must be {smallest} or more")
    counts = {name: config.shapes_train if name == "train" else config.shapes_validation for name in SPLITS}
    examples = [(name, i) for name in SPLITS if split in (name, "all") for i in range(counts[name])]

    def read(index):
        name, i = examples[index]
        image, masks = generate(tuple(config.size), [config.shapes_seed, SPLITS.index(name), i])
        if meaning.task == "multilabel":
            return image, masks
        return image, (masks * np.arange(1, len(SHAPES) + 1, dtype=np.uint8)).max(-1)

    return Source(meaning, [f"{name}_{i:05d}" for name, i in examples], read, files=(), read_size=lambda _: config.size)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.variant`."""
    if check_choice("config.data.variant", config.variant, ("multiclass", "multilabel")) == "multilabel":
        return Classes("multilabel", SHAPES, PALETTE, channels=1)
    return Classes("multiclass", ("background", *SHAPES), ((0, 0, 0), *PALETTE), channels=1)


def generate(size: tuple[int, int], seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One image uint8 `[H, W, 1]` (0 or 255) and its masks uint8 `[H, W, 6]` (0 or 1)."""
    rng = np.random.default_rng(seed)
    grid_y, grid_x = np.mgrid[: size[0], : size[1]]

    def place(zoom):
        """The offsets of all pixels from a random centre, and a random size, in pixels."""
        y, x = (int(side * rng.uniform(0.1, 0.9)) for side in size)
        return grid_y - y, grid_x - x, int(min(size) * rng.uniform(0.06, 0.12) * zoom)

    y, x, s = place(0.8)
    square = np.maximum(abs(y), abs(x)) <= s // 2
    y, x, s = place(0.5)
    circle = y**2 + x**2 < s**2
    y, x, s = place(1.0)
    triangle = (x + s // 2 >= 0) & (x <= y) & (y + s // 2 < s)  # the lower left half of a square
    y, x, s = place(0.7)
    ring = (y**2 + x**2 < s**2) & (y**2 + x**2 >= (0.7 * s) ** 2)
    y, x, s = place(1.0)
    mesh = (np.maximum(abs(y), abs(x)) <= s // 2) & (grid_y % 2 == 1) & (grid_x % 2 == 1)
    y, x, s = place(1.2)
    bar = lambda along, across: (abs(along) <= s // 2) & (across >= -1) & (across < 1)
    plus = bar(y, x) | bar(x, y)

    masks = np.stack([square, circle, triangle, ring, mesh, plus], axis=-1)
    return masks.any(-1, keepdims=True).astype(np.uint8) * 255, masks.astype(np.uint8)
