"""Connections between process 0 and the others, over which all learn at once that one of them has failed or gone.

JAX alone does not serve: its client ends a process with a C++ stack dump if process 0 is gone or another process has
been silent for long, and a process that connects under a number in use ends all of them. So processes meet here
first. Process 0 listens at the coordinator's address and refuses whoever does not belong to the run; JAX's own service
has another port, and its clients reach it through a relay that stays open when process 0 is gone.

A connection carries JSON objects, one a line: `process`, `of`, `host` and `pid` of the process that connects; the
answer, `refused` with a reason, or the `port` of JAX's service and the `name` of process 0; from then on both send
`{}` each second, and `ended` or a `failure` before they end.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from unet_jax.errors import UserError, escape

HEARTBEAT = 1.0  # seconds between two signs of life
HEARTBEAT_TIMEOUT = 40  # seconds without any after which a process counts as gone
_LONGEST = 2**20  # bytes of a message; the longest is a traceback
_RETRY = 0.5  # seconds between attempts to reach process 0


class Failure(NamedTuple):
    """Why a process ends, and its exit code."""

    text: str
    code: int


class Link:
    """One end of a connection."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(HEARTBEAT_TIMEOUT)
        self._connection, self._lines = connection, connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; if the connection is gone, `receive` finds out."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end. Raises OSError, or ValueError for what is not one of ours."""
        line = self._lines.readline(_LONGEST)
        message = json.loads(line) if line else None
        if message is not None and not isinstance(message, dict):
            raise ValueError("not a JSON object")
        return message

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


class Group:
    """The other processes of a run, as one of them sees them: process 0 sees all, the others see process 0."""

    def __init__(self, process: int, count: int, failed: Callable[[Failure], None]):
        """`failed` is called in a thread, with the reason, when another process has failed or is gone."""
        self._process, self._count, self._failed = process, count, failed
        self._links: dict[int, Link] = {}
        self._names: dict[int, str] = {}
        self._changing = threading.Lock()

    def meet(self, host: str, port: int) -> str:
        """Connects to process 0, or lets the others connect; returns the address at which JAX is to find its service.

        Raises:
          UserError: process 0 cannot listen on `port`; it refuses this process; something else listens there.
        """
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        if self._process:
            return self._relay(host, self._join(host, port))
        server, service = _listen(port), _free_port()
        threading.Thread(target=self._accept, args=(server, service), daemon=True).start()
        return f"127.0.0.1:{service}"

    def missing(self) -> list[int]:
        """The processes that have not connected to process 0; on the others: process 0, unless it was reached."""
        return sorted({*(range(1, self._count) if self._process == 0 else [0])} - self._names.keys())

    def tell(self, **message: Any) -> None:
        """Sends a message to all processes that this one sees."""
        for link in list(self._links.values()):
            link.send(**message)

    def _send_heartbeats(self) -> None:
        while True:
            self.tell()
            time.sleep(HEARTBEAT)

    def _join(self, host: str, port: int) -> int:
        hello = {"process": self._process, "of": self._count, "host": socket.gethostname(), "pid": os.getpid()}
        while True:
            try:
                link = Link(socket.create_connection((host, port), timeout=HEARTBEAT_TIMEOUT))
                link.send(**hello)
                answer = link.receive()
            except OSError:  # not there yet
                answer = None
            except ValueError:
                answer = {}
            if answer is None:
                time.sleep(_RETRY)
            elif reason := answer.get("refused"):
                raise UserError(f"process 0 at {host}:{port} refuses this process: {reason}")
            elif {"port", "name"} <= answer.keys():
                self._watch(0, str(answer["name"]), link)
                return int(answer["port"])
            else:
                raise UserError(f"--coordinator: at {host}:{port} another program answers. Choose another port")

    def _accept(self, server: socket.socket, service: int) -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=self._welcome, args=(Link(connection), service), daemon=True).start()

    def _welcome(self, link: Link, service: int) -> None:
        try:
            hello = link.receive()
            process, of = int(hello["process"]), int(hello["of"])
            name = escape(f"process {process} on {hello['host']} (pid {hello['pid']})")
        except (OSError, ValueError, TypeError, KeyError):  # whoever knocks at open ports
            return link.close()
        with self._changing:
            reason = self._reason_against(process, of)
            if reason is None:
                self._names[process] = name
        if reason is not None:
            print(f"warning: {name} wanted to join and was refused: {reason}", flush=True)
            link.send(refused=reason)
            return link.close()
        link.send(port=service, name=f"process 0 on {socket.gethostname()} (pid {os.getpid()})")
        self._watch(process, name, link)

    def _reason_against(self, process: int, of: int) -> str | None:
        if of != self._count:
            return f"this run has {self._count} processes, not {of}. Give the same --num_processes to all"
        if process in self._names:
            return (
                f"{self._names[process]} is in this run already, which goes on. Choose another --process_id, or stop "
                "that run first"
            )
        return None if 0 < process < of else f"there is no process {process} of {of}"

    def _watch(self, process: int, name: str, link: Link) -> None:
        self._links[process], self._names[process] = link, name
        threading.Thread(target=self._receive_all, args=(name, link), daemon=True).start()

    def _receive_all(self, name: str, link: Link) -> None:
        has_ended = False
        reason = "has ended without giving a reason: it was killed, it crashed, or its machine is gone"
        try:
            while (message := link.receive()) is not None:
                if "failure" in message:
                    return self._failed(Failure(*message["failure"]))
                has_ended |= "ended" in message
        except TimeoutError:
            reason = f"has been silent for {HEARTBEAT_TIMEOUT} s: it was stopped or suspended, or the network is down"
        except (OSError, ValueError):
            pass
        if not has_ended:
            remedy = "Start all processes again with the same command; a training resumes from its last checkpoint"
            self._failed(Failure(f"error: {name} {reason}. {remedy}", 1))

    def _relay(self, host: str, service: int) -> str:
        """Passes JAX's connections on to its service in process 0; returns the address for them."""
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_relay_all, args=(server, (host, service)), daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"


def _relay_all(server: socket.socket, target: tuple[str, int]) -> None:
    kept = []  # a connection would be closed with its last reference, and JAX's client end this process
    while True:
        near, _ = server.accept()
        with contextlib.suppress(OSError):  # process 0 is gone
            far = socket.create_connection(target)
            kept.append(far)
            threading.Thread(target=_copy, args=(near, far), daemon=True).start()
            threading.Thread(target=_copy, args=(far, near), daemon=True).start()
        kept.append(near)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


def bind_host() -> str:
    """The address that process 0 listens at, as JAX's own variable has it; empty: all addresses of the machine."""
    return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")


def _listen(port: int) -> socket.socket:
    host = bind_host()
    try:
        if socket.has_dualstack_ipv6() and host in ("", "::"):
            with contextlib.suppress(OSError):  # no IPv6 here, or the port is taken, as below
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"--coordinator: process 0 cannot listen on port {port}: {error}. Choose another port"
        ) from error


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]
