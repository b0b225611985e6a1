"""The HTML of a report: `report.html` in this folder is the template, with all style and script; here are its parts.

Whatever comes from a user, such as names, ids, values and messages, goes through `esc`.
"""

import base64
import io
import math
import pathlib
import shlex
import string
from collections.abc import Sequence
from html import escape as esc
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unet_jax import draw
from unet_jax.data.source import Classes

WIDTH = 480  # pixels, at most, of the images in the file
SMALL = 240  # pixels: images narrower than this are shown as squares, not smoothed, and stored without loss
OPENINGS = {
    "worst": ("Worst", "where to look first"),
    "median": ("Median", "what to expect"),
    "best": ("Best", "what it can do"),
}
LAYERS = ("truth", "prediction", "error")


class Picture(NamedTuple):
    """A validation image to show.

    Attributes:
      id: of the example.
      scores: `metrics.scores` of this image alone.
      image: uint8 `[H, W, C]`.
      label: uint8 `[H, W]`, or `[H, W, K]` of overlapping masks.
      prediction: as `label`.
    """

    id: str
    scores: dict[str, Any]
    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


def render(
    name: str,
    config: Any,
    classes: Classes,
    step: int,
    rows: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    missing: str | None,
    origin: str,
    scores: dict[str, Any],
    confusion: np.ndarray | None,
    pictures: dict[str, list[Picture]],
) -> str:
    """The whole page.

    Args:
      name: of the work directory.
      config: the configuration of the training.
      classes: names and colours.
      step: of the checkpoint that was scored.
      rows: of `metrics.jsonl`.
      runs: of `environment.json`.
      missing: why there are no images; None where there are.
      origin: of the scores, in words.
      scores: `metrics.scores`, as far as known.
      confusion: counts `[K, K]` or `[K, 2, 2]`; None where unknown.
      pictures: to show, by rank.
    """
    last = max((row["step"] for row in rows), default=step)
    note = (
        f'<p class="note">The images could not be read, so that none are shown: {esc(missing)}</p>' if missing else ""
    )
    task = f"{classes.task}, {len(classes.names)} classes"
    parts = {
        "title": esc(name),
        "over": f"U-Net report &middot; {esc(config.data.name)}",
        "under": f"{task} &middot; checkpoint of step {step} of {last}{' &middot; ' + esc(origin) if origin else ''}",
        "headline": _headline(scores, next((r for r in rows if r["step"] == step and "val/loss" in r), {})),
        "note": note,
        "curves": _curves(rows),
        "classes": _class_table(scores, classes),
        "confusion": _matrix(confusion, classes),
        "images": _images(pictures, classes),
        "command": _command(runs),
        "settings": _settings(config, runs),
    }
    template = pathlib.Path(__file__).with_name("report.html").read_text()
    return string.Template(template).substitute(parts)


def _headline(scores: dict[str, Any], row: dict[str, Any]) -> str:
    """The scores of the whole split; what only the training computed comes from its log."""
    shown = {"mean IoU": scores.get("miou"), "mean Dice": scores.get("mdice"), "pixel accuracy": scores.get("accuracy")}
    logged = {"val/v_rand": "V_rand", "val/v_info": "V_info", "val/loss": "validation loss"}
    shown |= {title: row.get(key) for key, title in logged.items()}
    tiles = [f"<div><dt>{k}</dt><dd>{v:.4f}</dd></div>" for k, v in shown.items() if v is not None]
    return f'<dl class="scores">{"".join(tiles)}</dl>' if tiles else ""


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    figures = []
    for title, names in (("Loss", draw.LOSSES), ("Validation scores", draw.SCORES)):
        light, dark = (draw.draw_curves(rows, names, theme) for theme in ("light", "dark"))
        if light is not None:
            figures.append(
                f"<figure><figcaption>{title}</figcaption><picture>"
                f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(dark.encode(), "svg+xml")}">'
                f'<img src="{_uri(light.encode(), "svg+xml")}" alt="{title} over epochs"></picture></figure>'
            )
    return _section("Curves", "", f'<div class="curves">{"".join(figures)}</div>') if figures else ""


def _class_table(scores: dict[str, Any], classes: Classes) -> str:
    """IoU and Dice of each class as bars with numbers."""
    if not scores:
        return ""
    pixels = scores.get("pixels", {})
    total = max(sum(pixels.values()), 1)
    lines = []
    for name, color in zip(classes.names, classes.palette, strict=True):
        cells = ""
        for kind in ("iou", "dice"):
            value = scores[kind][name]
            bar = '<span class="absent">absent</span>'
            if value is not None:
                bar = f'<div>{value:.4f}<i style="--v:{value:.2%}"></i></div>'
            cells += f'<td class="bar {kind}">{bar}</td>'
        share = f"{pixels[name] / total:.2%}" if name in pixels else "&ndash;"
        lines.append(f'<tr><th scope="row">{_swatch(color)}{esc(name)}</th>{cells}<td>{share}</td></tr>')
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("Class", "IoU", "Dice", "Pixels"))
    table = f'<table class="classes"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    lead = (
        "A class that does not occur in the truth is absent, and no part of the means. Pixels: its share of the truth."
    )
    return _section("Classes", lead, _box("Scores of each class", table))


def _matrix(counts: np.ndarray | None, classes: Classes) -> str:
    """The confusion counts as shares of each row; for overlapping masks a row of rates per class."""
    if counts is None:
        return ""
    if classes.task == "multilabel":
        heads = ("Found", "Missed", "False alarm", "Rightly left out")
        lead = "Percent: of the pixels of a mask, those found and missed; of all others, those marked and left out."
        shares = [np.concatenate([_shares(row) for row in one[::-1, ::-1]]) for one in counts]
        right = [(0, 3)] * len(shares)
    else:
        heads = [f"<span>{esc(name)}</span>" for name in classes.names]
        lead = "Rows are the truth, columns the prediction. Percent of the pixels of each row."
        shares = [_shares(row) for row in counts]
        right = [(k,) for k in range(len(shares))]
    lines = []
    for name, row, hits in zip(classes.names, shares, right, strict=True):
        cells = "".join(_cell(share, k in hits) for k, share in enumerate(row))
        if np.isnan(row).all():
            cells = f'<td class="absent" colspan="{len(row)}">absent</td>'
        lines.append(f'<tr><th scope="row">{esc(name)}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    table = f'<table class="matrix"><thead><tr><td></td>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return _section("Confusion", lead, _box("Confusion of classes", table))


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts as shares of their sum; NaN where that is 0."""
    total = counts.sum()
    return counts / total if total else np.full(len(counts), np.nan)


def _cell(share: float, hit: bool) -> str:
    if math.isnan(share):
        return "<td>&ndash;</td>"
    text = "0" if share == 0 else "&lt;0.1" if share < 0.0005 else f"{100 * share:.1f}"
    kind = "zero" if share == 0 else "hit" if hit else ""
    # The root lets small confusions be seen; the numbers tell their true size.
    return f'<td class="{kind}" style="--a:{60 * math.sqrt(share):.0f}%">{text}</td>'


def _images(pictures: dict[str, list[Picture]], classes: Classes) -> str:
    """The cards of the chosen images, with their legend and the controls that move all of them."""
    if not any(pictures.values()):
        return ""
    entries = [
        f"<li>{_swatch(color)}{esc(name)}</li>" for name, color in zip(classes.names, classes.palette, strict=True)
    ]
    entries.append(f"<li>{_swatch(draw.WRONG)}wrong</li>")
    if any((picture.label == classes.ignore_label).any() for shown in pictures.values() for picture in shown):
        entries.append(f"<li>{_swatch(draw.IGNORED)}not counted</li>")
    groups, number = [], 0
    for rank, shown in pictures.items():
        cards = []
        for picture in shown:
            number += 1
            cards.append(_card(picture, classes, number))
        title, why = OPENINGS[rank]
        if cards:
            groups.append(f'<h3>{title} <span>&ndash; {why}</span></h3><div class="cards">{"".join(cards)}</div>')
    controls = f'<div class="all">{_controls("all images", 0)}</div>'
    lead = "By the mean IoU over the classes present in the image. The slider mixes the image with the layer over it."
    return _section("Images", lead, f'<ul class="legend">{"".join(entries)}</ul>{controls}{"".join(groups)}')


def _card(picture: Picture, classes: Classes, number: int) -> str:
    """One image under its three layers."""
    height, width = picture.label.shape[:2]
    name = esc(picture.id)
    errors = draw.error_map(picture.label, picture.prediction, classes)
    overlay = Image.fromarray(errors)
    overlay.putpalette([0, 0, 0, 150, *draw.WRONG, 255, *draw.IGNORED, 255], "RGBA")  # right pixels are dimmed
    layers = {
        "truth": Image.fromarray(draw.colorize(picture.label, classes)),
        "prediction": Image.fromarray(draw.colorize(picture.prediction, classes)),
        "error": overlay,
    }
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(picture.image, (height, width, 3))))
    if width > WIDTH:
        size = (WIDTH, round(height * WIDTH / width))
        image = image.resize(size, Image.Resampling.BOX)
        layers = {layer: drawn.resize(size, Image.Resampling.NEAREST) for layer, drawn in layers.items()}
    images = _image(image, f"{name}: image", "image", "PNG" if width < SMALL else "JPEG")
    images += "".join(_image(drawn, f"{name}: {layer}", layer, "PNG") for layer, drawn in layers.items())
    wrong = (errors == draw.WRONG_PIXEL).sum() / max((errors != draw.IGNORED_PIXEL).sum(), 1)
    known = {k: v for k, v in picture.scores["iou"].items() if v is not None}
    lowest = min(known, key=known.get)
    return (
        f'<article class="card" data-layer="error"><div class="stage{" small" if width < SMALL else ""}">{images}</div>'
        f'<div class="text"><h4><span>{name}</span><b>{picture.scores["miou"]:.3f}</b></h4>'
        f'<p class="facts">{wrong:.1%} wrong &middot; lowest: {esc(lowest)} {known[lowest]:.3f}</p>'
        f"{_controls(name, number)}</div></article>"
    )


def _controls(name: str, number: int) -> str:
    """Native inputs, so that keyboards and screen readers know them: which layer, and how much of it."""
    hidden = ' class="hidden"' if number else ""  # on a card the picture says it
    choices = "".join(
        f'<label><input type="radio" name="layer{number}" value="{layer}"{" checked" if layer == "error" else ""}>'
        f"{layer}</label>"
        for layer in LAYERS
    )
    return (
        f"<fieldset><legend{hidden}>Layer over {name}</legend>{choices}</fieldset>"
        f'<label class="mix">image<input type="range" min="0" max="100" step="5" value="100" '
        f'aria-label="Share of the layer over {name}, percent">layer</label>'
    )


def _image(picture: Image.Image, alt: str, kind: str, form: str) -> str:
    file = io.BytesIO()
    picture.save(file, form, **({"quality": 88} if form == "JPEG" else {"optimize": True}))
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img class="{kind}" alt="{alt}" {size} src="{_uri(file.getvalue(), form.lower())}">'


def _command(runs: Sequence[dict[str, Any]]) -> str:
    if runs and runs[0]["command"]:
        words = [shlex.quote(word) for word in shlex.split(runs[0]["command"])]
        lines = [" ".join(words[:3]), *words[3:]]  # python -m unet_jax.main, then a flag a line
        return "<pre>" + esc(" \\\n  ".join(lines)) + "</pre>"
    return (
        '<p class="lead">The command was not recorded. Write the fields below into a file beside configs/default.py, '
        "and train it anew:</p><pre>python -m unet_jax.main --config=configs/FILE.py</pre>"
    )


def _settings(config: Any, runs: Sequence[dict[str, Any]]) -> str:
    """All fields of the configuration, and the environment of every run that had one of its own."""
    plain = {name: value for name, value in config.items() if not hasattr(value, "items")}
    groups = {"": plain} | {name: dict(value.items()) for name, value in config.items() if hasattr(value, "items")}
    fields = "".join(
        (f'<tr class="group"><th colspan="2" scope="rowgroup">{esc(group)}</th></tr>' if group else "")
        + "".join(_field(name, value) for name, value in values.items())
        for group, values in groups.items()
    )
    blocks = [f'<details><summary>Configuration</summary><table class="fields">{fields}</table></details>']
    for run in runs:
        title = "Environment" if len(runs) == 1 else f"Environment from step {int(run['first_step'])}"
        values = {name: run[name] for name in ("command", "devices", "platform", "commit")} | run["versions"]
        table = "".join(_field(name, "not recorded" if value is None else value) for name, value in values.items())
        blocks.append(f'<details><summary>{title}</summary><table class="fields">{table}</table></details>')
    if not runs:
        blocks.append("<details><summary>Environment: not recorded</summary><p>This training is older.</p></details>")
    return "".join(blocks)


def _field(name: str, value: Any) -> str:
    return f'<tr><th scope="row">{esc(name)}</th><td>{esc(str(value))}</td></tr>'


def _section(title: str, lead: str, content: str) -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{lead}{content}</section>"


def _box(label: str, table: str) -> str:
    """A box that scrolls sideways by itself, with the keyboard as well."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _swatch(color: Sequence[int]) -> str:
    return f'<span class="swatch" style="background:rgb({",".join(map(str, color))})"></span>'


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
