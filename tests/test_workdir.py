import sys

import pytest

from unet_jax.parallel import processes
from unet_jax.workdir import files


def test_the_environment_of_a_run_is_recorded_once(tmp_path, monkeypatch):
    from etils import epath

    path = epath.Path(tmp_path)
    assert files.read_environment(path) == []
    monkeypatch.setattr(sys, "argv", ["/home/someone/unet_jax/main.py", "--config=a.py", "--config.data.size=(48, 48)"])
    files.record_environment(path, 0, "8 x cpu")
    files.record_environment(path, 20, "8 x cpu")  # went on just so
    (run,) = files.read_environment(path)
    assert run["first_step"] == 0 and run["devices"] == "8 x cpu"
    assert run["command"] == "python -m unet_jax.main --config=a.py '--config.data.size=(48, 48)'"
    assert set(run["versions"]) == set(processes.versions())
    assert "someone" not in (path / "environment.json").read_text()
    files.record_environment(path, 30, "1 x gpu")
    assert [run["first_step"] for run in files.read_environment(path)] == [0, 30]


@pytest.mark.parametrize("program", ["", "/usr/bin/pytest", "/opt/jupyter/main.py"])
def test_a_notebook_has_no_command(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "-f", "kernel.json"])
    assert files._command() is None


def test_code_outside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "__file__", str(tmp_path / "unet_jax" / "workdir.py"))
    assert files._commit() is None
    (tmp_path / ".git").mkdir()  # damaged
    assert files._commit() is None
