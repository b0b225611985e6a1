"""Measures unet_jax beside the same networks in PyTorch, on the same work, in rounds taken in turn.

  python scripts/benchmark                                   # all suites on this device: takes minutes
  python scripts/benchmark --suite step predict --work paper --dtype bfloat16 --output runs/benchmark

Prints tables, whose columns scripts/README.md explains, and writes benchmark.json (every single time) and benchmark.png
into --output. PyTorch is optional.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # for configs/, and where unet_jax is not installed

import measure  # noqa: E402
from measure import WORKS, Row, Settings, Work  # noqa: E402

from unet_jax.errors import UserError, check_choice  # noqa: E402

DTYPES = ("float32", "bfloat16")
ON_CPU = ("carla-8", "carla-32", "lite0-8")  # works small enough for a CPU
_TIMES = "work, dtype, contender, ms, quartiles, images/s"
_STEP = f"{_TIMES}, speed, memory, compiled in, GFLOP, of peak"
_SCALING = "direction, factor, image, batch, ms, quartiles, images/s, cost, operations, memory"
SUITES = {  # what is measured, and the columns of the table
    "step": ("a training step: forward, softmax cross-entropy, backward, Adam; beside PyTorch", _STEP),
    "predict": ("class probabilities of a batch, beside PyTorch", _STEP),
    "input": ("our image pipeline alone, and how long a training waits for it", f"{_TIMES}, of need, waiting"),
    "startup": ("python -m unet_jax.main to its first finished step, and --help", "case, ms, quartiles"),
    "scaling": ("the cost of our step by pixels, batch, width and virtual CPU devices", _SCALING),
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
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped; benchmark.json holds what was measured before.", file=sys.stderr)
        sys.exit(130)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    works = [*sorted({name.partition("-")[0] for name in WORKS}), *WORKS]
    for name, choices, default, text in (
        ("--suite", SUITES, list(SUITES), ". ".join(f"{name}: {text}" for name, (text, _) in SUITES.items())),
        ("--work", works, None, f"{', '.join(works)}; default: {', '.join(ON_CPU)} on a CPU, elsewhere all"),
        ("--dtype", DTYPES, None, f"{', '.join(DTYPES)}; default: float32 on a CPU, elsewhere both"),
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
    flags.output.mkdir(parents=True, exist_ok=True)
    return flags


def _run(flags: argparse.Namespace) -> None:
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as unet_jax.main runs; for all contenders
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        device, file = _describe_device(), flags.output / "benchmark.json"
        on_cpu = device["platform"] == "cpu"
        settings = Settings(flags.repeats, flags.seconds, device["platform"], device["cores"], pathlib.Path(folder))
        names = set(flags.work or (ON_CPU if on_cpu else WORKS))
        works = [work for name, work in WORKS.items() if {name, name.partition("-")[0]} & names]
        dtypes = flags.dtype or (DTYPES[:1] if on_cpu else DTYPES)
        installed = [name for name in ("jax", "jaxlib", "flax", "optax", "torch") if importlib.util.find_spec(name)]
        result = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": {"repeats": flags.repeats, "seconds": flags.seconds, "dtypes": list(dtypes)},
            "device": device,
            "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in installed},
            "skipped": {},
            "rows": [],
        }
        print(format_head(result), flush=True)
        for suite in (name for name in SUITES if name in flags.suite):
            if missing := [name for name in NEEDS.get(suite, ()) if importlib.util.find_spec(name) is None]:
                result["skipped"][suite] = f"not installed: {', '.join(missing)}"
                print(f"{suite} is skipped, {result['skipped'][suite]}", flush=True)
                continue
            for rows in _measure(suite, works, dtypes, settings):
                result["rows"] += rows
                file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")  # a later stop loses nothing
            print(format_suite(result, suite), flush=True)
        file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"Wrote {file}{draw(result, flags.output / 'benchmark.png')}")


def _describe_device() -> dict[str, Any]:
    """What is measured on, asked of JAX in another process, for this one must not hold the device.

    Raises:
      UserError: JAX does not start.
    """
    code = "import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"JAX does not start: {done.stderr.strip()[-300:]}")
    kind, cpuinfo = json.loads(done.stdout.splitlines()[-1]), pathlib.Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        **dict(zip(("platform", "device_kind", "device_count"), kind, strict=True)),
        "cpu": cpus[0] if cpus else platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,  # of the last minute
    }


def _measure(suite: str, works: Sequence[Work], dtypes: Sequence[str], settings: Settings) -> Iterator[list[Row]]:
    """Yields the rows of a suite, some at a time."""
    if suite == "startup":
        yield measure_startup(settings.folder)
    elif suite == "scaling":
        yield from measure.measure_scaling(works[0], dtypes[0], settings)
    elif suite == "input":
        yield from (measure.measure_input(work, dtype, settings) for dtype in dtypes for work in works)
    for dtype in dtypes if suite in ("step", "predict") else ():
        n = 3072 if settings.platform == "cpu" else 8192
        matmul = Work(f"matmul-{n}", {}, 0, 0, (n, n), 1)
        yield measure.compare("matmul", matmul, dtype, settings, (measure.OURS, measure.TORCH[0]))
        yield from (measure.compare(suite, work, dtype, settings) for work in works)


def measure_startup(folder: pathlib.Path) -> list[Row]:
    """Seconds of the command until its first finished step, with nothing cached and again, and of --help."""
    train = [f"--config={ROOT / 'configs' / 'shapes.py'}", "--config.train.log_every_steps=1"]
    rows = []
    for case, repeats in ("--help", 5), ("cold", 1), ("warm", 3):
        measure.log(f"startup {case}")
        rows.append({"suite": "startup", "case": case})
        arguments = ("", ["--help"], folder) if case == "--help" else ("step 1/", train, folder)
        try:
            times = [seconds_until(*arguments) for _ in range(repeats)]
            rows[-1] |= {"times_s": times, **measure.spread(times, "median_s", "quartiles_s")}
        except ChildProcessError as failure:
            rows[-1]["error"] = str(failure)
    return rows


def seconds_until(line: str, flags: Sequence[str], folder: pathlib.Path) -> float:
    """Seconds until `python -m unet_jax.main` prints a line that starts with `line`, or ends if that is empty."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        command = [sys.executable, "-m", "unet_jax.main", *flags, *([f"--workdir={workdir}/run"] if line else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started, output = time.perf_counter(), [""]
        with subprocess.Popen(command, env=environment, cwd=workdir, **pipes) as process:
            watchdog = threading.Timer(measure.ROUND_TIMEOUT, process.kill)  # it may hang
            watchdog.daemon = True
            watchdog.start()
            for text in process.stdout:
                output.append(text)
                if line and text.startswith(line):
                    break
            seconds = time.perf_counter() - started
            watchdog.cancel()
            process.kill()
    if not output[-1].startswith(line):
        raise ChildProcessError(f"it ended before its first step: {''.join(output[-5:]).strip()[-300:]}")
    return seconds


def format_head(result: Mapping[str, Any]) -> str:
    """What was measured on, and how."""
    device, settings = result["device"], result["settings"]
    precision = "in full" if device["platform"] == "cpu" else "JAX's default, TensorFloat-32 if there is one, in both"
    lines = [
        f"device   {device['device_count']} x {device['device_kind']}, one used",
        f"cpu      {device['cores']} cores of {device['cpu']}",
        f"versions {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"rounds   {settings['repeats']} of about {settings['seconds']:g} s, in turn, a process for each row",
        f"float32  {precision}",
    ]
    if device["load_before"] > 0.2 * device["cores"]:
        load = f"{device['load_before']:.1f} of {device['cores']} before the start"
        lines.append(f"WARNING  the machine is busy (load {load}): that slows some rows more than others")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Four digits, and no exponent."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 3)}f}"


_COLUMNS = {  # name -> key of a row, and how to show it; other columns are words, by the same name
    "factor": ("factor", "x {:g}".format),
    "image": ("size", lambda size: "x".join(map(str, size))),
    "batch": ("batch", str),
    "ms": ("median_s", lambda seconds: _number(1e3 * seconds)),
    "quartiles": ("quartiles_s", lambda quartiles: "-".join(_number(1e3 * seconds) for seconds in quartiles)),
    "images/s": ("images_per_s", _number),
    "speed": ("ratio", "{:.2f}x".format),
    "of need": ("of_need", lambda value: f"{_number(value)}x"),
    "waiting": ("waited", "{:.1%}".format),
    "cost": ("cost", "{:.2f}x".format),
    "operations": ("work_of_base", "{:.2f}x".format),
    "memory": ("memory_bytes", lambda count: f"{_number(count / 2**30)} GiB"),
    "compiled in": ("compile_s", "{:.1f} s".format),
    "GFLOP": ("gflop", "{:,.1f}".format),
    "of peak": ("of_peak", "{:.0%}".format),
}


def format_suite(result: Mapping[str, Any], suite: str) -> str:
    """The table of a suite; an error takes the rest of its line."""
    title, columns = SUITES[suite][0], SUITES[suite][1].split(", ")
    peaks = {}  # GFLOP/s of the fastest round of a large matrix product, by either framework
    for row in result["rows"]:
        if row["suite"] == "matmul" and "error" not in row:
            peaks[row["dtype"]] = max(peaks.get(row["dtype"], 0.0), row["gflop"] / min(row["times_s"]))
    table = [dict(zip(columns, columns, strict=True))]
    for row in (row for row in result["rows"] if row["suite"] == suite):
        of_peak = row.get("gflop_per_s", 0.0) / peaks.get(row.get("dtype"), math.inf) or None
        cells = {name: row[name] for name in columns if name not in _COLUMNS}
        for name in columns if "error" not in row else ():
            if name in _COLUMNS:
                value = {**row, "of_peak": of_peak}.get(_COLUMNS[name][0])
                cells[name] = "-" if value is None else _COLUMNS[name][1](value)
        table.append({**cells, "error": row.get("error", "")})
    lines = ["", f"{suite}: {title}"]
    widths = {name: max(len(cells.get(name, "")) for cells in table) for name in columns}
    for cells in table:
        shown = [cells[n].rjust(w) if n in _COLUMNS else cells[n].ljust(w) for n, w in widths.items() if n in cells]
        lines.append("  ".join([*shown, cells.get("error", "")]).rstrip()[:120])
    if suite in ("step", "predict"):
        lines += [f"peak of {dtype}: {peak:,.0f} GFLOP/s" for dtype, peak in peaks.items()]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: pathlib.Path) -> str:
    """Draws speed beside PyTorch and cost beside the base, a bar for each row; returns what to print of it."""
    rows = [r for r in result["rows"] if r["suite"] in ("step", "predict", "scaling") and "error" not in r]
    if not rows:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "; no picture, matplotlib is not installed"
    suites = {suite: drawn for suite in SUITES if (drawn := [row for row in rows if row["suite"] == suite])}
    figure = Figure((9, 1 + 1.1 * len(suites) + 0.25 * len(rows)), layout="constrained")
    figure.suptitle("unet_jax beside PyTorch, {device_kind}, {cores} cores of {cpu}".format(**result["device"]))
    axes = figure.subplots(len(suites), height_ratios=[2 + len(rows) for rows in suites.values()], squeeze=False)[:, 0]
    for ax, (suite, rows) in zip(axes, suites.items(), strict=True):
        key = "cost" if suite == "scaling" else "ratio"
        names = ("direction", "factor") if suite == "scaling" else ("work", "dtype", "contender")
        for y, row in enumerate(rows):
            value, (low, high) = row.get(key, 1.0), row.get(f"{key}_quartiles", (1.0, 1.0))
            color = "#1f6f8b" if row["contender"] == measure.OURS else "#e3a27c"
            ax.barh(y, value, xerr=[[value - low], [high - value]], capsize=2, color=color)
            ax.text(high, y, f"  {value:.2f}x  {_number(row['images_per_s'])} images/s", va="center", fontsize=8)
        ax.set_yticks(range(len(rows)), ["  ".join(str(row[name]) for name in names) for row in rows], fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.3)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_title(f"{suite}: {SUITES[suite][0]}", loc="left", fontsize=10)
        ax.set_xlabel("cost, the base is 1" if suite == "scaling" else "speed, the faster of PyTorch is 1", fontsize=9)
    figure.savefig(file, dpi=110)
    return f" and {file}"


if __name__ == "__main__":
    main()
