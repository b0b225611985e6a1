"""The training step alone: microbatches, rematerialised activations, images split over devices."""

import chex
import helpers
import jax
import numpy as np
import pytest

from unet_jax import losses
from unet_jax.errors import UserError
from unet_jax.parallel import sharding
from unet_jax.training import components, plan, step


@pytest.fixture
def gradient_config(config):
    """SGD with a rate of 1: the weights change by the gradient. Two terms, and pixels that count nowhere."""
    config.model.norm, config.augment.rotate = "none", 45.0
    config.loss.dice, config.loss.class_weights = 0.5, (0.5, 1.0, 2.0, 1.0, 3.0, 1.0, 0.0)
    config.optimizer.name, config.optimizer.momentum, config.optimizer.learning_rate = "sgd", 0.0, 1.0
    return config


def _compile(config, mesh):
    return plan.compile_step(config, plan.find_classes(config.data), mesh)


@pytest.mark.parametrize("norm", ["none", pytest.param("group", marks=pytest.mark.slow)])
def test_gradients_of_microbatches_add_up_to_those_of_the_batch(gradient_config, norm):
    config = gradient_config
    config.model.norm = norm
    config.loss.update({n: 0.5 for n, term in losses.TERMS.items() if not term.combine and "multiclass" in term.tasks})
    whole, whole_history = helpers.run_steps(config, helpers.two_devices(), steps=1)
    config.train.accumulate = 4
    accumulated, history = helpers.run_steps(config, helpers.two_devices(), steps=1)
    # Weights of size one less their gradients: float32 rounding of sums over 8 x 48 x 48 pixels in another order.
    chex.assert_trees_all_close(accumulated.params, whole.params, atol=1e-6)
    assert history[0]["loss"] == pytest.approx(whole_history[0]["loss"], abs=1e-6)


def test_augmentation_across_the_batch_does_not_see_devices_and_microbatches(gradient_config):
    config = gradient_config
    config.augment.update({"turns": True, "blur": 1.0, "noise": 0.1, "cutmix": 0.7})
    one, history = helpers.run_steps(config, helpers.one_device(), steps=1)
    many, many_history = helpers.run_steps(config, sharding.create_mesh(4, 2), steps=1)
    config.train.accumulate = 4
    accumulated, accumulated_history = helpers.run_steps(config, helpers.two_devices(), steps=1)
    for other, other_history in ((many, many_history), (accumulated, accumulated_history)):
        chex.assert_trees_all_close(other.params, one.params, atol=1e-6)
        assert other_history[0]["loss"] == pytest.approx(history[0]["loss"], abs=1e-6)


def test_a_step_says_whether_any_pixel_was_labelled(gradient_config, monkeypatch):
    assert helpers.run_steps(gradient_config, helpers.two_devices(), steps=1)[1][0]["labelled"] == 1
    put_batch = sharding.put_batch
    blank = lambda mesh, batch: put_batch(mesh, {**batch, "label": np.full_like(batch["label"], 255)})
    monkeypatch.setattr(sharding, "put_batch", blank)
    (found,) = helpers.run_steps(gradient_config, helpers.two_devices(), steps=1)[1]
    assert (found["labelled"], found["loss"], found["grad_norm"]) == (0, 0, 0)


def test_a_loss_of_the_whole_batch_is_refused_with_microbatches(config):
    config.loss.batch_dice, config.train.accumulate = 0.5, 2
    with pytest.raises(UserError, match=r"config.loss.batch_dice is computed from the whole batch at once.*use config"):
        helpers.build(config, helpers.one_device())


def test_steps_with_microbatches_compile_once(gradient_config, monkeypatch):
    made, make = [], step.make_train_step
    monkeypatch.setattr(step, "make_train_step", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1])
    gradient_config.train.accumulate, gradient_config.optimizer.learning_rate = 2, 0.01
    helpers.run_steps(gradient_config, helpers.two_devices(), steps=3)
    assert [function._cache_size() for function in made] == [1]


@pytest.mark.slow
def test_rematerialised_activations_change_nothing(gradient_config):
    config = gradient_config
    stored, _ = helpers.run_steps(config, helpers.two_devices(), steps=1)
    config.model.remat = (0, 1, 2)
    rematerialised, _ = helpers.run_steps(config, helpers.two_devices(), steps=1)
    chex.assert_trees_all_equal_structs(stored.params, rematerialised.params)
    chex.assert_trees_all_close(stored.params, rematerialised.params, atol=1e-6)


@pytest.mark.slow
def test_microbatches_and_remat_save_memory(config, optimized):
    config.data.size, config.train.batch_size = (128, 128), 32
    peak = lambda: _compile(config, sharding.create_mesh(0, 1)).peak
    whole = peak()
    config.model.remat = (0, 1, 2)
    # Without, every block keeps what goes into and comes out of both convolutions, norms and activations; with, what
    # goes into the block. The logits and one block at a time remain.
    assert peak() < 0.85 * whole
    config.model.remat, config.train.accumulate = (), 4
    assert peak() < 0.5 * whole  # a quarter of the activations; images, labels and weights stay


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"padding": "valid"}, {"upsample": "bilinear"}, {"upsample": "nearest"}])
def test_networks_train_the_same_on_images_split_over_devices(gradient_config, model):
    config = gradient_config
    config.model.update(model)
    one, one_history = helpers.run_steps(config, helpers.one_device(), steps=2)
    many, many_history = helpers.run_steps(config, sharding.create_mesh(2, 4), steps=2)
    for a, b in zip(one_history, many_history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    chex.assert_trees_all_close(one.params, many.params, atol=1e-5)
    assert np.isfinite([row["loss"] for row in many_history]).all()


@pytest.mark.parametrize("model", [{}, {"upsample": "transposed_3x3", "norm": "none", "dropout": 0.3}])
def test_a_step_has_no_sums_whose_order_a_gpu_chooses(gradient_config, model):
    config = gradient_config
    config.model.update(model)
    config.augment.update({"turns": True, "blur": 1.0, "noise": 0.1, "cutmix": 0.7})
    made = _compile(config, helpers.two_devices())
    shardings = jax.tree.map(lambda x: x.sharding, made.arguments[0])
    program = components.make_train_step(config, made.components, shardings).lower(*made.arguments).as_text()
    assert "stablehlo.convolution" in program
    assert "scatter" not in program  # nor the select_and_scatter of a windowed maximum
