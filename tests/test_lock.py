"""Only one training at a time writes to a work directory."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import commands
import pytest

from unet_jax.errors import UserError
from unet_jax.training import loop
from unet_jax.workdir import lock


def written(path, **values):
    """A lock as process 1 of another machine writes it, with other `values`."""
    held = {"host": "node2", "process": 1, "since": "2026-01-01 12:00:00 UTC", "machine": "another", "started": "5"}
    (path / "lock").write_text(json.dumps({**held, "token": "theirs", "heartbeat": 3, **values}))


def take(path):
    with lock.Lock(path) as held:
        held.take()
        return json.loads((path / "lock").read_text())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "STALE", 0.5)
    monkeypatch.setattr(lock, "_SETTLE", 0.1)


def test_a_lock_is_held_renewed_and_released_however_the_training_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with pytest.raises(KeyboardInterrupt), lock.Lock(tmp_path) as held:
        held.take()
        values = json.loads((tmp_path / "lock").read_text())
        assert (values["host"], values["process"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(UserError, match=rf"is in use: process {os.getpid()} on .*Choose another --workdir"):
            take(tmp_path)
        while json.loads((tmp_path / "lock").read_text())["heartbeat"] == values["heartbeat"]:
            time.sleep(0.01)
        held.check()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("process", [2**22 + 1, os.getpid()], ids=["ended", "number used again"])
def test_the_lock_of_a_process_that_has_ended_is_taken_over_at_once(tmp_path, monkeypatch, process, capsys):
    monkeypatch.setattr(lock, "STALE", 60)
    written(tmp_path, machine=lock._machine(), process=process)
    assert take(tmp_path)["token"] != "theirs"
    assert f"process {process} on node2 (since 2026-01-01 12:00:00 UTC) has ended" in capsys.readouterr().out


def test_a_zombie_has_ended():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert lock._start_time(child.pid) is None and lock._start_time(os.getpid()) is not None
    child.wait()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\0", b'{"machine": 3}'])
def test_a_lock_of_another_machine_or_a_damaged_one_is_taken_over_if_it_does_not_change(tmp_path, content, capsys):
    written(tmp_path)
    if content is not None:
        (tmp_path / "lock").write_bytes(content)
    assert take(tmp_path)["token"] != "theirs"
    out = capsys.readouterr().out
    holder = "process 1 on node2 (since" if content is None else "an unknown process (the file is damaged)"
    assert f"was written by {holder}" in out and "waiting 0.5 s" in out and "has not changed for 0.5 s" in out


def test_a_lock_of_another_machine_that_changes_is_in_use(tmp_path):
    written(tmp_path)
    timer = threading.Timer(0.2, written, (tmp_path,), {"heartbeat": 4})
    timer.start()
    with pytest.raises(UserError, match="is in use: process 1 on node2"):
        take(tmp_path)
    timer.join()
    assert json.loads((tmp_path / "lock").read_text())["token"] == "theirs"


def test_what_is_no_file_is_an_error(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock cannot be read: it is a folder.*move it away"):
        take(tmp_path)


def test_one_of_many_that_take_over_at_once_wins(tmp_path):
    for machine in ("another", lock._machine()):
        written(tmp_path, machine=machine, process=2**22 + 1)
        locks, refused = [lock.Lock(tmp_path) for _ in range(5)], []

        def attempt(own, refused=refused):
            try:
                own.take()
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=attempt, args=(own,)) for own in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 4 and all("is in use" in text for text in refused)
        for own in locks:
            own.__exit__()
        assert not list(tmp_path.iterdir())


def test_who_has_lost_the_work_directory_is_stopped_before_it_writes_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.Lock, "_send_heartbeats", lambda self: None)  # as while it was suspended
    with lock.Lock(tmp_path) as held:
        held.take()
        written(tmp_path)
        held.check()  # no heartbeat is late
        monkeypatch.setattr(lock, "HEARTBEAT", -1.0)
        steps = SimpleNamespace(evaluates=lambda step: False)
        run = SimpleNamespace(lock=held, steps=steps)  # whatever else it uses fails
        state = SimpleNamespace(eval_variables=None)
        for write in (lambda: loop.log_step(run, 4, {}), lambda: loop.evaluate_and_save(run, state, 4, 0, None)):
            with pytest.raises(UserError, match="taken over by process 1 on node2 .*It has written nothing since"):
                write()
    assert json.loads((tmp_path / "lock").read_text())["token"] == "theirs"


@pytest.mark.slow
def test_a_second_training_is_refused_and_a_kill_leaves_no_trace(tmp_path):
    flags = commands.training(tmp_path / "run", "--config.train.epochs=4000")
    first = commands.Command(*flags, folder=tmp_path, devices=1)
    first.wait_for("step 3/10000")
    second = commands.Command(*flags, folder=tmp_path, devices=1)
    assert second.wait(60) == 1, second.output
    assert f"is in use: process {first.pid} on {socket.gethostname()} (since 2" in second.output
    assert "Traceback" not in second.output and "step" not in second.output
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL  # dying takes a while
    third = commands.Command(*flags, folder=tmp_path, devices=1)
    third.wait_for("taking it over")
    third.wait_for("step ")
    third.send(signal.SIGTERM)
    assert third.wait() == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "lock").exists()
