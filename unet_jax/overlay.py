"""Labels drawn over their images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unet_jax import report
from unet_jax.data.source import Classes

MARGIN = 8


def overlay(image: np.ndarray, label: np.ndarray, classes: Classes, opacity: float = 0.5) -> np.ndarray:
    """An image uint8 `[H, W, C]` under the colours of its label, uint8 `[H, W, 3]`; the background stays clear.

    Args:
      image: uint8 `[H, W, C]`, C = 1 or 3.
      label: uint8 `[H, W]` or `[H, W, K]`.
      classes: names and colours.
      opacity: of the colours.
    """
    shown = (label == 1).any(-1) if classes.task == "multilabel" else label != 0
    colors = report.colorize(label, classes).astype(np.float32)
    mixed = (1 - opacity) * image + opacity * colors
    return np.where(shown[..., None], mixed, image).astype(np.uint8)


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray]], classes: Classes, columns: int = 6) -> Image.Image:
    """Captioned pictures in a grid, with a legend of all classes below.

    Args:
      pictures: caption and uint8 `[h, w, 3]`.
      classes: names and colours.
      columns: of the grid.
    """
    width, height = (max(p.shape[axis] for _, p in pictures) + extra for axis, extra in ((1, MARGIN), (0, 20 + MARGIN)))
    rows = -(-len(pictures) // columns)
    font = ImageFont.load_default(13)
    per_line = max(columns * width // 180, 1)
    legend = -(-len(classes.names) // per_line)
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height + 22 * legend + MARGIN), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(pictures):
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        sheet.paste(Image.fromarray(picture), (left, top))
        while font.getlength(caption) > width - MARGIN and len(caption) > 4:  # the end of a name tells images apart
            caption = "..." + caption[4:]
        pen.text((left, top + picture.shape[0] + 2), caption, (20, 20, 20), font)
    for place, (name, color) in enumerate(zip(classes.names, classes.palette, strict=True)):
        left, top = MARGIN + place % per_line * 180, MARGIN + rows * height + place // per_line * 22
        pen.rectangle((left, top, left + 14, top + 14), tuple(color), (90, 90, 90))
        pen.text((left + 20, top - 1), name, (20, 20, 20), font)
    return sheet
