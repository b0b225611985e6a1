"""Curves over epochs, drawn by one painter for `history.png` and for the report."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from unet_jax import metrics
from unet_jax.workdir import files

LOSSES = {"train/loss": "training loss", "val/loss": "validation loss"}  # keys of `metrics.jsonl` and their titles
# Text, lines and curves on a light and on a dark background.
THEMES = {
    "light": ("#5b6168", "#dcdedf", ("#1f6f8b", "#c8642b", "#6b7f2a", "#7a5ba6", "#a33b62")),
    "dark": ("#a3a9b0", "#353a40", ("#6bb8d6", "#ec9a63", "#adc25f", "#b39ddb", "#e58cab")),
}


class Curve(NamedTuple):
    """Values over epochs."""

    title: str
    epochs: list[float]
    values: list[float]


class Chart(NamedTuple):
    """Curves that share their axes."""

    title: str
    curves: list[Curve]  # at least one
    # Of the values; None fits them, on a logarithmic scale if they span more than a factor of ten.
    limits: tuple[float, float] | None = None


def charts(rows: Sequence[dict[str, Any]], records: Sequence[metrics.Record]) -> list[Chart]:
    """The charts of a training: losses, scores within 0..1, and other scores, which would flatten those.

    Args:
      rows: the lines of `metrics.jsonl`.
      records: the metrics to draw, see `metrics.describe`; of these, their `metrics.summary`.
    """
    losses = _curves(rows, LOSSES)
    scores = _curves(rows, {f"val/{record.key}": record.title for record in metrics.summary(records)})
    bounded = [curve for curve in scores if 0 <= min(curve.values) and max(curve.values) <= 1]
    others = [curve for curve in scores if curve not in bounded]
    found = Chart("Loss", losses), Chart("Validation scores", bounded, (0, 1)), Chart("More validation scores", others)
    return [chart for chart in found if chart.curves]


def draw_history(rows: Sequence[dict[str, Any]], records: Sequence[metrics.Record], path: epath.Path) -> None:
    """Draws all charts side by side as a PNG at `path`, unless there is nothing to draw; see `charts`."""
    if found := charts(rows, records):
        files.write_bytes(path, _draw(found, "light", titles=True, format="png", dpi=150, facecolor="white"))


def draw_svg(chart: Chart, theme: str) -> bytes:
    """A chart as SVG, without its title, on a transparent background, in the colours of one of `THEMES`."""
    return _draw([chart], theme, titles=False, format="svg", transparent=True, metadata={"Date": None})


def _curves(rows: Sequence[dict[str, Any]], titles: dict[str, str]) -> list[Curve]:
    """The curves of those keys that have values."""
    curves = []
    for key, title in titles.items():
        points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            curves.append(Curve(title, *map(list, zip(*points, strict=True))))
    return curves


def _draw(charts: Sequence[Chart], theme: str, titles: bool, **save) -> bytes:
    """Charts side by side; `save` goes to `Figure.savefig`."""
    import matplotlib
    from matplotlib.figure import Figure  # pyplot would keep the figure

    text, line, _ = THEMES[theme]
    # Glyphs as paths need no fonts where the page is read; with a fixed salt equal curves make equal files.
    settings = {"svg.fonttype": "path", "svg.hashsalt": "unet_jax", "font.size": 10, "axes.edgecolor": line}
    settings |= {"text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text}
    with matplotlib.rc_context(settings):
        # Small, so that the text is large on a phone.
        figure = Figure(figsize=(4 * len(charts), 2.9), layout="constrained")
        for part, chart in zip(figure.subfigures(1, len(charts), squeeze=False)[0], charts, strict=True):
            _draw_chart(part, chart, theme, chart.title if titles else None)
        file = io.BytesIO()
        figure.savefig(file, **save)
    return file.getvalue()


def _draw_chart(figure, chart: Chart, theme: str, title: str | None) -> None:
    """Draws one chart with its legend into a (sub)figure."""
    from cycler import cycler
    from matplotlib import ticker

    _, line, colors = THEMES[theme]
    axes = figure.add_subplot()
    axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=colors))
    for curve in chart.curves:
        marker = {"marker": "o", "markersize": 2.5} if len(curve.values) <= 40 else {}
        axes.plot(curve.epochs, curve.values, label=f"{curve.title} {curve.values[-1]:.4f}", linewidth=1.6, **marker)
    values = [value for curve in chart.curves for value in curve.values]
    if chart.limits:
        axes.set_ylim(chart.limits)
    elif max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")
    axes.grid(axis="y", color=line, linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    legend = {"ncols": 2, "frameon": False, "handlelength": 1, "columnspacing": 1}
    legend |= {"title": title, "alignment": "left", "title_fontproperties": {"weight": "bold"}}
    figure.legend(loc="outside upper left", **legend)
