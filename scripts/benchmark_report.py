"""What `benchmark.py` found, as tables and as a picture; both are made of benchmark.json alone."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
COLORS = {"unet_jax": "#1f6f8b", "PyTorch eager": "#e3a27c", "PyTorch compiled": "#c8642b"}
INK, LINES = "#5b6168", "#dcdedf"
TITLES = {
    "step": "Training step: forward, softmax cross-entropy, backward, Adam",
    "predict": "Prediction: class probabilities",
    "input": "Images: ours alone, and how long a training waits for them",
    "startup": "python -m unet_jax.main, seconds",
    "scaling": "Cost of our training step",
}
LEGENDS = {
    "step": (
        "ms: median of the rounds, and their quartiles. speed: how many times as fast as the faster row of PyTorch, "
        "the median\n"
        "of the ratios in each round. memory: peak beyond what the process held before. GFLOP: of convolutions and "
        "matrix\n"
        "products, as written. of peak: GFLOP/s as a share of what a large product of matrices of that type reaches "
        "here;\n"
        "convolutions by Winograd's method multiply less than is written, so that it can exceed 100 %."
    ),
    "input": (
        "of need: images/s as a multiple of those of the step alone, which waits for none. waiting: share of a "
        "training\n"
        "spent waiting for images. pipeline: nothing but the images. files: PNG, decoded and resized each time."
    ),
    "startup": (
        "cold: nothing cached, until the first finished training step of configs/shapes.py; warm: the same again."
    ),
    "scaling": (
        "cost: time of a step beside that of the base (x 1), the median of the ratios in each round; work: GFLOP "
        "likewise."
    ),
}
LEGENDS["predict"] = LEGENDS["step"]


def format_head(result: Mapping[str, Any]) -> str:
    """What was measured on, and how."""
    device, settings = result["device"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    on_cpu = device["platform"] == "cpu"
    busy = ""
    if device["load_before"] > 0.2 * device["cores"]:
        busy = (
            f"\nWARNING  the machine is busy (load {device['load_before']:.1f} of {device['cores']} before it began): "
            "that slows one more than the other"
        )
    precision = (
        "float32 in full" if on_cpu else "float32 with JAX's default, TensorFloat-32 where there is one, in both"
    )
    return (
        f"device   {device['device_count']} x {device['device_kind']}, one used; {device['cores']} cores of "
        f"{device['cpu']}\nversions {versions}\nrounds   {settings['repeats']} of about {settings['seconds']:g} s "
        f"for each row, in turn, a process for each row; {precision}{busy}"
    )


def format_suite(result: Mapping[str, Any], suite: str) -> str:
    """The table of a suite."""
    rows = [row for row in result["rows"] if row["suite"] == suite]
    peaks = find_peaks(result["rows"])
    cells = {"input": _input_cells, "startup": _startup_cells, "scaling": _scaling_cells}.get(suite, _step_cells)
    lines = ["", TITLES[suite], *_align([cells(row, peaks) for row in rows])]
    if suite in ("step", "predict"):
        lines += [f"peak of {dtype}: {peak:,.0f} GFLOP/s" for dtype, peak in peaks.items()]
    return "\n".join([*lines, LEGENDS[suite]])


def find_peaks(rows: Iterable[Row]) -> dict[str, float]:
    """GFLOP/s of the fastest round of a product of large matrices, by either framework, for each dtype."""
    peaks = {}
    for row in rows:
        if row["suite"] == "matmul" and "error" not in row:
            peaks[row["dtype"]] = max(peaks.get(row["dtype"], 0.0), row["gflop"] / min(row["times_s"]))
    return peaks


def _align(table: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns as wide as they need; words to the left, numbers to the right. An error takes the rest of its line."""
    names = list(dict.fromkeys(name for cells in table for name in cells if name != "error"))
    widths = {name: max(len(name), *(len(cells.get(name, "")) for cells in table)) for name in names}

    def line(cells):
        shown = [
            cells.get(n, "").ljust(widths[n])
            if n in ("work", "dtype", "contender", "step", "command")
            else cells.get(n, "").rjust(widths[n])
            for n in names
            if n in cells or "error" not in cells
        ]
        return "  ".join([*shown, cells.get("error", "")]).rstrip()[:120]

    return [line({name: name for name in names}), *map(line, table)]


def _begin(row: Row, **first: str) -> dict[str, str]:
    """The first columns; the error is the rest where there is one."""
    if "error" in row:
        return first | {"error": row["error"]}
    low, high = row["quartiles_s"]
    return first | {"ms": _number(1e3 * row["median_s"]), "quartiles": f"{_number(1e3 * low)}-{_number(1e3 * high)}"}


def _step_cells(row: Row, peaks: Mapping[str, float]) -> dict[str, str]:
    cells = _begin(row, work=row["work"], dtype=row["dtype"], contender=row["contender"])
    if "error" in row:
        return cells
    share = row["gflop_per_s"] / peaks[row["dtype"]] if "gflop_per_s" in row and row["dtype"] in peaks else None
    return cells | {
        "images/s": _number(row["images_per_s"]),
        "speed": _optional(row.get("ratio"), "{:.2f}x"),
        "memory": _size(row.get("memory_bytes")),
        "compiled in": _optional(row.get("compile_s"), "{:.1f} s"),
        "GFLOP": _optional(row.get("gflop"), "{:,.1f}"),
        "of peak": _optional(share, "{:.0%}"),
    }


def _input_cells(row: Row, _) -> dict[str, str]:
    cells = _begin(row, work=row["work"], dtype=row["dtype"], contender=row["contender"])
    if "error" in row:
        return cells
    return cells | {
        "images/s": _number(row["images_per_s"]),
        "of need": f"{_number(row['of_need'])}x" if "of_need" in row else "-",
        "waiting": _optional(row.get("waited"), "{:.1%}"),
    }


def _startup_cells(row: Row, _) -> dict[str, str]:
    if "error" in row:
        return {"command": row["case"], "error": row["error"]}
    low, high = row["quartiles_s"]
    return {"command": row["case"], "seconds": f"{row['median_s']:.2f}", "quartiles": f"{low:.2f}-{high:.2f}"}


def _scaling_cells(row: Row, _) -> dict[str, str]:
    height, width = row["size"]
    what = f"{row['direction']} x {row['factor']:g}"
    cells = _begin(row, step=what, image=f"{height}x{width}", batch=str(row["batch"]))
    if "error" in row:
        return cells
    return cells | {
        "images/s": _number(row["images_per_s"]),
        "cost": _optional(row.get("cost"), "{:.2f}x"),
        "work": _optional(row.get("work_of_base"), "{:.2f}x"),
        "memory": _size(row.get("memory_bytes")),
    }


def _number(value: float) -> str:
    """Four digits, and no exponent."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 3)}f}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def draw(result: Mapping[str, Any], file: pathlib.Path) -> str:
    """Draws speed beside PyTorch and cost by size; returns what to say about the picture."""
    panels = [suite for suite in ("step", "predict", "scaling") if any(_drawn(result, suite))]
    if not panels:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "; no picture, matplotlib is not installed"
    groups = [len({(row["work"], row["dtype"]) for row in _drawn(result, suite)}) for suite in panels]
    heights = [4.2 if suite == "scaling" else 1.1 + 0.95 * n for suite, n in zip(panels, groups, strict=True)]
    figure = Figure((9, sum(heights) + 0.6), layout="constrained")
    device = result["device"]
    name = device["cpu"] if device["platform"] == "cpu" else device["device_kind"]
    figure.suptitle(f"unet_jax beside PyTorch, {name}, {device['cores']} cores", color=INK)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for suite, ax in zip(panels, axes, strict=True):
        (_draw_scaling if suite == "scaling" else _draw_bars)(ax, list(_drawn(result, suite)))
        ax.set_title(TITLES[suite], loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK, labelsize=9)
    figure.savefig(file, dpi=110)
    return f" and {file}"


def _drawn(result: Mapping[str, Any], suite: str) -> Iterable[Row]:
    return (row for row in result["rows"] if row["suite"] == suite and "error" not in row)


def _draw_bars(ax, rows: Sequence[Row]) -> None:
    """A group of bars for each work: images/s beside the best of PyTorch, or of ours where there is none."""
    groups = list(dict.fromkeys((row["work"], row["dtype"]) for row in rows))
    ours = {(r["work"], r["dtype"]): r["images_per_s"] for r in rows if r["contender"] == "unet_jax"}
    names = [name for name in COLORS if any(row["contender"] == name for row in rows)]
    height, longest = 0.8 / len(names), 0.0
    for i, name in enumerate(names):
        for row in (row for row in rows if row["contender"] == name):
            group = row["work"], row["dtype"]
            base = row["images_per_s"] / ours.get(group, row["images_per_s"])
            value = row.get("ratio", base)
            low, high = row.get("ratio_quartiles", [base, base])
            y = groups.index(group) + (i - (len(names) - 1) / 2) * height
            label = name if group == groups[0] else None
            ax.barh(y, value, 0.9 * height, color=COLORS[name], label=label)
            ax.errorbar(value, y, xerr=[[value - low], [high - value]], color="black", capsize=2, linewidth=0.8)
            text = f"  {value:.2f}x   {_number(row['images_per_s'])} images/s"
            ax.text(high, y, text, va="center", fontsize=8, color=INK)
            longest = max(longest, high)
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    ax.set_xlim(0, 1.35 * longest)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_yticks(range(len(groups)), [f"{work}\n{dtype}" for work, dtype in groups])
    ax.set_xlabel("speed, the faster of PyTorch is 1; whiskers are quartiles of the rounds", fontsize=9, color=INK)
    ax.legend(fontsize=8, frameon=False, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1))


def _draw_scaling(ax, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if "cost" in row]
    colors = ("#1f6f8b", "#c8642b", "#6b7f2a", "#7a5ba6")
    for direction, color in zip(dict.fromkeys(row["direction"] for row in rows), colors, strict=False):
        points = [row for row in rows if row["direction"] == direction]
        x, y = [row["factor"] for row in points], [row["cost"] for row in points]
        spread = [[abs(row["cost"] - row["cost_quartiles"][i]) for row in points] for i in (0, 1)]
        label = "virtual CPU devices" if direction == "devices" else direction
        ax.errorbar(x, y, yerr=spread, color=color, marker="o", markersize=4, capsize=3, linewidth=1.5, label=label)
    factors = sorted({row["factor"] for row in rows})
    ax.plot(factors, factors, color=INK, linewidth=0.8, linestyle=":", label="proportional")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.grid(color=LINES, linewidth=0.6)
    ax.set_xlabel("times the base", fontsize=9, color=INK)
    ax.set_ylabel("cost of a step, times the base", fontsize=9, color=INK)
    ax.legend(fontsize=8, frameon=False)
