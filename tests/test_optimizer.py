import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unet_jax.errors import UserError
from unet_jax.training import optimizer


def _schedule(config, **settings):
    return optimizer.make_schedule(config.optimizer.to_dict() | settings, steps_per_epoch=10, total_steps=100)


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
        (dict(name="adam"), optax.adam(0.1)),
        (dict(name="adamw", weight_decay=0.01), optax.adamw(0.1, weight_decay=0.01)),
        (dict(name="sgd", momentum=0.99), optax.sgd(0.1, momentum=0.99)),
        (dict(name="sgd", clip_norm=1.0), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))),
    ],
    ids=["adam", "adamw", "sgd", "clipped"],
)
def test_optimizers_are_those_of_optax(config, settings, rule):
    made = optimizer.make_optimizer(config.optimizer.to_dict() | settings, optax.constant_schedule(0.1))
    params, gradients = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 4.0])}
    for tx in (made, rule):
        state = tx.init(params)
        _, state = tx.update(gradients, state, params)
        updates, _ = tx.update(gradients, state, params)
        if tx is made:
            expected = updates
    assert (updates["w"] == expected["w"]).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(name="adma"), "Did you mean 'adam'"),
        (dict(schedule="cosin"), "Did you mean 'cosine'"),
        (dict(learning_rate=-1.0), "must be positive"),
        (dict(warmup_epochs=10.0), "not within the training"),
        (dict(name="sgd", weight_decay=0.1), "weight_decay is for 'adamw'"),
        (dict(ema=1.0), "config.optimizer.ema"),
    ],
)
def test_an_invalid_setting_is_an_error_that_names_it(config, settings, message):
    settings = config.optimizer.to_dict() | settings
    with pytest.raises(UserError, match=message):
        schedule = optimizer.make_schedule(settings, steps_per_epoch=10, total_steps=100)
        optimizer.make_optimizer(settings, schedule)
