#!/usr/bin/env python3
"""Usage: scripts/local_cluster.py N [--dry-run] [flags of unet_jax.main]

Installs what is missing, then trains with N processes on this machine that talk over loopback, as those of N hosts
would: to try on CPUs what will run on many machines. Without --config or --mode it is configs/shapes.py.

Every line of output starts with its process, "[0] ". SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) go to all
processes, which save and end. The exit code is the first one that is not 0: 143 after SIGTERM, 130 after SIGINT, 129
after SIGHUP. If a process dies, the others end by themselves within a minute; what is left after LOCAL_CLUSTER_GRACE
seconds (90) is killed.
JAX_NUM_CPU_DEVICES=4 gives each process four devices; JAX_PLATFORMS is cpu unless set.
--dry-run prints the commands.
"""

import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unet_jax.parallel import streams  # noqa: E402 (needs nothing that is yet to be installed)


def main(arguments):
    """Returns the exit code, or a message for exit code 1."""
    count, flags = "".join(arguments[:1]), [flag for flag in arguments[1:] if flag != "--dry-run"]
    grace = os.environ.get("LOCAL_CLUSTER_GRACE", "90")
    if count == "--help":
        print(__doc__.strip())
        return 0
    if not count.isdecimal() or int(count) == 0:
        return "error: the number of processes comes first: scripts/local_cluster.py 2 --config=configs/shapes.py"
    if not grace.isdecimal():
        return f"error: LOCAL_CLUSTER_GRACE={grace} is not a number of seconds"
    received, port = set(), "PORT"
    if "--dry-run" not in arguments:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda number, frame: received.add(number))
        code = subprocess.run([ROOT / "scripts" / "install.sh"]).returncode
        if code or received:
            return 128 + max(received) if received else abs(code)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"  # JAX would listen to the whole network
    environment = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "JAX_COORDINATOR_BIND_ADDRESS": address}
    train = [str(ROOT / "scripts" / "train.sh"), f"--coordinator={address}", f"--num_processes={count}"]
    commands = [[*train, f"--process_id={i}", *flags] for i in range(int(count))]
    if "--dry-run" not in arguments:
        return run(commands, environment, int(grace), received)
    for command in commands:
        print(*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command))
    return 0


def run(commands, environment, grace, received):
    """Runs processes to their end, passing on the signals that were `received`; returns the exit code."""
    processes, readers = {}, []
    for i, command in enumerate(commands):
        # In sessions of their own: what a terminal sends reaches this program alone, which passes it on once.
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        unbuffered = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}  # a pipe would hold lines back
        processes[i] = subprocess.Popen(command, env=unbuffered, start_new_session=True, **pipes)
        readers.append(threading.Thread(target=copy_lines, args=(processes[i].stdout, b"[%d] " % i), daemon=True))
        readers[-1].start()
    first, deadline = 0, float("inf")
    while processes:
        while received:
            number = received.pop()
            for process in processes.values():
                os.killpg(process.pid, number)  # as a terminal does: also to install.sh, while train.sh waits for it
        for i in [i for i, process in processes.items() if process.poll() is not None]:
            code = processes.pop(i).returncode
            if code and not first:
                first, deadline = code if code > 0 else 128 - code, time.monotonic() + grace
                print(f"process {i} ended with exit code {first}", file=sys.stderr, flush=True)
        if time.monotonic() >= deadline:
            deadline = float("inf")
            for i, process in processes.items():
                print(f"process {i} did not end within {grace} s of the first, and is killed", file=sys.stderr)
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        time.sleep(0.1)
    for reader in readers:
        reader.join(10)
    return first


def copy_lines(stream, prefix):
    """Copies lines to the standard output, with a prefix each."""
    with stream:
        for line in stream:
            sys.stdout.buffer.write(prefix + line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    streams.guard()  # it outlives the terminal, until all have saved
    sys.exit(main(sys.argv[1:]))
