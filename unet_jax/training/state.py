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
    ema_batch_stats: PyTree = None  # likewise of `batch_stats`

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """What the network is evaluated with: the EMA of weights and statistics, each if enabled."""
        params = self.params if self.ema is None else self.ema
        batch_stats = self.batch_stats if self.ema_batch_stats is None else self.ema_batch_stats
        return {"params": params, "batch_stats": batch_stats}


def create(
    seed: int,
    model: nn.Module,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    ema: bool,
    mesh: jax.sharding.Mesh,
    shard_optimizer: bool = False,
    ema_statistics: bool = False,
) -> TrainState:
    """A new state, initialised on the devices that will hold it.

    Args:
      image_shape: `[B, H, W, C]` of any image batch that the network takes.
      ema: whether to keep EMA weights.
      mesh: every array is whole on each of its devices.
      shard_optimizer: whether optimizer state and EMA are sharded over the devices along `data` instead (as stage 1 of
        ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054).
      ema_statistics: whether to keep an EMA of the averages of batch normalisation.
    """
    init = make_init(seed, model, image_shape, optimizer, ema, ema_statistics)
    where = shardings(jax.eval_shape(init), mesh, shard_optimizer)
    return jax.jit(init, out_shardings=where, compiler_options=sharding.run_once_options(mesh))()


def make_init(
    seed: int,
    model: nn.Module,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    ema: bool,
    ema_statistics: bool = False,
) -> Callable[[], TrainState]:
    """The function that initialises a new state; the arguments are those of `create`."""

    def init():
        variables = model.init(jax.random.key(seed), jnp.zeros(image_shape))
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            ema_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema_statistics else None,
        )

    return init


def shardings(state: TrainState, mesh: jax.sharding.Mesh, shard_optimizer: bool) -> TrainState:
    """The sharding of each array of a state; the arguments are those of `create`."""
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    if not shard_optimizer:
        return whole
    names = ("opt_state", "ema", "ema_batch_stats")
    return whole.replace(**{name: sharding.split_largest_axis(mesh, getattr(state, name)) for name in names})
