"""One training at a time in a work directory: the file `lock` in it says who trains there.

It is JSON: `host`, `process` and `since` for whoever reads it; `machine` and `started`, which tell a process from
others with its number; a random `token`; and `heartbeat`, a number that grows every few seconds. Whoever finds a lock
looks for its process if that is of the same machine; else it watches for `STALE` seconds whether the file changes, as
clocks of two machines cannot be compared. A lock whose process has ended, or that does not change, is taken over.

A file system must show a file that was changed on another machine within `STALE` seconds. Buckets cannot create a file
only if there is none, so there two trainings that start in the same second may both go on until the next heartbeat.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from etils import epath

from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import schema

NAME = "lock"
HEARTBEAT = 5.0  # seconds between two heartbeats
STALE = 30.0  # seconds without a heartbeat after which a lock of another machine is taken over
_SETTLE = 1.0  # seconds after which all machines see who was the last of several that took over at once
_REMEDY = "Choose another --workdir, or end that training first: after SIGTERM or Ctrl-C the same command resumes it"


class Lock:
    """A context that ends with the lock released, if `take` has taken it; on the main process only.

    Attributes:
      path: the file.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = epath.Path(workdir)
        self.path = self._workdir / NAME
        self._token, self._beats, self._since = secrets.token_hex(8), 0, time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self._partial = self._workdir / f"{NAME}.{self._token}.partial"
        self._written = 0.0  # when, by this machine's clock
        self._held, self._ended, self._writing = False, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        with self._writing, contextlib.suppress(OSError):  # what is left is taken over
            self._held = False
            if self._is_ours():  # also if `take` was interrupted
                self.path.unlink()
            self._partial.unlink(missing_ok=True)

    def take(self) -> None:
        """Takes the lock of an existing folder, if necessary after up to `STALE` seconds.

        Raises:
          UserError: somebody else trains there, or the file cannot be written or is none.
        """
        if not processes.is_main():
            return
        try:
            while not self._create():
                content = self._read()
                if content is not None and self._take_over(content, self._wait_until_stale(content)):
                    break
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from error
        self._held = True
        self._thread.start()

    def check(self) -> None:
        """Raises a `UserError` if the lock was lost, as after this process was suspended; call it before any write.

        It reads the file only after a heartbeat that is late.
        """
        if self._held and abs(time.time() - self._written) > 2 * HEARTBEAT:
            self._renew()
        if self._held or not self._written:
            return
        holder = _parse(self._read())
        raise UserError(
            f"--workdir={self._workdir} was taken over by {_name(holder)} while this process was stopped or could not "
            f"write {self.path} for more than {STALE:g} s. It has written nothing since; that training goes on from "
            "the last checkpoint"
        )

    def _text(self) -> str:
        values = {"host": socket.gethostname(), "process": os.getpid(), "since": self._since, "machine": _machine()}
        values |= {"started": _start_time(os.getpid()), "token": self._token, "heartbeat": self._beats}
        return json.dumps(values, indent=2) + "\n"

    def _create(self) -> bool:
        """Creates the file unless it exists; returns whether it did."""
        if schema.occupied(self.path):
            return False
        if not schema.is_local(self.path):
            return self._take_over(None, _SETTLE)
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        self._written = time.time()
        return True

    def _read(self) -> bytes | None:
        """What is in the file; None if there is none."""
        for attempts_left in (2, 1, 0):
            try:
                return schema.read_bytes(self.path)
            except UserError as error:
                if not schema.occupied(self.path):
                    return None
                if not attempts_left or not schema.is_file(self.path):
                    raise UserError(f"{error}. It must be the lock of a training: move it away") from error
            time.sleep(0.1)  # a network file system may fail while another machine replaces a file

    def _is_ours(self) -> bool:
        try:
            return _parse(self._read()).get("token") == self._token
        except UserError:
            return False

    def _wait_until_stale(self, content: bytes) -> float:
        """Returns how long `_take_over` has to settle if the training that wrote this has ended; else a `UserError`."""
        holder = _parse(content)
        if holder.get("machine") == _machine() and isinstance(holder.get("process"), int):
            started = _start_time(holder["process"])
            if started is not None and started == holder.get("started"):
                raise self._in_use(holder)
            processes.print_on_main(f"{_name(holder)} has ended without removing {self.path}: taking it over")
            return _SETTLE / 10  # a machine has one view of its files
        processes.print_on_main(
            f"{self.path} was written by {_name(holder)}. Whether that training goes on cannot be seen from here: "
            f"waiting {STALE:g} s for it to change the file"
        )
        until = time.monotonic() + STALE
        while time.monotonic() < until:
            time.sleep(min(1.0, STALE / 10))
            found = self._read()
            if found is None:
                break
            if found != content and _parse(found):  # what is half written is empty
                raise self._in_use(_parse(found))
        else:
            processes.print_on_main(f"{self.path} has not changed for {STALE:g} s: taking it over")
        return _SETTLE

    def _take_over(self, content: bytes | None, settle: float) -> bool:
        """Replaces the file if it still is `content`; returns whether this process holds it `settle` seconds later."""
        if self._read() == content:
            self._write()
            time.sleep(settle)
        return self._is_ours()

    def _write(self) -> None:
        self._beats += 1
        self._partial.write_text(self._text())
        self._partial.replace(self.path)
        self._written = time.time()

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            self._renew()

    def _renew(self) -> None:
        with self._writing:
            if self._held and not self._ended.is_set():
                try:
                    content = self._read()
                    self._held = content is None or _parse(content).get("token") == self._token
                    if self._held:
                        self._write()
                except (OSError, UserError):
                    pass  # such as a full disk: saving checkpoints says so, and the next heartbeat may pass

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        return UserError(f"--workdir={self._workdir} is in use: {_name(holder)} trains there. {_REMEDY}")


def _parse(content: bytes | None) -> dict[str, Any]:
    """The fields of a lock; none if it is damaged, or not yet written."""
    try:
        values = schema.parse(content or b"")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if not {"process", "host", "since"} <= holder.keys():
        return "an unknown process (the file is damaged)"
    return f"process {holder['process']} on {holder['host']} (since {holder['since']})"


def _machine() -> str:
    """The table of processes that a process number belongs to: that of a boot of a kernel, and of a container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_time(process: int) -> str | None:
    """When a process started, as far as the system tells; None if there is no such process, or it has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    try:  # not Linux
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it is another user's
    return ""
