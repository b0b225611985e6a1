"""Reading and resizing image files, by Pillow alone, so that it works where TensorFlow is not installed."""

import zipfile
import zlib

import numpy as np
from PIL import Image

from unet_jax.errors import UserError, check_choice

# What Pillow and zip archives raise for broken files.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)
RESIZE = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


def read(path, mode: str) -> np.ndarray:
    """Reads an image file as uint8.

    Args:
      path: a file, as any path object with `open` (of a folder, of a zip archive, of a bucket).
      mode: `RGB` or `L` to convert to `[h, w, 3]` or `[h, w]`; `grey` for an image without colour `[h, w]`; `red` for
        the red channel `[h, w]` as it is, or the indices of an image with a palette.

    Raises:
      UserError: the file is not a readable 8-bit image; names it.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            deep = any(";16" in str(tile) for tile in image.tile)  # Pillow would keep the upper 8 bits, and not say so
            if deep or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise UserError(
                    f"{path}: a{' 16-bit' if deep else ''} {image.mode} image; 8-bit grey, RGB or RGBA is needed"
                )
            if mode == "red":
                if image.mode == "P":  # the ids are the indices, not the colours
                    return np.asarray(image)
                return np.asarray(image.getchannel("R") if "R" in image.getbands() else image.convert("L"))
            if mode == "grey":
                rgb = np.asarray(image.convert("RGB"))
                if (rgb != rgb[..., :1]).any():
                    raise UserError(f"{path}: a coloured image; 8-bit grey is needed, convert it")
                return rgb[..., 0]
            return np.asarray(image.convert(mode))
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error


def resize_image(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes an image uint8 `[h, w, C]` to (height, width) `size`.

    Args:
      image: uint8 `[h, w, C]`, C = 1 or 3.
      size: height and width in pixels.
      method: `bilinear` (antialiased where it shrinks) or `nearest` (centre of each pixel, as in TensorFlow 2).
    """
    check_choice("config.data.resize", method, RESIZE)
    if image.shape[:2] == tuple(size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((size[1], size[0]), RESIZE[method]))
    return resized.reshape(*size, image.shape[-1])


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a label uint8 `[h, w]` or `[h, w, K]` to `size` by the nearest pixel: classes never blend."""
    rows, columns = ((np.arange(n) + 0.5) * old / n for n, old in zip(size, label.shape[:2], strict=True))
    return label[rows.astype(int)[:, None], columns.astype(int)[None, :]]
