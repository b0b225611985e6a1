"""Several processes as one: how they find each other, see that they were started alike, and end together."""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from unet_jax.errors import Interrupted, UserError

START_TIMEOUT = 300  # seconds until all processes must have come
HEARTBEAT_TIMEOUT = 40  # seconds without a sign of life until a process counts as dead
END_TIMEOUT = 10  # seconds that a failed process waits until the others have read why
_FAILURE, _ENDED, _PLAN = "unet_jax/failure", "unet_jax/ended", "unet_jax/plan"


def hint(environment: Mapping[str, str]) -> str | None:
    """What in the environment says that there are more processes than this one; None if nothing does."""
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
    # A machine with TPUs does not say so in its environment; JAX asks its metadata how many there are.
    has_tpus = any(os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0"))
    return "the TPUs of this machine" if has_tpus and importlib.util.find_spec("libtpu") else None


def be_deterministic() -> None:
    """Makes JAX compile for GPUs what gives the same bits in every run; elsewhere it always does.

    The compiler then takes neither the fastest kernel of each run's own trials nor one that adds in any order.

    Raises:
      UserError: JAX has already started a GPU, which is too late.
    """
    flag = "--xla_gpu_deterministic_ops=true"
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flag in flags:
        return
    import jax
    from jax._src import xla_bridge  # no public name tells whether devices are in use

    if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
        raise UserError(f"config.deterministic = True comes too late for a GPU in use: set XLA_FLAGS={flag} beforehand")
    os.environ["XLA_FLAGS"] = " ".join([*flags, flag])


@contextlib.contextmanager
def together(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Joins the other processes, if there are any; an exception in one of them ends all of them.

    Where there are others, an exception within the context does not leave it: its text is told to them, and all
    processes exit with its code.

    Args:
      coordinator: `host:port` of process 0; None, as the other two: found by JAX where the environment hints at it.
      num_processes: how many there are.
      process_id: which of them this is.

    Raises:
      UserError: some of them without the others, or without meaning; nothing that JAX can find.
    """
    if not _join(coordinator, num_processes, process_id):
        yield
        return
    import jax

    done = threading.Event()
    threading.Thread(target=_watch, args=(_cluster(), done), daemon=True).start()
    try:
        devices = jax.local_devices()
        me = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{me}: on {socket.gethostname()}, {len(devices)} x {devices[0].device_kind}", flush=True)
        yield
    except BaseException as error:
        done.set()  # one of the two tells
        _fail(_cluster(), error)
    else:
        jax.distributed.shutdown()
    finally:
        done.set()


def _join(coordinator, num_processes, process_id) -> bool:
    """Starts `jax.distributed` where there is more than one process; whether there is."""
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    found = hint(os.environ)
    if len(missing) == 3 and found is None:
        return False
    settings: dict[str, Any] = {}
    if len(missing) < 3:
        if missing:
            raise UserError(f"{', '.join(missing)} is missing: {', '.join(given)} are given together, or not at all")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, as node1:8476")
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
    # JAX would end the process with a dump of its stack.
    where = coordinator or f"the coordinator (by {found})"
    missed = (
        f"error: process {process_id}: not all {num_processes} processes came to {where} within {START_TIMEOUT} s. "
        "Start all of them, with the same --coordinator: an address of process 0 that the others can reach"
    )
    timer = threading.Timer(START_TIMEOUT, _exit, (missed if coordinator else f"error: {where} does not answer", 1))
    timer.daemon = True
    timer.start()
    # Python's handlers do not run while it waits; there is nothing to save yet.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        jax.distributed.initialize(
            **settings, initialization_timeout=2 * START_TIMEOUT, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    except (ValueError, TypeError, RuntimeError, OSError, LookupError) as error:
        raise UserError(
            f"{found or coordinator} hints at several processes, but they cannot be joined: {error}. Give "
            "--coordinator, --num_processes and --process_id"
        ) from error
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return _cluster().num_processes > 1


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator: process 0 cannot listen on port {port}: {error}. Choose another"
            ) from error


def check_same(plan: Mapping[str, Any]) -> None:
    """Checks that all processes were started for the same work, with the same versions, before they begin it.

    Args:
      plan: what each process is about to do, as JSON can hold it.

    Raises:
      UserError: they were not; tells each difference from process 0.
    """
    import jax

    if jax.process_count() == 1:
        return
    store, me = _cluster().client, jax.process_index()
    text = json.dumps({**plan, "versions": versions()}, indent=1, sort_keys=True)
    if me == 0:
        store.key_value_set(_PLAN, text)
    main = store.blocking_key_value_get(_PLAN, START_TIMEOUT * 1000)
    lines = difflib.unified_diff(main.splitlines(), text.splitlines(), n=0)
    differing = "\n".join(f"  {line}" for line in lines if line[0] in "+-" and line[:3] not in ("---", "+++"))
    if differing:
        raise UserError(f"process {me} was not started as process 0 was (- process 0, + process {me}):\n{differing}")
    wait_for_all(_PLAN, START_TIMEOUT)


def wait_for_all(name: str, timeout: float) -> None:
    """Waits until all processes have come here, without using their devices; each `name` once.

    Args:
      timeout: seconds.
    """
    import jax

    if jax.process_count() > 1:
        _cluster().client.wait_at_barrier(name, round(timeout * 1000))


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _cluster():
    """What `jax.distributed` knows: `client` with a key-value store, `process_id`, `num_processes`.

    There is no public way to the store yet. It knows without starting a backend, as `jax.process_index()` would.
    """
    from jax._src import distributed

    return distributed.global_state


def _watch(cluster, done: threading.Event) -> None:
    """Ends this process once another one has failed: it may hang in a collective that nobody joins."""
    silent_since = None
    while not done.wait(0.5) and cluster.client is not None:  # it is, once all have shut down
        failure = _read_failure(cluster)
        if failure is None:
            silent_since = None
        elif "process" not in failure:  # its own client will soon end it with a dump of its stack
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > 2:
                _end(cluster, failure["text"], 1)
        elif failure["process"] != cluster.process_id:
            _end(cluster, failure["text"], failure["code"])


def _read_failure(cluster) -> dict[str, Any] | None:
    """What ended the first process that failed; None if all is well, or a text alone if the store does not answer."""
    try:
        return json.loads(cluster.client.key_value_try_get(_FAILURE))
    except Exception as error:  # JAX has no types for them
        if "NOT_FOUND" in str(error):
            return None
        return {"text": f"error: process 0 does not answer any more, it was killed or cut off: {error}"}


def _fail(cluster, error: BaseException) -> None:
    """Tells the other processes why this one ends, and exits."""
    import jax

    me = cluster.process_id
    text, code = describe(error)
    follows = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    if follows:
        reason = str(error).partition("\n")[0]
        text = f"error: {reason}. If another process has ended, this is why: look at what it printed"
    text = f"process {me} of {cluster.num_processes}: {text}"
    try:
        cluster.client.key_value_set(_FAILURE, json.dumps({"process": me, "text": text, "code": code}))
    except Exception:  # another one was first, or process 0 is gone
        if follows and (first := _read_failure(cluster)):
            text, code = first["text"], first.get("code", 1)
    _end(cluster, text, code)


def _end(cluster, text: str, code: int) -> None:
    """Prints and exits; process 0, which holds the store, as the last."""
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        if cluster.process_id:
            cluster.client.key_value_set(f"{_ENDED}/{cluster.process_id}", "")
        else:
            until = time.monotonic() + END_TIMEOUT
            while len(cluster.client.key_value_dir_get(_ENDED)) < cluster.num_processes - 1:
                if time.monotonic() > until:
                    break
                time.sleep(0.1)
            time.sleep(0.5)
    _exit("", code)


def describe(error: BaseException) -> tuple[str, int]:
    """What to print for an exception that ends the program, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", 1
    if isinstance(error, Interrupted):
        return str(error), 128 + error.signal
    if isinstance(error, SystemExit):
        return f"ends with exit code {error.code}", error.code if isinstance(error.code, int) else 1
    if type(error).__module__ == "tensorflow.python.framework.errors_impl":  # of a bucket that cannot be reached
        return f"error: {error}", 1
    return "".join(traceback.format_exception(error)).rstrip(), 1


def _exit(text: str, code: int) -> None:
    """Ends this process without waiting for others, as the shutdown of `jax.distributed` would."""
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
