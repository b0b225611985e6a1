"""Writes images of things that resizing would destroy, with their masks, for configs/folder.py.

python scripts/make_tiny_things.py objects FOLDER   # 40 images of 2000x2000: one square of 8x8 among 300 crosses
python scripts/make_tiny_things.py lines FOLDER     # 40 images of 1024x1024: 12 curves, one pixel wide, in noise
"""

import argparse
import pathlib

import numpy as np
from PIL import Image
from scipy import ndimage

OBJECT = 8  # pixels, height and width
CROSS = np.zeros((OBJECT, OBJECT), bool)
CROSS[3:5] = CROSS[:, 3:5] = True


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A cloudy grey background with noise, float `[size, size]`."""
    clouds = ndimage.zoom(rng.normal(0, 15, (size // 50 + 1,) * 2), size / (size // 50 + 1), order=1)
    return 110 + clouds[:size, :size] + rng.normal(0, 10, (size, size))


def objects(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image with one bright square among crosses of the same size and brightness, and its mask."""
    image, mask = texture(rng, 2000), np.zeros((2000, 2000), bool)
    for k in range(301):
        row, column = rng.integers(0, 2000 - OBJECT, 2)
        place = slice(row, row + OBJECT), slice(column, column + OBJECT)
        if not mask[place].any():
            image[place] += 60 * (CROSS if k else 1)
            mask[place] |= not k
    return image, mask


def lines(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of bright curves that are one pixel wide, and their mask."""
    image, mask = texture(rng, 1024), np.zeros((1024, 1024), bool)
    for _ in range(12):
        steps = 3000
        angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.02, steps))
        path = rng.uniform(0, 1024, (2, 1)) + np.cumsum([np.sin(angle), np.cos(angle)], axis=1)
        rows, columns = path.astype(int)[:, ((path >= 0) & (path < 1024)).all(0)]
        mask[rows, columns] = True
    return image + 40 * mask, mask


def main() -> None:
    """Writes the images of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("objects", "lines"))
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    for name in ("images", "masks"):
        (arguments.folder / name).mkdir(parents=True)
    for index in range(40):
        image, mask = {"objects": objects, "lines": lines}[arguments.kind](np.random.default_rng(index))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(arguments.folder / f"images/{index:02d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(arguments.folder / f"masks/{index:02d}.png")


if __name__ == "__main__":
    main()
