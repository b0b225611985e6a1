"""Starting from the weights of another training, and freezing some of them."""

import dataclasses
import json
import shutil

import chex
import helpers
import jax
import numpy as np
import pytest
from etils import epath

import unet_jax
from unet_jax import data, losses, models
from unet_jax.errors import UserError
from unet_jax.inference import forward
from unet_jax.training import loop, optimizer, pretrained
from unet_jax.training.state import TrainState
from unet_jax.workdir import checkpoints, files


def _params(path, step=None):
    return jax.tree.map(np.asarray, unet_jax.load(path, step).variables["params"])


@pytest.mark.slow
def test_the_first_step_starts_from_the_other_weights(trained, config, tmp_path, capsys):
    config.init_from = str(trained)
    config.optimizer.learning_rate, config.optimizer.ema = 1e-30, 0.0
    config.train.epochs = 0.4  # one step
    loop.train(config, tmp_path / "run")
    assert f"Starting from the weights of {trained}, step" in capsys.readouterr().out
    for old, new in zip(jax.tree.leaves(_params(trained)), jax.tree.leaves(_params(tmp_path / "run")), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-20)


@pytest.mark.slow
def test_another_number_of_classes_replaces_the_head(trained, config, tmp_path, capsys):
    config.init_from = str(trained)
    config.data.variant = "multilabel"
    config.optimizer.learning_rate, config.train.epochs = 1e-30, 0.4
    loop.train(config, tmp_path / "run")
    assert "its head has 7 outputs and is replaced by a new one with 6" in capsys.readouterr().out
    old, new = _params(trained), _params(tmp_path / "run")
    assert new["head"]["kernel"].shape[-1] == 6 and new["head"]["kernel"].std() > 0.01
    np.testing.assert_allclose(old["down_0"]["Conv_0"]["kernel"], new["down_0"]["Conv_0"]["kernel"], atol=1e-20)


@pytest.mark.slow
def test_frozen_weights_stay_bit_for_bit_and_a_restart_changes_nothing(trained, config, tmp_path, monkeypatch, capsys):
    """With everything on that fine-tuning has."""
    monkeypatch.setattr(optimizer, "ENCODER", "merge_1/")  # whose updates are smaller: this network has no encoder
    config.init_from, config.loss.class_weights, config.train.epochs = str(trained), ("sqrt",), 4.0
    settings = dict(weight_decay=0.1, decayed="kernels", clip_norm=1.0, encoder_learning_rate=0.5, ema_statistics=True)
    config.optimizer.update(dict(name="adamw", frozen=("down", "up_0/bias"), **settings))
    whole, path = tmp_path / "whole", tmp_path / "resumed"
    loop.train(config, whole)
    state, _ = helpers.final_state(whole)
    first, last = (pretrained._flatten({"params": params}) for params in (_params(trained), state.params))
    for name, value in last.items():
        assert np.array_equal(value, first[name]) == name.startswith(("params/down", "params/up_0/bias")), name

    source, classes = data.load(config.data, "train"), json.loads((whole / "classes.json").read_text())
    labels = np.stack([source.read(index)[1] for index in range(len(source))])
    counts = [int((labels == value).sum()) for value in range(7)]
    assert classes["class_counts"] == counts
    assert f"background {(sum(counts) / 7 / counts[0]) ** 0.5:.3g}, square" in capsys.readouterr().out
    loaded = unet_jax.load(whole, 10)
    chex.assert_trees_all_equal(loaded.variables, state.eval_variables)
    assert not np.array_equal(_first_mean(state.ema_batch_stats), _first_mean(state.batch_stats))
    loss = losses.make(loaded.config.loss, "multiclass", 7, loaded.class_counts)
    assert loss.class_weights == losses.balanced_weights("sqrt", counts)

    # Resuming from the step before neither needs the other work directory nor changes the result.
    shutil.copytree(whole, path)
    shutil.rmtree(path / "checkpoints/10")
    moved = trained.rename(tmp_path / "moved")
    try:
        loop.train(config, path)
    finally:
        moved.rename(trained)
    helpers.assert_same_run(path, whole)


def _first_mean(batch_stats):
    return batch_stats["down_0"]["BatchNorm_0"]["mean"]


def _network(config, channels=1):
    classes = dataclasses.replace(data.classes(config.data), channels=channels)
    return forward.create_network(config.model, classes, helpers.one_device())


def _arrays(path):
    variables = unet_jax.load(path).variables
    return pretrained._flatten(variables)


def test_parts_are_taken_and_everything_else_stays_fresh(trained, config):
    config.init_from, config.init_parts = str(trained), ("down", "merge_1/Conv")
    config.optimizer.ema_statistics = True
    built, fresh = helpers.build(config, helpers.two_devices())
    loaded = pretrained.load_pretrained(config, built.network)
    assert loaded.summary.endswith(": down, merge_1/Conv")
    state, saved = pretrained.with_pretrained(fresh, loaded), _arrays(trained)
    chex.assert_trees_all_equal(state.eval_variables, {"params": state.params, "batch_stats": state.batch_stats})
    before = pretrained._flatten({"params": fresh.params, "batch_stats": fresh.batch_stats})
    taken = set()
    for name, value in pretrained._flatten(state.eval_variables).items():
        if name.partition("/")[2].startswith(("down", "merge_1/Conv")):
            taken.add(name.partition("/")[0])
            np.testing.assert_array_equal(value, saved[name])
        else:
            np.testing.assert_array_equal(value, before[name])
    assert taken == {"params", "batch_stats"}
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {leaf.sharding for leaf in jax.tree.leaves(fresh)}


@pytest.mark.parametrize("channels", [3, 1])
def test_another_number_of_channels_adapts_the_first_convolution(trained, config, channels):
    config.init_from = str(trained)
    loaded, name = pretrained.load_pretrained(config, _network(config, channels)), "params/down_0/Conv_0/kernel"
    expected = _arrays(trained)
    expected[name] = np.repeat(expected[name], channels, 2) * np.float32(1 / channels)
    chex.assert_trees_all_equal(loaded.arrays, expected)
    assert loaded.normalization == forward.Normalization()
    assert ("for 1 channel(s), is adapted to 3" in loaded.summary) == (channels == 3)


def test_weights_and_prefixes_that_do_not_fit_are_named(trained, config, tmp_path):
    config.init_from = str(trained)
    config.model.features = (4, 8, 16)
    with pytest.raises(UserError, match=r"batch_stats/down_2/BatchNorm_0/mean is \(8,\) there, but \(16,\)"):
        loop.train(config, tmp_path / "run")
    config.model.features = (4, 8, 8)
    config.init_from = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no config.json"):
        loop.train(config, tmp_path / "run2")
    assert not any((tmp_path / name / "config.json").exists() for name in ("run", "run2"))  # not claimed
    config.init_from = ""
    for init_from, parts, message in (
        ("", ("down_0",), r"init_parts = \('down_0',\) needs config.init_from"),
        (str(trained), ("down_0", "dwn_1"), "'dwn_1' is a prefix of no weight. The blocks are down_0, .*'down_1'"),
        (str(trained), ("head",), r"params/head/bias is \(7,\) there, but \(6,\)"),
    ):
        config.init_from, config.init_parts, config.data.variant = init_from, parts, "multilabel"
        with pytest.raises(UserError, match=message):
            loop.train(config, tmp_path / "run3")
    config.init_from, config.init_parts = "", ()
    for frozen, message in (
        (("dwn_0",), "Did you mean 'down_0'"),
        (("",), "is a prefix of no weight"),
        (("d", "u", "m", "h"), "nothing to train"),
    ):
        config.optimizer.frozen = frozen
        with pytest.raises(UserError, match=message):
            loop.train(config, tmp_path / "run3")


def test_an_encoder_starts_from_published_weights_unless_they_come_from_another_run(config, tmp_path):
    config.model.update(dict(name="encoder_unet", features=(4, 4, 4), upsample="nearest", encoder_norm="frozen"))
    network = _network(config)
    needed = models.abstract_variables(network.model, 1)
    shapes = models.shapes(needed)
    is_encoder = lambda name: name.partition("/")[2].startswith("encoder/")

    # A run whose weights are all 2.
    twos = jax.tree.map(lambda x: np.full(x.shape, 2, np.float32), needed)
    run = epath.Path(tmp_path) / "run"
    run.mkdir()
    normalization = forward.Normalization((3.0,), (4.0,))
    files.claim(run, config, {**network.classes.to_json(), "normalization": normalization.to_json()})
    writer = checkpoints.CheckpointWriter(run)
    writer.save(1, TrainState(np.int32(1), **twos, opt_state={}, ema=None), {}, None)
    writer.close()
    config.init_from = str(run)
    for parts in ((), ("encoder",)):
        config.init_parts, config.model.pretrained = parts, "missing.pth"  # nor is it needed
        loaded = pretrained.load_pretrained(config, network)
        assert loaded.arrays.keys() == {name for name in shapes if not parts or is_encoder(name)}
        assert loaded.normalization == normalization and all((array == 2).all() for array in loaded.arrays.values())
    config.init_parts, config.model.pretrained = ("merge", "head"), "imagenet"
    loaded = pretrained.load_pretrained(config, network)
    assert {name: array.shape for name, array in loaded.arrays.items()} == shapes
    assert {name for name, array in loaded.arrays.items() if (array != 2).any()} == set(filter(is_encoder, shapes))
    assert loaded.normalization == forward.Normalization((127.0,), (128.0,))
    first, second = loaded.summary.splitlines()
    assert first.startswith("Encoder efficientnet_lite0: ") and second.endswith(", step 1: merge, head")


def test_files_that_do_not_belong_together_are_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with helpers.edited_json(tmp_path / "run/classes.json") as values:
        classes = data.Classes.from_json(values)
        values |= dataclasses.replace(classes, names=classes.names[:5], palette=classes.palette[:5]).to_json()
    with pytest.raises(UserError, match=r"params/head/bias is \(7,\), but the network .* 5 classes .* needs \(5,\)"):
        unet_jax.load(tmp_path / "run")
