"""Training: what step and loop compute, and that neither devices nor crashes change it."""

import dataclasses
import json
import shutil

import chex
import helpers
import jax
import numpy as np
import pytest
import tiny

from unet_jax import data, defaults, metrics
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.parallel import sharding
from unet_jax.training import loop, optimizer
from unet_jax.workdir import checkpoints, files, integrity, metrics_log


def test_golden_step(config):
    """The numbers of this test were recorded when the step was known to be right."""
    config.augment.brightness = 0.0
    final, history = helpers.run_steps(config, helpers.one_device(), steps=2)
    found = [history[0]["loss"], history[0]["grad_norm"], history[1]["loss"]]
    found.append(float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(final.params))))
    # float32 sums in another order on another machine: a relative 1e-3 after two steps of Adam.
    np.testing.assert_allclose(
        found,
        GOLDEN,
        rtol=1e-3,
        err_msg="The training step computes something else than before: loss and gradient norm of step 1, loss of step "
        "2, sum of all absolute weights. If that is intended (another draw, another default), say so in the commit and "
        "record the new numbers; published results may no longer be reproduced.",
    )


GOLDEN = [2.078961, 1.308313, 2.061543, 736.96637]


@pytest.mark.slow
@pytest.mark.parametrize(
    "space, variant, norm, name, rate",
    [(1, "multiclass", "batch", "sgd", 0.05), (2, "multilabel", "none", "adam", 1e-3)],
)
def test_one_device_equals_eight(config, space, variant, norm, name, rate):
    # Not Adam with a normalisation: Adam divides each gradient by its magnitude, and some gradients of weights before a
    # normalisation are nearly zero, so that it amplifies their rounding (to 4e-5 in the weights; the losses agree).
    config.data.variant, config.model.norm, config.loss.dice, config.loss.batch_dice = variant, norm, 0.5, 0.5
    config.optimizer.name, config.optimizer.learning_rate = name, rate
    one, one_history = helpers.run_steps(config, helpers.one_device())
    eight, eight_history = helpers.run_steps(config, sharding.create_mesh(0, space))
    # Gradients are summed in another order: float32 rounding over five steps stays within 1e-5.
    for a, b in zip(one_history, eight_history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    chex.assert_trees_all_close(one.params, eight.params, atol=1e-5)
    chex.assert_trees_all_close(one.batch_stats, eight.batch_stats, atol=1e-5)
    assert one.step == eight.step == 5


@pytest.mark.slow
@pytest.mark.parametrize("features", [(4, 8, 8), (64, 128)])  # the wide one uses Winograd convolutions
def test_convolutions_for_one_cpu_train_the_same(config, features):
    config.model.features = features
    config.model.norm, config.optimizer.name, config.optimizer.learning_rate = "none", "sgd", 0.05
    results = [helpers.run_steps(config, helpers.one_device(), conv_impl=impl) for impl in ("plain", "cpu")]
    for a, b in zip(*(history for _, history in results), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)  # sums in another order, over five steps
    chex.assert_trees_all_close(results[0][0].params, results[1][0].params, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_images_of_any_size_are_mirrored_as_needed_and_every_pixel_is_scored(config, tmp_path, padding, capsys):
    config.data.size, config.augment.crop, config.model.padding = (50, 53), (49, 51), padding
    config.model.extra_conv, config.train.epochs = True, 1.0
    loop.train(config, tmp_path / "run")
    given = {"same": "52x52", "valid": "92x96"}[padding]
    assert f"training predicts 49x51 from {given}, mirrored where needed" in capsys.readouterr().out
    result = evaluate.evaluate_workdir(tmp_path / "run", None, None, "validation", None)
    assert result.confusion.sum() == 10 * 50 * 53


@pytest.mark.slow
def test_ema_of_weights_and_statistics_follow_the_formula(config):
    config.optimizer.ema, config.optimizer.ema_statistics = 0.6, True
    states = [state for state, _ in helpers.each_step(config, helpers.one_device(), steps=3)]
    averaged = lambda state: {"params": state.ema, "batch_stats": state.ema_batch_stats}
    latest = lambda state: {"params": state.params, "batch_stats": state.batch_stats}
    expected = latest(states[0])
    for i, state in enumerate(states[1:]):
        decay = min(0.6, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, latest(state))
        chex.assert_trees_all_close(averaged(state), expected, atol=1e-6)
    chex.assert_trees_all_equal(state.eval_variables, averaged(state))
    evaluated = state.replace(ema_batch_stats=None).eval_variables  # without, the statistics are the latest ones
    chex.assert_trees_all_equal(evaluated, {"params": state.ema, "batch_stats": state.batch_stats})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training that was never interrupted."""
    config = tiny.get_config()
    path = tmp_path_factory.mktemp("finished") / "run"
    loop.train(config, path)
    return path, config


def test_the_work_directory_keeps_its_contract(finished):
    path, config = finished
    assert json.loads((path / "config.json").read_text())["train"]["batch_size"] == 8
    classes = json.loads((path / "classes.json").read_text())
    assert classes["names"][0] == "background" and len(classes["palette"]) == 7
    assert "10" in {p.name for p in (path / "checkpoints").iterdir()}
    assert {p.name for p in (path / "panels").iterdir()} == {"5", "10"}
    assert (path / "panels" / "10" / "validation_00000.png").stat().st_size > 1000
    assert (path / "history.png").stat().st_size > 5000
    assert list(path.glob("events.out.tfevents.*"))
    rows = metrics_log.read(path)
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 10, 10]
    assert rows[0].keys() >= {"step", "epoch", "train/loss", "train/images_per_sec", "train/data_wait"}
    assert rows[-1].keys() >= {"step", "epoch", "val/loss", "val/accuracy", "val/miou", "val/iou/square"}
    assert rows[-1]["epoch"] == 4.0
    assert not list(path.glob("*.partial"))


def test_a_finished_training_is_left_as_it_is(finished, capsys):
    path, config = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    loop.train(config, path)
    assert f"{path} is finished: 10 steps" in capsys.readouterr().out
    changed = {file for file, mtime in before.items() if file.stat().st_mtime_ns != mtime}
    assert {file.name for file in changed} <= {"config.json", "classes.json", "history.png"}


class _Crash(Exception):
    pass


@pytest.mark.parametrize(
    "crash_after, cache_gib",
    [(4, 1.0), pytest.param(8, 0.0, marks=pytest.mark.slow)],
    ids=["mid-epoch, mid-line of metrics", "mid-epoch, not cached"],
)
def test_resuming_after_a_crash_is_bit_equal(finished, tmp_path, monkeypatch, crash_after, cache_gib):
    reference, config = finished
    config = config.copy_and_resolve_references()
    config.data.cache_gib = cache_gib
    path = tmp_path / "run"
    if crash_after == 4:
        config.train.checkpoint_every_epochs = 0.8  # 2 steps
    with monkeypatch.context() as patch:
        save = checkpoints.CheckpointWriter.save

        def save_and_crash(self, step, *args):
            save(self, step, *args)
            if step >= crash_after:
                self.close()
                metrics_log.append(path, {"step": step + 1, "epoch": 0.0, "train/loss": 0.0})
                with (path / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 9, "ep')  # torn
                raise _Crash

        patch.setattr(checkpoints.CheckpointWriter, "save", save_and_crash)
        with pytest.raises(_Crash):
            loop.train(config, path)
    loop.train(config, path)
    helpers.assert_same_run(path, reference)


def test_another_configuration_is_refused_with_the_differences(finished, config):
    path, _ = finished
    config.optimizer.learning_rate = 0.5
    config.model.features = (4, 8)
    config.train.log_every_steps = 1  # changes no result
    with pytest.raises(UserError) as error:
        loop.train(config, path)
    message = str(error.value)
    assert "config.optimizer.learning_rate: 0.001 there, 0.5 now" in message
    assert "config.model.features: [4, 8, 8] there, [4, 8] now" in message
    assert "log_every" not in message


@pytest.mark.slow
def test_a_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    config.optimizer.name, config.optimizer.schedule, config.optimizer.learning_rate = "sgd", "constant", 1e-3
    config.model.norm = "none"
    config.train.checkpoint_every_epochs = 0.4  # each step
    # At step 4 the update is huge but finite, so the loss and the gradients of that step do not show it.
    monkeypatch.setattr(optimizer, "make_schedule", lambda *_: lambda step: jax.numpy.where(step == 3, 1e25, 1e-3))
    with pytest.raises(UserError, match=r"step 4: not finite: .*param_norm = inf.*Try a lower") as error:
        loop.train(config, tmp_path / "run")
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '3'}" in str(error.value)
    assert integrity.steps(tmp_path / "run")[-1] == 3


def test_a_work_directory_without_the_fields_at_their_defaults_is_resumed_and_scored(finished, tmp_path):
    """As if each field whose default the run used had been added later."""
    reference, config = finished
    path = tmp_path / "run"
    shutil.copytree(reference, path)
    with helpers.edited_json(path / "config.json") as values:
        kept = defaults.differing(defaults.flatten(values))
        values.clear()
        for name, value in kept.items():
            group, _, field = name.rpartition(".")
            (values.setdefault(group, {}) if group else values)[field] = value
        assert "eval" not in values and "loss" not in values and "features" in values["model"]
    loop.train(config, path)  # finished: nothing differs
    evaluate.evaluate_workdir(path, None, None, "validation", None)


def test_examples_that_changed_are_refused(finished, tmp_path, monkeypatch):
    path, config = finished
    shutil.copytree(path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")  # so that there are steps left to train
    load = data.load
    other = dataclasses.replace(load(config.data, "validation"), ids=["other"] * 10)
    monkeypatch.setattr(data, "load", lambda settings, split: load(settings, split) if split == "train" else other)
    with pytest.raises(UserError, match="was trained on other examples"):
        loop.train(config, tmp_path / "run")


def test_a_training_goes_on_where_its_images_have_moved(config, tmp_path, capsys):
    for k in range(10):
        mask = np.zeros((16, 16), np.uint8)
        mask[k : k + 5] = 1
        for folder, picture in (("images", mask * 200 + k), ("masks", mask)):
            helpers.save_image(picture, tmp_path / f"data/{folder}/{k}.png")
    config.data.name, config.data.variant, config.data.size = "folder", "binary", (16, 16)
    config.data.root = str(tmp_path / "data")
    loop.train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "moved_run")
    shutil.rmtree(tmp_path / "moved_run/checkpoints/4")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    config.data.root = str(tmp_path / "moved")
    capsys.readouterr()
    loop.train(config, tmp_path / "moved_run")
    assert "have moved from" in (printed := capsys.readouterr().out) and "Resuming from step 3" in printed
    helpers.assert_same_run(tmp_path / "moved_run", tmp_path / "run")
    assert files.read_config(tmp_path / "moved_run").data.root == config.data.root  # where it is scored from now on

    shutil.rmtree(tmp_path / "moved_run/checkpoints/4")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    helpers.save_image(np.ones((16, 16), np.uint8), tmp_path / "other/masks/3.png")
    config.data.root = str(tmp_path / "other")
    with pytest.raises(
        UserError, match="have the same names, but are not known to be the same: the sizes of their files"
    ):
        loop.train(config, tmp_path / "moved_run")


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", [("carla", "carla23"), ("oxford_iiit_pet", "binary")])
def test_a_whole_training_on_image_files(config, tmp_path, name, variant):
    root = tmp_path / "data"
    if name == "carla":
        helpers.make_frames(root, range(10), size=(40, 30))
    else:
        helpers.make_pets(root, [f"Bengal_{i}" for i in range(12)])
    config.data.name, config.data.variant, config.data.root = name, variant, str(root)
    config.data.size, config.data.resize = (16, 16), "nearest"
    config.train.epochs = config.train.eval_every_epochs = 20.0
    config.train.checkpoint_every_epochs = 20.0
    config.optimizer.learning_rate, config.augment.rotate = 1e-2, 0.0
    loop.train(config, tmp_path / "run")
    last = metrics_log.read(tmp_path / "run")[-1]
    assert last["val/miou"] > 0.9  # a colour of its own for each class
    counted = [value for key, value in last.items() if key.startswith("val/iou/") and value is not None]
    assert len(counted) == 2
    result = evaluate.evaluate_workdir(tmp_path / "run", None, str(root), "all")
    assert metrics.flatten(result.records)["miou"] == pytest.approx(last["val/miou"], abs=0.1)


def test_folders_that_are_not_work_directories_are_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds 'thesis.tex' but no config.json"):
        loop.train(config, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        loop.train(config, tmp_path / "thesis.tex" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("train.batch_size", 9, "use 8 or 16"),
        ("train.epochs", 0.0, "config.train.epochs = 0.0 must be positive"),
        ("train.log_every_steps", 0, "log_every_steps must be 1 or more"),
        ("data.size", (50, 40), "shapes need at least 48x48"),
        ("data.name", "carla", "config.data.variant"),
        ("data.resize", "bicubic", "config.data.resize"),
        ("loss.class_weights", (1.0,), "hold 7 weights"),
        ("augment.crop", (30, 49), r"config.augment.crop = \(30, 49\) must be"),
        (
            "mesh.space",
            8,
            r"size = \(49, 48\), for which the network needs 52 rows: .* = 8 devices: use 48 or 56",
        ),
        ("train.epochs", float("nan"), "config.train.epochs = nan must be positive"),
        ("optimizer.learning_rate", float("inf"), "learning_rate = inf must be positive"),
        ("optimizer.decay_epochs", ("a",), "decay_epochs"),
        ("seed", 2**40, "config.seed"),
        ("mesh.space", 3, "do not divide 8 devices"),
    ],
)
def test_bad_values_leave_no_work_directory_behind(config, tmp_path, field, value, message):
    config.update_from_flattened_dict({field: value})
    if (field, value) == ("mesh.space", 8):
        config.data.size = (49, 48)  # mirrored to 52, a multiple of the network's stride of 4
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
