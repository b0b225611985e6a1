"""Measures unet_jax beside the same networks in PyTorch, on the same work, in rounds taken in turn.

  python scripts/benchmark                                   # all suites on this device: takes minutes
  python scripts/benchmark --suite step --work carla-8 --repeats 20
  python scripts/benchmark --suite step predict --work paper --dtype bfloat16 --output runs/benchmark

step     a training step: forward, softmax cross-entropy, backward, Adam; beside PyTorch eager and torch.compile
predict  class probabilities of a batch, likewise
input    our image pipeline alone, from the cache and from files, and how long a training waits for it
startup  python -m unet_jax.main until its first finished training step, with cold caches and warm ones; --help
scaling  how the cost of our step grows with pixels, batch, width and virtual CPU devices

Prints tables, and writes benchmark.json (every single time) and benchmark.png into --output. PyTorch is optional.
scripts/README.md explains the columns.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # for configs/, and where unet_jax is not installed

import measure  # noqa: E402
from measure import OURS, TORCH, WORKS, Row, Settings, Work  # noqa: E402

from unet_jax.errors import UserError, check_choice  # noqa: E402

DTYPES = ("float32", "bfloat16")
ON_CPU = ("carla-8", "carla-32")  # works small enough for a CPU
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")
TITLES = {
    "step": "Training step: forward, softmax cross-entropy, backward, Adam",
    "predict": "Prediction: class probabilities",
    "input": "Images: our pipeline alone, and how long a training waits for it",
    "startup": "python -m unet_jax.main, seconds",
    "scaling": "Cost of our training step, beside that of the base (x 1)",
}
NEEDS = {  # beyond what the network and its step need
    "input": ("ml_collections", "tensorflow", "tqdm"),
    "startup": ("absl", "clu", "ml_collections", "orbax", "tensorflow", "tqdm"),
}


def main() -> None:
    """Measures; bad flags end with exit code 1 and one message."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the processes end, too
    try:
        _run(_parse())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped; benchmark.json holds what was measured before.", file=sys.stderr)
        sys.exit(130)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    groups = sorted({name.partition("-")[0] for name in WORKS})
    works = f"""{", ".join(groups)} (all sizes), or one of {", ".join(WORKS)}: batch of carla at 96x128 and of paper at
        572x572, side of unet, in batches of 4. Default: {", ".join(ON_CPU)} on a CPU, elsewhere all"""
    dtypes = "float32, bfloat16; default: float32 on a CPU, elsewhere both"
    for name, choices, default, text in (
        ("--suite", TITLES, list(TITLES), "default: all"),
        ("--work", (*groups, *WORKS), None, works),
        ("--dtype", DTYPES, None, dtypes),
    ):
        check = lambda value, name=name, choices=choices: check_choice(name, value, choices)
        parser.add_argument(name, nargs="+", type=check, default=default, metavar="NAME", help=text)
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each in a round (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default="benchmark", metavar="DIR", help="default: %(default)s")
    flags = parser.parse_args()
    if flags.repeats < 1 or not 0 < flags.seconds < 3600:
        raise UserError(f"--repeats={flags.repeats} and --seconds={flags.seconds} must be positive")
    if (file := flags.output / "benchmark.json").exists():
        raise UserError(f"{file} exists and is not overwritten: choose another --output, or remove it")
    try:
        flags.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={flags.output}: {error}") from error
    return flags


def _run(flags: argparse.Namespace) -> None:
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as unet_jax.main runs; for all contenders
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        device = _describe_device()
        on_cpu = device["platform"] == "cpu"
        settings = Settings(flags.repeats, flags.seconds, device["platform"], device["cores"], pathlib.Path(folder))
        names = set(flags.work or (ON_CPU if on_cpu else WORKS))
        works = [work for name, work in WORKS.items() if {name, name.partition("-")[0]} & names]
        dtypes = flags.dtype or (DTYPES[:1] if on_cpu else DTYPES)
        installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
        result = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": {"repeats": flags.repeats, "seconds": flags.seconds, "dtypes": list(dtypes)},
            "device": device,
            "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in installed},
            "skipped": {},
            "rows": [],
        }
        print(format_head(result), flush=True)
        for suite in (name for name in TITLES if name in flags.suite):
            if missing := [name for name in NEEDS.get(suite, ()) if not importlib.util.find_spec(name)]:
                result["skipped"][suite] = f"not installed: {', '.join(missing)}"
                print(f"{suite} is skipped, {result['skipped'][suite]}", flush=True)
                continue
            for rows in measure.measure(suite, works, dtypes, settings):
                result["rows"] += rows
                _write(flags.output / "benchmark.json", result)  # a later error or stop loses nothing
            print(format_suite(result, suite), flush=True)
        _write(flags.output / "benchmark.json", result)
    print(f"Wrote {flags.output / 'benchmark.json'}{draw(result, flags.output / 'benchmark.png')}")


def _write(file: pathlib.Path, result: Mapping[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    partial.replace(file)


def _describe_device() -> dict[str, Any]:
    """What the benchmark runs on, asked of JAX in a process of its own: this one must not hold the device.

    Raises:
      UserError: JAX does not start.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # of the last minute
    code = "import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"JAX does not start: {done.stderr.strip()[-300:]}")
    device = dict(zip(("platform", "device_kind", "device_count"), json.loads(done.stdout.splitlines()[-1]), strict=True))
    cpu = platform.processor() or "unknown"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return {**device, "cpu": cpu, "cores": cores, "system": system, "load_before": load}


def format_head(result: Mapping[str, Any]) -> str:
    """What was measured on, and how."""
    device, settings = result["device"], result["settings"]
    on_cpu = device["platform"] == "cpu"
    lines = [
        f"device   {device['device_count']} x {device['device_kind']}, one used; {device['cores']} cores of {device['cpu']}",
        f"versions {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"rounds   {settings['repeats']} of about {settings['seconds']:g} s for each row, in turn, a process for each row",
        f"float32  {'in full' if on_cpu else 'as JAX has it by default, TensorFloat-32 where there is one, in both'}",
    ]
    if device["load_before"] > 0.2 * device["cores"]:
        load = f"{device['load_before']:.1f} of {device['cores']} before the start"
        lines.append(f"WARNING  the machine is busy (load {load}): that slows some rows more than others")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Four digits, and no exponent."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 3)}f}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


_WORDS = {"work": "work", "dtype": "dtype", "contender": "contender", "command": "case", "change": "change"}  # to the left
_NUMBERS = {  # header of a column -> key of a row, and how it is shown
    "image": ("size", lambda size: "x".join(map(str, size))),
    "batch": ("batch", str),
    "seconds": ("median_s", _number),
    "from - to": ("quartiles_s", lambda seconds: " - ".join(map(_number, seconds))),
    "ms": ("median_s", lambda seconds: _number(1e3 * seconds)),
    "quartiles": ("quartiles_s", lambda seconds: "-".join(_number(1e3 * s) for s in seconds)),
    "images/s": ("images_per_s", _number),
    "speed": ("ratio", "{:.2f}x".format),
    "of need": ("of_need", lambda value: f"{_number(value)}x"),
    "waiting": ("waited", "{:.1%}".format),
    "cost": ("cost", "{:.2f}x".format),
    "operations": ("work_of_base", "{:.2f}x".format),
    "memory": ("memory_bytes", _size),
    "compiled in": ("compile_s", "{:.1f} s".format),
    "GFLOP": ("gflop", "{:,.1f}".format),
    "of peak": ("of_peak", "{:.0%}".format),
}
_STEP = ("work", "dtype", "contender", "ms", "quartiles", "images/s", "speed", "memory", "compiled in", "GFLOP", "of peak")
COLUMNS = {
    "step": _STEP,
    "predict": _STEP,
    "input": ("work", "dtype", "contender", "ms", "quartiles", "images/s", "of need", "waiting"),
    "startup": ("command", "seconds", "from - to"),
    "scaling": ("change", "image", "batch", "ms", "quartiles", "images/s", "cost", "operations", "memory"),
}


def format_suite(result: Mapping[str, Any], suite: str) -> str:
    """The table of a suite; an error takes the rest of its line."""
    columns = COLUMNS[suite]
    table = [({name: name for name in columns}, "")]
    for row in (row for row in result["rows"] if row["suite"] == suite):
        cells = {name: row[_WORDS[name]] for name in columns if name in _WORDS}
        for name in () if "error" in row else (name for name in columns if name in _NUMBERS):
            key, form = _NUMBERS[name]
            cells[name] = "-" if row.get(key) is None else form(row[key])
        table.append((cells, row.get("error", "")))
    widths = {name: max(len(cells.get(name, "")) for cells, _ in table) for name in columns}
    lines = ["", TITLES[suite]]
    for cells, error in table:
        shown = [text.ljust(widths[n]) if n in _WORDS else text.rjust(widths[n]) for n, text in cells.items()]
        lines.append("  ".join([*shown, error]).rstrip()[:120])
    peaks = {row["dtype"]: row["peak"] for row in result["rows"] if suite in ("step", "predict") and "peak" in row}
    return "\n".join([*lines, *(f"peak of {dtype}: {peak:,.0f} GFLOP/s" for dtype, peak in peaks.items())])


_COLORS = {"unet_jax": "#1f6f8b", "PyTorch eager": "#e3a27c", "PyTorch compiled": "#c8642b"}


def draw(result: Mapping[str, Any], file: pathlib.Path) -> str:
    """Draws speed beside PyTorch and cost beside the base, a bar for each row; returns what to print about it."""
    value = lambda row: row.get("cost" if row["suite"] == "scaling" else "ratio")
    drawn = {suite: [r for r in result["rows"] if r["suite"] == suite and value(r)] for suite in TITLES}
    drawn = {suite: rows for suite, rows in drawn.items() if rows}
    if not drawn:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "; no picture, matplotlib is not installed"
    heights = [0.8 + 0.28 * len(rows) for rows in drawn.values()]
    figure = Figure((9, sum(heights) + 0.6), layout="constrained")
    device = result["device"]
    name = device["cpu"] if device["platform"] == "cpu" else device["device_kind"]
    figure.suptitle(f"unet_jax beside PyTorch, {name}, {device['cores']} cores")
    axes = figure.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (suite, rows) in zip(axes, drawn.items(), strict=True):
        values, labels = [value(row) for row in rows], []
        spread = [row["cost_quartiles" if suite == "scaling" else "ratio_quartiles"] for row in rows]
        for row in rows:
            what = f"{row['change']}" if suite == "scaling" else f"{row['work']} {row['dtype']}"
            labels.append(f"{what}  {row['contender']}")
        whiskers = [[v - low for v, (low, _) in zip(values, spread)], [high - v for v, (_, high) in zip(values, spread)]]
        ...
