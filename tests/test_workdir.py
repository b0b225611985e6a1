import contextlib
import copy
import functools
import json
import os
import random
import shutil
import signal
import sys

import pytest
from etils import epath
from helpers import ROOT, edited_json

import unet_jax
from unet_jax import data, defaults
from unet_jax.errors import UserError
from unet_jax.evaluation import report
from unet_jax.parallel import processes
from unet_jax.workdir import files, metrics_log


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
    files.claim(path, config, data.Classes("binary", ("a", "b"), ((0, 0, 0), (1, 1, 1))).to_json())
    return path


@pytest.mark.parametrize("name, default", [("train.caution", 3), ("data.crops", (1, 2)), ("note", "")])
def test_a_new_field_at_its_default_leaves_an_older_work_directory_valid(config, tmp_path, add_field, name, default):
    path = _claimed(tmp_path / "run", config)
    add_field(name, default)
    _set_new(config, name, default)
    files.check(path, config)  # it can be resumed
    read = files.read_config(path)
    assert json.loads(read.to_json()) == json.loads(config.to_json())  # with the default of the new field
    assert read.train.batch_size == 8 != defaults.fields()["train.batch_size"]


@pytest.mark.parametrize("name, default, other", [("train.caution", 3, 4), ("note", "", "a")])
def test_a_new_field_at_another_value_is_a_difference_that_is_named(config, tmp_path, add_field, name, default, other):
    path = _claimed(tmp_path / "run", config)
    add_field(name, default)
    _set_new(config, name, other)
    with pytest.raises(UserError, match=f"config.{name}: {default!r} there, {other!r} now"):
        files.check(path, config)


def test_a_field_that_this_version_does_not_know_is_named(config, tmp_path):
    """A work directory of a later version, whose field this one does not know."""
    path = _claimed(tmp_path / "run", config)
    with edited_json(path / "config.json") as values:
        values["train"]["epoch"] = 4
    with pytest.raises(UserError, match="no field config.train.epoch .= 4.*mean 'train.epochs'.*newer version.*update"):
        files.check(path, config)


def test_a_new_field_of_the_data_set_changes_the_key_of_its_cache_only_at_another_value(config, add_field):
    before = data.load(config.data, "train").settings
    add_field("data.crops", 1)
    _set_new(config, "data.crops", 1)
    assert data.load(config.data, "train").settings == before
    config.data.crops = 2
    assert data.load(config.data, "train").settings == {**before, "data.crops": 2}


# Damage. Whatever stands in a work directory, reading it works or raises a `UserError` that names the file.

CONTENTS = {
    "empty": b"",
    "list": b"[]",
    "empty object": b"{}",
    "null": b"null",
    "number": b"5",
    "huge number": b"1" * 5000,
    "text": b'"x"',
    "not finite": b'{"step": NaN, "seed": Infinity}',
    "a field twice": b'{"seed": 0, "seed": 0}',
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"data":' * 100_000,
    "nested, and closed": b'{"data":' + b"[" * 900 + b"]" * 900 + b"}",
    "binary": bytes(range(256)) * 4,
    "UTF-16": '{"seed": 0}\n'.encode("utf-16"),
    "Latin-1": '{"\xe9": 0}\n'.encode("latin-1"),
}


def _replace(path, make):
    """Whatever stands at `path` gives way to what `make` makes."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)


def _large(path):
    with path.open("wb") as file:
        file.truncate(2**40)


KINDS = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to nowhere": lambda path: path.symlink_to("/nowhere/file"),
    "large": _large,
    **{name: functools.partial(lambda content, path: path.write_bytes(content), c) for name, c in CONTENTS.items()},
}
VALUES = [None, True, -1, 2**31, 10**400, 1.5, float("nan"), "x", "\0", "\ud800"]
VALUES += [[], [[]], [-1], ["x", "x"], {}, {"x": 0}]


@contextlib.contextmanager
def _at_most(seconds):
    def stop(*_):
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _damaged_json(content):
    """A JSON object with one field left out, added, or of each wrong value."""
    paths = [(name,) for name in content] + [(n, i) for n, v in content.items() if isinstance(v, dict) for i in v]
    for *outer, name in paths:
        changes = [lambda group, n=name: group.pop(n), lambda group: group.update(other=1)]
        changes += [lambda group, n=name, v=value: group.update({n: v}) for value in VALUES]
        for change in changes:
            changed = copy.deepcopy(content)
            change(changed[outer[0]] if outer else changed)
            yield json.dumps(changed).encode()


def _read_or_name(file, read, *arguments):
    """Whether it could be read; if not, the error must name the file."""
    with _at_most(20):
        try:
            read(*arguments)
        except UserError as error:
            assert str(file.parent) in str(error) and file.name in str(error) and len(str(error)) < 1000
            return False
    return True


@pytest.fixture
def damaged(trained, tmp_path):
    """A copy of a work directory, to damage."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "classes.json"])
def test_damage_to_what_a_network_is_is_named(damaged, name):
    file = damaged / name
    content = json.loads(file.read_text())
    for make in KINDS.values():
        _replace(file, make)
        assert not _read_or_name(file, unet_jax.load, damaged)
        assert not _read_or_name(file, report.write, damaged)
    read = files.read_config if name == "config.json" else files.read_classes
    accepted = []
    for changed in _damaged_json(content):
        _replace(file, lambda path, text=changed: path.write_bytes(text))
        if _read_or_name(file, read, damaged):
            accepted.append(changed)
    # Of the right types, yet others than were saved.
    for changed in random.Random(0).sample(accepted, min(6, len(accepted))):
        file.write_bytes(changed)
        _read_or_name(damaged, unet_jax.load, damaged)


def test_damage_to_what_is_only_to_look_at_stops_nothing(damaged, capsys):
    names, per_class = data.Classes.from_json(files.read_classes(damaged)).names, {"miou": False, "iou": True}
    run, row = files.read_environment(damaged)[0], {"step": 1, "epoch": 0.5, "val/loss": None}
    scores = {"step": 5, "images": 1, "split": "x", "data_root": "", "tta": "none", "loss": 1.0, "miou": 0.5}
    scores |= {"iou": {"square": 0.5}, "confusion": [[0] * 7] * 7}
    read_scores = lambda: files.read_scores(damaged / "eval.json", names, per_class)
    for name, whole, read in (
        ("environment.json", {"runs": [run]}, lambda: files.read_environment(damaged)),
        ("metrics.jsonl", row, lambda: metrics_log.read(damaged)),
        ("eval.json", scores, read_scores),
    ):
        file = damaged / name
        assert _replace(file, lambda path, v=whole: path.write_text(json.dumps(v) + "\n")) is None and read()
        capsys.readouterr()
        for kind, make in KINDS.items():
            _replace(file, make)
            with _at_most(20):
                assert not read(), kind
            absent = kind == "missing" and name != "eval.json"
            torn = name == "metrics.jsonl" and CONTENTS.get(kind, b"-")[:1] in (b"{", b"") and kind != "Latin-1"
            assert (str(file) in capsys.readouterr().out) == (not absent and not torn), (name, kind)
        for changed in _damaged_json(whole):
            _replace(file, lambda path, text=changed: path.write_bytes(text + b"\n"))
            with _at_most(20):
                read()
