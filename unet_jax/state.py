"""The training state and its creation on a mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from unet_jax import mesh

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: float32.
      batch_stats: running averages of batch normalisation; empty without.
      opt_state: of the optimizer.
      ema: exponential moving average of `params`; None when it is off.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """What the network is evaluated with: the averaged weights when they are on."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


def create(
    seed: int,
    model: nn.Module,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    ema: bool,
    devices: jax.sharding.Mesh,
    shard_optimizer: bool = False,
) -> TrainState:
    """A new state, drawn where it will live.

    Args:
      seed: of the weights.
      model: the network.
      image_shape: `[B, H, W, C]` of any image batch that the network takes.
      optimizer: makes `opt_state`.
      ema: whether to keep averaged weights.
      devices: the mesh; every array lies whole on each device.
      shard_optimizer: whether `opt_state` and `ema` are shared among the devices along `data` instead (as stage 1 of
        ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    init = make_init(seed, model, image_shape, optimizer, ema)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), devices, shard_optimizer))()


def make_init(
    seed: int, model: nn.Module, image_shape: tuple[int, ...], optimizer: optax.GradientTransformation, ema: bool
) -> Callable[[], TrainState]:
    """The function that draws a new state; the arguments are those of `create`."""

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


def shardings(state: TrainState, devices: jax.sharding.Mesh, shard_optimizer: bool) -> TrainState:
    """Where each array of a state lies; the arguments are as `create` takes them."""
    whole = jax.tree.map(lambda _: mesh.replicated(devices), state)
    if not shard_optimizer:
        return whole
    return whole.replace(
        opt_state=mesh.split_largest_axis(devices, state.opt_state), ema=mesh.split_largest_axis(devices, state.ema)
    )
