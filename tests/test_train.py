"""The step and the loop: what they compute, and that neither devices nor crashes change it."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import test_data
import tiny

from unet_jax import data
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.models import unet
from unet_jax.parallel import sharding
from unet_jax.training import loop, optimizer, state, step
from unet_jax.workdir import checkpoints, files, integrity, metrics_log

TIMES = {"train/images_per_sec", "train/data_wait"}


def _run_steps(config, devices, steps=5, one_cpu=False):
    """Trains without the loop; returns the state and the metrics of each step."""
    source = data.load(config.data, "train")
    images = pipeline.Pipeline(source, config.data.size, config.data.resize, config.data.cache_gib)
    model = unet.create(source.classes.num_outputs, **config.model, one_cpu=one_cpu)
    schedule = optimizer.make_schedule(config.optimizer, 2.5, 10)
    tx = optimizer.make_optimizer(config.optimizer, schedule)
    shape = (1, *config.data.size, source.classes.channels)
    train_state = state.create(config.seed, model, shape, tx, True, devices, config.mesh.shard_optimizer)
    layout = jax.tree.map(lambda array: array.sharding, train_state)
    train_step = step.make_train_step(model, tx, config, source.classes, devices, layout)
    quiet = sharding.per_device(devices, 0)
    size = config.train.batch_size
    batches, history = images.train_batches(size, config.seed, 0, np.arange(size)), []
    for _ in range(steps):
        train_state, metrics = train_step(train_state, sharding.put_batch(devices, next(batches)), quiet)
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(train_state), history


def _one_device():
    return sharding.create_mesh(1, 1, jax.devices()[:1])


def test_golden_step(config):
    """The numbers of this test were recorded when the step was known to be right."""
    config.augment.brightness = 0.0
    final, history = _run_steps(config, _one_device(), steps=2)
    found = [history[0]["loss"], history[0]["grad_norm"], history[1]["loss"]]
    found.append(float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(final.params))))
    expected = GOLDEN
    # float32 sums in another order on another machine: a relative 1e-3 after two steps of Adam.
    np.testing.assert_allclose(
        found,
        expected,
        rtol=1e-3,
        err_msg="The training step computes something else than before: loss and gradient norm of step 1, loss of step "
        "2, sum of all absolute weights. If that was the aim (another draw, another default), say so in the commit and "
        "record the new numbers; results in the README may be void.",
    )


GOLDEN = [2.078961, 1.308313, 2.061543, 736.96637]


@pytest.mark.parametrize(
    "space, variant, norm, name, rate",
    [(1, "multiclass", "batch", "sgd", 0.05), (2, "multilabel", "none", "adam", 1e-3)],
)
def test_one_device_equals_eight(config, space, variant, norm, name, rate):
    # Not Adam with a normalisation: Adam divides each gradient by its own size, and weights before a normalisation
    # have some that are nearly zero, whose rounding it enlarges (to 4e-5 in the weights; the losses agree still).
    config.data.variant, config.model.norm, config.loss.dice = variant, norm, 0.5
    config.optimizer.name, config.optimizer.learning_rate = name, rate
    one, one_history = _run_steps(config, _one_device())
    eight, eight_history = _run_steps(config, sharding.create_mesh(0, space))
    # Gradients are summed in another order: float32 rounding over five steps stays within 1e-5.
    for a, b in zip(one_history, eight_history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    chex.assert_trees_all_close(one.params, eight.params, atol=1e-5)
    chex.assert_trees_all_close(one.batch_stats, eight.batch_stats, atol=1e-5)
    assert one.step == eight.step == 5


@pytest.mark.parametrize("features", [(4, 8, 8), (64, 128)])  # the wide one takes Winograd's form
def test_the_form_for_one_cpu_trains_the_same(config, features):
    config.model.features = features
    config.model.norm, config.optimizer.name, config.optimizer.learning_rate = "none", "sgd", 0.05
    results = [_run_steps(config, _one_device(), one_cpu=one_cpu) for one_cpu in (False, True)]
    for a, b in zip(*(history for _, history in results), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)  # sums in another order, over five steps
    chex.assert_trees_all_close(results[0][0].params, results[1][0].params, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_size_that_the_network_cannot_take_is_mirrored_and_every_pixel_trained_and_scored(
    config, tmp_path, padding, capsys
):
    config.data.size, config.augment.crop, config.model.padding = (50, 53), (49, 51), padding
    config.model.extra_conv, config.train.epochs = True, 1.0
    loop.train(config, tmp_path / "run")
    given = {"same": "52x52", "valid": "92x96"}[padding]
    assert f"training predicts 49x51 from {given}, mirrored where needed" in capsys.readouterr().out
    result = evaluate.evaluate_workdir(tmp_path / "run", None, None, "validation", None)
    assert result.confusion.sum() == 10 * 50 * 53


def test_averaged_weights_follow_the_formula(config):
    config.optimizer.ema = 0.6
    averages, weights = [], []
    for steps in (0, 1, 2, 3):
        final, _ = _run_steps(config, _one_device(), steps)
        leaf = lambda tree: tree["head"]["kernel"]
        averages.append(leaf(final.ema))
        weights.append(leaf(final.params))
    average = weights[0]
    for i in range(3):
        decay = min(0.6, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * weights[i + 1]
        np.testing.assert_allclose(averages[i + 1], average, atol=1e-6)
    assert (leaf(final.eval_variables["params"]) == averages[-1]).all()


def _final(path, config):
    """The state at the end of a finished training, and the metrics without times."""
    source = data.load(config.data, "train")
    model = unet.create(source.classes.num_outputs, **config.model)
    tx = optimizer.make_optimizer(config.optimizer, optimizer.make_schedule(config.optimizer, 2.5, 10))
    shape = (1, *config.data.size, source.classes.channels)
    blank = state.create(1, model, shape, tx, True, sharding.create_mesh(0, 1))
    writer = checkpoints.CheckpointWriter(path)
    final, meta = writer.restore(10, blank)
    writer.close()
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in metrics_log.read(path)]
    return jax.device_get(final), meta, rows


def _assert_equal(path, reference, config):
    """Weights, optimizer, averages, statistics, what the loop keeps, and the lines of metrics, bit for bit."""
    expected, found = _final(reference, config), _final(path, config)
    chex.assert_trees_all_equal(found[0], expected[0])
    assert found[1:] == expected[1:]


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


def test_a_finished_training_says_so_and_does_nothing(finished, capsys):
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
    [(4, 1.0), (8, 0.0)],
    ids=["mid-epoch, a line of metrics begun", "mid-epoch, not cached"],
)
def test_going_on_after_a_crash_is_bit_equal(finished, tmp_path, monkeypatch, crash_after, cache_gib):
    reference, config = finished
    config = config.copy_and_resolve_references()
    config.data.cache_gib = cache_gib
    path = tmp_path / "run"
    if crash_after == 4:
        config.train.checkpoint_every_epochs = 0.8  # 2 steps
    with monkeypatch.context() as patch:
        written = checkpoints.CheckpointWriter.save

        def save_and_crash(self, step, *args):
            written(self, step, *args)
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
    _assert_equal(path, reference, config)


def test_another_configuration_is_refused_with_its_differences(finished, config):
    path, _ = finished
    config.optimizer.learning_rate = 0.5
    config.model.features = (4, 8)
    config.train.log_every_steps = 1  # does not matter
    with pytest.raises(UserError) as error:
        loop.train(config, path)
    message = str(error.value)
    assert "config.optimizer.learning_rate: 0.001 there, 0.5 now" in message
    assert "config.model.features: [4, 8, 8] there, [4, 8] now" in message
    assert "log_every" not in message


def test_a_training_that_blows_up_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    config.optimizer.name, config.optimizer.schedule, config.optimizer.learning_rate = "sgd", "constant", 1e-3
    config.model.norm = "none"
    config.train.checkpoint_every_epochs = 0.4  # each step
    # At step 4 the update is huge but finite: the loss and the gradient of that step do not tell.
    monkeypatch.setattr(optimizer, "make_schedule", lambda *_: lambda step: jax.numpy.where(step == 3, 1e25, 1e-3))
    with pytest.raises(UserError, match=r"step 4: not finite: .*param_norm = inf.*Try a lower") as error:
        loop.train(config, tmp_path / "run")
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '3'}" in str(error.value)
    assert integrity.steps(tmp_path / "run")[-1] == 3


def test_a_work_directory_of_an_older_version_goes_on_and_is_scored(finished, tmp_path):
    reference, config = finished
    path = tmp_path / "run"
    shutil.copytree(reference, path)
    values = files.read_json(path / "config.json")
    del values["eval"], values["model"]["kernel_init"], values["augment"]["elastic"], values["loss"]["border_weight"]
    files.write_json(path / "config.json", values)
    loop.train(config, path)  # finished: nothing differs
    evaluate.evaluate_workdir(path, None, None, "validation", None)
    assert set(files.LATER_FIELDS) <= set(files._flat(json.loads(config.to_json())))


def test_examples_that_changed_are_refused(config, tmp_path):
    config.train.epochs = 0.4
    loop.train(config, tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values["train"]["epochs"] = config.train.epochs = 0.8  # a run that is not finished yet
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    source = data.load(config.data, "validation")
    with pytest.MonkeyPatch.context() as patch:
        loaded = data.load

        def load(settings, split):
            return loaded(settings, split) if split == "train" else dataclasses.replace(source, ids=["other"] * 10)

        patch.setattr(data, "load", load)
        with pytest.raises(UserError, match="was trained on other examples"):
            loop.train(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", [("carla", "carla23"), ("oxford_iiit_pet", "binary")])
def test_files_go_through_the_whole_training(config, tmp_path, name, variant):
    root = tmp_path / "data"
    if name == "carla":
        test_data.make_frames(root, range(10), size=(40, 30))
    else:
        test_data.make_pets(root, [f"Bengal_{i}" for i in range(12)])
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
    assert result.scores["miou"] == pytest.approx(last["val/miou"], abs=0.1)


def test_folders_that_are_no_work_directories_are_left_alone(config, tmp_path):
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
            r"size = \(49, 48\), to which the network gives 52 rows: .* = 8 devices: use 48 or 56",
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
        config.data.size = (49, 48)  # mirrored to 52, a multiple of the four that the network wants
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
