"""The works of `benchmark.py`, and the processes that do them: one for each contender, one at a time.

Each process builds its work once and then answers "take n steps" with the seconds it took. `interleave` goes round
among them, so that whatever else the machine does hits all alike.
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
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

BUILD_TIMEOUT, RUN_TIMEOUT = 1800, 900  # seconds; torch.compile of a large network takes minutes
OURS, TORCH = "unet_jax", ("PyTorch eager", "PyTorch compiled")
MAX_STEPS = 4096  # in a round


class Work(NamedTuple):
    """A network and a batch.

    Attributes:
      name: for people.
      model: settings of the network, as in `config.model`.
      channels: of the images.
      classes: of the labels.
      size: height and width of images and labels; a network without padding sees more, mirrored.
      batch: images in it.
      around: mirrored pixels around each image: left, right, above, below.
    """

    name: str
    model: Mapping[str, Any]
    channels: int
    classes: int
    size: tuple[int, int]
    batch: int
    around: tuple[int, int, int, int] = (0, 0, 0, 0)


_CARLA = {
    "features": (32, 64, 128, 256, 512),
    "upsample": "transposed_3x3",
    "dropout": 0.3,
    "dropout_on_skip": True,
    "extra_conv": True,
}
_UNET = {"features": (64, 128, 256, 512, 1024)}
_PAPER = {**_UNET, "padding": "valid", "dropout": 0.5}
WORKS = {
    work.name: work
    for work in (
        *(Work(f"carla-{n}", _CARLA, 3, 23, (96, 128), n) for n in (8, 32)),
        *(Work(f"unet-{n}", _UNET, 1, 2, (n, n), 4) for n in (256, 512)),
        *(Work(f"paper-{n}", _PAPER, 1, 2, (388, 388), n, (92, 92, 92, 92)) for n in (1, 8, 16)),
    )
}


class Task(NamedTuple):
    """What a process is to do.

    Attributes:
      suite: `step`, `predict`, `matmul` (of two square matrices, `work.size`), `input`, or `probe` (nothing).
      work: see `Work`; None to probe.
      dtype: `float32` or `bfloat16`.
      contender: `unet_jax`, `PyTorch eager` or `PyTorch compiled`; for `input`, which part of the way.
      platform: of jax, as `gpu`; empty is its default.
      devices: how many of them; for a CPU, virtual ones.
      cores: of the CPU, to be used by all.
      folder: input: of the images.
    """

    suite: str
    work: Work | None
    dtype: str
    contender: str
    platform: str = ""
    devices: int = 1
    cores: int = 1
    folder: str = ""


class Contender(NamedTuple):
    """A work that is ready.

    Attributes:
      run: takes n steps and waits for their end; may return the last loss, or a dictionary that is added to the answer.
      facts: what is known of it beside times.
      device_memory: peak bytes by the allocator of an accelerator; None where the process tells.
    """

    run: Callable[[int], Any]
    facts: dict[str, Any]
    device_memory: Callable[[], int] | None = None


class Failed(Exception):
    """A process gave no answer; says why."""


def say(text: str) -> None:
    """Tells how far it is, beside the results."""
    print(text, file=sys.stderr, flush=True)


def draw_batch(work: Work) -> dict:
    """Noise: `image` uint8 `[B, H, W, C]` and `label` uint8 `[B, H, W]`, the same for all contenders."""
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (work.batch, *work.size, work.channels), np.uint8),
        "label": rng.integers(0, work.classes, (work.batch, *work.size), np.uint8),
    }


class Worker:
    """A process that does a task, as its parent sees it."""

    def __init__(self, task: Task, log: pathlib.Path):
        """Starts it; what it prints goes into `log`."""
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, task, str(log)), daemon=True)
        self._process.start()
        theirs.close()  # so that its end shows

    def ask(self, message: int | None, timeout: float) -> dict[str, Any]:
        """Sends a number of steps, or None for the end, and waits for the answer.

        Raises:
          Failed: see `answer`.
        """
        with contextlib.suppress(OSError):  # ended: so `answer` finds
            self._connection.send(message)
        return self.answer(timeout)

    def answer(self, timeout: float) -> dict[str, Any]:
        """Waits for an answer.

        Raises:
          Failed: there was none in time, the process ended, or it says what went wrong.
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

    def _describe_end(self) -> str:
        code = self._process.exitcode or 0
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name + (", out of memory?" if code == -signal.SIGKILL else "")
        printed = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        return f"the process ended ({how})" + (f": {last[:160]}" if last else "")

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def interleave(
    tasks: Mapping[str, Task], repeats: int, seconds: float, folder: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Measures tasks round by round, each round in another order.

    Args:
      tasks: by the name of their row.
      repeats: rounds.
      seconds: how long each is to take in a round, roughly; one step at least.
      folder: for what the processes print.

    Returns:
      for each task the facts of its contender, `steps` in a round, `times_s` of a step in each round, other values of
      the rounds, `memory_bytes`; or `error`.
    """
    workers, found, order = {}, {name: {} for name in tasks}, random.Random(0)

    def attempt(name, function, *args):
        try:
            return function(*args)
        except Failed as failure:
            say(f"  {name}: {failure}")
            found[name] = {"error": str(failure)}
            workers.pop(name).close()

    try:
        for name, task in tasks.items():
            started = time.perf_counter()
            log = folder / f"worker-{len(list(folder.iterdir()))}.txt"
            workers[name] = Worker(task, log)
            if answer := attempt(name, workers[name].answer, BUILD_TIMEOUT):
                found[name] |= answer
                if steps := attempt(name, _calibrate, workers[name], seconds):
                    found[name] |= {"steps": steps, "times_s": []}
                    say(f"  {name}: ready after {time.perf_counter() - started:.0f} s, {steps} steps a round")
        for _ in range(repeats):
            for name in order.sample(sorted(workers), len(workers)):
                steps = found[name]["steps"]
                if answer := attempt(name, workers[name].ask, steps, RUN_TIMEOUT):
                    found[name]["times_s"].append(answer.pop("seconds") / steps)
                    for key, value in answer.items():
                        found[name].setdefault(key, []).append(value)
        for name in sorted(workers):
            if answer := attempt(name, workers[name].ask, None, 60):
                found[name] |= answer
    finally:
        for worker in workers.values():
            worker.close()
    return found


def _calibrate(worker: Worker, seconds: float) -> int:
    """Warms up, and finds how many steps fill `seconds`."""
    worker.ask(1, BUILD_TIMEOUT)
    worker.ask(1, BUILD_TIMEOUT)  # threads and caches are slow to begin with, too
    steps = 1
    while (taken := worker.ask(steps, RUN_TIMEOUT)["seconds"]) < seconds / 2 and steps < MAX_STEPS:
        steps *= 2
    return min(max(1, round(steps * seconds / max(taken, 1e-9))), MAX_STEPS)


def serve(connection, task: Task, log: str) -> None:
    """The life of a process: builds its work and takes steps until it is told to end."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # As much memory as is needed, and nothing from earlier compilations.
    os.environ |= {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_NUM_CPU_DEVICES": str(task.devices),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    os.environ |= {"JAX_PLATFORMS": "cpu"} if task.platform == "cpu" else {}
    try:
        module = importlib.import_module("unet_torch" if task.contender in TORCH else "benchmark_jax")
        facts = module.start(task)
        if task.suite == "probe":
            connection.send(facts)
            return
        before = _resident("VmRSS")
        contender = module.build(task)
        connection.send(facts | contender.facts)
        rounds = 0
        while (steps := connection.recv()) is not None:
            contender.run(1)  # a training never idles, and what idled has lost caches, perhaps memory
            started = time.perf_counter()
            result = contender.run(steps)
            answer = {"seconds": time.perf_counter() - started}
            if isinstance(result, dict):
                answer |= result
            elif result is not None and not math.isfinite(result):
                raise FloatingPointError(f"the loss is {result}")
            connection.send(answer)
            if rounds == 0:
                _forget_compilation()
            rounds += 1
        if contender.device_memory is not None:
            memory = contender.device_memory()
        else:
            memory = None if before is None else max(_resident("VmHWM") - before, 0)
        connection.send({"memory_bytes": memory})
    except ImportError as error:
        connection.send({"error": f"not installed: {error.name or error}"})
    except Exception as error:
        text = " ".join(str(error).split())
        connection.send({"error": f"{type(error).__name__}: {text[:200]}"})


def _resident(field: str) -> int | None:
    """Bytes that this process holds (VmRSS) or held at most (VmHWM), where the system tells."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _forget_compilation() -> None:
    """Gives back what compilers left free, and begins the peak of resident memory anew, where the system allows it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    values = list(values)
    if len(values) == 1:
        values *= 2
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """How many times as fast as `reference`, in each round that both have."""
    return [other / own for own, other in zip(times, reference, strict=False)]
