"""Whatever interrupts a training, the same command resumes it and ends where it would have ended."""

import os
import random
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

from unet_jax.data import pipeline
from unet_jax.errors import Interrupted, UserError
from unet_jax.evaluation import evaluate
from unet_jax.training import log, loop, optimizer
from unet_jax.workdir import checkpoints, integrity


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_sigterm_twice_saves_once_and_the_same_command_resumes(finished, tmp_path):
    path = tmp_path / "run"
    command = commands.Command(*commands.training(path), folder=tmp_path)
    command.wait_for("step 3/10")
    command.send(signal.SIGTERM)
    command.wait_for("SIGTERM: saving at the next step")
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM, command.output
    assert f"SIGTERM: {path} is saved; the same command resumes it" in command.output
    assert "Traceback" not in command.output
    assert 3 < integrity.steps(path)[-1] < 10
    commands.succeed(*commands.training(path), folder=tmp_path)
    helpers.assert_same_run(path, finished)


def test_sigint_before_the_first_step_ends_at_once_with_130(tmp_path):
    command = commands.Command(*commands.training(tmp_path / "run"), folder=tmp_path)
    command.wait_for("data  ")
    command.send(signal.SIGINT)
    assert command.wait() == 128 + signal.SIGINT, command.output
    assert "stopped by SIGINT; nothing had to be saved" in command.output and "Traceback" not in command.output
    assert not integrity.steps(tmp_path / "run")


def test_libraries_that_catch_exceptions_do_not_swallow_a_signal(config, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "10", "empty")

    def interrupted(*_, **__):
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", interrupted)
    with pytest.raises(Interrupted, match="stopped"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("at", ["step", "evaluation", "last evaluation"])
@pytest.mark.slow
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


@pytest.mark.slow
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
        if mode == "rb":
            raise OSError(5, "Input/output error")
        return open_file(self, mode, **settings)

    monkeypatch.setattr(path_type, "open", fail)
    assert "cannot be read ([Errno 5]" in integrity.find_damage(finished, 10)


def damage(folder, how):
    largest = helpers.largest_file(folder)
    if how == "truncated":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif how == "one bit flipped":
        helpers.flip_bit(largest)
    elif how == "a file deleted":
        largest.unlink()
    elif how == "checksums deleted":
        (folder / integrity.CHECKSUMS).unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()


SLOW_DAMAGES = ("truncated", "a file deleted", "checksums deleted", "empty")


@pytest.mark.parametrize(
    "how", ["one bit flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in SLOW_DAMAGES)]
)
def test_a_damaged_step_is_named_and_the_one_before_used(config, finished, tmp_path, how, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    damage(path / "checkpoints" / "10", how)
    result = evaluate.evaluate_workdir(path, None, None, "validation")  # reading moves nothing
    assert f"{path / 'checkpoints' / '10'} is damaged" in capsys.readouterr().out
    assert result is not None and (path / "checkpoints" / "10").exists()
    loop.train(config, path)
    printed = capsys.readouterr().out
    assert f"{path / 'checkpoints' / '10'} is damaged" in printed and "the newest intact step is 8" in printed
    assert "Resuming from step 8" in printed and (path / "damaged" / "10").exists()
    helpers.assert_same_run(path, finished)


@pytest.mark.slow
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
        damage(path / "checkpoints" / str(step), "one bit flipped")
    before = sorted(path.rglob("*"))
    with pytest.raises(UserError, match="has no intact checkpoint(.|\n)*/8: (.|\n)*/10: .*its checksum differs"):
        loop.train(config, path)
    with pytest.raises(UserError, match="has no intact checkpoint"):
        evaluate.evaluate_workdir(path, None, None, "validation")
    assert sorted(path.rglob("*")) == before
    with pytest.raises(UserError, match="10 is damaged: .*Choose another --step: 8"):
        evaluate.evaluate_workdir(path, 10, None, "validation")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_an_excessive_learning_rate_is_an_error(config, tmp_path, nonfinite, capsys):
    config = config.copy_and_resolve_references()
    config.train.nonfinite, config.train.epochs = nonfinite, 8.0
    config.optimizer.learning_rate, config.optimizer.schedule = 1e20, "constant"
    kept = {"stop": "None is saved yet", "skip": r"The last good checkpoint is .*/checkpoints/8"}[nonfinite]
    with pytest.raises(UserError, match=rf"not finite: .*\. {kept}\. Try a lower config.optimizer"):
        loop.train(config, tmp_path / "run")
    assert capsys.readouterr().out.count("skipped update") == (log.MAX_SKIPPED if nonfinite == "skip" else 0)


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_thousand_steps_grow_no_memory_and_compile_nothing(tmp_path):
    settings = ["--config.model.features=(4,4)", "--config.train.batch_size=2", "--config.train.epochs=200"]
    settings += ["--config.train.eval_every_epochs=20", "--config.train.checkpoint_every_epochs=10"]
    settings += ["--config.train.log_every_steps=50"]
    flags = commands.training(tmp_path / "run", *settings)
    command = commands.Command(*flags, folder=tmp_path, devices=1, log_compiles=True)
    held, compiled = {}, {}
    for step in (500, 1900):
        command.wait_for(f"step {step}/2000")
        held[step] = command.resident_bytes()
        compiled[step] = command.output.count("Finished XLA compilation")
    assert command.wait() == 0, command.output
    assert compiled[500] > 0 and compiled[1900] == compiled[500]
    assert held[1900] < 1.02 * held[500], held
