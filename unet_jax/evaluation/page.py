"""The page of a report: here its values are prepared, the rest is in `report.html.jinja`, `report.css`, `report.js`."""

import base64
import hashlib
import io
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from unet_jax import metrics
from unet_jax.data import colors
from unet_jax.data.source import Classes
from unet_jax.errors import escape
from unet_jax.evaluation import curves, pictures
from unet_jax.metrics import Record, confusion

WIDTH = 480  # pixels; wider images are shrunk to it
SMALL = 240  # pixels; images narrower than this are stored losslessly and enlarged without smoothing


class Picture(NamedTuple):
    """An image to show."""

    id: str  # of the example
    records: list[Record]  # the metrics of this image alone
    image: np.ndarray  # uint8 `[H, W, 1 or 3]`
    label: np.ndarray  # uint8 `[H, W]`, or `[H, W, K]` for a multilabel task
    prediction: np.ndarray  # as `label`


class Results(NamedTuple):
    """What is known about a split."""

    origin: str  # where the scores come from; empty if there are none
    loss: float | None  # of the split; None if unknown
    records: list[Record]  # its metrics; values are None where unknown
    counts: np.ndarray | None = None  # confusion counts `[K, K]`, or `[K, 2, 2]` for a multilabel task; None if unknown
    shown: Mapping[str, Sequence[Picture]] = {}  # the images to show, by rank


def render(
    name: str,  # of the work directory
    config: Any,  # of the training
    classes: Classes,
    step: int,  # of the checkpoint that was scored
    rows: Sequence[dict[str, Any]],  # the lines of `metrics.jsonl`
    runs: Sequence[dict[str, Any]],  # those of `environment.json`
    results: Results,
    missing: str | None = None,  # why the images could not be read; None if they could
) -> str:
    """The page as HTML."""
    shown = {rank: found for rank, found in results.shown.items() if found}
    # The foreground of two classes comes first, then the metric that picks the best checkpoint.
    rank = lambda record: (record.foreground is None, record.key != config.eval.best_metric)
    scores = [(record.title, record.value) for record in sorted(metrics.summary(results.records), key=rank)]
    scores.append(("loss", results.loss))
    columns = [  # and whether all values are shares, to be drawn as bars
        (record, all(0 <= value <= 1 for value in _known(record).values()))
        for record in results.records
        if record.per_class and _known(record)
    ]
    charts = [
        (chart.title, *(_data_uri(curves.draw_svg(chart, theme), "svg+xml") for theme in ("light", "dark")))
        for chart in curves.charts(rows, results.records)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    text = environment.get_template("report.html.jinja").render(
        name=name,
        config=config.to_dict(),
        classes=classes,
        step=step,
        last_step=max((row["step"] for row in rows), default=step),
        origin=results.origin,
        missing=missing,
        scores=[(title, value) for title, value in scores if value is not None],
        charts=charts,
        columns=columns,
        pixel_shares=None if results.counts is None else _shares(confusion.pixel_counts(results.counts)),
        confusion_rows=None if results.counts is None else _confusion_rows(results.counts, classes),
        cards={rank: [_card(picture, classes) for picture in found] for rank, found in shown.items()},
        legend=_legend([picture.label for found in shown.values() for picture in found], classes),
        command=_command(runs),
        runs=runs,
    )
    return escape(text)  # HTML has no control characters


def _known(record: Record) -> dict[str, float]:
    """The values of a record with a value per class, without the absent classes."""
    return {name: value for name, value in record.value.items() if value is not None}


def _confusion_rows(counts: np.ndarray, classes: Classes) -> list[tuple[str, list[tuple[float | None, bool]]]]:
    """Of each class: name, and (share, whether the prediction is right) of each column.

    The shares are those of the row; for a multilabel task those of the pixels inside the mask (found, missed) and
    outside of it (false alarm, rightly left out). They are None where there are no such pixels.
    """
    if classes.task == "multilabel":
        shares = [_shares(inside[::-1]) + _shares(outside[::-1]) for outside, inside in counts]
        right = [(0, 3)] * len(shares)
    else:
        shares = [_shares(row) for row in counts]
        right = [(k,) for k in range(len(shares))]
    return [
        (name, [(share, k in hits) for k, share in enumerate(row)])
        for name, row, hits in zip(classes.names, shares, right, strict=True)
    ]


def _shares(counts: np.ndarray) -> list[float | None]:
    """Counts as shares of their sum; None where that is 0."""
    total = counts.sum()
    return (counts / total).tolist() if total else [None] * len(counts)


def _card(picture: Picture, classes: Classes) -> dict[str, Any]:
    """An image with the layers to show over it, and the values of its caption."""
    height, width = picture.label.shape[:2]
    is_small = width < SMALL
    errors = pictures.error_map(picture.label, picture.prediction, classes)
    overlay = Image.fromarray(errors)
    overlay.putpalette([0, 0, 0, 150, *pictures.WRONG, 255, *colors.IGNORED, 255], "RGBA")  # right pixels are dimmed
    layers = {
        "image": Image.fromarray(np.ascontiguousarray(np.broadcast_to(picture.image, (height, width, 3)))),
        "ground-truth": Image.fromarray(colors.colorize(picture.label, classes)),
        "prediction": Image.fromarray(colors.colorize(picture.prediction, classes)),
        "error": overlay,
    }
    if width > WIDTH:
        size = (WIDTH, max(1, round(height * WIDTH / width)))
        method = {"image": Image.Resampling.BOX}
        layers = {layer: x.resize(size, method.get(layer, Image.Resampling.NEAREST)) for layer, x in layers.items()}
    by_key = {record.key: record for record in picture.records}
    iou = _known(by_key["iou"])
    lowest = min(iou, key=iou.get)
    return {
        "id": picture.id,
        "is_small": is_small,
        "size": layers["image"].size,
        "layers": {
            layer: _image_uri(x, "JPEG" if layer == "image" and not is_small else "PNG") for layer, x in layers.items()
        },
        "score": by_key["miou"].value,
        "wrong": (errors == pictures.WRONG_PIXEL).sum() / max((errors != pictures.IGNORED_PIXEL).sum(), 1),
        "lowest": (lowest, iou[lowest]),
    }


def _legend(labels: Sequence[np.ndarray], classes: Classes) -> list[tuple[str, Sequence[int]]]:
    """Title and colour of all that the layers show."""
    entries = [*zip(classes.names, classes.palette, strict=True), ("wrong", pictures.WRONG)]
    ignored = any((label == classes.ignore_label).any() for label in labels)
    return [*entries, ("not counted", colors.IGNORED)] if ignored else entries


def _command(runs: Sequence[dict[str, Any]]) -> str | None:
    """The command of the first run, a flag on each line; None if it was not recorded."""
    if not runs or not runs[0]["command"]:
        return None
    words = [shlex.quote(word) for word in shlex.split(runs[0]["command"])]
    return " \\\n  ".join([" ".join(words[:3]), *words[3:]])  # python -m unet_jax.main


def _image_uri(image: Image.Image, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, **({"quality": 88} if form == "JPEG" else {"optimize": True}))
    return _data_uri(file.getvalue(), form.lower())


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
