import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from unet_jax.models.batch_norm import BatchNorm


class Plain(nn.Module):
    """The same of Flax."""

    use_running_average: bool
    epsilon: float
    activation: object

    @nn.compact
    def __call__(self, x):
        settings = dict(momentum=0.9, epsilon=self.epsilon, name="norm")
        x = nn.BatchNorm(self.use_running_average, **settings)(x)
        return x if self.activation is None else self.activation(x)


@pytest.mark.parametrize("activation", [None, nn.relu, nn.relu6])
def test_normalisation_its_averages_and_gradients_equal_those_of_flax(activation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.normal(size=(4, 6, 5, 7)) + rng.normal(size=7), jnp.float32)
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    params = {"scale": jnp.asarray(rng.normal(size=7) + 2, jnp.float32), "bias": jnp.linspace(-1, 5, 7)}
    stats = {"mean": jnp.full(7, 0.3), "var": jnp.full(7, 8.0)}
    nest = lambda tree, name: {name: tree} if name else tree

    def run(kind, name, x, params):
        def loss(x, params):
            variables = {"params": nest(params, name), "batch_stats": nest(stats, name)}
            y, changed = kind(False, 1e-3, activation).apply(variables, x, mutable=["batch_stats"])
            evaluated = kind(True, 1e-3, activation).apply(variables, x)
            return ((y + evaluated) * weights).sum(), (y, evaluated, changed["batch_stats"])

        (_, (y, evaluated, changed)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
        return y, evaluated, changed[name] if name else changed, gradients

    found, expected = run(BatchNorm, "", x, params), run(Plain, "norm", x, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())  # float32 sums of 120 terms, in another order


def test_variables_start_as_those_of_flax_and_the_result_has_the_type_asked_for():
    x = jnp.ones((2, 3, 4, 5), jnp.bfloat16)
    ours, theirs = BatchNorm(False, dtype="bfloat16"), nn.BatchNorm(False, dtype=jnp.bfloat16)
    y, variables = ours.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_equal(jax.device_get(variables), jax.device_get(theirs.init(jax.random.key(0), x)))
