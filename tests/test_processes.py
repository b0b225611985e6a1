"""Training gives the same result on any number of devices and processes, and processes end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import chex
import commands
import helpers
import jax
import numpy as np
import pytest

from unet_jax.errors import UserError
from unet_jax.parallel import distributed, sharding
from unet_jax.workdir import checkpoints, files, integrity

# Sums are added, and so rounded, in another order. Adam would amplify this: see test_one_device_equals_eight.
STEADY = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.05")
STEADY += ("--config.optimizer.schedule=constant", "--config.train.log_every_steps=1")
STEADY += ("--config.optimizer.ema_statistics",)


def losses(path):
    return {row["step"]: row["train/loss"] for row in helpers.metric_rows(path) if "train/loss" in row}


def assert_close(path, reference):
    """Checks that the losses of all steps agree within 1e-5, the rounding of float32 sums in another order."""
    expected, found = losses(reference), losses(path)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """A training run of 30 steps on eight devices."""
    path = tmp_path_factory.mktemp("steady") / "run"
    commands.succeed(*commands.training(path, *STEADY, "--config.train.epochs=12"), folder=path.parent)
    return path


@pytest.mark.slow
def test_one_device_eight_four_by_two_and_two_processes_train_and_score_the_same(steady, tmp_path):
    confusions = {}
    for name, settings in {
        "one device": {"devices": 1},
        "four by two": {"more": ["--config.mesh.space=2"]},
        "two by four": {"more": ["--config.mesh.data=2", "--config.mesh.space=4"]},
        "sharded optimizer": {"more": ["--config.mesh.shard_optimizer=True"]},
        "two processes": {"together": True, "devices": 4},
    }.items():
        path = tmp_path / name / "run"
        more = [*STEADY, "--config.train.epochs=2", *settings.pop("more", ())]
        run = commands.succeed_together if settings.pop("together", False) else commands.succeed
        run(*commands.training(path, *more), folder=path.parent, **settings)
        found = losses(path)
        assert len(found) == 5
        expected = losses(steady)
        np.testing.assert_allclose(list(found.values()), [expected[k] for k in found], rtol=0, atol=1e-5)
        run("--mode=eval", f"--workdir={steady}", folder=path.parent, **settings)
        confusions[name] = json.loads((steady / "eval.json").read_text())["confusion"]
    assert all(counts == confusions["one device"] for counts in confusions.values())
    assert np.sum(confusions["one device"]) == 10 * 48 * 48


@pytest.mark.slow
def test_training_resumes_on_one_device_then_four_then_two_processes(steady, tmp_path):
    path = tmp_path / "run"
    more = commands.training(path, *STEADY, "--config.train.epochs=12")
    for devices in (8, 1, 4):
        before = integrity.steps(path)[-1] if devices != 8 else 0
        command = commands.Command(*more, folder=tmp_path, devices=devices)
        command.wait_for(f"step {before + 1}/30")
        command.send(signal.SIGTERM)
        assert command.wait() == 128 + signal.SIGTERM, command.output
        assert before < integrity.steps(path)[-1] < 30
    commands.succeed_together(*more, folder=tmp_path, devices=2)
    assert_close(path, steady)
    assert len(files.read_environment(path)) == 4


@pytest.mark.slow
def test_a_checkpoint_restored_on_other_devices_is_bit_equal(steady):
    config = files.read_config(steady)
    found = []
    writer = checkpoints.CheckpointWriter(steady)
    for mesh, shard_optimizer in (
        (sharding.create_mesh(8, 1), False),
        (helpers.one_device(), False),
        (sharding.create_mesh(2, 2, jax.devices()[:4]), True),
        (sharding.create_mesh(8, 1), True),
    ):
        config.mesh.shard_optimizer = shard_optimizer
        _, blank = helpers.build(config, mesh)
        restored, _ = writer.restore(30, blank)
        replicated = {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(restored.ema)}
        assert replicated == ({True, False} if shard_optimizer else {True})
        found.append(jax.device_get(restored))
    writer.close()
    for other in found[1:]:
        chex.assert_trees_all_equal(other, found[0])


@pytest.mark.slow
def test_signals_to_one_of_two_processes_save_the_same_step_on_both(tmp_path):
    reference, path = tmp_path / "reference", tmp_path / "run"
    outputs = commands.succeed_together(*commands.training(reference), folder=tmp_path, devices=2)
    assert "process 0 of 2: on " in outputs[0] and "process 1 of 2: on " in outputs[1]
    assert "2 process(es)" in outputs[0] and "step 3/10" not in outputs[1]
    cluster = commands.start_cluster(*commands.training(path), folder=tmp_path, devices=2)
    cluster[0].wait_for("step 3/10")
    for number in (signal.SIGHUP, signal.SIGTERM):  # the first one counts
        cluster[1].send(number)
    assert [command.wait() for command in cluster] == [129, 129], cluster[0].output + cluster[1].output
    assert 3 < integrity.steps(path)[-1] < 10
    assert all("the same command resumes it" in command.output for command in cluster)
    commands.succeed_together(*commands.training(path), folder=tmp_path, devices=2)
    helpers.assert_same_run(path, reference)


@pytest.mark.slow
def test_an_exception_in_one_process_ends_both_with_its_text(tmp_path):
    path = tmp_path / "run"
    first, second = commands.start_cluster(
        *commands.training(path), folder=tmp_path, devices=2, each=[{"file_size": 15_000}, {}]
    )  # only process 0 cannot write
    assert first.wait(40) == 1, first.output
    ended = time.monotonic()
    assert second.wait(30) == 1
    assert time.monotonic() - ended < 30
    for command in (first, second):
        assert "process 0 of 2: error: " in command.output and "could not be saved" in command.output
        assert "Traceback" not in command.output


IMPATIENT = {"unet_jax.parallel.links.HEARTBEAT_TIMEOUT": 3, "unet_jax.parallel.distributed.END_TIMEOUT": 1}


def assert_ended_with(text, command):
    """Checks that a command ends soon, with our sentence, and neither with a traceback nor with one of C++."""
    assert command.wait(15) == 1, command.output
    assert text in command.output and "Start all processes again with the same command" in command.output
    for word in ("Traceback", "***", "absl", "Check failed", "F0000", "another task died", "terminate called"):
        assert word not in command.output


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_a_reason(tmp_path, killed):
    flags = commands.training(tmp_path / "run", "--config.train.epochs=4000")
    cluster = commands.start_cluster(*flags, folder=tmp_path, devices=2, constants=IMPATIENT)
    cluster[0].wait_for("step 3/10000")
    cluster[killed].send(signal.SIGKILL)
    assert_ended_with(f"process {killed} on {socket.gethostname()} (pid ", cluster[1 - killed])
    assert "has ended without giving a reason" in cluster[1 - killed].output


@pytest.mark.slow
def test_a_process_whose_number_is_in_use_is_refused_and_a_stopped_one_ends_the_others(tmp_path):
    path = tmp_path / "run"
    flags = commands.training(path, "--config.train.epochs=4000")
    settings = {"folder": tmp_path, "devices": 2, "constants": IMPATIENT}
    cluster = commands.start_cluster(*flags, **settings)
    cluster[0].wait_for("step 3/10000")
    newcomer = commands.Command(*cluster[1].flags, **settings)
    assert newcomer.wait(30) == 1
    refusal = f"process 1 on {socket.gethostname()} (pid {cluster[1].pid}) is in this run already, which goes on"
    assert refusal in newcomer.output and "Traceback" not in newcomer.output
    assert refusal in cluster[0].output
    before = integrity.steps(path)
    cluster[1].send(signal.SIGSTOP)
    silent = "(pid {}) has been silent for 3 s: it was stopped or suspended"
    assert_ended_with(silent.format(cluster[1].pid), cluster[0])
    cluster[1].send(signal.SIGCONT)
    assert_ended_with("Start all processes again", cluster[1])
    assert integrity.steps(path)[-1] >= before[-1]
    assert integrity.find_damage(path, integrity.steps(path)[-1]) is None


@pytest.mark.slow
def test_processes_that_were_started_differently_print_the_difference(tmp_path):
    each = ["--config.optimizer.learning_rate=0.01", "--config.optimizer.learning_rate=0.02"]
    cluster = commands.start_cluster(
        *commands.training(tmp_path / "run"), folder=tmp_path, devices=2, each=[{"more": [flag]} for flag in each]
    )
    for command in cluster:
        assert command.wait(60) == 1, command.output
        assert "process 1 was started differently from process 0" in command.output
        assert '"learning_rate": 0.01' in command.output and '"learning_rate": 0.02' in command.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process_id", [0, 1])
def test_an_unreachable_coordinator_is_named(process_id):
    program = (
        "from unet_jax.parallel import distributed, processes\n"
        "processes.START_TIMEOUT = 2\n"
        f"with distributed.initialized('127.0.0.1:{29871 + process_id}', 2, {process_id}): pass"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=commands.ROOT)
    assert result.returncode == 1
    assert f"not all 2 processes reached 127.0.0.1:{29871 + process_id} within 2 s" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # set in the batch script too, not only in processes that srun started
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
    ],
)
def test_launchers_are_detected_from_the_environment(environment, found):
    assert distributed.launcher_hint(environment) == found


@pytest.mark.parametrize(
    "data, space, expected",
    [(0, 1, (8, 1)), (1, 8, (1, 8)), (0, 4, (2, 4)), (0, 3, (8, 1)), (2, 0, (2, 4)), (16, 0, (8, 1))],
)
def test_evaluation_splits_images_if_its_devices_allow_it(data, space, expected):
    assert tuple(sharding.create_eval_mesh(data, space).shape.values()) == expected


@pytest.mark.slow
def test_a_work_directory_that_is_not_shared_is_an_error(tmp_path):
    cluster = commands.start_cluster(
        *commands.training("run"),
        folder=tmp_path,
        devices=2,
        each=[{"folder": tmp_path / "a"}, {"folder": tmp_path / "b"}],
    )
    for command in cluster:
        assert command.wait(90) == 1, command.output
        assert "--workdir=run is not the same folder on process 1 as on process 0" in command.output


def test_deterministic_kernels_must_be_enabled_before_a_gpu_starts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    sharding.use_deterministic_kernels()
    expected = "--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_FLAGS"] == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sharding.use_deterministic_kernels()  # already enabled: nothing to change
    assert os.environ["XLA_FLAGS"] == expected
    monkeypatch.delenv("XLA_FLAGS")
    jax.devices()
    with pytest.raises(UserError, match="too late.*XLA_FLAGS=--xla_gpu_deterministic_ops=true"):
        sharding.use_deterministic_kernels()
