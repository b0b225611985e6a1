"""The training state and its creation on a mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from unet_jax.parallel import sharding

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, the number of steps taken
    params: PyTree  # float32
    batch_stats: PyTree  # running averages of batch normalisation; empty without
    opt_state: PyTree  # of the optimizer
    ema: PyTree  # exponential moving average of `params`; None if disabled

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """What the network is evaluated with: the EMA weights if enabled."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


def create(
    seed: int,
    model: nn.Module,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    ema: bool,
    mesh: jax.sharding.Mesh,
    shard_optimizer: bool = False,
) -> TrainState:
    """A new state, initialised on the devices that will hold it.

    Args:
      image_shape: `[B, H, W, C]` of any image batch that the network takes.
      ema: whether to keep EMA weights.
      mesh: every array is whole on each of its devices.
      shard_optimizer: whether `opt_state` and `ema` are sharded over the devices along `data` instead (as stage 1 of
        ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    init = make_init(seed, model, image_shape, optimizer, ema)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh, shard_optimizer))()


def make_init(
    seed: int, model: nn.Module, image_shape: tuple[int, ...], optimizer: optax.GradientTransformation, ema: bool
) -> Callable[[], TrainState]:
    """The function that initialises a new state; the arguments are those of `create`."""

    def init():
        variables = model.init(jax.random.key(seed), jnp.zeros(image_shape))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    return init


def shardings(state: TrainState, mesh: jax.sharding.Mesh, shard_optimizer: bool) -> TrainState:
    """The sharding of each array of a state; the arguments are those of `create`."""
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    if not shard_optimizer:
        return whole
    return whole.replace(
        opt_state=sharding.split_largest_axis(mesh, state.opt_state), ema=sharding.split_largest_axis(mesh, state.ema)
    )
