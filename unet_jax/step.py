"""The training step: augment, forward, loss, gradients, update; jitted once over the mesh."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from unet_jax import augment, data, losses, mesh, predict, state

if TYPE_CHECKING:  # the step runs where it is not installed
    from ml_collections import ConfigDict


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    config: "ConfigDict",
    classes: data.Classes,
    devices: jax.sharding.Mesh,
    shardings: state.TrainState,
) -> Callable:
    """A jitted function (state, batch, signals) -> (state, metrics); the state is donated.

    Every random draw is a function of (seed, step, position in the global batch). With `config.train.accumulate` = a,
    the batch goes through the network in a parts, one after another, and the sum of their gradients is that of the
    whole batch; only batch normalisation, whose statistics are then those of the parts, tells the difference.

    `signals` int32 `[devices]` (see `mesh.put_everywhere`) are what each process was told from outside; the largest is
    among the metrics of all processes, so that they act on it at the same step.

    Args:
      model: the network.
      tx: the optimizer.
      config: as `configs/default.py` describes it.
      classes: what the network predicts.
      devices: the mesh.
      shardings: where each array of the state lies, see `state.shardings`.
    """
    loss_weights = losses.term_weights(config.loss)
    class_weights = tuple(config.loss.class_weights)
    settings, ema_decay, seed, parts = dict(config.augment), config.optimizer.ema, config.seed, config.train.accumulate
    skips = config.train.nonfinite == "skip"

    def augmented(batch, keys):
        """The network's input, and what the loss needs."""
        examples = {name: batch[name] for name in batch if name != "mask"}
        examples["image"] = predict.as_float(batch["image"])
        crop = settings["crop"] or batch["image"].shape[1:3]
        examples = augment.augment(keys, examples, settings, predict.margins(model, crop), classes.ignore_label)
        return {name: mesh.split_height(devices, values) for name, values in examples.items()}

    def loss_fn(params, batch_stats, examples, keys, totals):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats}, examples["image"], keys, mutable=["batch_stats"]
        )
        label = examples["label"]
        logits = mesh.split_height(devices, logits[:, : label.shape[1], : label.shape[2]])
        mask = label != classes.ignore_label
        terms = losses.terms(logits, label, mask, classes.task, class_weights, examples.get("weight"))
        return losses.combine(terms, loss_weights, totals), updates.get("batch_stats", {})

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients_of_parts(train_state, examples, keys):
        """Loss, gradients and batch statistics; every a-th example belongs to one part, so that none changes device."""
        label, weight = examples["label"], examples.get("weight")
        mask = label != classes.ignore_label
        totals = losses.totals(label, mask, classes.task, class_weights, weight)
        split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

        def add_part(sums, part):
            loss, batch_stats, gradients = sums
            examples = {name: mesh.split_height(devices, values) for name, values in part[0].items()}
            (more, batch_stats), added = gradient_fn(train_state.params, batch_stats, examples, part[1], totals)
            return (loss + more, batch_stats, jax.tree.map(jnp.add, gradients, added)), None

        zeros = jax.tree.map(jnp.zeros_like, train_state.params)
        sums = (jnp.zeros(()), train_state.batch_stats, zeros)
        (loss, batch_stats, gradients), _ = jax.lax.scan(add_part, sums, jax.tree.map(split, (examples, keys)))
        return (loss, batch_stats), gradients

    def train_step(train_state, batch, signals):
        step_key = jax.random.fold_in(jax.random.key(seed), train_state.step)
        positions = jnp.arange(batch["image"].shape[0])
        augment_keys, dropout_keys = (
            jax.vmap(lambda i, use=use: jax.random.fold_in(jax.random.fold_in(step_key, use), i))(positions)
            for use in (0, 1)
        )
        examples = augmented(batch, augment_keys)
        if parts == 1:
            found = gradient_fn(train_state.params, train_state.batch_stats, examples, dropout_keys, None)
        else:
            found = gradients_of_parts(train_state, examples, dropout_keys)
        (loss, batch_stats), gradients = found

        updates, opt_state = tx.update(gradients, train_state.opt_state, train_state.params)
        params = optax.apply_updates(train_state.params, updates)
        ema = train_state.ema
        if ema is not None:  # the decay rises from 0.1, so that the first weights are soon forgotten
            decay = jnp.minimum(ema_decay, (1 + train_state.step) / (10 + train_state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        new_state = state.TrainState(train_state.step + 1, params, batch_stats, opt_state, ema)
        # The norm of the new weights tells whether this state, not the one before, is good.
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
        if skips:
            finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
            kept = train_state.replace(step=new_state.step)
            new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, kept)
        return new_state, {**metrics, "signal": signals.max()}

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, mesh.replicated(devices)),
        compiler_options=mesh.compiler_options(devices, remat=bool(model.remat)),
    )
