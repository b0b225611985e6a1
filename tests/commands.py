"""`python -m unet_jax.main` in processes forked from one that has already imported everything: real, and quickly there.

That process never starts a backend of JAX, so that each child has its own, with as many devices as it wants.
"""

import faulthandler
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import socket
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.py"
_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Imports what the commands import on their way, in the process that they are forked from."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    _context.set_forkserver_preload(["commands", "preloaded"])


class Command:
    """A running command.

    Attributes:
      output: what it has printed so far, both streams.
    """

    def __init__(
        self,
        *flags: str,
        devices: int = 8,
        folder: pathlib.Path,
        file_size: int = 0,
        fills_cache: bool = True,
        log_compiles: bool = False,
    ):
        """Starts `python -m unet_jax.main FLAGS` with `devices` virtual devices.

        Args:
          folder: to run in; it holds the output.
          file_size: no file may grow beyond this many bytes; 0 is no limit.
          fills_cache: whether it adds to the shared compile cache, where a kill could leave half a file.
          log_compiles: whether JAX tells what it compiles.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"output_{time.monotonic_ns()}.txt"
        settings = {"jax_num_cpu_devices": devices, "jax_log_compiles": log_compiles}
        if not fills_cache:
            settings["jax_persistent_cache_min_compile_time_secs"] = 1e9
        self._process = _context.Process(target=_run, args=(flags, str(self._file), settings, file_size))
        self._process.start()

    @property
    def output(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def wait(self, timeout: float = 240) -> int:
        """Waits for its end; returns the exit code, -signal where it was killed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send(signal.SIGUSR1)  # tells where it hangs
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
        os.kill(self._process.pid, number)

    def resident_bytes(self) -> int:
        """The memory that it holds."""
        pages = pathlib.Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()


def succeed(*flags: str, **settings) -> str:
    """Runs a command that must end with 0; returns what it printed."""
    command = Command(*flags, **settings)
    code = command.wait()
    assert code == 0, command.output
    return command.output


def start_cluster(*flags: str, each=({}, {}), **settings) -> list[Command]:
    """Starts the same command as two processes that work together; `each` has its own settings, and `more` flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index, own in enumerate(each):
        together = (f"--coordinator={address}", f"--num_processes={len(each)}", f"--process_id={index}")
        started.append(Command(*flags, *own.pop("more", ()), *together, **{**settings, **own}))
    return started


def _run(flags, file, settings, file_size):
    os.chdir(os.path.dirname(file))
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of multiprocessing ignore it
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    import jax

    for name, value in settings.items():
        jax.config.update(name, value)
    sys.argv = [str(ROOT / "unet_jax" / "main.py"), *flags]
    runpy.run_module("unet_jax.main", run_name="__main__", alter_sys=True)
