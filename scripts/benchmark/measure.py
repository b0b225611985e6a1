"""The works and suites of the benchmark, and the processes that run them: one for each contender.

A process prepares its task once and then answers "take n steps" with the seconds it took. `interleave` has them take
rounds in turn, in changing order, so that whatever else the machine does slows all of them alike.
"""

import contextlib
import ctypes
import importlib
import math
import multiprocessing
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OURS, TORCH = "unet_jax", ("PyTorch eager", "PyTorch compiled")
PREPARE_TIMEOUT, ROUND_TIMEOUT = 1800, 900  # seconds; torch.compile of a large network takes minutes
MAX_STEPS = 4096  # in a round
QUEUE = 3  # batches that the image pipeline may have ready before they are asked for

Row = dict[str, Any]


class Work(NamedTuple):
    """A network and a batch of images."""

    name: str
    model: Mapping[str, Any]  # settings of the network, as in `config.model`
    channels: int
    classes: int
    size: tuple[int, int]  # height and width of images and labels
    batch: int
    margin: int = 0  # pixels that an unpadded network sees beyond each side of an image, mirrored


_UNET = {"features": (64, 128, 256, 512, 1024)}
_PAPER = {**_UNET, "padding": "valid", "dropout": 0.5}
_CARLA = {"features": (32, 64, 128, 256, 512), "upsample": "transposed_3x3", "extra_conv": True}
_CARLA |= {"dropout": 0.3, "dropout_on_skip": True}
WORKS = {
    work.name: work
    for work in (
        *(Work(f"carla-{n}", _CARLA, 3, 23, (96, 128), n) for n in (8, 32)),
        *(Work(f"unet-{n}", _UNET, 1, 2, (n, n), 4) for n in (256, 512)),
        *(Work(f"paper-{n}", _PAPER, 1, 2, (388, 388), n, margin=92) for n in (1, 8, 16)),
    )
}


class Settings(NamedTuple):
    """How to measure."""

    repeats: int  # rounds
    seconds: float  # roughly, of each contender in a round; one step at least
    platform: str  # as JAX names it
    cores: int  # of the CPU to use
    folder: pathlib.Path  # for temporary files


class Task(NamedTuple):
    """What a process does."""

    suite: str  # step, predict, matmul (of two matrices of `work.size`) or input
    work: Work
    dtype: str
    contender: str  # unet_jax, PyTorch eager or PyTorch compiled; of input, which part of the way
    settings: Settings
    devices: int = 1  # on a CPU, virtual ones


class Failed(Exception):
    """A process did not do what it was asked for; the message says why."""


def log(text: str) -> None:
    """Prints progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def draw_batch(work: Work) -> dict:
    """Noise, the same for all contenders: `image` uint8 `[B, H, W, C]` and `label` uint8 `[B, H, W]`."""
    import numpy as np

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (work.batch, *work.size, work.channels), np.uint8)
    return {"image": image, "label": rng.integers(0, work.classes, (work.batch, *work.size), np.uint8)}


class Worker:
    """A process that does a task, seen from its parent."""

    def __init__(self, task: Task):
        context = multiprocessing.get_context("spawn")
        self._output = task.settings.folder / f"worker-{len(list(task.settings.folder.iterdir()))}.txt"
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=serve, args=(other_end, task, str(self._output)), daemon=True)
        self._process.start()
        other_end.close()  # so that an ended process is noticed

    def answer(self, timeout: float) -> dict[str, Any]:
        """Waits for what it knows of its task, the first answer.

        Raises:
          Failed: no answer came in time, the process ended, or it reports an error.
        """
        try:
            if not self._connection.poll(timeout):
                raise Failed(f"no answer in {timeout:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise Failed(self._describe_end()) from None
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def take(self, steps: int, timeout: float) -> dict[str, Any]:
        """Has it take some steps, and waits for the answer: `seconds` and more; 0 steps end it: `memory_bytes`."""
        with contextlib.suppress(OSError):  # it has ended, as `answer` will find
            self._connection.send(steps)
        return self.answer(timeout)

    def _describe_end(self) -> str:
        code = self._process.exitcode or 0
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reason += ", out of memory?" if code == -signal.SIGKILL else ""
        output = self._output.read_text(errors="replace").strip() if self._output.exists() else ""
        return f"the process ended ({reason})" + (f": {output.splitlines()[-1][:160]}" if output else "")

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def interleave(tasks: Mapping[Any, Task], settings: Settings) -> dict[Any, dict[str, Any]]:
    """Measures tasks round by round.

    Returns:
      for each task what is known of it, `steps` in a round, `times_s` of a step in each round, other values of the
      rounds, `memory_bytes`; or `error`.
    """
    workers, results, order = {}, {}, random.Random(0)

    def attempt(name, function, *args):
        try:
            return function(*args)
        except Failed as failure:
            log(f"  {name}: {failure}")
            results[name] = {"error": str(failure)}
            workers.pop(name).close()

    try:
        for name, task in tasks.items():
            workers[name] = Worker(task)
            if facts := attempt(name, _prepare, workers[name], settings.seconds):
                log(f"  {name}: ready, {facts['steps']} steps a round")
                results[name] = facts
        for _ in range(settings.repeats):
            for name in order.sample(sorted(workers), len(workers)):
                result = results[name]
                if answer := attempt(name, workers[name].take, result["steps"], ROUND_TIMEOUT):
                    result["times_s"].append(answer.pop("seconds") / result["steps"])
                    for key, value in answer.items():
                        result.setdefault(key, []).append(value)
        for name in sorted(workers):
            results[name] |= attempt(name, workers[name].take, 0, 60) or {}
    finally:
        for worker in workers.values():
            worker.close()
    return results


def _prepare(worker: Worker, seconds: float) -> dict[str, Any]:
    """Warms up, and finds how many steps fill `seconds`."""
    facts = worker.answer(PREPARE_TIMEOUT)
    for _ in range(2):  # threads and caches are slow at first
        worker.take(1, PREPARE_TIMEOUT)
    steps = 1
    while (taken := worker.take(steps, ROUND_TIMEOUT)["seconds"]) < seconds / 2 and steps < MAX_STEPS:
        steps *= 2
    steps = min(max(1, round(steps * seconds / max(taken, 1e-9))), MAX_STEPS)
    return {**facts, "steps": steps, "times_s": []}


def serve(connection, task: Task, output: str) -> None:
    """What a process runs."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_NUM_CPU_DEVICES": str(task.devices)}
    os.environ |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3"} | ({"JAX_PLATFORMS": "cpu"} if task.settings.platform == "cpu" else {})
    try:
        side = importlib.import_module("with_torch" if task.contender in TORCH else "with_jax")
        before = _resident_bytes("VmRSS:")
        run, facts = side.build(task)
        connection.send(facts)
        first = True
        while steps := connection.recv():
            # A training never idles. What has idled has lost caches, perhaps memory, and has a full queue of images.
            run(QUEUE if task.suite == "input" else 1)
            started = time.perf_counter()
            values = run(steps) or {}
            seconds = time.perf_counter() - started
            if not math.isfinite(values.pop("loss", 0)):
                raise FloatingPointError("the loss is not finite")
            connection.send({"seconds": seconds, **values})
            if first:
                _forget_compilation()
            first = False
        memory = side.device_memory() or _resident_bytes("VmHWM:") - before
        connection.send({"memory_bytes": memory})
    except ImportError as error:
        connection.send({"error": f"not installed: {error.name or error}"})
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def _resident_bytes(field: str) -> int:
    """Memory that this process holds (VmRSS) or held at most (VmHWM); 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        words = pathlib.Path("/proc/self/status").read_text().split()
        return int(words[words.index(field) + 1]) * 1024
    return 0


def _forget_compilation() -> None:
    """Returns memory that compilers freed, and restarts the peak of resident memory, where the system allows it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure(suite: str, works: Sequence[Work], dtypes: Sequence[str], settings: Settings) -> Iterator[list[Row]]:
    """Yields the rows of a suite, some at a time."""
    if suite == "startup":
        yield measure_startup(settings)
    elif suite == "scaling":
        yield from measure_scaling(works[0], dtypes[0], settings)
    for dtype in dtypes if suite == "input" else ():
        yield from (measure_input(work, dtype, settings) for work in works)
    for dtype in dtypes if suite in ("step", "predict") else ():
        n = 3072 if settings.platform == "cpu" else 8192
        yield (products := compare("matmul", Work(f"matmul-{n}", {}, 0, 0, (n, n), 1), dtype, settings, (OURS, TORCH[0])))
        peak = max((row["gflop"] / min(row["times_s"]) for row in products if "error" not in row), default=None)
        yield from (compare(suite, work, dtype, settings, peak=peak) for work in works)


def compare(
    suite: str, work: Work, dtype: str, settings: Settings, contenders: Sequence[str] = (OURS, *TORCH), peak=None
) -> list[Row]:
    """A row for each contender, see `summarise` and `add_ratios`; `peak` is GFLOP/s."""
    log(f"{suite} {work.name} {dtype}")
    results = interleave({name: Task(suite, work, dtype, name, settings) for name in contenders}, settings)
    counts = {name: result["parameters"] for name, result in results.items() if "parameters" in result}
    assert len(set(counts.values())) < 2, f"the networks differ: {counts}"
    gflop = {"gflop": results[OURS].get("gflop"), "peak_gflop_per_s": peak}
    return add_ratios([summarise(suite, work, dtype, name, gflop | result) for name, result in results.items()])


def summarise(suite: str, work: Work, dtype: str, name: str, result: Mapping[str, Any]) -> Row:
    """A row: what was measured, with medians, quartiles and rates."""
    row = {"suite": suite, "work": work.name, "dtype": dtype, "contender": name, **result}
    if "error" not in row:
        row |= spread(row["times_s"], "median_s", "quartiles_s")
        row["images_per_s"] = work.batch / row["median_s"]
        if row.get("gflop"):
            row["gflop_per_s"] = row["gflop"] / row["median_s"]
    return row


def spread(values: Iterable[float], median: str, quartiles: str) -> dict[str, Any]:
    """The median, and the first and third quartile, by these names."""
    values = list(values)
    low, middle, high = statistics.quantiles(values * (2 if len(values) == 1 else 1), n=4, method="inclusive")
    return {median: middle, quartiles: [low, high]}


def add_ratios(rows: list[Row]) -> list[Row]:
    """Adds `ratio`, the median over rounds of how many times as fast a row is as the faster row of PyTorch."""
    measured = [row for row in rows if "error" not in row]
    best = min((row for row in measured if row["contender"] in TORCH), key=lambda row: row["median_s"], default=None)
    for row in measured if best else ():
        row["ratios"] = [other / own for own, other in zip(row["times_s"], best["times_s"], strict=False)]
        row |= {**spread(row["ratios"], "ratio", "ratio_quartiles"), "ratio_to": best["contender"]}
    return rows


def measure_input(work: Work, dtype: str, settings: Settings) -> list[Row]:
    """Our image pipeline alone and in a training, from the cache and from files, beside a step that waits for none."""
    log(f"input {work.name} {dtype}")
    parts = [f"{part} from {place}" for place in ("cache", "files") for part in ("pipeline", "training")]
    tasks = {"step alone": Task("step", work, dtype, OURS, settings)}
    tasks |= {part: Task("input", work, dtype, part, settings) for part in parts}
    rows = [summarise("input", work, dtype, name, result) for name, result in interleave(tasks, settings).items()]
    for row in rows:
        if "images_per_s" in row and "images_per_s" in rows[0]:
            row["of_need"] = row["images_per_s"] / rows[0]["images_per_s"]
        if "waited_s" in row:
            row["waited"] = sum(row["waited_s"]) / (sum(row["times_s"]) * row["steps"])
    return rows


def measure_scaling(base: Work, dtype: str, settings: Settings) -> Iterator[list[Row]]:
    """Yields the rows of our step at a few points along each of four directions; `cost` is its time in times of base."""
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
        log(f"scaling {base.name} {dtype}: {'virtual CPU devices' if virtual else direction}")
        where = settings._replace(platform="cpu") if virtual else settings
        tasks = {f: Task("step", work, dtype, OURS, where, f if virtual else 1) for f, work in points.items()}
        rows = []
        for factor, result in interleave(tasks, settings).items():
            work = points[factor]
            point = {"direction": direction, "factor": factor, "size": work.size, "batch": work.batch}
            rows.append(summarise("scaling", work, dtype, OURS, result | point))
        one = next(row for row in rows if row["factor"] == 1)
        for row in rows:
            if "error" not in one and "error" not in row:
                costs = [own / base for own, base in zip(row["times_s"], one["times_s"], strict=False)]
                row |= {**spread(costs, "cost", "cost_quartiles"), "work_of_base": row["gflop"] / one["gflop"]}
        yield rows


def measure_startup(settings: Settings) -> list[Row]:
    """Seconds of the command until its first finished step, with nothing cached and again, and of --help."""
    train = [f"--config={ROOT / 'configs' / 'shapes.py'}", "--config.train.log_every_steps=1"]
    rows = []
    for case, flags, line, times in (
        ("--help", ["--help"], "", 5), ("cold", train, "step 1/", 1), ("warm", train, "step 1/", 3)
    ):
        log(f"startup {case}")
        try:
            seconds = [seconds_until(line, flags, settings.folder) for _ in range(times)]
            result = {"times_s": seconds, **spread(seconds, "median_s", "quartiles_s")}
        except Failed as failure:
            result = {"error": str(failure)}
        rows.append({"suite": "startup", "case": case, **result})
    return rows


def seconds_until(line: str, flags: Sequence[str], folder: pathlib.Path) -> float:
    """Seconds that `python -m unet_jax.main` takes to print a line that starts with `line`; if that is empty, to end.

    Raises:
      Failed: it ended without that line.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        command = [sys.executable, "-m", "unet_jax.main", *flags, *([f"--workdir={workdir}/run"] if line else [])]
        started, output = time.perf_counter(), [""]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=environment, cwd=workdir, **pipes) as process:
            for text in process.stdout:
                output.append(text)
                if line and text.startswith(line):
                    break
            seconds = time.perf_counter() - started
            process.kill()
    if not output[-1].startswith(line):
        raise Failed(f"it ended before its first step: {''.join(output[-5:]).strip()[-300:]}")
    return seconds
