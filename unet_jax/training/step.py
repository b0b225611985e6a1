"""The training step: augment, forward, loss, gradients, update; jitted once over the mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unet_jax import losses
from unet_jax.inference import forward
from unet_jax.parallel import sharding
from unet_jax.training import augment
from unet_jax.training.state import TrainState

AUGMENT, DROPOUT = 0, 1  # numbers of the keys of a step


def make_train_step(
    network: forward.Network,
    optimizer: optax.GradientTransformation,
    loss: losses.Loss,
    *,
    augmentation: Mapping[str, Any],
    is_cut: bool = False,
    seed: int,
    shardings: TrainState,
    ema: float = 0.0,
    microbatches: int = 1,
    skip_nonfinite: bool = False,
) -> Callable:
    """A jitted function (state, batch, signals) -> (state, metrics); the state is donated.

    Every random draw is a function of (seed, step, position in the global batch). With several microbatches the batch
    goes through the network in as many parts, one after another, and the sum of their gradients is that of the whole
    batch; only batch normalisation, whose statistics are then those of a microbatch, makes a difference.

    `signals` int32 `[devices]` (see `sharding.per_device`) are the signals that the processes have received; the
    largest is among the metrics of all processes, so that they act on it at the same step.

    Args:
      augmentation: `config.augment`, or any mapping with its fields.
      is_cut: whether the images are windows with what surrounds them, see `augment.augment`.
      seed: of augmentation and dropout.
      shardings: of the state, see `state.shardings`.
      ema: decay of the EMA weights, and of the statistics if the state has an EMA of them; 0 is off.
      microbatches: how many parts a batch has.
      skip_nonfinite: whether a step whose loss, gradients or new weights are not finite leaves the state as it was.
    """
    model, classes, mesh, augmentation = network.model, network.classes, network.mesh, dict(augmentation)

    def augmented(batch, keys):
        """The network's input, and what the loss needs."""
        examples = {name: batch[name] for name in batch if name != "mask"}
        examples["image"] = network.normalization.to_unit(batch["image"])
        crop = augmentation["crop"] or batch["image"].shape[1:3]
        margins = network.margins(crop)
        examples = augment.augment(keys, examples, augmentation, margins, classes.ignore_label, is_cut)
        examples["image"] = network.normalization(examples["image"])
        return {name: sharding.split_height(mesh, values) for name, values in examples.items()}

    level_weights = [2.0**-level for level in range(1 + model.deep_supervision)]  # as nnU-Net has them

    def loss_fn(params, batch_stats, examples, keys, totals):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats}, examples["image"], keys, mutable=["batch_stats"]
        )
        of_levels = logits if isinstance(logits, tuple) else (logits,)
        value = 0.0
        for level, (weight, logits) in enumerate(zip(level_weights, of_levels, strict=True)):
            label, pixel_weights = _targets(examples, level)
            logits = logits[:, : label.shape[1], : label.shape[2]]
            logits = logits if level else sharding.split_height(mesh, logits)
            terms = loss.terms(logits, label, label != classes.ignore_label, pixel_weights)
            value += weight * loss.combine(terms, None if totals is None else totals[level])
        return value / sum(level_weights), updates.get("batch_stats", {})

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(state, examples, keys):
        """Loss, batch statistics and gradients; microbatch i takes every n-th example, so that none changes device."""
        totals = []
        for level in range(len(level_weights)):
            label, pixel_weights = _targets(examples, level)
            totals.append(loss.totals(label, label != classes.ignore_label, classes.num_outputs, pixel_weights))
        split = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

        def add(sums, microbatch):
            loss_sum, batch_stats, gradients = sums
            examples = {name: sharding.split_height(mesh, values) for name, values in microbatch[0].items()}
            (value, batch_stats), more = gradient_fn(state.params, batch_stats, examples, microbatch[1], totals)
            return (loss_sum + value, batch_stats, jax.tree.map(jnp.add, gradients, more)), None

        zeros = (jnp.zeros(()), state.batch_stats, jax.tree.map(jnp.zeros_like, state.params))
        (value, batch_stats, gradients), _ = jax.lax.scan(add, zeros, jax.tree.map(split, (examples, keys)))
        return (value, batch_stats), gradients

    def train_step(state, batch, signals):
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        positions = jnp.arange(batch["image"].shape[0])
        augment_keys, dropout_keys = (
            jax.vmap(lambda i, use=use: jax.random.fold_in(jax.random.fold_in(step_key, use), i))(positions)
            for use in (AUGMENT, DROPOUT)
        )
        examples = augmented(batch, augment_keys)
        if microbatches == 1:
            result = gradient_fn(state.params, state.batch_stats, examples, dropout_keys, None)
        else:
            result = accumulated(state, examples, dropout_keys)
        (value, batch_stats), gradients = result

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The decay rises from 0.1, so that the initial weights are soon forgotten.
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = lambda new, old: None if old is None else optax.incremental_update(new, old, 1 - decay)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=average(params, state.ema),
            ema_batch_stats=average(batch_stats, state.ema_batch_stats),
        )
        # The norm of the new weights shows whether the new state is finite, not only the one before.
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
        if skip_nonfinite:
            finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
            unchanged = state.replace(step=new_state.step)
            new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, unchanged)
        labelled = (examples["label"] != classes.ignore_label).any()  # or else the loss is 0, whatever was predicted
        return new_state, {**metrics, "labelled": labelled, "signal": signals.max()}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh, remat=bool(model.remat)),
    )


def _targets(examples: Mapping[str, jax.Array], level: int) -> tuple[jax.Array, jax.Array | None]:
    """Label and pixel weights for logits of 1 / 2^level of the size: those of the pixel in the middle of each."""
    chosen = slice(2**level // 2, None, 2**level)
    label, weight = (examples.get(name) for name in ("label", "weight"))
    return label[:, chosen, chosen], None if weight is None else weight[:, chosen, chosen]
