import json
import sys

import pytest
from etils import epath
from helpers import ROOT

from unet_jax import data, defaults
from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import files


def test_the_environment_of_a_run_is_recorded_once(tmp_path, monkeypatch):
    path = epath.Path(tmp_path)
    assert files.read_environment(path) == []
    monkeypatch.setattr(sys, "argv", ["/home/someone/unet_jax/main.py", "--config=a.py", "--config.data.size=(48, 48)"])
    files.record_environment(path, 0, "8 x cpu")
    files.record_environment(path, 20, "8 x cpu")  # resumed in the same environment
    (run,) = files.read_environment(path)
    assert run["first_step"] == 0 and run["devices"] == "8 x cpu"
    assert run["command"] == "python -m unet_jax.main --config=a.py '--config.data.size=(48, 48)'"
    assert set(run["versions"]) == set(processes.versions())
    assert "someone" not in (path / "environment.json").read_text()
    files.record_environment(path, 30, "1 x gpu")
    assert [run["first_step"] for run in files.read_environment(path)] == [0, 30]


@pytest.mark.parametrize("program", ["", "/usr/bin/pytest", "/opt/jupyter/main.py"])
def test_a_notebook_has_no_command(program, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "-f", "kernel.json"])
    files.record_environment(epath.Path(tmp_path), 0, "8 x cpu")
    (run,) = files.read_environment(epath.Path(tmp_path))
    assert run["command"] is None


def test_code_outside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "unet_jax" / "workdir" / "files.py"))
    files.record_environment(epath.Path(tmp_path), 0, "8 x cpu")
    (tmp_path / ".git").mkdir()  # damaged
    files.record_environment(epath.Path(tmp_path), 1, "1 x cpu")
    assert [run["commit"] for run in files.read_environment(epath.Path(tmp_path))] == [None, None]


# A new field: one line in `configs/default.py`.


@pytest.fixture
def add_field(tmp_path, monkeypatch):
    """Adds a field to `configs/default.py`."""

    def add(name, default):
        text = (ROOT / "configs" / "default.py").read_text()
        end = "    return config.lock()"
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "default.py").write_text(text.replace(end, f"    config.{name} = {default!r}\n{end}"))
        monkeypatch.setattr(defaults, "__file__", str(tmp_path / "unet_jax" / "defaults.py"))
        defaults.fields.cache_clear()
        assert name in defaults.fields()

    yield add
    defaults.fields.cache_clear()


def _set_new(config, name, value):
    with config.unlocked():
        config.update_from_flattened_dict({name: value})


def _claimed(path, config):
    """A work directory of `config`."""
    path = epath.Path(path)
    files.check(path, config)
    files.claim(path, config, {"names": ["a", "b"]})
    return path


@pytest.mark.parametrize("name, default", [("train.patience", 3), ("data.crops", (1, 2)), ("note", "")])
def test_a_new_field_at_its_default_leaves_an_older_work_directory_valid(config, tmp_path, add_field, name, default):
    path = _claimed(tmp_path / "run", config)
    add_field(name, default)
    _set_new(config, name, default)
    files.check(path, config)  # it can be resumed
    read = files.read_config(path)
    assert json.loads(read.to_json()) == json.loads(config.to_json())  # with the default of the new field
    assert read.train.batch_size == 8 != defaults.fields()["train.batch_size"]


@pytest.mark.parametrize("name, default, other", [("train.patience", 3, 4), ("note", "", "a")])
def test_a_new_field_at_another_value_is_a_difference_that_is_named(config, tmp_path, add_field, name, default, other):
    path = _claimed(tmp_path / "run", config)
    add_field(name, default)
    _set_new(config, name, other)
    with pytest.raises(UserError, match=f"config.{name}: {default!r} there, {other!r} now"):
        files.check(path, config)


def test_a_field_that_this_version_does_not_know_is_a_difference_that_is_named(config, tmp_path):
    """A work directory of a later version, whose field this one does not know."""
    path = _claimed(tmp_path / "run", config)
    values = json.loads((path / "config.json").read_text())
    values["train"]["patience"] = 4
    files.write_json(path / "config.json", values)
    with pytest.raises(UserError, match="config.train.patience: 4 there, 'absent' now"):
        files.check(path, config)


def test_a_new_field_of_the_data_set_changes_the_key_of_its_cache_only_at_another_value(config, add_field):
    before = data.load(config.data, "train").settings
    add_field("data.crops", 1)
    _set_new(config, "data.crops", 1)
    assert data.load(config.data, "train").settings == before
    config.data.crops = 2
    assert data.load(config.data, "train").settings == {**before, "data.crops": 2}
