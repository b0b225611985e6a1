"""Several processes working as one: how they connect, watch each other, and end together."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from unet_jax.errors import UserError, describe
from unet_jax.parallel import processes, signals

HEARTBEAT_TIMEOUT = 40  # seconds without a heartbeat after which a process counts as dead
END_TIMEOUT = 10  # seconds that process 0 waits, after a failure, for the others to read its reason
_FAILURE, _ENDED = "unet_jax/failure", "unet_jax/ended"


def launcher_hint(environment: Mapping[str, str]) -> str | None:
    """The environment variable that shows that several processes were launched; None if there is none."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(environment.get(name, 1)) > 1:
            return name
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return "JAX_COORDINATOR_ADDRESS"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "JOB_COMPLETION_INDEX"
    workers = environment.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        return "TPU_WORKER_HOSTNAMES" if "," in workers else None
    # TPU hosts do not always set a variable; JAX asks their metadata server how many hosts there are.
    has_tpus = any(os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0"))
    return "the TPUs of this machine" if has_tpus and importlib.util.find_spec("libtpu") else None


@contextlib.contextmanager
def initialized(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Connects to the other processes, if there are any; an exception in one of them ends all of them.

    With several processes an exception inside the context does not leave it: its text is sent to the other processes,
    and all of them exit with its exit code.

    Args:
      coordinator: `host:port` of process 0; if all three are None, JAX detects the cluster.
      num_processes, process_id: their number, and the index of this one.

    Raises:
      UserError: only some of the arguments are given, or invalid ones; or the cluster cannot be detected.
    """
    if not _connect(coordinator, num_processes, process_id):
        yield
        return
    import jax

    state, done = processes.distributed_state(), threading.Event()
    threading.Thread(target=_watch, args=(state, done), daemon=True).start()
    try:
        devices = jax.local_devices()
        name = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{name}: on {socket.gethostname()}, {len(devices)} x {devices[0].device_kind}", flush=True)
        yield
    except BaseException as error:
        done.set()  # from here on this thread reports, not the watcher
        _fail(state, error)
    else:
        jax.distributed.shutdown()
    finally:
        done.set()


def _connect(coordinator, num_processes, process_id) -> bool:
    """Starts `jax.distributed` if there are several processes; returns whether there are."""
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in flags.items() if value is None]
    hint = launcher_hint(os.environ)
    if len(missing) == 3 and hint is None:
        return False
    settings: dict[str, Any] = {}
    if len(missing) < 3:
        if missing:
            raise UserError(f"{', '.join(missing)} is missing: give all of {', '.join(flags)}, or none of them")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, such as node1:8476")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} is not in 0..{num_processes - 1} (--num_processes - 1)")
        if num_processes == 1:
            return False
        settings = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        settings["cluster_detection_method"] = "deactivate"
        if process_id == 0:
            _check_port(int(port))
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    timeout = processes.START_TIMEOUT
    if coordinator:
        message = (
            f"error: process {process_id}: not all {num_processes} processes reached {coordinator} within {timeout} s. "
            "Start all of them with the same --coordinator, an address of process 0 that the others can reach"
        )
    else:
        message = f"error: the coordinator (found by {hint}) did not answer within {timeout} s"
    # Our own timer, because JAX's timeout aborts the process with a stack dump.
    timer = threading.Timer(timeout, _exit, (message, 1))
    timer.daemon = True
    timer.start()
    # Python's signal handlers do not run during the wait; there is nothing to save yet.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in signals.STOP_SIGNALS}
    try:
        jax.distributed.initialize(
            **settings, initialization_timeout=2 * timeout, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    except (ValueError, TypeError, RuntimeError, OSError, LookupError) as error:
        raise UserError(
            f"{hint or coordinator} indicates several processes, but connecting to them failed: {error}. Set "
            "--coordinator, --num_processes and --process_id"
        ) from error
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return processes.distributed_state().num_processes > 1


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator: process 0 cannot listen on port {port}: {error}. Choose another port"
            ) from error


def _watch(state, done: threading.Event) -> None:
    """Ends this process once another one has failed, as it may hang in a collective that the other never joins."""
    silent_since = None
    while not done.wait(0.5) and state.client is not None:  # None after the shutdown
        failure = _read_failure(state)
        if failure is None:
            silent_since = None
        elif "process" not in failure:  # end before JAX's client aborts this process with a stack dump
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > 2:
                _end(state, failure["text"], 1)
        elif failure["process"] != state.process_id:
            _end(state, failure["text"], failure["code"])


def _read_failure(state) -> dict[str, Any] | None:
    """The `process`, `text` and exit `code` of the first failure, if any; only `text` if the store does not answer."""
    try:
        return json.loads(state.client.key_value_try_get(_FAILURE))
    except Exception as error:  # JAX has no exception types for these
        if "NOT_FOUND" in str(error):
            return None
        return {"text": f"error: process 0 no longer answers; it was killed or is unreachable: {error}"}


def _fail(state, error: BaseException) -> None:
    """Sends the reason for the end of this process to the others, and exits."""
    import jax

    text, code = describe(error)
    # An error of a collective usually follows from the end of another process.
    may_follow = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    if may_follow:
        reason = str(error).partition("\n")[0]
        text = f"error: {reason}. If another process has ended, that is the cause: see its output"
    text = f"process {state.process_id} of {state.num_processes}: {text}"
    try:
        failure = {"process": state.process_id, "text": text, "code": code}
        state.client.key_value_set(_FAILURE, json.dumps(failure))
    except Exception:  # another process failed first, or process 0 is gone
        if may_follow and (first := _read_failure(state)):
            text, code = first["text"], first.get("code", 1)
    _end(state, text, code)


def _end(state, text: str, code: int) -> None:
    """Prints and exits; process 0 exits last, because it holds the key-value store."""
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        if state.process_id:
            state.client.key_value_set(f"{_ENDED}/{state.process_id}", "")
        else:
            until = time.monotonic() + END_TIMEOUT
            while len(state.client.key_value_dir_get(_ENDED)) < state.num_processes - 1 and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(0.5)
    _exit("", code)


def _exit(text: str, code: int) -> None:
    """Ends this process without waiting for the others, as the shutdown of `jax.distributed` would."""
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
