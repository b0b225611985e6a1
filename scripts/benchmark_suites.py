"""The suites of `benchmark.py`: what is measured beside what, and the rows that come of it."""

import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmark_workers import OURS, TORCH, Failed, Task, Work, interleave, quartiles, ratios, say

ROOT = pathlib.Path(__file__).resolve().parent.parent
MATMUL = {"cpu": 3072}  # side of the matrices of the peak; elsewhere 8192
STARTS = 3  # of the command, with warm caches
START_TIMEOUT = 900  # seconds

Row = dict[str, Any]


class Run(NamedTuple):
    """How to measure, and on what: `platform` is jax's name of it, `folder` a temporary one."""

    repeats: int
    seconds: float
    platform: str
    cores: int
    folder: pathlib.Path


def measure(suite: str, works: Sequence[Work], dtypes: Sequence[str], run: Run) -> Iterable[list[Row]]:
    """Yields the rows of a suite, some at a time."""
    if suite == "startup":
        yield measure_startup(run)
    elif suite == "scaling":
        yield from measure_scaling(works[0], dtypes[0], run)
    else:
        for dtype in dtypes:
            if suite != "input":
                yield compare("matmul", _matmul(run), dtype, run, (OURS, TORCH[0]))
            for work in works:
                yield measure_input(work, dtype, run) if suite == "input" else compare(suite, work, dtype, run)


def _matmul(run: Run) -> Work:
    n = MATMUL.get(run.platform, 8192)
    return Work(f"matmul-{n}", {}, 0, 0, (n, n), 1)


def compare(suite: str, work: Work, dtype: str, run: Run, contenders: Sequence[str] = (OURS, *TORCH)) -> list[Row]:
    """One row for each contender, see `summarise`, and how fast each is beside the faster one of PyTorch."""
    say(f"{suite} {work.name} {dtype}")
    tasks = {name: Task(suite, work, dtype, name, run.platform, cores=run.cores) for name in contenders}
    found = interleave(tasks, run.repeats, run.seconds, run.folder)
    counts = {name: values["parameters"] for name, values in found.items() if "parameters" in values}
    assert len(set(counts.values())) < 2, f"the networks differ: {counts}"
    gflop = found[OURS].get("gflop")
    rows = [summarise(suite, work, dtype, name, {"gflop": gflop, **values}) for name, values in found.items()]
    return add_ratios(rows)


def summarise(suite: str, work: Work, dtype: str, name: str, found: Mapping[str, Any]) -> Row:
    """A row of the result: what was measured, and its median and quartiles."""
    row = {"suite": suite, "work": work.name, "dtype": dtype, "contender": name, **found}
    if "error" in row:
        return row
    for key in ("versions", "platform", "device_kind", "device_count"):
        row.pop(key, None)  # the head has them
    low, median, high = quartiles(row["times_s"])
    row |= {"median_s": median, "quartiles_s": [low, high], "images_per_s": work.batch / median}
    if row.get("gflop"):
        row["gflop_per_s"] = row["gflop"] / median
    return row


def add_ratios(rows: list[Row]) -> list[Row]:
    """Adds `ratio`, the median over rounds of how many times as fast a row is as the faster row of PyTorch."""
    torch = [row for row in rows if row["contender"] in TORCH and "error" not in row]
    best = min(torch, key=lambda row: row["median_s"], default=None)
    for row in rows if best else ():
        if "error" not in row:
            found = ratios(row["times_s"], best["times_s"])
            low, median, high = quartiles(found)
            row |= {"ratio": median, "ratio_quartiles": [low, high], "ratios": found, "ratio_to": best["contender"]}
    return rows


def measure_input(work: Work, dtype: str, run: Run) -> list[Row]:
    """Our images alone and in a training, from the cache and from files, beside a step that waits for none."""
    say(f"input {work.name} {dtype}")
    folder = run.folder / f"images-{work.name}"
    if not folder.exists():
        _write_images(work, folder)
    parts = [f"{part} from {where}" for where in ("cache", "files") for part in ("pipeline", "training")]
    tasks = {
        name: Task("step" if name == OURS else "input", work, dtype, name, run.platform, 1, run.cores, str(folder))
        for name in (OURS, *parts)
    }
    found = interleave(tasks, run.repeats, run.seconds, run.folder)
    rows = [summarise("input", work, dtype, "step alone" if n == OURS else n, v) for n, v in found.items()]
    needed = rows[0].get("images_per_s")
    for row in rows[1:] if needed else ():
        if "error" not in row:
            row["of_need"] = row["images_per_s"] / needed
    for row in rows:
        if "waited_s" in row:
            row["waited"] = sum(row["waited_s"]) / (sum(row["times_s"]) * row["steps"])
    return rows


def _write_images(work: Work, folder: pathlib.Path) -> None:
    """PNG files two and a half times as high and wide as what the network sees: soft colours with a little noise."""
    import numpy as np
    from PIL import Image

    rng, size = np.random.default_rng(0), [n * 5 // 2 for n in work.size]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(max(64, 2 * work.batch)):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + rng.integers(-4, 5, (*size, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.convert("RGB" if work.channels == 3 else "L").save(folder / "images" / f"{i}.png")
        regions = rng.integers(0, work.classes, (6, 8), np.uint8)
        Image.fromarray(regions).resize(size[::-1], Image.Resampling.NEAREST).save(folder / "masks" / f"{i}.png")


def measure_scaling(base: Work, dtype: str, run: Run) -> Iterable[list[Row]]:
    """Yields, for each of four directions, the rows of our step at a few points; `cost` is the time beside the base."""
    scale = lambda values, factor: tuple(max(1, int(n * factor)) for n in values)
    widths = base.model["features"]
    directions = {
        "pixels": {f: base._replace(size=scale(base.size, f**0.5)) for f in (0.25, 1, 4)},
        "batch": {f: base._replace(batch=int(base.batch * f)) for f in (0.25, 1, 4) if base.batch * f >= 1},
        "width": {f: base._replace(model={**base.model, "features": scale(widths, f)}) for f in (0.5, 1, 2)},
        "devices": {n: base for n in (1, 2, 4, 8) if base.batch % n == 0},
    }
    for direction, points in directions.items():
        virtual = direction == "devices"
        say(f"scaling {base.name} {dtype}: {'virtual CPU devices' if virtual else direction}")
        tasks = {
            str(factor): Task(
                "step", work, dtype, OURS, "cpu" if virtual else run.platform, factor if virtual else 1, run.cores
            )
            for factor, work in points.items()
        }
        found = interleave(tasks, run.repeats, run.seconds, run.folder)
        rows = []
        for factor, work in points.items():
            row = summarise("scaling", work, dtype, OURS, found[str(factor)])
            row |= {"direction": direction, "factor": factor, "size": work.size, "batch": work.batch}
            rows.append(row)
        one = next(row for row in rows if row["factor"] == 1)
        for row in rows if "error" not in one else ():
            if "error" not in row:
                low, median, high = quartiles(1 / r for r in ratios(row["times_s"], one["times_s"]))
                row |= {"cost": median, "cost_quartiles": [low, high], "work_of_base": row["gflop"] / one["gflop"]}
        yield rows


def measure_startup(run: Run) -> list[Row]:
    """Seconds of the command until its first finished step, with nothing cached and again, and of --help."""
    config = str(ROOT / "configs" / "shapes.py")
    train = [f"--config={config}", "--config.train.log_every_steps=1"]
    cases = {"--help": (["--help"], "", STARTS + 2), "cold": (train, "step 1/", 1), "warm": (train, "step 1/", STARTS)}
    rows = []
    for case, (arguments, until, times) in cases.items():
        row = {"suite": "startup", "case": case, "times_s": []}
        say(f"startup {case}")
        try:
            for _ in range(times):
                row["times_s"].append(seconds_until(arguments, until, run.folder))
            low, median, high = quartiles(row["times_s"])
            row |= {"median_s": median, "quartiles_s": [low, high]}
        except Failed as failure:
            row["error"] = str(failure)
        rows.append(row)
    return rows


def seconds_until(arguments: Sequence[str], line: str, folder: pathlib.Path) -> float:
    """Seconds from the start of `python -m unet_jax.main` until it prints a line that begins so, or until its end.

    Raises:
      Failed: it ends before, or never comes to it.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # where unet_jax is not installed
    environment |= {"PYTHONPATH": os.pathsep.join(path)}
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        command = [sys.executable, "-m", "unet_jax.main", *arguments]
        command += [f"--workdir={workdir}/run"] if line else []
        started, seen = time.perf_counter(), [""]
        process = subprocess.Popen(
            command, env=environment, cwd=workdir, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        timer = threading.Timer(START_TIMEOUT, process.kill)
        timer.start()
        try:
            for text in process.stdout:
                if line and text.startswith(line):
                    return time.perf_counter() - started
                seen = [*seen, text][-5:]
            if not line:
                return time.perf_counter() - started
            raise Failed(f"it ended before its first step: {''.join(seen).strip()[-300:]}")
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
