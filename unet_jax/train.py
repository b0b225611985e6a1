"""Training: `train` reads from top to bottom; `make_train_step` is the step."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import linen as nn

from unet_jax import (
    augment,
    checkpoint,
    data,
    draw,
    evaluate,
    log,
    losses,
    mesh,
    optimizer,
    predict,
    report,
    state,
    trained,
    workdir,
)
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.models import unet

if TYPE_CHECKING:  # the step runs where it is not installed
    from ml_collections import ConfigDict


def train(config: "ConfigDict", path: epath.PathLike) -> None:
    """Trains a network, or goes on with the training that `path` holds.

    Args:
      config: as `configs/default.py` describes it.
      path: the work directory.

    Raises:
      UserError: anything that the user can put right, before any training; or loss or gradients that are not finite.
    """
    from clu import parameter_overview

    path = epath.Path(path)
    config = config.copy_and_resolve_references()
    if (path / "config.json").exists():
        data.take_settled(config.data, workdir.read_config(path).data)
    data.settle(config.data, mesh.say)
    workdir.check(path, config)

    # Data.
    sources = {split: data.load(config.data, split) for split in ("train", "validation")}
    classes = sources["train"].classes
    count, batch_size = len(sources["train"]), config.train.batch_size
    loss_weights = losses.term_weights(config.loss)
    losses.check(loss_weights, config.loss.class_weights, len(classes.names))
    weigh = evaluate.make_weigh(config.loss, classes)
    evaluate.check(config.eval, classes)

    # Devices and steps.
    devices = mesh.create(config.mesh.data, config.mesh.space)
    mesh.check_batch_size(devices, batch_size)
    rows = mesh.process_rows(batch_size)
    steps_per_epoch = count / batch_size
    total_steps = _steps("epochs", config.train.epochs, steps_per_epoch)
    eval_every = _steps("eval_every_epochs", config.train.eval_every_epochs, steps_per_epoch)
    if not 0 <= config.seed < 2**31:
        raise UserError(f"config.seed = {config.seed} is not in 0..2**31-1")
    if config.train.log_every_steps < 1 or config.train.panels < 0:
        raise UserError("config.train.log_every_steps must be 1 or more, config.train.panels 0 or more")
    save_every = _steps("checkpoint_every_epochs", config.train.checkpoint_every_epochs, steps_per_epoch)

    # Network and optimizer.
    model = unet.create(classes.num_outputs, **config.model, one_cpu=mesh.is_one_cpu(devices))
    crop = augment.check(config.augment, config.data.size)
    image_size = _input_size("config.data.size", model, config.data.size, devices)
    input_size = _input_size("config.augment.crop", model, crop, devices)
    schedule = optimizer.make_schedule(config.optimizer, steps_per_epoch, total_steps)
    optimizer.check_frozen(config.optimizer.frozen, trained.shapes(unet.abstract(model, classes.channels)["params"]))
    tx = optimizer.make_optimizer(config.optimizer, schedule)

    # What was already done, or what to begin with. Nothing is written before all of it has been found in order.
    examples = {split: hashlib.sha256(repr(list(s.ids)).encode()).hexdigest() for split, s in sources.items()}
    first_step, beginning = 0, None
    if checkpoint.exists(path):
        first_step = _check_done(path, examples, config.data.root)
    elif config.init_from:
        beginning = trained.read_beginning(config.init_from, model, classes, mesh.replicated(devices))
    original_size = sources["train"].read(0)[0].shape[:2]
    workdir.claim(path, config, {**classes.to_json(), "image_size": original_size})
    checkpoints = checkpoint.Checkpoints(path)
    if first_step >= total_steps:
        checkpoints.close()
        _draw_history(path)  # it may have been killed just before
        if not (path / "report.html").exists():
            report.write(path)
        mesh.say(
            f"{path} is finished: {first_step} steps. Look at {path / 'report.html'}, or score it with --mode=eval."
        )
        return

    # Images and state.
    window = []
    images = {
        split: pipeline.Pipeline(source, config.data.size, config.data.resize, config.data.cache_gib, weigh)
        for split, source in sources.items()
    }
    train_state = state.create(
        seed=config.seed,
        model=model,
        image_shape=(1, *model.smallest_input, classes.channels),
        optimizer=tx,
        ema=config.optimizer.ema > 0,
        sharding=mesh.replicated(devices),
    )
    if first_step:
        train_state, meta = checkpoints.restore(first_step, train_state)
        window = meta["window"]
        mesh.say(f"Going on from step {first_step} of {path}")
    elif beginning is not None:
        weights, done = beginning
        train_state = trained.begin(train_state, weights)
        mesh.say(done)
    workdir.rewind_metrics(path, first_step)
    if mesh.is_main_process():
        workdir.record_environment(path, first_step, f"{jax.device_count()} x {jax.devices()[0].device_kind}")

    # Compilation, and what it tells.
    batches = images["train"].train_batches(batch_size, config.seed, first_step, rows)
    batch = mesh.put_batch(devices, next(batches))
    mesh.say(parameter_overview.get_parameter_overview(train_state.params, include_stats=False))
    mesh.say(
        f"data     {count} training and {len(sources['validation'])} validation images of "
        f"{config.data.size[0]}x{config.data.size[1]}, {len(classes.names)} classes ({classes.task}), "
        f"{'held in memory' if images['train'].cached else 'read anew each epoch'}\n"
        f"tiles    {log.tiles('training', crop, input_size)}; {log.tiles('validation', config.data.size, image_size)}\n"
        f"devices  {jax.device_count()} x {jax.devices()[0].device_kind}, mesh data={devices.shape['data']} "
        f"space={devices.shape['space']}; {jax.process_count()} process(es)\n"
        f"steps    {total_steps} of {batch_size} images, {steps_per_epoch:.1f} an epoch"
    )
    started = time.monotonic()
    train_step = make_train_step(model, tx, config, classes, devices).lower(train_state, batch).compile()
    mesh.say(f"memory   {log.memory(train_step)}; compiled in {time.monotonic() - started:.1f} s")
    eval_step = evaluate.make_eval_step(model, classes, config, devices)
    panels = draw.Panels(images["validation"], config.train.panels, path / "panels")
    predict_step = evaluate.make_predict_step(model, classes)

    # The loop. Metrics are fetched one step late, so that the device never waits for the host.
    history = log.Log(config, path, schedule, steps_per_epoch, total_steps, first_step, window)
    pending = None
    for step in range(first_step + 1, total_steps + 1):
        train_state, metrics = train_step(train_state, batch)
        if pending is not None:
            _check_finite(*pending, checkpoints)
            history.add(*pending)
        pending = step, metrics
        if step < total_steps:
            waiting = time.monotonic()
            rows_of_batch = next(batches)
            history.waited += time.monotonic() - waiting
            batch = mesh.put_batch(devices, rows_of_batch)

        last = step == total_steps
        evaluates, saves = last or step % eval_every == 0, last or step % save_every == 0
        if evaluates or saves:
            _check_finite(*pending, checkpoints)
            history.add(*pending)
            pending, score = None, None
            if evaluates:
                result = evaluate.evaluate(
                    eval_step,
                    train_state.eval_variables,
                    images["validation"].eval_batches(batch_size, rows),
                    devices,
                    loss_weights,
                    classes,
                )
                score = result.scores["miou"]
                history.add_evaluation(step, result)
                panels.draw(step, lambda image: predict_step(train_state.eval_variables, image))  # noqa: B023
            checkpoints.save(step, train_state, {"window": history.window, "examples": examples}, score)
            history.restart_clock()

    best = checkpoints.best_step()
    checkpoints.close()
    history.close()
    _draw_history(path)
    report.write(path, images=images["validation"], devices=devices)
    mesh.say(evaluate.format_table(result))
    mesh.say(
        f"Finished: {total_steps} steps; best checkpoint: step {best}.\n"
        f"Look at {path / 'report.html'}, in a browser, and {path / 'panels' / str(total_steps)}; score it again with\n"
        f"  python -m unet_jax.main --mode=eval --workdir={path}"
    )


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    config: "ConfigDict",
    classes: data.Classes,
    devices: jax.sharding.Mesh,
) -> Callable:
    """A jitted function (state, batch) -> (state, metrics); the state is donated.

    Every random draw is a function of (seed, step, position in the global batch).
    """
    loss_weights = losses.term_weights(config.loss)
    class_weights = tuple(config.loss.class_weights)
    settings, ema_decay, seed = dict(config.augment), config.optimizer.ema, config.seed

    def train_step(train_state, batch):
        step_key = jax.random.fold_in(jax.random.key(seed), train_state.step)
        positions = jnp.arange(batch["image"].shape[0])
        augment_keys, dropout_keys = (
            jax.vmap(lambda i, use=use: jax.random.fold_in(jax.random.fold_in(step_key, use), i))(positions)
            for use in (0, 1)
        )
        examples = {name: batch[name] for name in batch if name != "mask"}
        examples["image"] = predict.as_float(batch["image"])
        crop = settings["crop"] or batch["image"].shape[1:3]
        margins = predict.margins(model, crop)
        examples = augment.augment(augment_keys, examples, settings, margins, classes.ignore_label)
        image = jax.lax.with_sharding_constraint(examples["image"], mesh.by_example_and_height(devices))
        label, pixel_weights = examples["label"], examples.get("weight")

        def loss_fn(params):
            variables = {"params": params, "batch_stats": train_state.batch_stats}
            logits, updates = model.apply(variables, image, dropout_keys, mutable=["batch_stats"])
            logits = logits[:, : crop[0], : crop[1]]
            mask = label != classes.ignore_label
            terms = losses.terms(logits, label, mask, classes.task, class_weights, pixel_weights)
            return losses.combine(terms, loss_weights), updates.get("batch_stats", {})

        (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
        updates, opt_state = tx.update(gradients, train_state.opt_state, train_state.params)
        params = optax.apply_updates(train_state.params, updates)
        ema = train_state.ema
        if ema is not None:  # the decay rises from 0.1, so that the first weights are soon forgotten
            decay = jnp.minimum(ema_decay, (1 + train_state.step) / (10 + train_state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        train_state = state.TrainState(train_state.step + 1, params, batch_stats, opt_state, ema)
        # The norm of the new weights tells whether this state, not the one before, is good.
        norms = {"grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
        return train_state, {"loss": loss, **norms}

    return jax.jit(train_step, donate_argnums=0, out_shardings=mesh.replicated(devices))


def _check_done(path: epath.Path, examples: dict[str, str], root: str) -> int:
    """The step from which to go on.

    Raises:
      UserError: the work directory holds no training, or one on other examples.
    """
    checkpoints = checkpoint.Checkpoints(path)
    try:
        step = checkpoints.latest_step()
        if step == 0:
            raise UserError(
                f"{path} holds imported weights. Begin with them by --config.init_from={path}, in another --workdir"
            )
        if checkpoints.read_meta(step)["examples"] != examples:
            raise UserError(
                f"{path} was trained on other examples than config.data.root = {root!r} holds now: images were added, "
                "removed or renamed. Restore them, or choose another --workdir"
            )
    finally:
        checkpoints.close()
    return step


def _draw_history(path: epath.Path) -> None:
    if mesh.is_main_process():
        draw.draw_history(workdir.read_metrics(path), path / "history.png")


def _input_size(field: str, model: nn.Module, size: Sequence[int], devices: jax.sharding.Mesh) -> tuple[int, int]:
    """What the network is given to predict `size`: with the margins it needs, which mirror the image.

    Raises:
      UserError: the devices cannot share its height.
    """
    height, width = (n + sum(around) for n, around in zip(size, model.margins(size), strict=True))
    try:
        mesh.check_height(devices, height)
    except UserError as error:
        raise UserError(f"{field} = {tuple(size)}, to which the network gives {height} rows: {error}") from error
    return height, width


def _steps(field: str, epochs: float, steps_per_epoch: float) -> int:
    """Epochs as a whole number of steps, at least one."""
    if not 0 < epochs < math.inf:
        raise UserError(f"config.train.{field} = {epochs} must be positive")
    return max(1, round(epochs * steps_per_epoch))


def _check_finite(step: int, metrics: dict[str, jax.Array], checkpoints: checkpoint.Checkpoints) -> None:
    """Stops a training that has blown up, before its state can replace a good one."""
    values = {name: float(value) for name, value in metrics.items()}
    if all(map(math.isfinite, values.values())):
        return
    good = checkpoints.latest_step()
    checkpoints.close()
    kept = f"The last good checkpoint is {checkpoints.path / str(good)}" if good else "No checkpoint was saved yet"
    raise UserError(
        f"step {step}: not finite: {', '.join(f'{name} = {value}' for name, value in values.items())}. {kept}. Try a "
        "lower config.optimizer.learning_rate, config.optimizer.clip_norm=1.0 or config.optimizer.warmup_epochs=1."
    )
