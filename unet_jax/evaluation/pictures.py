"""Pictures of labelled images: panels during training, maps of errors, contact sheets."""

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from unet_jax import paths
from unet_jax.data import colors
from unet_jax.data import images as image_files
from unet_jax.data.pipeline import Pipeline
from unet_jax.data.source import Classes
from unet_jax.errors import UserError, escape_line
from unet_jax.parallel import processes

WRONG = (255, 40, 40)
WRONG_PIXEL, IGNORED_PIXEL = 1, 2  # values of an error map
TILE_HEIGHT = 256  # pixels, at least; smaller images are enlarged by an integer factor
TILE_SIDE = 1024  # pixels, at most; larger images are shrunk
MARGIN = 8
INK, OUTLINE = (20, 20, 20), (90, 90, 90)


class Panels:
    """Draws the same few images at every evaluation."""

    def __init__(self, images: Pipeline, count: int, folder: epath.Path, picture: Callable[[np.ndarray], np.ndarray]):
        """Chooses `count` images, spread evenly over the split; `picture` makes one uint8 `[H, W, 1 or 3]`."""
        self._classes, self._folder = images.source.classes, folder
        chosen = spread(count, len(images.source))
        self._ids = [images.source.ids[i] for i in chosen]
        for name in self._ids:
            self._file(0, name)  # an id that names no file should not wait for the first evaluation
        self._indices, self._examples = chosen, [images.read(i) for i in chosen]
        self._examples = [{**example, "image": picture(example["image"])} for example in self._examples]

    def draw(self, step: int, predict: Callable[[Sequence[int]], Sequence[np.ndarray]]) -> None:
        """Writes one PNG per image into `<folder>/<step>/`; raises a `UserError` if that cannot be written.

        `predict` maps indices of images to their predicted labels.
        """
        predictions = predict(self._indices)
        if not processes.is_main():
            return
        for name, example, prediction in zip(self._ids, self._examples, predictions, strict=True):
            panel = draw_panel(**example, prediction=prediction, classes=self._classes)
            file = self._file(step, name)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as stream:
                    panel.save(stream, "PNG")
            except OSError as error:
                raise UserError(f"{file} cannot be written: {error}") from error

    def _file(self, step: int, name: str) -> epath.Path:
        return paths.file_below(self._folder / str(step), name, ".png")


def draw_panel(
    image: np.ndarray,  # uint8 `[H, W, 1 or 3]`
    label: np.ndarray,  # uint8 `[H, W]` or `[H, W, K]`
    prediction: np.ndarray,  # as `label`
    classes: Classes,
    weight: np.ndarray | None = None,  # of each pixel in the loss, float `[H, W]`, drawn as one more tile
) -> Image.Image:
    """Image, ground truth, prediction and error side by side, with a legend of the classes that occur.

    Tiles of more than `TILE_SIDE` pixels a side are shrunk to that.
    """
    occurring, errors = _occurring(label, prediction, classes), error_map(label, prediction, classes)
    share = (errors == WRONG_PIXEL).sum() / max((errors != IGNORED_PIXEL).sum(), 1)
    size = image_files.scaled_size(label.shape[:2], [min(1.0, TILE_SIDE / max(label.shape[:2]))] * 2, "")
    label, prediction, errors = (image_files.resize_label(x, size) for x in (label, prediction, errors))
    rgb = np.broadcast_to(image_files.resize_image(image, size, "bilinear"), (*size, 3))
    wrong = errors == WRONG_PIXEL
    dimmed = rgb.mean(-1, keepdims=True).repeat(3, -1) * 0.6
    tiles = {
        "image": rgb,
        "ground truth": colors.colorize(label, classes),
        "prediction": colors.colorize(prediction, classes),
        f"error ({share:.1%} of pixels)": np.where(wrong[..., None], WRONG, dimmed),
    }
    if weight is not None:
        grey = (image_files.resize_label(weight, size)[..., None] / max(weight.max(), 1e-9) * 255).repeat(3, -1)
        tiles[f"loss weight ({weight.min():.1f} to {weight.max():.1f})"] = grey
    return _lay_out(tiles, occurring, classes)


def error_map(label: np.ndarray, prediction: np.ndarray, classes: Classes) -> np.ndarray:
    """Whether each pixel is right (0), wrong (`WRONG_PIXEL`) or ignored (`IGNORED_PIXEL`), uint8 `[H, W]`.

    Labels are `[H, W]`, or `[H, W, K]` for a multilabel task, where one wrong mask makes the pixel wrong.
    """
    counted = label != classes.ignore_label
    wrong = (label != prediction) & counted
    if classes.task == "multilabel":
        wrong, counted = wrong.any(-1), counted.any(-1)
    return np.where(wrong, WRONG_PIXEL, np.where(counted, 0, IGNORED_PIXEL)).astype(np.uint8)


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray]], classes: Classes, columns: int = 6) -> Image.Image:
    """Pictures uint8 `[h, w, 3]` with their captions in a grid, with a legend of all classes below."""
    width, height = (max(p.shape[axis] for _, p in pictures) + extra for axis, extra in ((1, MARGIN), (0, 20 + MARGIN)))
    rows = -(-len(pictures) // columns)
    font = ImageFont.load_default(13)
    per_line = max(columns * width // 180, 1)
    legend = -(-len(classes.names) // per_line)
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height + 22 * legend + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(pictures):
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        sheet.paste(Image.fromarray(picture), (left, top))
        caption = escape_line(caption)
        while font.getlength(caption) > width - MARGIN and len(caption) > 4:  # names differ at their ends
            caption = "..." + caption[4:]
        pen.text((left, top + picture.shape[0] + 2), caption, INK, font)
    for place, (name, color) in enumerate(zip(classes.names, classes.palette, strict=True)):
        left, top = MARGIN + place % per_line * 180, MARGIN + rows * height + place // per_line * 22
        pen.rectangle((left, top, left + 14, top + 14), tuple(color), OUTLINE)
        pen.text((left + 20, top - 1), name, INK, font)
    return sheet


def spread(count: int, total: int) -> list[int]:
    """At most `count` indices below `total`, spread evenly, with the first and the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def _occurring(label, prediction, classes: Classes) -> list[int]:
    """The classes in the ground truth or the prediction."""
    if classes.task == "multilabel":
        return np.flatnonzero(((label == 1) | (prediction == 1)).any((0, 1))).tolist()
    values = np.union1d(label, prediction)
    return values[values != classes.ignore_label].tolist()


def _lay_out(tiles: dict[str, np.ndarray], occurring: Sequence[int], classes: Classes) -> Image.Image:
    """Captioned tiles `[H, W, 3]` in a row, with a legend below, wrapped."""
    height, width = next(iter(tiles.values())).shape[:2]
    factor = max(1, -(-TILE_HEIGHT // height))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(15)
    total = MARGIN + len(tiles) * (width + MARGIN)
    places, x, y = [], MARGIN, 0
    for k in occurring:
        needed = 22 + int(font.getlength(classes.names[k])) + 2 * MARGIN
        if x + needed > total and x > MARGIN:
            x, y = MARGIN, y + 22
        places.append((x, y))
        x += needed
    top = 24 + height + MARGIN
    canvas = Image.new("RGB", (total, top + y + 22 + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (caption, tile) in enumerate(tiles.items()):
        left = MARGIN + column * (width + MARGIN)
        pen.text((left, 4), caption, INK, font)
        picture = Image.fromarray(np.ascontiguousarray(tile, np.uint8))
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, 24))
    for k, (x, y) in zip(occurring, places, strict=True):
        pen.rectangle((x, top + y + 2, x + 15, top + y + 17), tuple(classes.palette[k]), OUTLINE)
        pen.text((x + 22, top + y), classes.names[k], INK, font)
    return canvas
