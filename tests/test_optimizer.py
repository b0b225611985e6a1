import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unet_jax import models
from unet_jax.errors import UserError
from unet_jax.training import optimizer

RATE = optax.constant_schedule(0.1)


def _schedule(config, **settings):
    return optimizer.make_schedule(config.optimizer.to_dict() | settings, steps_per_epoch=10, ends=[100])


def test_schedules(config):
    constant = _schedule(config, schedule="constant", learning_rate=0.5)
    assert constant(0) == constant(99) == 0.5
    step = _schedule(config, schedule="step", learning_rate=1.0, decay_epochs=(3, 6))
    np.testing.assert_allclose([step(s) for s in (0, 29, 31, 59, 61, 99)], [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    cosine = _schedule(config, schedule="cosine", learning_rate=1.0)
    np.testing.assert_allclose([cosine(s) for s in (0, 50, 100)], [1, 0.5, 0], atol=1e-6)


def test_warm_up_rises_to_the_peak_and_moves_no_boundary(config):
    schedule = _schedule(config, schedule="step", learning_rate=1.0, decay_epochs=(3,), warmup_epochs=1)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 29, 31)], [0, 0.5, 1, 1, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "settings, rule",
    [
        (dict(name="adam"), optax.adam(RATE)),
        (dict(name="adamw", weight_decay=0.01), optax.adamw(RATE, weight_decay=0.01)),
        (dict(name="sgd", momentum=0.99), optax.sgd(RATE, momentum=0.99)),
        (dict(name="sgd", clip_norm=1.0), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE, momentum=0.9))),
    ],
    ids=["adam", "adamw", "sgd", "clipped"],
)
def test_optimizers_are_those_of_optax(config, settings, rule):
    made = optimizer.make_optimizer(config.optimizer.to_dict() | settings, RATE)
    params, gradients = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 4.0])}
    for tx in (made, rule):
        state = tx.init(params)
        structure = jax.tree.structure(state)
        _, state = tx.update(gradients, state, params)
        updates, _ = tx.update(gradients, state, params)
        if tx is made:
            expected, expected_structure = updates, structure
    assert (updates["w"] == expected["w"]).all()
    assert structure == expected_structure  # fields at their defaults add nothing: older checkpoints can be restored


PARAMS = {
    "encoder": {"conv": {"kernel": jnp.array([[1.0, -2.0]])}, "norm": {"scale": jnp.array([0.5, 4.0])}},
    "encoder_like": {"kernel": jnp.array([[3.0]])},
    "head": {"bias": jnp.array([2.0]), "kernel": jnp.array([[5.0, -1.0]])},
}


@pytest.mark.parametrize("decayed, frozen", [("kernels", ()), ("kernels", ("head/bias",)), ("all", ())])
def test_decay_and_learning_rates_of_groups_by_hand(config, decayed, frozen):
    settings = dict(name="adamw", weight_decay=0.1, decayed=decayed, encoder_learning_rate=0.25, frozen=frozen)
    settings = config.optimizer.to_dict() | settings
    made = optimizer.make_optimizer(settings, optax.constant_schedule(0.01))
    optimizer.check_names(settings, models.shapes(PARAMS))
    params, opt_state = PARAMS, made.init(PARAMS)
    for factor in (1.0, -0.5, 2.0):
        gradients = jax.tree.map(lambda x, factor=factor: factor * jnp.sin(x), PARAMS)
        updates, opt_state = made.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)

    def by_hand(path, start):
        name, start = "/".join(key.key for key in path), np.float64(start)
        rate = 0.0 if name in frozen else 0.0025 if name.startswith("encoder/") else 0.01
        decay = 0.1 if start.ndim > 1 or decayed == "all" else 0.0
        x, m, v = start, 0.0, 0.0
        for step, factor in enumerate((1.0, -0.5, 2.0), start=1):
            gradient = factor * np.sin(start)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            x = x - rate * ((m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) + decay * x)
        return x

    chex.assert_trees_all_close(params, jax.tree_util.tree_map_with_path(by_hand, PARAMS), rtol=1e-6)


def test_a_factor_for_the_encoder_needs_one(config):
    settings = config.optimizer.to_dict() | dict(encoder_learning_rate=0.1)
    with pytest.raises(UserError, match="encoder_learning_rate = 0.1 is for networks with an encoder"):
        optimizer.check_names(settings, ("down_0/Conv_0/kernel", "encoder_like/kernel"))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(name="adma"), "Did you mean 'adam'"),
        (dict(schedule="cosin"), "Did you mean 'cosine'"),
        (dict(learning_rate=-1.0), "must be positive"),
        (dict(warmup_epochs=10.0), "not within the training"),
        (dict(name="sgd", weight_decay=0.1), "weight_decay is for 'adamw'"),
        (dict(ema=1.0), "config.optimizer.ema"),
        (dict(ema_statistics=True), "ema_statistics needs EMA weights: set config.optimizer.ema"),
        (dict(encoder_learning_rate=0.0), "encoder_learning_rate = 0.0 must be positive"),
        (dict(encoder_learning_rate=float("nan")), "encoder_learning_rate = nan must be positive"),
        (dict(name="adamw", decayed="kernel"), "Did you mean 'kernels'"),
    ],
)
def test_an_invalid_setting_is_an_error_that_names_it(config, settings, message):
    settings = config.optimizer.to_dict() | {"ema": 0.0} | settings
    with pytest.raises(UserError, match=message):
        schedule = optimizer.make_schedule(settings, steps_per_epoch=10, ends=[100])
        optimizer.make_optimizer(settings, schedule)
