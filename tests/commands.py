"""`python -m unet_jax.main` in processes forked from one that has already imported everything: real, and fast to start.

That process never starts a JAX backend, so each command has its own, with as many devices as it wants.
"""

import faulthandler
import importlib
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.py"
# Imported by the process that commands are forked from, because commands import them.
PRELOADED = ("clu.metric_writers", "matplotlib.pyplot", "tensorflow")
PRELOADED += ("unet_jax.data.shapes", "unet_jax.training.loop")
_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Prepares the process that commands are forked from; it starts with the first command."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    _context.set_forkserver_preload(["commands", *PRELOADED])


def training(path: pathlib.Path, *more: str) -> tuple[str, ...]:
    """The flags of a tiny training in the work directory `path`."""
    return (f"--config={TINY}", "--config.train.panels=0", f"--workdir={path}", *more)


class Command:
    """A running command.

    Attributes:
      output: what it has printed so far to either stream.
      flags: as it was started with.
      pid: its process id.
    """

    def __init__(
        self,
        *flags: str,
        devices: int = 8,
        folder: pathlib.Path,
        file_size: int = 0,
        fills_cache: bool = True,
        log_compiles: bool = False,
        streams: Mapping[int, str] | None = None,
        ignored: Sequence[signal.Signals] = (),
        constants: Mapping[str, float] | None = None,
    ):
        """Starts `python -m unet_jax.main FLAGS` with `devices` virtual devices.

        Args:
          folder: to run in; the output is written there.
          file_size: no file may grow beyond this many bytes; 0 is no limit.
          fills_cache: whether it adds to the shared compilation cache, where a kill could leave half a file.
          log_compiles: whether JAX logs what it compiles.
          streams: descriptor -> what it is instead of the output file: "closed", "no reader" (a pipe whose reader has
            left), or a path; a terminal becomes the controlling one.
          ignored: signals that are ignored from the start.
          constants: other values of module constants, such as those of timeouts.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.flags = flags
        self._file = folder / f"output_{time.monotonic_ns()}.txt"
        settings = {"jax_num_cpu_devices": devices, "jax_log_compiles": log_compiles}
        if not fills_cache:
            settings["jax_persistent_cache_min_compile_time_secs"] = 1e9
        self._process = _context.Process(
            target=_run, args=(flags, str(self._file), settings, file_size, streams or {}, ignored, constants or {})
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def wait(self, timeout: float = 240) -> int:
        """Waits for its end; returns the exit code, or -signal if it was killed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send(signal.SIGUSR1)  # prints where it hangs
            time.sleep(1)
            self._process.kill()
            raise TimeoutError(self.output)
        return self._process.exitcode

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Waits until it has printed `text`."""
        until = time.monotonic() + timeout
        while text not in self.output:
            assert self._process.is_alive() and time.monotonic() < until, self.output
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def resident_bytes(self) -> int:
        """Its resident memory."""
        pages = pathlib.Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()


def succeed(*flags: str, **settings) -> str:
    """Runs a command that must succeed; returns what it printed."""
    command = Command(*flags, **settings)
    code = command.wait()
    assert code == 0, command.output
    return command.output


def start_cluster(*flags: str, each=({}, {}), **settings) -> list[Command]:
    """Starts the same command as one process per entry of `each`, with its own settings and `more` flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index, own in enumerate(each):
        distributed = (f"--coordinator={address}", f"--num_processes={len(each)}", f"--process_id={index}")
        started.append(Command(*flags, *own.pop("more", ()), *distributed, **{**settings, **own}))
    return started


def succeed_together(*flags: str, **settings) -> list[str]:
    """As `start_cluster`, for commands that must succeed; returns what each printed."""
    cluster = start_cluster(*flags, **settings)
    codes = [command.wait() for command in cluster]
    assert codes == [0] * len(cluster), "\n".join(command.output for command in cluster)
    return [command.output for command in cluster]


def _run(flags, file, settings, file_size, streams, ignored, constants):
    os.chdir(os.path.dirname(file))
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of multiprocessing ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as does what runs under nohup
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    import jax

    for name, value in settings.items():
        jax.config.update(name, value)
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    if streams:
        os.setsid()
    for descriptor, target in streams.items():
        _redirect(descriptor, target)
    sys.argv = [str(ROOT / "unet_jax" / "main.py"), *flags]
    runpy.run_module("unet_jax.main", run_name="__main__", alter_sys=True)


def _redirect(descriptor, target):
    if target == "closed":
        os.close(descriptor)
        return
    if target == "no reader":
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = os.open(target, os.O_RDWR)  # only so does a terminal become the controlling one
    os.dup2(opened, descriptor)
    os.close(opened)
