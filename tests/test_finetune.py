"""Starting from the weights of another training, and freezing some of them."""

import dataclasses
import shutil

import helpers
import jax
import numpy as np
import pytest

import unet_jax
from unet_jax import data
from unet_jax.errors import UserError
from unet_jax.training import loop


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
def test_frozen_weights_stay_bit_for_bit_and_survive_a_restart(trained, config, tmp_path):
    config.init_from = str(trained)
    config.optimizer.frozen = ("down", "up_0/bias")
    config.optimizer.name, config.optimizer.weight_decay, config.optimizer.clip_norm = "adamw", 0.1, 1.0
    config.optimizer.ema = 0.0
    config.train.epochs = 4.0
    loop.train(config, tmp_path / "whole")
    flat = lambda tree: {"/".join(k.key for k in p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    first, last = flat(_params(trained)), flat(_params(tmp_path / "whole", 10))
    for name, value in last.items():
        assert np.array_equal(value, first[name]) == name.startswith(("down", "up_0/bias")), name
    # Resuming from the step before neither needs the other work directory nor changes the result.
    shutil.rmtree(tmp_path / "whole/checkpoints/10")
    moved = trained.rename(tmp_path / "moved")
    try:
        loop.train(config, tmp_path / "whole")
    finally:
        moved.rename(trained)
    for name, value in flat(_params(tmp_path / "whole", 10)).items():
        np.testing.assert_array_equal(value, last[name])


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
    for frozen, message in (
        (("dwn_0",), "Did you mean 'down_0'"),
        (("",), "is a prefix of no weight"),
        (("d", "u", "m", "h"), "nothing to train"),
    ):
        config.optimizer.frozen = frozen
        with pytest.raises(UserError, match=message):
            loop.train(config, tmp_path / "run3")


def test_files_that_do_not_belong_together_are_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with helpers.edited_json(tmp_path / "run/classes.json") as values:
        classes = data.Classes.from_json(values)
        values |= dataclasses.replace(classes, names=classes.names[:5], palette=classes.palette[:5]).to_json()
    with pytest.raises(UserError, match=r"params/head/bias is \(7,\), but the network .* 5 classes .* needs \(5,\)"):
        unet_jax.load(tmp_path / "run")
