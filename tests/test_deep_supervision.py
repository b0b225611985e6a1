"""Heads below the top of the decoder, which only training sees."""

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import data, models
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.models.encoder_unet import EncoderUNet
from unet_jax.models.unet import UNet
from unet_jax.parallel import sharding
from unet_jax.training import pretrained


@pytest.mark.parametrize("network, heads", [(UNet, 1), (EncoderUNet, 2)])
def test_training_returns_more_logits_of_half_and_a_quarter_of_the_size(network, heads):
    model = network(2, features=(4, 4, 6), deep_supervision=heads, norm="none")
    image, keys = jnp.zeros((1, 64, 32, 3)), jax.random.split(jax.random.key(0), 1)
    variables = jax.eval_shape(model.init, keys[0], image)
    assert jax.eval_shape(model.apply, variables, image).shape == (1, 64, 32, 2)
    train = lambda variables: model.apply(variables, image, keys, mutable=["batch_stats"])[0]
    several = jax.eval_shape(train, variables)
    assert [x.shape for x in several] == [(1, 64 // n, 32 // n, 2) for n in (1, 2, 4)][: 1 + heads]
    assert all(x.dtype == jnp.float32 for x in several)


def test_evaluation_does_not_see_the_heads():
    model = UNet(2, features=(4, 4, 6), deep_supervision=1)
    image = jax.random.normal(jax.random.key(0), (1, 16, 24, 3))
    params = model.init(jax.random.key(1), image)["params"]
    without = {name: x for name, x in params.items() if name != "deep_head_0"}
    assert len(without) == len(params) - 1
    found = model.clone(deep_supervision=0).apply({"params": without}, image)
    assert (found == model.apply({"params": params}, image)).all()


@pytest.fixture
def deep(config):
    """SGD with a rate of 1: the weights change by the gradient."""
    config.model.norm, config.model.dropout, config.model.deep_supervision = "none", 0.0, 1
    config.loss.dice, config.loss.class_weights = 0.5, (0.5, 1.0, 2.0, 1.0, 3.0, 1.0, 0.0)
    config.optimizer.name, config.optimizer.momentum, config.optimizer.learning_rate = "sgd", 0.0, 1.0
    return config


def test_the_loss_is_the_mean_over_levels_each_at_half_the_weight(deep):
    deep.augment.update(flip_horizontal=False, rotate=0.0, brightness=0.0)
    built, state = helpers.build(deep, helpers.one_device())
    images = pipeline.Pipeline(data.load(deep.data, "train"), deep.data.size, deep.data.resize, cache_gib=1.0)
    batch = next(images.train_batches(8, deep.seed, 0, np.arange(8)))
    keys = jax.random.split(jax.random.key(0), 8)
    levels = built.network.model.apply({"params": state.params}, batch["image"] / np.float32(255), keys)
    label = batch["label"]
    losses = []
    for logits, labels in zip(levels, (label, label[:, 1::2, 1::2]), strict=True):
        terms = built.loss.terms(logits, jnp.asarray(labels), np.ones(labels.shape, bool))
        losses.append(float(built.loss.combine(terms)))
    assert losses[0] != losses[1]
    _, history = helpers.run_steps(deep, helpers.one_device(), steps=1)
    assert history[0]["loss"] == pytest.approx((losses[0] + 0.5 * losses[1]) / 1.5, rel=1e-5)


@pytest.mark.slow
def test_microbatches_and_devices_make_no_difference(deep):
    whole, whole_history = helpers.run_steps(deep, helpers.one_device(), steps=1)
    deep.train.accumulate = 4
    split, history = helpers.run_steps(deep, sharding.create_mesh(2, 4), steps=1)
    # float32 rounding of sums over 8 x 48 x 48 pixels in another order.
    chex.assert_trees_all_close(split.params, whole.params, atol=1e-6)
    assert history[0]["loss"] == pytest.approx(whole_history[0]["loss"], abs=1e-6)


def test_training_goes_on_from_a_network_without_the_heads_and_with_another_number_of_classes(config, tmp_path):
    config.data.variant = "multilabel"  # six outputs
    path = helpers.save_untrained(tmp_path / "before", config)
    config.init_from, config.model.deep_supervision = str(path), 1
    taken = pretrained.load_pretrained(config, helpers.build(config, sharding.create_mesh(0, 1))[0].network)
    assert "params/head/kernel" in taken.arrays and "params/deep_head_0/kernel" not in taken.arrays
    config.data.variant = "multiclass"  # seven
    taken = pretrained.load_pretrained(config, helpers.build(config, sharding.create_mesh(0, 1))[0].network)
    assert not any("head" in name for name in taken.arrays)
    assert "its head has 6 outputs and is replaced by a new one with 7" in taken.summary


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"deep_supervision": 2}, r"deep_supervision = 2 is not in 0\.\.1, the levels below the top"),
        ({"deep_supervision": 1, "padding": "valid"}, "deep_supervision needs config.model.padding = 'same'"),
        ({"name": "encoder_unet", "deep_supervision": 3}, r"deep_supervision = 3 is not in 0\.\.2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(config, settings, message):
    config.model.update({"features": (4, 6, 8), **settings})
    with pytest.raises(UserError, match=message):
        models.create(num_outputs=2, **config.model)
