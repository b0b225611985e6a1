"""Training: `train` reads from top to bottom; the step is in `step.py`."""

import hashlib
import time
from signal import Signals
from typing import TYPE_CHECKING

import jax
from etils import epath

from unet_jax import (
    checkpoint,
    data,
    draw,
    evaluate,
    integrity,
    log,
    make,
    mesh,
    processes,
    report,
    signals,
    state,
    step,
    trained,
    workdir,
)
from unet_jax.data import pipeline
from unet_jax.errors import Interrupted, UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def train(config: "ConfigDict", path: epath.PathLike) -> None:
    """Trains a network, or goes on with the training that `path` holds.

    Args:
      config: as `configs/default.py` describes it.
      path: the work directory.

    Raises:
      UserError: anything that the user can put right, before any training; loss or gradients that are not finite; a
        checkpoint that cannot be written.
      Interrupted: by SIGTERM or SIGINT; all that was done is saved.
    """
    from clu import parameter_overview

    path = epath.Path(path)
    config = config.copy_and_resolve_references()
    if config.deterministic:
        processes.be_deterministic()
    if (path / "config.json").exists():
        data.take_settled(config.data, workdir.read_config(path).data)
    data.settle(config.data, mesh.say)
    if mesh.is_main_process():
        workdir.check(path, config)
    workdir.check_shared(path)

    # Data.
    with mesh.main_first("data"):
        sources = {split: data.load(config.data, split) for split in ("train", "validation")}
    classes = sources["train"].classes
    count, batch_size = len(sources["train"]), config.train.batch_size
    weigh = evaluate.make_weigh(config.loss, classes)
    evaluate.check(config.eval, classes)

    # Devices, steps, network and optimizer.
    devices = mesh.create(config.mesh.data, config.mesh.space)
    steps_per_epoch = count / batch_size
    total_steps = make.count_steps("epochs", config.train.epochs, steps_per_epoch)
    eval_every = make.count_steps("eval_every_epochs", config.train.eval_every_epochs, steps_per_epoch)
    save_every = make.count_steps("checkpoint_every_epochs", config.train.checkpoint_every_epochs, steps_per_epoch)
    parts = make.prepare(config, classes, devices, steps_per_epoch, total_steps)
    rows = mesh.process_rows(devices, batch_size)

    # What was already done, or what to begin with. Nothing is written before all of it has been found in order.
    examples = {split: hashlib.sha256(repr(list(s.ids)).encode()).hexdigest() for split, s in sources.items()}
    first_step, meta, beginning = integrity.newest_good_step(path), None, None
    if first_step is not None:
        meta = _check_done(path, first_step, examples, config.data.root)
    elif config.init_from:
        beginning = trained.read_beginning(config.init_from, parts.model, classes, mesh.replicated(devices))
    if first_step is None:
        _check_nothing_done(path, min(save_every, eval_every))
    first_step = first_step or 0
    if mesh.is_main_process():
        original_size = sources["train"].read(0)[0].shape[:2]
        workdir.claim(path, config, {**classes.to_json(), "image_size": original_size})
    if first_step >= total_steps and meta["evaluated"]:
        _draw_history(path)  # it may have been killed just before
        if not (path / "report.html").exists():
            report.write(path)
        mesh.say(
            f"{path} is finished: {first_step} steps. Look at {path / 'report.html'}, or score it with --mode=eval."
        )
        return

    # Images and state.
    images = {
        split: pipeline.Pipeline(source, config.data.size, config.data.resize, config.data.cache_gib, weigh, mesh.say)
        for split, source in sources.items()
    }
    train_state = state.create(
        seed=config.seed,
        model=parts.model,
        image_shape=(1, *parts.model.smallest_input, classes.channels),
        optimizer=parts.tx,
        ema=config.optimizer.ema > 0,
        devices=devices,
        shard_optimizer=config.mesh.shard_optimizer,
    )
    checkpoints = checkpoint.Checkpoints(path)
    if meta is not None:
        train_state, _ = checkpoints.restore(first_step, train_state)
        mesh.say(f"Going on from step {first_step} of {path}")
    elif beginning is not None:
        weights, done = beginning
        train_state = trained.begin(train_state, weights)
        mesh.say(done)
    if mesh.is_main_process():
        workdir.rewind_metrics(path, first_step, meta is None or meta["evaluated"])
        workdir.record_environment(path, first_step, f"{jax.device_count()} x {jax.devices()[0].device_kind}")

    # Compilation, and what it tells.
    batches = images["train"].train_batches(batch_size, config.seed, first_step, rows)
    batch = mesh.put_batch(devices, next(batches))
    mesh.say(parameter_overview.get_parameter_overview(train_state.params, include_stats=False))
    mesh.say(
        f"data     {count} training and {len(sources['validation'])} validation images of "
        f"{config.data.size[0]}x{config.data.size[1]}, {len(classes.names)} classes ({classes.task}), "
        f"{'cached' if images['train'].cached else 'read anew each epoch'}\n"
        f"tiles    {log.tiles('training', parts.crop, parts.input_size)}; "
        f"{log.tiles('validation', config.data.size, parts.image_size)}\n"
        f"devices  {jax.device_count()} x {jax.devices()[0].device_kind}, mesh data={devices.shape['data']} "
        f"space={devices.shape['space']}; {jax.process_count()} process(es)\n"
        f"steps    {total_steps} of {batch_size} images, {steps_per_epoch:.1f} an epoch"
    )
    started = time.monotonic()
    layout = jax.tree.map(lambda array: array.sharding, train_state)
    train_step = step.make_train_step(parts.model, parts.tx, config, classes, devices, layout)
    train_step = train_step.lower(train_state, batch, mesh.put_everywhere(devices, 0)).compile()
    mesh.say(f"memory   {log.memory(train_step)}; compiled in {time.monotonic() - started:.1f} s")
    eval_step = evaluate.make_eval_step(parts.model, classes, config, devices)
    panels = draw.Panels(images["validation"], config.train.panels, path / "panels")
    predict_step = evaluate.make_predict_step(parts.model, classes, devices)
    history = log.Log(config, path, parts.schedule, steps_per_epoch, total_steps, first_step, meta)

    def conclude(done: int, told: int, replace: bool = False) -> int:
        """Evaluates the state after `done` steps if it is time, unless told to stop, and saves it; the signal, or 0."""
        score, result = None, None
        evaluates = done == total_steps or done % eval_every == 0
        if evaluates and not told:
            variables = train_state.eval_variables
            validation = images["validation"].eval_batches(batch_size, rows)
            result = evaluate.evaluate(
                eval_step, variables, validation, devices, parts.loss_weights, classes, lambda: deferred.received
            )
        if result is not None:
            score = result.scores["miou"]
            history.add_evaluation(done, result)
        told = told or mesh.largest(deferred.received)
        evaluated = not evaluates or result is not None
        if evaluated or not replace:
            kept = {**history.kept, "examples": examples, "evaluated": evaluated}
            checkpoints.save(done, train_state, kept, score, replace)
        if result is not None and not told:  # the save goes on meanwhile
            panels.draw(done, lambda image: predict_step(variables, image))
        history.restart_clock()
        return told

    # The loop. Metrics are fetched one step late, so that the device never waits for the host.
    pending, told = None, 0
    with signals.Deferred() as deferred:
        if meta is not None and not meta["evaluated"]:
            told = conclude(first_step, 0, replace=True)
        for done in range(first_step + 1, total_steps + 1):
            if told:
                break
            train_state, metrics = train_step(train_state, batch, mesh.put_everywhere(devices, deferred.received))
            if pending is not None:
                told = history.add(*pending)
                _check(history, checkpoints, path)
            pending = done, metrics
            if done < total_steps:
                waiting = time.monotonic()
                rows_of_batch = next(batches)
                history.waited += time.monotonic() - waiting
                batch = mesh.put_batch(devices, rows_of_batch)
            if told or done == total_steps or done % eval_every == 0 or done % save_every == 0:
                told = max(told, history.add(*pending))
                _check(history, checkpoints, path)
                pending = None
                told = conclude(done, told)
        checkpoints.close()
        history.close()
        told = told or mesh.largest(deferred.received)
    if told:
        raise Interrupted(f"{Signals(told).name}: {path} is saved; the same command goes on from there", told)

    _draw_history(path)
    report.write(path, images=images["validation"], devices=devices)
    mesh.say(evaluate.format_table(history.last_evaluation))
    mesh.say(
        f"Finished: {total_steps} steps; best checkpoint: step {integrity.best_step(path)}.\n"
        f"Look at {path / 'report.html'}, in a browser, and {path / 'panels' / str(total_steps)}; score it again with\n"
        f"  python -m unet_jax.main --mode=eval --workdir={path}"
    )


def _check_nothing_done(path: epath.Path, save_every: int) -> None:
    """Says that a work directory without a checkpoint begins anew.

    Raises:
      UserError: it had one: a save begins when the one before has ended, so that by twice its period one was there.
    """
    reached = max((row["step"] for row in workdir.read_metrics(path)), default=0)
    if reached > 2 * save_every:
        raise UserError(
            f"{path} has no checkpoint, though its metrics.jsonl reaches step {reached}: put its checkpoints back, or "
            "choose another --workdir"
        )
    if reached:
        mesh.say(f"{path} has no checkpoint: it was stopped before the first one, and begins anew")


def _check_done(path: epath.Path, done: int, examples: dict[str, str], root: str) -> dict:
    """What was saved beside the state after `done` steps.

    Raises:
      UserError: the work directory holds no training, or one on other examples.
    """
    if done == 0:
        raise UserError(
            f"{path} holds imported weights. Begin with them by --config.init_from={path}, in another --workdir"
        )
    meta = checkpoint.read_meta(path, done)
    if meta["examples"] != examples:
        raise UserError(
            f"{path} was trained on other examples than config.data.root = {root!r} holds now: images were added, "
            "removed or renamed. Restore them, or choose another --workdir"
        )
    return {"evaluated": True, **meta}  # older ones do not say


def _check(history: log.Log, checkpoints: checkpoint.Checkpoints, path: epath.Path) -> None:
    """Stops a training that has blown up, before its state can replace a good one, or that cannot be saved."""
    checkpoints.check()
    if not history.blown_up:
        return
    checkpoints.close()
    good = integrity.steps(path)
    kept = f"The last good checkpoint is {path / 'checkpoints' / str(good[-1])}" if good else "None was saved yet"
    raise UserError(
        f"{history.blown_up}. {kept}. Try a lower config.optimizer.learning_rate, config.optimizer.clip_norm=1.0 or "
        "config.optimizer.warmup_epochs=1; config.train.nonfinite=skip forgives single steps"
    )


def _draw_history(path: epath.Path) -> None:
    if mesh.is_main_process():
        draw.draw_history(workdir.read_metrics(path), path / "history.png")
