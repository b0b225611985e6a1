"""Training: `train`, then `take_steps`; `setup.py` opens or resumes the run, `step.py` is the step."""

import shlex
import time
from signal import Signals
from typing import TYPE_CHECKING

from etils import epath

from unet_jax import metrics
from unet_jax.errors import Interrupted, UserError
from unet_jax.evaluation import report, scores
from unet_jax.parallel import processes, sharding, signals
from unet_jax.training import setup, state
from unet_jax.workdir import integrity, lock

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def train(config: "ConfigDict", path: epath.PathLike) -> None:
    """Trains a network, resuming from `path` if it holds a checkpoint.

    Args:
      config: as in `configs/default.py`.
      path: the work directory.

    Raises:
      UserError: anything that the user can put right, before any training, such as another training in `path`; a loss
        or gradients that are not finite; a checkpoint that cannot be written.
      Interrupted: by a signal; everything done so far is saved.
    """
    with lock.Lock(path) as held:
        run = setup.open_run(config, epath.Path(path), held)
        if run is None:
            return
        stop_signal = take_steps(run)
        if stop_signal:
            message = f"{Signals(stop_signal).name}: {run.path} is saved; the same command resumes it"
            raise Interrupted(message, stop_signal)
        finish(run)


def take_steps(run: setup.Run) -> int:
    """Trains from the first to the last step, evaluating and saving; returns the signal that stopped it, or 0."""
    mesh, train_state = run.components.network.mesh, run.state
    stop_signal, pending = 0, None  # metrics are fetched one step late, so that the device never waits for the host
    with signals.Deferred() as deferred:
        if not run.evaluated:
            stop_signal = evaluate_and_save(run, train_state, run.first_step, 0, deferred, replace=True)
        batch = sharding.put_batch(mesh, next(run.batches))
        for step in range(run.first_step + 1, run.steps.total + 1):
            if stop_signal or run.log.is_patience_lost(run.config.train.patience):
                break
            train_state, step_metrics = run.train_step(train_state, batch, sharding.per_device(mesh, deferred.received))
            if pending is not None:
                stop_signal = log_step(run, *pending)
            pending = step, step_metrics
            if step < run.steps.total:
                waiting = time.monotonic()
                host_batch = next(run.batches)
                run.log.waited += time.monotonic() - waiting
                batch = sharding.put_batch(mesh, host_batch)
            if stop_signal or run.steps.saves(step):
                stop_signal = max(stop_signal, log_step(run, *pending))
                pending = None
                stop_signal = evaluate_and_save(run, train_state, step, stop_signal, deferred)
        run.writer.close()
        run.log.close()
        return stop_signal or processes.max_over_processes(deferred.received)


def log_step(run: setup.Run, step: int, step_metrics: dict) -> int:
    """Logs the metrics of a step; returns the signal that came with them, or 0.

    Raises a `UserError` if the training has diverged, before its state can replace a good one, cannot be saved, or has
    lost the work directory to another one.
    """
    run.lock.check()
    stop_signal = run.log.add(step, step_metrics)
    run.writer.check()
    if run.log.nonfinite_error:
        run.writer.close()
        good = integrity.steps(run.path)
        kept = f"The last good checkpoint is {run.path}/checkpoints/{good[-1]}" if good else "None is saved yet"
        raise UserError(
            f"{run.log.nonfinite_error}. {kept}. Try a lower config.optimizer.learning_rate, "
            "config.optimizer.clip_norm=1.0 or config.optimizer.warmup_epochs=1; config.train.nonfinite=skip forgives "
            "single steps"
        )
    return stop_signal


def evaluate_and_save(
    run: setup.Run,
    train_state: state.TrainState,
    step: int,
    stop_signal: int,
    deferred: signals.Deferred,
    replace: bool = False,
) -> int:
    """Evaluates the state after `step` steps if that is due and nothing stops the training, and saves it.

    `replace` is for a step that was saved before, without its scores. Returns the signal that stops the training, or 0.
    """
    variables, result = train_state.eval_variables, None
    due = run.steps.evaluates(step)
    if due and not stop_signal:
        result = run.scorer.score(variables, lambda: deferred.received)
    run.lock.check()
    is_telling = result is not None and result.is_telling
    score = metrics.value_of(run.config.eval.best_metric, result.records) if is_telling else None
    if result is not None:
        run.log.add_evaluation(step, result, score)
    stop_signal = stop_signal or processes.max_over_processes(deferred.received)
    evaluated = not due or result is not None
    if evaluated or not replace:
        meta = {**run.log.resume_state, **run.example_digests, "evaluated": evaluated, **run.record}
        run.writer.save(step, train_state, meta, score, replace)
    if result is not None and not stop_signal:  # while the checkpoint is being written
        run.panels.draw(step, lambda indices: run.scorer.labels(variables, indices))
    run.log.restart_clock()
    return stop_signal


def finish(run: setup.Run) -> None:
    """Draws curves and report, and prints the scores of the best checkpoint and where to look."""
    path, last = run.path, run.log.evaluated_step
    if last < run.steps.total:
        processes.print_on_main(
            f"No better {run.config.eval.best_metric} in {run.config.train.patience} evaluation(s) "
            f"(config.train.patience): ended after step {last} of {run.steps.total}"
        )
    setup.draw_history(path, run.config, run.components.network.classes)
    report.write(path, images=run.images["validation"], mesh=run.components.network.mesh)
    best = integrity.best_step(path)
    if processes.is_main():
        table, note = _final_table(run, best)
        processes.print_on_main(
            f"{table}\n"
            f"Finished: {last} steps; best checkpoint: step {best}{note}.\n"
            f"Open {path / 'report.html'} in a browser, look at {path / 'panels' / str(last)}, score it again:\n"
            f"  python -m unet_jax.main --mode=eval --workdir={shlex.quote(str(path))}"
        )


def _final_table(run: setup.Run, best: int) -> tuple[str, str]:
    """The scores of the best checkpoint, and, if that is not the last step, what to know about the two."""
    last, total, key = run.log.last_evaluation, run.log.evaluated_step, run.config.eval.best_metric
    loss, records, note = last.loss, last.records, ""
    if best != total:
        classes = run.components.network.classes
        described = metrics.describe(classes.names, classes.task, run.config.eval.em_scores)
        logged = scores.read_logged(run.path, best, described)
        if logged is None:
            note = f", but these are the scores of step {total}, as metrics.jsonl has none of step {best}"
        else:
            loss, records = logged
            of_best, of_last = (scores.number(metrics.flatten(found)[key]) for found in (records, last.records))
            note = f", whose scores these are ({key} {of_best}); after step {total} it was {of_last}"
    return scores.format_table(loss, records, last.pixels), note
