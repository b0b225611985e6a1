"""Several processes working as one: how they connect, and end together."""

import contextlib
import importlib.util
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from unet_jax.errors import Interrupted, UserError, describe
from unet_jax.parallel import links, processes, signals

END_TIMEOUT = 5  # seconds that a process has to end by itself once another one has failed
_NEVER = 24 * 60 * 60  # seconds; `links` notices sooner, and without a stack dump


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


class _Cluster(NamedTuple):
    host: str  # of process 0
    port: int
    count: int  # of processes
    process: int  # this one
    settings: dict[str, Any]  # more for `jax.distributed`
    found_by: str  # the user's words for where the above is from


@contextlib.contextmanager
def initialized(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Connects to the other processes, if there are any; an exception in one of them ends all of them.

    With several processes an exception inside the context does not leave it: its text is sent to the other processes,
    and all of them exit with its exit code. They also end, with a reason, if a process is gone or has been silent for
    `links.HEARTBEAT_TIMEOUT` seconds. A process whose number is in use is refused, and the others go on.

    Args:
      coordinator: `host:port` of process 0; if all three are None, JAX detects the cluster.
      num_processes, process_id: their number, and the index of this one.

    Raises:
      UserError: only some of the arguments are given, or invalid ones; or the cluster cannot be detected.
    """
    cluster = _find_cluster(coordinator, num_processes, process_id)
    if cluster is None:
        yield
        return
    import jax

    received: queue.SimpleQueue[links.Failure] = queue.SimpleQueue()
    ends_itself = threading.Event()

    def failed(failure: links.Failure) -> None:
        """Ends this process, as its main thread may hang in a collective that the failed process never joins."""
        received.put(failure)
        group.tell(failure=failure)  # process 0 passes it on
        if not ends_itself.wait(END_TIMEOUT):
            _exit(*failure)

    group = links.Group(cluster.process, cluster.count, failed)
    name = f"process {cluster.process} of {cluster.count}"
    try:
        _connect(cluster, group)
        devices = jax.local_devices()
        print(f"{name}: on {socket.gethostname()}, {len(devices)} x {devices[0].device_kind}", flush=True)
        yield
        group.tell(ended=True)
        jax.distributed.shutdown()
    except BaseException as error:
        signals.ignore()
        ends_itself.set()
        failure = _reason(error, name, received)
        group.tell(failure=failure)
        _exit(*failure)
    finally:
        ends_itself.set()


def _find_cluster(coordinator, num_processes, process_id) -> _Cluster | None:
    """The processes that work together; None if there is only this one."""
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in flags.items() if value is None]
    hint = launcher_hint(os.environ)
    if len(missing) == 3 and hint is None:
        return None
    if len(missing) < 3:
        if missing:
            raise UserError(f"{', '.join(missing)} is missing: give all of {', '.join(flags)}, or none of them")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, such as node1:8476")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} is not in 0..{num_processes - 1} (--num_processes - 1)")
        cluster = _Cluster(host, int(port), num_processes, process_id, {}, "--coordinator")
    else:
        cluster = _detect_cluster(hint)
    return cluster if cluster.count > 1 else None


def _detect_cluster(hint: str) -> _Cluster:
    # JAX has no public way to detect a cluster without connecting to it.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, processes.START_TIMEOUT
        )
        if None in (address, count, process):
            raise ValueError("JAX finds no address of process 0, no number of processes, or no number of this one")
        host, _, port = address.rpartition(":")
        settings = {} if devices is None or "JAX_LOCAL_DEVICE_IDS" in os.environ else {"local_device_ids": devices}
        return _Cluster(host, int(port), int(count), int(process), settings, hint)
    except (ValueError, TypeError, RuntimeError, OSError, LookupError) as error:
        raise UserError(
            f"{hint} indicates several processes, but they cannot be found: {error}. Set --coordinator, "
            "--num_processes and --process_id"
        ) from error


def _connect(cluster: _Cluster, group: links.Group) -> None:
    """Waits for all processes and starts `jax.distributed`; exits if that takes longer than `START_TIMEOUT`."""
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.config.update("jax_check_proxy_envs", False)  # JAX only connects to this machine, see `links`, so no proxy:
    no_proxy = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112
    os.environ["no_grpc_proxy"] = f"127.0.0.1,{no_proxy}".rstrip(",")  # noqa: SIM112
    timeout = processes.START_TIMEOUT

    def give_up() -> None:
        address, waiting = f"{cluster.host}:{cluster.port}", ", ".join(map(str, group.missing())) or "none"
        _exit(
            f"error: process {cluster.process}: not all {cluster.count} processes reached {address} within {timeout} s "
            f"(missing: {waiting}; the address is from {cluster.found_by}). Start all of them with the same "
            "--coordinator, an address of process 0 that the others can reach",
            1,
        )

    # Our own timer, because JAX's timeout aborts the process with a stack dump.
    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    # Python's signal handlers do not run during the wait; there is nothing to save yet.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in signals.stop_signals()}
    try:
        address = group.meet(cluster.host, cluster.port)
        host, port = links.bind_host() or "::", address.rpartition(":")[2]
        jax.distributed.initialize(
            address,
            cluster.count,
            cluster.process,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            initialization_timeout=2 * timeout,
            heartbeat_timeout_seconds=_NEVER,
            **cluster.settings,
        )
    except RuntimeError as error:
        raise UserError(f"the processes at {cluster.host}:{cluster.port} cannot work together: {error}") from error
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reason(error: BaseException, name: str, received: queue.SimpleQueue) -> links.Failure:
    """Why this process ends: its own error, unless that may follow from the end of another process."""
    is_our_own = isinstance(error, UserError | Interrupted | SystemExit) and error.__cause__ is None
    if not is_our_own:  # such as that of a collective, of many types
        with contextlib.suppress(queue.Empty):
            return received.get(timeout=2)
    text, code = describe(error)
    return links.Failure(f"{name}: {text}", code)


def _exit(text: str, code: int) -> None:
    """Ends this process without waiting for the others, as the shutdown of `jax.distributed` would."""
    print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
