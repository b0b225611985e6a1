"""Batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167) that keeps only its input for the gradient.

Differentiated operation by operation, as `flax.linen.BatchNorm` is, it keeps the centred input and the mask of the
activation, too. `tests/test_batch_norm.py` holds it against that, gradients included.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

MOMENTUM = 0.9  # of the averages; with 0.99 they would follow a short run too slowly


class BatchNorm(nn.Module):
    """Normalisation and activation of `[B, H, W, C]`; the variables of `flax.linen.BatchNorm`."""

    use_running_average: bool
    epsilon: float = 1e-5
    activation: Callable | None = None
    dtype: str = "float32"  # of the result; statistics are float32
    frozen: bool = False  # whether training uses the running averages too, and changes no variable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        average_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        average_var = self.variable("batch_stats", "var", jnp.ones, shape)
        if self.use_running_average or self.frozen:
            variables = scale, bias, average_mean.value, average_var.value
            y = _normalize(x, *(lax.stop_gradient(variables) if self.frozen else variables), self.epsilon)
            y = y.astype(self.dtype)
            return self.activation(y) if self.activation else y
        y, mean, var = normalize_batch(x, scale, bias, self.epsilon, self.activation)
        if not self.is_initializing():
            average_mean.value = MOMENTUM * average_mean.value + (1 - MOMENTUM) * mean
            average_var.value = MOMENTUM * average_var.value + (1 - MOMENTUM) * var
        return y.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_batch(x, scale, bias, epsilon, activation):
    """`activation(scale * (x - mean) / sqrt(var + epsilon) + bias)`, `mean` and `var` of the batch, without gradients.

    `x` is `[B, H, W, C]`, all others are float32 `[C]`.
    """
    mean, square = (values.mean((0, 1, 2)) for values in (x.astype(jnp.float32), lax.square(x.astype(jnp.float32))))
    var = jnp.maximum(0, square - lax.square(mean))
    y = _normalize(x, scale, bias, mean, var, epsilon)
    return (activation(y) if activation else y).astype(x.dtype), mean, var


def _normalize(x, scale, bias, mean, var, epsilon):
    return (x.astype(jnp.float32) - mean) * (scale * lax.rsqrt(var + epsilon)) + bias


def _forward(x, scale, bias, epsilon, activation):
    y, mean, var = normalize_batch(x, scale, bias, epsilon, activation)
    return (y, mean, var), (x, scale, bias, mean, var)


def _backward(epsilon, activation, residuals, gradients):
    """Section 3 of the paper, in sums over the batch."""
    x, scale, bias, mean, var = residuals
    gradient = gradients[0].astype(jnp.float32)
    if activation:
        y = _normalize(x, scale, bias, mean, var, epsilon)
        (gradient,) = jax.vjp(activation, y)[1](gradient)
    x = x.astype(jnp.float32)
    axes, count = (0, 1, 2), x.size // x.shape[-1]
    deviation = lax.rsqrt(var + epsilon)
    bias_gradient = gradient.sum(axes)
    # Not the sum of products with the normalised input, which XLA would keep in memory from the forward pass on.
    scale_gradient = ((gradient * x).sum(axes) - mean * bias_gradient) * deviation
    normalized = (x - mean) * deviation
    x_gradient = (scale * deviation) * (gradient - (bias_gradient + normalized * scale_gradient) / count)
    return x_gradient.astype(residuals[0].dtype), scale_gradient, bias_gradient


normalize_batch.defvjp(_forward, _backward)
