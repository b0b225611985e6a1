"""Pictures for a work directory and its report: panels of validation images, labels in colour, curves."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from unet_jax import mesh
from unet_jax.data.pipeline import Pipeline
from unet_jax.data.source import Classes
from unet_jax.errors import UserError

WRONG = (255, 40, 40)
IGNORED = (128, 128, 128)
WRONG_PIXEL, IGNORED_PIXEL = 1, 2  # of an error map
TILE_HEIGHT = 256  # pixels, at least; small images are enlarged by a whole factor
MARGIN = 8

# Names in `metrics.jsonl` and what they are called on paper.
LOSSES = {"train/loss": "training loss", "val/loss": "validation loss"}
SCORES = {
    "val/accuracy": "pixel accuracy",
    "val/miou": "mean IoU",
    "val/mdice": "mean Dice",
    "val/v_rand": "V_rand",
    "val/v_info": "V_info",
}
# Ink, lines and curves on a light and on a dark page.
THEMES = {
    "light": ("#5b6168", "#dcdedf", ("#1f6f8b", "#c8642b", "#6b7f2a", "#7a5ba6", "#a33b62")),
    "dark": ("#a3a9b0", "#353a40", ("#6bb8d6", "#ec9a63", "#adc25f", "#b39ddb", "#e58cab")),
}


class Panels:
    """Draws the same few images at every evaluation."""

    def __init__(self, images: Pipeline, count: int, folder: epath.Path):
        """Chooses `count` images, spread over the split."""
        self._classes, self._folder = images.source.classes, folder
        total = len(images.source)
        chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)) if count else []
        self._ids = [images.source.ids[i] for i in chosen]
        self._examples = [images.read(int(i)) for i in chosen]

    def draw(self, step: int, predict: Callable[[np.ndarray], Any]) -> None:
        """Writes one PNG per image into `<folder>/<step>/`.

        Args:
          step: the number of steps taken.
          predict: uint8 images `[B, H, W, C]` -> predicted labels.

        Raises:
          UserError: they cannot be written.
        """
        if not self._examples:
            return
        folder = self._folder / str(step)
        for name, example in zip(self._ids, self._examples, strict=True):  # one by one, for images may be large
            prediction = np.asarray(predict(example["image"][None]))[0]
            if not mesh.is_main_process():
                continue
            picture = draw_panel(**example, prediction=prediction, classes=self._classes)
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / f"{name}.png").open("wb") as file:
                    picture.save(file, "PNG")
            except OSError as error:
                raise UserError(f"{folder / name}.png cannot be written: {error}") from error


def draw_panel(
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    classes: Classes,
    weight: np.ndarray | None = None,
) -> Image.Image:
    """Image, truth, prediction and error side by side, with a legend of the classes that occur.

    Args:
      image: uint8 `[H, W, C]`.
      label: uint8 `[H, W]` or `[H, W, K]`.
      prediction: as `label`.
      classes: names and colours.
      weight: of each pixel in the loss, float `[H, W]`, drawn as well; None is none.
    """
    rgb = np.broadcast_to(image, (*label.shape[:2], 3))
    errors = error_map(label, prediction, classes)
    wrong, counted = errors == WRONG_PIXEL, errors != IGNORED_PIXEL
    grey = rgb.mean(-1, keepdims=True).repeat(3, -1) * 0.6
    error = np.where(wrong[..., None], WRONG, grey).astype(np.uint8)
    tiles = {
        "image": rgb,
        "truth": colorize(label, classes),
        "prediction": colorize(prediction, classes),
        f"error ({wrong.sum() / max(counted.sum(), 1):.1%} of pixels)": error,
    }
    if weight is not None:
        grey = (weight[..., None] / max(weight.max(), 1e-9) * 255).repeat(3, -1)
        tiles[f"loss weight ({weight.min():.1f} to {weight.max():.1f})"] = grey.astype(np.uint8)
    return _lay_out(tiles, _occurring(label, prediction, classes), classes)


def colorize(label: np.ndarray, classes: Classes) -> np.ndarray:
    """Labels uint8 `[H, W]` or `[H, W, K]` in the colours of the palette, uint8 `[H, W, 3]`; overlaps blend."""
    palette = np.array(classes.palette, np.float32)
    if classes.task == "multilabel":
        active = (label == 1).astype(np.float32)
        colors = active @ palette / np.maximum(active.sum(-1, keepdims=True), 1)
        ignored = (label == classes.ignore_label).any(-1)
    else:
        ignored = label == classes.ignore_label
        colors = palette[np.where(ignored, 0, label)]
    return np.where(ignored[..., None], IGNORED, colors).astype(np.uint8)


def error_map(label: np.ndarray, prediction: np.ndarray, classes: Classes) -> np.ndarray:
    """Where a prediction is right (0), wrong (`WRONG_PIXEL`) or not counted (`IGNORED_PIXEL`), uint8 `[H, W]`.

    Labels are `[H, W]`, or `[H, W, K]` of overlapping masks: there one wrong mask makes the pixel wrong.
    """
    counted = label != classes.ignore_label
    wrong = (label != prediction) & counted
    if classes.task == "multilabel":
        wrong, counted = wrong.any(-1), counted.any(-1)
    return np.where(wrong, WRONG_PIXEL, np.where(counted, 0, IGNORED_PIXEL)).astype(np.uint8)


def overlay(image: np.ndarray, label: np.ndarray, classes: Classes, opacity: float = 0.5) -> np.ndarray:
    """An image uint8 `[H, W, C]` under the colours of its label, uint8 `[H, W, 3]`; the background stays clear.

    Args:
      image: uint8 `[H, W, C]`, C = 1 or 3.
      label: uint8 `[H, W]` or `[H, W, K]`.
      classes: names and colours.
      opacity: of the colours.
    """
    mixed = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), 512):  # so that a large image is never held in float
        rows = slice(top, top + 512)
        shown = (label[rows] == 1).any(-1) if classes.task == "multilabel" else label[rows] != 0
        colors = colorize(label[rows], classes).astype(np.float32)
        mixed[rows] = np.where(shown[..., None], (1 - opacity) * image[rows] + opacity * colors, image[rows])
    return mixed


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


def _occurring(label, prediction, classes: Classes) -> list[int]:
    """The classes in the truth or the prediction."""
    if classes.task == "multilabel":
        return np.flatnonzero(((label == 1) | (prediction == 1)).any((0, 1))).tolist()
    values = np.union1d(label, prediction)
    return values[values != classes.ignore_label].tolist()


def _lay_out(tiles: dict[str, np.ndarray], shown: Sequence[int], classes: Classes) -> Image.Image:
    """Captioned tiles in a row, the legend below, wrapped."""
    height, width = next(iter(tiles.values())).shape[:2]
    factor = max(1, -(-TILE_HEIGHT // height))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(15)
    entries = [(classes.names[k], classes.palette[k]) for k in shown]
    total = MARGIN + len(tiles) * (width + MARGIN)
    places, x, y = [], MARGIN, 0
    for name, _ in entries:
        needed = 22 + int(font.getlength(name)) + 2 * MARGIN
        if x + needed > total and x > MARGIN:
            x, y = MARGIN, y + 22
        places.append((x, y))
        x += needed
    top = 24 + height + MARGIN
    canvas = Image.new("RGB", (total, top + y + 22 + MARGIN), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for column, (caption, tile) in enumerate(tiles.items()):
        left = MARGIN + column * (width + MARGIN)
        pen.text((left, 4), caption, (20, 20, 20), font)
        picture = Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, 24))
    for (name, color), (x, y) in zip(entries, places, strict=True):
        pen.rectangle((x, top + y + 2, x + 15, top + y + 17), tuple(color), (90, 90, 90))
        pen.text((x + 22, top + y), name, (20, 20, 20), font)
    return canvas


def draw_history(rows: Sequence[dict[str, Any]], path: epath.Path) -> None:
    """Curves of loss and scores over epochs, from the lines of `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, names in {left: LOSSES, right: SCORES}.items():
        for title, epochs, values in _curves(rows, names):
            axes.plot(epochs, values, label=f"{title}: {values[-1]:.4f} at the end", marker=".", markersize=4)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_title("loss")
    right.set_title("validation scores")
    right.set_ylim(0, 1)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def draw_curves(rows: Sequence[dict[str, Any]], names: dict[str, str], theme: str) -> str | None:
    """One figure of curves over epochs as SVG, on a transparent ground; None where there is nothing to draw.

    Losses are drawn on a logarithmic scale where they span more than a decade, scores from 0 to 1.

    Args:
      rows: the lines of `metrics.jsonl`.
      names: `LOSSES` or `SCORES`.
      theme: of `THEMES`.
    """
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure  # without pyplot, which would hold on to it

    curves = _curves(rows, names)
    if not curves:
        return None
    ink, line, colors = THEMES[theme]
    # Glyphs as paths need no fonts where the page is read; a fixed salt makes equal curves equal files.
    settings = {"svg.fonttype": "path", "svg.hashsalt": "unet_jax", "font.size": 10, "axes.edgecolor": line}
    settings |= {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4, 2.9), layout="constrained")  # small, so that its text is large on a phone
        axes = figure.add_subplot()
        for (title, epochs, values), color in zip(curves, colors, strict=False):
            marker = {"marker": "o", "markersize": 2.5} if len(values) <= 40 else {}
            axes.plot(epochs, values, label=f"{title} {values[-1]:.4f}", color=color, linewidth=1.6, **marker)
        known = [value for _, _, values in curves for value in values]
        if names is SCORES:
            axes.set_ylim(0, 1)
        elif max(known) > 10 * min(known) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch")
        axes.grid(axis="y", color=line, linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[["left", "right", "top"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1, columnspacing=1)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _curves(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> list[tuple[str, list, list]]:
    """(title, epochs, values) of the `names` that occur."""
    curves = []
    for name, title in names.items():
        points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            curves.append((title, *map(list, zip(*points, strict=True))))
    return curves
