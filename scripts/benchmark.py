"""Measures our network beside the same network in PyTorch, on the same work, round by round in turn.

  python scripts/benchmark.py                                  # all suites on this device: takes minutes
  python scripts/benchmark.py --suite step --work carla-8 --repeats 20
  python scripts/benchmark.py --suite step predict --work paper --dtype bfloat16 --output runs/benchmark

step     a training step: forward, softmax cross-entropy, backward, Adam; beside PyTorch eager and torch.compile
predict  class probabilities of a batch, likewise
input    our images alone, from the cache and from files, and how long a training waits for them
startup  python -m unet_jax.main until its first finished training step, with cold caches and warm ones; --help
scaling  how the cost of our step grows with pixels, batch, width and virtual CPU devices

Prints tables, and writes benchmark.json (every single time) and benchmark.png into --output. PyTorch is optional.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import signal
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for configs/, and where unet_jax is not installed

import benchmark_report  # noqa: E402
import benchmark_suites  # noqa: E402
from benchmark_workers import OURS, TORCH, WORKS, Failed, Task, Worker, say  # noqa: E402

from unet_jax.errors import UserError, check_choice  # noqa: E402

SUITES = ("step", "predict", "input", "startup", "scaling")
DTYPES = ("float32", "bfloat16")
NEEDS = {  # beyond what the network and its step need
    "input": ("ml_collections", "tensorflow", "tqdm"),
    "startup": ("absl", "clu", "ml_collections", "orbax.checkpoint", "tensorflow", "tqdm"),
}
SMALL = ("carla-8", "carla-32")  # works for a CPU


def main() -> None:
    """Measures; bad flags end with exit code 1 and one message."""
    flags = _parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the processes end with it
    try:
        _measure(flags)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"Stopped. What was measured before is in {flags.output}", file=sys.stderr)
        sys.exit(130)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--suite", nargs="+", default=list(SUITES), metavar="NAME", help="default: all")
    groups = sorted({name.partition("-")[0] for name in WORKS})
    parser.add_argument(
        "--work",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(groups)} (all sizes), or one of {', '.join(WORKS)}: batch of carla at 96x128 and of paper at "
        f"572x572, side of unet, in batches of 4. Default: {', '.join(SMALL)} on a CPU, elsewhere all",
    )
    parser.add_argument(
        "--dtype", nargs="+", metavar="NAME", help="float32, bfloat16; default: on a CPU float32, else both"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each in a round (%(default)s)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmark"), metavar="DIR", help="default: %(default)s"
    )
    flags = parser.parse_args()
    try:
        for name in flags.suite:
            check_choice("--suite", name, SUITES)
        for name in flags.work or ():
            check_choice("--work", name, [*groups, *WORKS])
        for name in flags.dtype or ():
            check_choice("--dtype", name, DTYPES)
        if flags.repeats < 1 or not 0 < flags.seconds < 3600:
            raise UserError(f"--repeats={flags.repeats} and --seconds={flags.seconds} must be positive")
        file = flags.output / "benchmark.json"
        if file.exists():
            raise UserError(f"{file} exists and is not overwritten: choose another --output, or remove it")
        flags.output.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    return flags


def _measure(flags: argparse.Namespace) -> None:
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as unet_jax.main runs; for all contenders
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        run = benchmark_suites.Run(flags.repeats, flags.seconds, "", cores, pathlib.Path(folder))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # of the last minute
        device, versions = probe(run)
        run = run._replace(platform=device["platform"])
        on_cpu = run.platform == "cpu"
        names = flags.work or (SMALL if on_cpu else WORKS)
        works = [work for name, work in WORKS.items() if {name, name.partition("-")[0]} & set(names)]
        dtypes = flags.dtype or (DTYPES[:1] if on_cpu else DTYPES)
        result = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": {"repeats": run.repeats, "seconds": run.seconds, "dtypes": list(dtypes)},
            "device": {**device, "load_before": load},
            "versions": versions,
            "skipped": {},
            "rows": [],
        }
        print(benchmark_report.format_head(result), flush=True)
        for suite in (name for name in SUITES if name in flags.suite):
            if missing := [name for name in NEEDS.get(suite, ()) if not _has(name)]:
                result["skipped"][suite] = f"not installed: {', '.join(missing)}"
                print(f"{suite} is skipped, {result['skipped'][suite]}", flush=True)
            for rows in () if missing else benchmark_suites.measure(suite, works, dtypes, run):
                result["rows"] += rows
                _write(flags.output, result)  # what was measured is kept, whatever comes next
            if not missing:
                print(benchmark_report.format_suite(result, suite), flush=True)
        _write(flags.output, result)
    print(f"Wrote {flags.output / 'benchmark.json'}{benchmark_report.draw(result, flags.output / 'benchmark.png')}")


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of the package that it is part of
        return False


def _write(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    partial = folder / "benchmark.json.partial"
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    partial.replace(folder / "benchmark.json")


def probe(run: benchmark_suites.Run) -> tuple[dict[str, Any], dict[str, str]]:
    """The device and the versions of all that takes part, as far as they are installed.

    Raises:
      UserError: JAX does not start.
    """
    found, versions = {}, {"python": platform.python_version()}
    for contender in (OURS, TORCH[0]):
        task = Task("probe", None, "", contender, found.get("platform", ""), cores=run.cores)
        worker = Worker(task, run.folder / f"probe-{contender}.txt")
        try:
            answer = worker.answer(300)
        except Failed as failure:
            if contender == OURS:
                raise UserError(f"unet_jax cannot be measured: {failure}") from None
            say(f"PyTorch: {failure}")
            continue
        finally:
            worker.close()
        versions |= answer.pop("versions")
        found |= answer
    found |= {"cpu": _cpu_name(), "cores": run.cores, "system": f"{platform.system()} {platform.machine()}"}
    return found, versions


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
