"""Colours of classes: palettes, labels as pictures, and labels laid over their images."""

import colorsys

import numpy as np

from unet_jax.data.source import Classes

IGNORED = (128, 128, 128)


def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """A palette of `count` colours: nearly black, then hues that are far from those before them."""
    golden = (5**0.5 - 1) / 2
    hues = [colorsys.hsv_to_rgb((0.6 + k * golden) % 1, 0.75 - 0.3 * (k % 3 == 2), 0.95) for k in range(count - 1)]
    return ((20, 20, 20), *(tuple(round(255 * part) for part in hue) for hue in hues))


def colorize(label: np.ndarray, classes: Classes) -> np.ndarray:
    """A label uint8 `[H, W]` or `[H, W, K]` in the colours of the palette, uint8 `[H, W, 3]`; overlaps blend."""
    palette = np.array(classes.palette, np.float32)
    if classes.task == "multilabel":
        active = (label == 1).astype(np.float32)
        colors = active @ palette / np.maximum(active.sum(-1, keepdims=True), 1)
        ignored = (label == classes.ignore_label).any(-1)
    else:
        ignored = label == classes.ignore_label
        colors = palette[np.where(ignored, 0, label)]
    return np.where(ignored[..., None], IGNORED, colors).astype(np.uint8)


def overlay(image: np.ndarray, label: np.ndarray, classes: Classes) -> np.ndarray:
    """An image mixed with the colours of its label, half and half, uint8 `[H, W, 3]`; the background is left as it is.

    The image is uint8 `[H, W, 1 or 3]`, the label uint8 `[H, W]` or `[H, W, K]`.
    """
    result = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), 512):  # in strips: all of a large image in float32 would need too much memory
        strip = slice(top, top + 512)
        shown = (label[strip] == 1).any(-1) if classes.task == "multilabel" else label[strip] != 0
        colors = colorize(label[strip], classes).astype(np.float32)
        result[strip] = np.where(shown[..., None], 0.5 * image[strip] + 0.5 * colors, image[strip])
    return result
