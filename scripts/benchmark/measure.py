"""The works of the benchmark, the processes that do them, one for each contender, and the suites that compare them.

A process prepares its task once and then answers "take n steps" with the seconds it took. `interleave` has them take
rounds in turn, in changing order, so that whatever else the machine does slows all of them alike.
"""

import contextlib
import ctypes
import functools
import importlib
import math
import multiprocessing
import os
import pathlib
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

OURS, TORCH = "unet_jax", ("PyTorch eager", "PyTorch compiled")
PREPARE_TIMEOUT, ROUND_TIMEOUT = 1800, 900  # seconds; torch.compile of a large network takes minutes
MAX_STEPS = 4096  # in a round
QUEUE = 3  # batches that the image pipeline may have ready before they are asked for

Row = dict[str, Any]
log = functools.partial(print, file=sys.stderr, flush=True)  # progress, apart from the results


class Work(NamedTuple):
    """A network and a batch of images."""

    name: str
    model: Mapping[str, Any]  # settings of `UNet`, or of `EncoderUNet` if there is an `encoder_name`
    channels: int
    classes: int
    size: tuple[int, int]  # height and width of images and labels
    batch: int
    margin: int = 0  # pixels that an unpadded network sees beyond each side of an image, mirrored


_CARLA = {"features": (32, 64, 128, 256, 512), "upsample": "transposed_3x3", "extra_conv": True}
_CARLA |= {"dropout": 0.3, "dropout_on_skip": True}
_UNET = {"features": (64, 128, 256, 512, 1024)}
_PAPER = {**_UNET, "padding": "valid", "dropout": 0.5}
_LITE0 = {"encoder_name": "efficientnet_lite0", "features": (32, 48, 64, 128)}
WORKS = {
    work.name: work
    for work in (
        *(Work(f"carla-{n}", _CARLA, 3, 23, (96, 128), n) for n in (8, 32)),
        *(Work(f"unet-{n}", _UNET, 1, 2, (n, n), 4) for n in (256, 512)),
        *(Work(f"paper-{n}", _PAPER, 1, 2, (388, 388), n, margin=92) for n in (1, 8, 16)),
        Work("lite0-8", _LITE0, 3, 11, (192, 256), 8),
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
        """Waits for an answer, the first of which is what it knows of its task.

        Raises `ChildProcessError` if none comes in time, the process has ended, or it reports an error.
        """
        answer = {"error": f"no answer in {timeout:.0f} s"}
        try:
            if self._connection.poll(timeout):
                answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code, reason = self._process.exitcode or 0, f"exit code {self._process.exitcode}"
            if code < 0:
                reason = signal.Signals(-code).name + (", out of memory?" if code == -signal.SIGKILL else "")
            output = self._output.read_text(errors="replace").split("\n") if self._output.exists() else []
            last = next((f": {line.strip()[:160]}" for line in reversed(output) if line.strip()), "")
            answer = {"error": f"the process ended ({reason}){last}"}
        if "error" in answer:
            raise ChildProcessError(answer["error"])
        return answer

    def take(self, steps: int, timeout: float) -> dict[str, Any]:
        """Has it take some steps, and waits for the answer: `seconds` and more; 0 steps end it: `memory_bytes`."""
        with contextlib.suppress(OSError):  # it has ended, as `answer` will find
            self._connection.send(steps)
        return self.answer(timeout)

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def interleave(tasks: Mapping[Any, Task], settings: Settings) -> dict[Any, dict[str, Any]]:
    """Measures tasks round by round.

    Returns for each task what is known of it, `steps` in a round, `times_s` of a step in each round, other values of
    the rounds, `memory_bytes`; or `error`.
    """
    workers, results, order = {}, {}, random.Random(0)

    def attempt(name, function, *args):
        try:
            return function(*args)
        except ChildProcessError as failure:
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
    facts, steps = worker.answer(PREPARE_TIMEOUT), 1
    for _ in range(2):  # threads and caches are slow at first
        worker.take(1, PREPARE_TIMEOUT)
    while (taken := worker.take(steps, ROUND_TIMEOUT)["seconds"]) < seconds / 2 and steps < MAX_STEPS:
        steps *= 2
    return {**facts, "steps": min(max(1, round(steps * seconds / max(taken, 1e-9))), MAX_STEPS), "times_s": []}


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
        for round_number, steps in enumerate(iter(connection.recv, 0)):
            # A training never idles. What has idled has lost caches, perhaps memory, and has a full queue of images.
            run(QUEUE if task.suite == "input" else 1)
            started = time.perf_counter()
            values = run(steps) or {}
            seconds = time.perf_counter() - started
            if not math.isfinite(values.pop("loss", 0)):
                raise FloatingPointError("the loss is not finite")
            connection.send({"seconds": seconds, **values})
            if round_number == 0:  # from here on, count no memory that compilers took, where the system allows it
                with contextlib.suppress(OSError, AttributeError):
                    ctypes.CDLL(None).malloc_trim(0)
                    pathlib.Path("/proc/self/clear_refs").write_text("5")
        connection.send({"memory_bytes": side.device_memory() or max(_resident_bytes("VmHWM:") - before, 0)})
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


def compare(suite: str, work: Work, dtype: str, settings: Settings, contenders=(OURS, *TORCH)) -> list[Row]:
    """A row for each contender, see `summarise` and `add_ratios`."""
    log(f"{suite} {work.name} {dtype}")
    results = interleave({name: Task(suite, work, dtype, name, settings) for name in contenders}, settings)
    counts = {name: result["parameters"] for name, result in results.items() if "parameters" in result}
    assert len(set(counts.values())) < 2, f"the networks differ: {counts}"
    gflop = {"gflop": results[OURS].get("gflop")}
    return add_ratios([summarise(suite, work, dtype, name, gflop | result) for name, result in results.items()])


def summarise(suite: str, work: Work, dtype: str, name: str, result: Mapping[str, Any]) -> Row:
    """A row: what was measured, with medians, quartiles and rates."""
    row = {"suite": suite, "work": work.name, "dtype": dtype, "contender": name, **result}
    if "error" not in row:
        row |= spread(row["times_s"], "median_s", "quartiles_s")
        row["images_per_s"] = work.batch / row["median_s"]
        row |= {"gflop_per_s": row["gflop"] / row["median_s"]} if row.get("gflop") else {}
    return row


def spread(values: list[float], median: str, quartiles: str) -> dict[str, Any]:
    """The median, and the first and third quartile, by these names."""
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
    parts = ["pipeline from cache", "training from cache", "pipeline from files", "training from files"]
    tasks = {part: Task("input", work, dtype, part, settings) for part in parts}
    tasks = {"step alone": Task("step", work, dtype, OURS, settings), **tasks}
    rows = [summarise("input", work, dtype, name, result) for name, result in interleave(tasks, settings).items()]
    for row in rows:
        if "images_per_s" in row and "images_per_s" in rows[0]:
            row["of_need"] = row["images_per_s"] / rows[0]["images_per_s"]
        if "waited_s" in row:
            row["waited"] = sum(row["waited_s"]) / (sum(row["times_s"]) * row["steps"])
    return rows


def measure_scaling(base: Work, dtype: str, settings: Settings) -> Iterator[list[Row]]:
    """Yields the rows of our step along each of four directions; `cost` is the time of a step, the base's is 1."""
    widths, scale = base.model["features"], lambda values, factor: tuple(max(1, int(n * factor)) for n in values)
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
        results, rows = interleave(tasks, settings), []
        for factor, work in points.items():
            point = {"direction": direction, "factor": factor, "size": work.size, "batch": work.batch}
            rows.append(summarise("scaling", work, dtype, OURS, results[factor] | point))
        one = next(row for row in rows if row["factor"] == 1)
        for row in rows:
            if "error" not in one and "error" not in row:
                costs = [own / base for own, base in zip(row["times_s"], one["times_s"], strict=False)]
                row |= {**spread(costs, "cost", "cost_quartiles"), "work_of_base": row["gflop"] / one["gflop"]}
        yield rows
