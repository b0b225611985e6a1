"""Whatever interrupts a training, the same command resumes it and ends where it would have ended."""

import os
import pty
import random
import re
import select
import shutil
import signal
import time

import chex
import commands
import helpers
import jax
import numpy as np
import pytest
import tiny

import unet_jax
from unet_jax.data import pipeline
from unet_jax.errors import Interrupted, UserError
from unet_jax.evaluation import evaluate
from unet_jax.training import log, loop, optimizer
from unet_jax.workdir import checkpoints, files, integrity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config():
    config = tiny.get_config()
    config.train.panels = 0
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config):
    """A training that was never interrupted: 10 steps, saved at 2, 4, 5, 6, 8, 10."""
    path = tmp_path_factory.mktemp("finished") / "run"
    loop.train(config, path)
    return path


def test_twenty_kills_at_random_moments(tmp_path):
    path, draw = tmp_path / "run", random.Random(0)
    settings = ["--config.train.epochs=24", "--config.train.checkpoint_every_epochs=0.4"]  # 60 steps, each saved
    settings += ["--config.train.eval_every_epochs=8", "--config.train.log_every_steps=1"]
    commands.succeed(*commands.training(tmp_path / "reference", *settings), folder=tmp_path, devices=1)
    unfinished = set()  # saves that were in progress when it was killed
    for kill in range(20):
        command = commands.Command(*commands.training(path, *settings), folder=tmp_path, devices=1, fills_cache=False)
        if kill % 4 == 0:  # anywhere, also before anything was written
            time.sleep(draw.uniform(0, 6))
        else:
            command.wait_for("/60  epoch")  # a step was taken, and its save has started
            time.sleep(draw.uniform(0, 0.6))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL, command.output
        if (path / "checkpoints").exists():
            unfinished |= {p.name for p in (path / "checkpoints").iterdir() if not p.name.isdigit()}
    assert unfinished and 1 < integrity.steps(path)[-1] < 60
    output = commands.succeed(*commands.training(path, *settings), folder=tmp_path, devices=1)
    assert "Resuming from step" in output
    helpers.assert_same_run(path, tmp_path / "reference")


def test_signals_and_lost_output_lose_no_work_and_the_same_command_resumes(finished, tmp_path):
    path = tmp_path / "run"
    flags = commands.training(path)

    # The terminal is closed.
    terminal, other = pty.openpty()
    command = commands.Command(*flags, folder=tmp_path, streams=dict.fromkeys((1, 2), os.ttyname(other)))
    shown = b""
    while b"step 3/10" not in shown:
        assert select.select([terminal], [], [], 60)[0], shown
        shown += os.read(terminal, 4096)
    os.close(other)
    os.close(terminal)
    assert command.wait() == 128 + signal.SIGHUP
    saved = integrity.steps(path)[-1]
    assert 3 <= saved < 10

    # Under nohup, with its output on a full disk; a second SIGTERM changes nothing.
    command = commands.Command(*flags, folder=tmp_path, streams={1: "/dev/full"}, ignored=[signal.SIGHUP])
    until = time.monotonic() + 60
    while max(row["step"] for row in helpers.metric_rows(path)) <= saved:
        assert time.monotonic() < until, command.output
        time.sleep(0.005)
    command.send(signal.SIGHUP)
    command.send(signal.SIGTERM)
    command.wait_for("SIGTERM: saving at the next step")
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM, command.output
    assert f"SIGTERM: {path} is saved; the same command resumes it" in command.output
    assert "Traceback" not in command.output
    assert saved < integrity.steps(path)[-1]

    # As by `2>&- | head -1`.
    lost = {1: "no reader", 2: "closed"}
    assert commands.Command(*flags, folder=tmp_path, streams=lost).wait() == 0
    helpers.assert_same_run(path, finished)
    for name in "abc":
        helpers.save_image(np.zeros((48, 48, 3), np.uint8), tmp_path / "images" / f"{name}.png")
    flags = ("--mode=predict", f"--workdir={path}", f"--input={tmp_path / 'images'}", f"--output={tmp_path / 'masks'}")
    assert commands.Command(*flags, folder=tmp_path, streams=lost, devices=1).wait() == 0
    assert {"a.png", "b.png", "c.png"} <= set(os.listdir(tmp_path / "masks"))


def test_sigint_before_the_first_step_ends_at_once_with_130(tmp_path):
    command = commands.Command(*commands.training(tmp_path / "run"), folder=tmp_path)
    command.wait_for("data  ")
    command.send(signal.SIGINT)
    assert command.wait() == 128 + signal.SIGINT, command.output
    assert "stopped by SIGINT; nothing had to be saved" in command.output and "Traceback" not in command.output
    assert not integrity.steps(tmp_path / "run")


def test_libraries_that_catch_exceptions_do_not_swallow_a_signal(config, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    _emptied(tmp_path / "run" / "checkpoints" / "10")

    def interrupted(*_, **__):
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", interrupted)
    with pytest.raises(Interrupted, match="stopped"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("at", ["step", "evaluation", "last evaluation"])
def test_a_signal_loses_no_step_and_no_evaluation(config, finished, tmp_path, monkeypatch, at):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        if at == "step":
            add = log.TrainingLog.add

            def add_and_signal(self, step, metrics):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return add(self, step, metrics)

            patch.setattr(log.TrainingLog, "add", add_and_signal)
        else:
            batches, calls = pipeline.Pipeline.eval_batches, []

            def some_batches(self, *args):
                calls.append(self)
                for index, batch in enumerate(batches(self, *args)):
                    if index == 1 and len(calls) == (1 if at == "evaluation" else 2):
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

            patch.setattr(pipeline.Pipeline, "eval_batches", some_batches)
        with pytest.raises(Interrupted, match="SIGTERM"):
            loop.train(config, path)
    assert integrity.steps(path)[-1] == {"step": 4, "evaluation": 5, "last evaluation": 10}[at]
    loop.train(config, path)
    helpers.assert_same_run(path, finished)


def test_a_checkpoint_replaced_by_one_with_a_score_is_never_lost(config, finished, tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:  # stopped in the first evaluation, before any other checkpoint
        patch.setattr(evaluate, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            config_late = config.copy_and_resolve_references()
            config_late.train.checkpoint_every_epochs = 2.0
            loop.train(config_late, path)
    assert integrity.steps(path) == [5]
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "write_checksums", lambda step: 1 / 0)
        with pytest.raises(UserError, match="5 could not be saved"):
            loop.train(config_late, path)
    loop.train(config_late, path)
    chex.assert_trees_all_equal(helpers.final_state(path)[0], helpers.final_state(finished)[0])
    found, expected = ([row for row in helpers.metric_rows(p) if "val/loss" in row] for p in (path, finished))
    assert found == expected
    assert not (path / "replaced").exists()


def test_missing_checkpoints_are_an_error(config, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has no checkpoint, though its metrics.jsonl reaches step 10"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_buckets_are_named_and_read_as_they_are(finished, monkeypatch):
    import tensorflow as tf

    assert os.fspath(integrity.checkpoints_dir("gs://bucket/runs/x")) == "gs://bucket/runs/x/checkpoints"
    opened = []

    def open_as_in_a_bucket(self, mode="r", **_):
        opened.append(self.name)
        return tf.io.gfile.GFile(os.fspath(self), mode)

    monkeypatch.setattr(type(integrity.checkpoints_dir(finished)), "open", open_as_in_a_bucket)
    assert integrity.find_damage(finished, 10) is None and len(opened) > 5


def test_a_file_that_cannot_be_read_is_damage(finished, monkeypatch):
    path_type = type(integrity.checkpoints_dir(finished))
    open_file = path_type.open

    def fail(self, mode="r", **settings):
        if mode == "rb" and self.name != integrity.CHECKSUMS:
            raise OSError(5, "Input/output error")
        return open_file(self, mode, **settings)

    monkeypatch.setattr(path_type, "open", fail)
    assert "cannot be read ([Errno 5]" in integrity.find_damage(finished, 10)


def _of_largest(change):
    return lambda folder: change(helpers.largest_file(folder))


def _become(make, name=None):
    """Puts something else where a file was."""

    def change(folder):
        file = folder / name if name else helpers.largest_file(folder)
        file.unlink()
        make(file)

    return change


def _of_sums(change):
    def edit(folder):
        with helpers.edited_json(folder / integrity.CHECKSUMS) as sums:
            change(sums)

    return edit


def _without_training(sums):
    for name in list(sums):
        if name.startswith("training/"):
            del sums[name]


def _emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _written(content):
    return lambda file: file.write_bytes(content)


SUMS, META = integrity.CHECKSUMS, "meta/metadata"
DAMAGES = {  # what happens to the folder of a step, and what is said about it
    "one bit flipped": (_of_largest(helpers.flip_bit), "is damaged, its checksum differs"),
    "truncated": (_of_largest(lambda file: os.truncate(file, 100)), "is damaged, its checksum differs"),
    "a file deleted": (_of_largest(os.unlink), "is missing"),
    "a file that became a folder": (_become(os.mkdir), "is missing"),
    "a file that became a pipe": (_become(os.mkfifo), "is not a file but a link, a pipe"),
    "a file that became a device": (_become(lambda file: file.symlink_to("/dev/zero")), "is not a file but a link"),
    "a file added": (lambda folder: (folder / "meta" / "more").write_bytes(b""), "meta/more is not listed"),
    "an item deleted": (lambda folder: shutil.rmtree(folder / "training"), "training/.* is missing"),
    "empty": (_emptied, "is missing: it was never finished"),
    "checksums deleted": (lambda folder: (folder / SUMS).unlink(), "is missing: it was never finished"),
    "checksums of nothing": (_of_sums(dict.clear), "lists no file of variables"),
    "checksums of one file less": (_of_sums(lambda sums: sums.pop(META)), f"{META} is not listed in {SUMS}"),
    "checksums of one file more": (_of_sums(lambda sums: sums.update(more="0" * 64)), "more is missing"),
    "checksums without an item": (_of_sums(_without_training), "lists no file of training"),
    "checksums of a device": (_of_sums(lambda sums: sums.update({"/dev/zero": "0" * 64})), "names '/dev/zero', which"),
    "checksums of another step": (_of_sums(lambda sums: sums.update({"../8/x": "0" * 64})), "names '../8/x', which"),
    "checksums that are none": (_of_sums(lambda sums: sums.update({META: "0" * 63})), "which is no SHA-256 sum"),
    "checksums that are numbers": (_of_sums(lambda sums: sums.update({META: 5})), "holds 5 for meta/metadata"),
    **{
        f"checksums that are {name}": (_become(make, SUMS), f"{SUMS} (cannot be read|is damaged): ")
        for name, make in {
            "a list": _written(b"[]"),
            "no text": _written(b"\xff\xfe"),
            "torn": _written(b'{"meta/metadata": "0'),
            "too deep": _written(b"[" * 100_000),
            "a folder": os.mkdir,
            "a pipe": os.mkfifo,
            "a device": lambda file: file.symlink_to("/dev/zero"),
        }.items()
    },
}


def test_each_damage_to_a_step_is_one_sentence(finished, tmp_path):
    for number, (how, (change, expected)) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number) / "checkpoints" / "10"
        shutil.copytree(finished / "checkpoints" / "10", folder)
        (folder / "meta" / ".nfs0001").write_bytes(b"")  # of a file system
        assert integrity.find_damage(tmp_path / str(number), 10) is None
        change(folder)
        found = integrity.find_damage(tmp_path / str(number), 10)
        assert found and re.search(expected, found) and len(found) < 500, (how, found)


def test_a_damaged_step_is_named_and_the_one_before_used_whatever_stands_beside_it(config, finished, tmp_path, capsys):
    """All that is only to look at is damaged too, and stops nothing."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    DAMAGES["one bit flipped"][0](path / "checkpoints" / "10")
    result = evaluate.evaluate_workdir(path, None, None, "validation")  # reading moves nothing
    assert f"{path / 'checkpoints' / '10'} is damaged" in capsys.readouterr().out
    assert result is not None and (path / "checkpoints" / "10").exists()

    kept = {"damaged": b"notes", "replaced": b"notes", "panels": b"notes", "environment.json": b"[]"}
    kept["metrics.jsonl"] = (path / "metrics.jsonl").read_bytes().replace(b"\n", b"\nnull\n", 1)
    kept["checkpoints/8/_CHECKPOINT_METADATA"] = b"[" * 100_000
    for name, content in kept.items():
        (path / name).write_bytes(content)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("notes")
    for name in ("report.html", "history.png", "classes.json.partial"):
        (path / name).unlink(missing_ok=True)
    (path / "report.html").mkdir()
    os.mkfifo(path / "history.png")
    (path / "classes.json.partial").symlink_to(elsewhere)

    loop.train(config, path)
    printed = capsys.readouterr().out
    assert f"{path / 'checkpoints' / '10'} is damaged" in printed and "the newest intact step is 8" in printed
    assert "Resuming from step 8" in printed and (path / "damaged" / "10").exists()
    helpers.assert_same_run(path, finished)
    for name, content in kept.items():  # nothing of the user is deleted
        aside = path / (name if name == "replaced" else f"{name}.damaged")
        assert aside.read_bytes() == content and (name == "replaced" or f"{path / name} is set aside" in printed)
    assert (path / "report.html.damaged").is_dir() and (path / "history.png.damaged").is_fifo()
    assert (path / "report.html").is_file() and (path / "history.png").is_file()
    assert elsewhere.read_text() == "notes"
    assert len(files.read_environment(path)) == 1


def test_what_was_changed_since_a_step_was_saved_is_named(config, finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)

    def edited(name, field, value):
        with helpers.edited_json(path / name) as values:
            group, _, last = field.rpartition(".")
            (values[group] if group else values)[last] = value

    def refused(message):
        with pytest.raises(UserError, match=message):
            unet_jax.load(path)
        for name in ("config.json", "classes.json"):
            shutil.copyfile(finished / name, path / name)

    edited("config.json", "eval.tta", "flip")
    refused(rf"{path}/config.json: config.eval.tta = 'flip' is not one of")
    edited("config.json", "data.resize", "cubic")
    refused(rf"{path}/config.json: config.data.resize = 'cubic' is not one of")
    edited("config.json", "data.resize", "nearest")
    refused(r"after step \d+ was saved(.|\n)*Put(.|\n)*config.json: data.resize is 'nearest', was 'bilinear'")
    edited("classes.json", "ignore_label", 3)
    refused(rf"{path}/classes.json: ignore_label = 3 is also the label of a class")
    edited("classes.json", "ignore_label", 100)
    refused(r"classes.json: ignore_label is 100, was 255")
    edited("classes.json", "normalization", {"mean": [1.0], "scale": [255.0]})
    refused(r"classes.json: normalization is {'mean': \[1.0\]")

    # Both the command and the file: the training itself would be another one.
    edited("config.json", "loss.dice", 1.0)
    shutil.rmtree(path / "checkpoints" / "10")
    changed = config.copy_and_resolve_references()
    changed.loss.dice = 1.0
    with pytest.raises(UserError, match=r"config.json: loss.dice is 1.0, was 0.0"):
        loop.train(changed, path)
    shutil.copyfile(finished / "config.json", path / "config.json")

    # What does not decide over results may change.
    edited("config.json", "eval.tta", "flips")
    edited("config.json", "data.root", "/moved")
    edited("classes.json", "names", [f"name {i}" for i in range(7)])
    capsys.readouterr()
    assert unet_jax.load(path).config.eval.tta == "flips"
    assert "warning" in (printed := capsys.readouterr().out) and "classes.json: names is ['name 0'" in printed


def test_an_unfinished_step_is_named_and_ignored(config, finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    folder = path / "checkpoints" / "10"
    folder.rename(folder.with_name("10.orbax-checkpoint-tmp-7"))
    loop.train(config, path)
    assert f"{folder} was not finished when the run ended" in capsys.readouterr().out
    helpers.assert_same_run(path, finished)


def test_without_an_intact_checkpoint_it_never_starts_from_scratch(config, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for step in integrity.steps(path):
        DAMAGES["one bit flipped"][0](path / "checkpoints" / str(step))
    before = sorted(path.rglob("*"))
    with pytest.raises(UserError, match="has no intact checkpoint(.|\n)*/8: (.|\n)*/10: .*its checksum differs"):
        loop.train(config, path)
    with pytest.raises(UserError, match="has no intact checkpoint"):
        evaluate.evaluate_workdir(path, None, None, "validation")
    assert sorted(path.rglob("*")) == before
    with pytest.raises(UserError, match="10 is damaged: .*Choose another --step: 8"):
        evaluate.evaluate_workdir(path, 10, None, "validation")


def test_a_full_disk_is_an_error_and_the_previous_step_stays(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    shutil.rmtree(path / "checkpoints" / "10")
    largest = max(p.stat().st_size for p in (path / "checkpoints").rglob("*") if p.is_file())
    command = commands.Command(*commands.training(path), folder=tmp_path, file_size=largest // 2)
    assert command.wait() == 1, command.output
    assert "could not be saved" in command.output and "Step 8 is intact" in command.output
    assert "Traceback" not in command.output
    assert integrity.find_damage(path, 8) is None and integrity.steps(path)[-1] == 8
    commands.succeed(*commands.training(path), folder=tmp_path)
    helpers.assert_same_run(path, finished)


def test_a_save_that_failed_in_the_background_is_an_error_before_the_next_one(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.train.epochs, config.train.log_every_steps = 40.0, 1
    config.train.eval_every_epochs = config.train.checkpoint_every_epochs = 16.0  # after 40 and 80 steps
    write_checksums = integrity.write_checksums

    def fail(step):
        if step.name.startswith("80"):
            raise OSError("No space left on device")
        write_checksums(step)

    monkeypatch.setattr(integrity, "write_checksums", fail)
    with pytest.raises(UserError, match="80 could not be saved: .*No space left.*Step 40 is intact"):
        loop.train(config, tmp_path / "run")
    assert integrity.steps(tmp_path / "run") == [40] and integrity.find_damage(tmp_path / "run", 40) is None
    assert helpers.metric_rows(tmp_path / "run")[-1]["step"] < 100


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_an_excessive_learning_rate_is_an_error(config, tmp_path, nonfinite, capsys):
    config = config.copy_and_resolve_references()
    config.train.nonfinite, config.train.epochs = nonfinite, 8.0
    config.optimizer.learning_rate, config.optimizer.schedule = 1e20, "constant"
    kept = {"stop": "None is saved yet", "skip": r"The last good checkpoint is .*/checkpoints/8"}[nonfinite]
    with pytest.raises(UserError, match=rf"not finite: .*\. {kept}\. Try a lower config.optimizer"):
        loop.train(config, tmp_path / "run")
    assert capsys.readouterr().out.count("skipped update") == (log.MAX_SKIPPED if nonfinite == "skip" else 0)


def test_one_bad_step_is_skipped_counted_and_forgiven(config, tmp_path, monkeypatch, capsys):
    config = config.copy_and_resolve_references()
    config.train.nonfinite, config.model.norm = "skip", "none"
    config.optimizer.name, config.optimizer.schedule, config.optimizer.learning_rate = "sgd", "constant", 1e-3
    make = optimizer.make_schedule
    monkeypatch.setattr(optimizer, "make_schedule", lambda *_: lambda step: jax.numpy.where(step == 3, 1e25, 1e-3))
    path = tmp_path / "run"
    config.train.epochs = 8.0
    with pytest.raises(UserError, match="10 steps in a row"):  # SGD counts its own steps: each repeats the same update
        loop.train(config, path)
    monkeypatch.setattr(optimizer, "make_schedule", make)
    loop.train(config, path)  # with a finite rate the same state can be resumed
    assert "skipped update (1 so far)" in capsys.readouterr().out
    found, meta = helpers.final_state(path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
    assert int(found.step) == 20 and meta["skipped"] == helpers.metric_rows(path)[-2]["train/skipped"]


@pytest.mark.parametrize(
    "every_epochs, last, bound",
    [
        # 10 steps an epoch. Nothing but steps: no memory at all; 0.5 % are 2.6 MB, so 2.6 kB a step.
        (1000, 1400, 1.005),
        # An evaluation and a save every 20 steps: 0.3 MB each, of which TensorStore's list of its metrics, which Orbax
        # asks for, never gives back some 30 kB, while the rest (pools of the allocator) becomes less with each.
        (2, 1160, 1.02),
    ],
    ids=["steps", "saves"],
)
def test_long_trainings_grow_no_memory_and_compile_nothing(tmp_path, every_epochs, last, bound):
    settings = [
        "--config.model.features=(4,4)",
        "--config.train.batch_size=2",
        f"--config.train.epochs={(last + 40) / 10}",
    ]
    settings += [f"--config.train.{name}_every_epochs={every_epochs}" for name in ("eval", "checkpoint")]
    settings += ["--config.train.log_every_steps=20"]
    flags = commands.training(tmp_path / "run", *settings)
    command = commands.Command(*flags, folder=tmp_path, devices=1, log_compiles=True)
    held, compiled = {}, {}
    for step in (first := 500, last):
        command.wait_for(f"step {step}/{last + 40}")
        held[step] = command.resident_bytes()
        compiled[step] = command.output.count("Finished XLA compilation")
    assert command.wait() == 0, command.output
    assert compiled[first] > 0 and compiled[last] == compiled[first]
    assert held[last] < bound * held[first], held
