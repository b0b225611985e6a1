"""Checkpoints by Orbax: written asynchronously; the latest two and the best, each with the whole state.

checkpoints/<step>/variables   weights, batch statistics, EMA of both: all that evaluation needs
                   training    optimizer state
                   meta        JSON: what else the loop needs to resume; what config.json and classes.json held
                   metrics     JSON: the score that picks the best
                   checksums.json  SHA-256 of every file of these: Orbax restores a flipped bit silently
"""

import logging
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import files, integrity

PyTree = Any


class CheckpointWriter:
    """Writes the checkpoints of one work directory; all processes do so together."""

    def __init__(self, workdir: epath.PathLike):
        """The steps on disk must be intact, see `integrity.newest_good_step`."""
        self._path, self._saving, self._failure = integrity.checkpoints_dir(workdir), 0, None
        self._hook, sys.unraisablehook = sys.unraisablehook, self._without_echoes
        logging.getLogger("asyncio").addFilter(_is_no_echo)
        score = integrity.finite_score  # a NaN must not become the best
        best = checkpoint_managers.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(n=2), best]),
            best_fn=score,
            create=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_checksums, barrier_sync_fn=self._barrier
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except Exception as error:  # damaged files raise anything
            raise UserError(f"{self._path} cannot be read: {_first_line(error)}") from error

    def save(self, step: int, state, meta: dict[str, Any], score: float | None, replace: bool = False) -> None:
        """Starts to save `state`, which may be changed or donated as soon as this returns.

        Args:
          step: the number of steps taken.
          state: a `TrainState`.
          meta: JSON-serialisable.
          score: higher is better; None if the state was not evaluated.
          replace: whether `step` was saved before, without its score.

        Raises:
          UserError: this step, or the one before, cannot be written.
        """
        variables, training = _items(state)
        try:
            self._manager.wait_until_finished()  # until here `_saving` is the step before
            self._saving = step
            if replace:
                self._move_aside(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(variables),
                    training=ocp.args.StandardSave(training),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if score is None else {"score": float(score)},
            )
        except Exception as error:
            raise self._not_saved(error) from error

    def check(self) -> None:
        """Raises a `UserError` if the save in progress has failed; the steps before it are unchanged."""
        if self._failure is not None:
            raise self._not_saved(self._failure) from self._failure

    def close(self) -> None:
        """Waits until everything is on disk; raises a `UserError` if the last step cannot be written."""
        try:
            self._manager.wait_until_finished()
            if processes.is_main():
                replaced = integrity.replaced_dir(self._path)
                if replaced.is_dir():
                    replaced.rmtree()
            self._manager.close()
        except Exception as error:
            raise self._not_saved(error) from error
        sys.unraisablehook = self._hook
        logging.getLogger("asyncio").removeFilter(_is_no_echo)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Where processes wait for each other while they save, in a thread of Orbax.

        A process whose save has failed comes here too, while its exception propagates, and would wait for those that
        wait for its files.
        """
        error = sys.exception()
        if error is not None:
            self._failure = error
            raise error
        processes.wait_for_all(key, timeout_ms / 1000)

    def restore(self, step: int, state) -> tuple[Any, dict[str, Any]]:
        """The state and meta saved at `step`, sharded as the arrays of `state`, which is not changed."""
        abstract = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        variables, training = jax.tree.map(abstract, _items(state))
        items = ocp.args.Composite(
            variables=ocp.args.StandardRestore(variables),
            training=ocp.args.StandardRestore(training),
            meta=ocp.args.JsonRestore(),
        )
        try:
            saved = self._manager.restore(step, args=items)
        except Exception as error:  # foreign files raise anything
            raise UserError(f"{self._path / str(step)} cannot be read: {_first_line(error)}") from error
        return state.replace(**saved.variables, **saved.training), saved.meta

    def _not_saved(self, error: Exception) -> UserError:
        replaced = integrity.replaced_dir(self._path)
        kept = [step for step in integrity.steps(self._path.parent) if step != self._saving]
        kept += integrity.numbers(replaced)
        remedy = f"Step {kept[-1]} is intact; the same command resumes from it" if kept else "There is no other step"
        return UserError(f"{self._path / str(self._saving)} could not be saved: {_first_line(error)}. {remedy}")

    def _move_aside(self, step: int) -> None:
        """Hides a step from Orbax; `integrity` restores it should its successor not be saved."""
        with processes.main_first("move aside"):
            if processes.is_main():
                files.make_folder(integrity.replaced_dir(self._path))
                (self._path / str(step)).rename(integrity.replaced_dir(self._path) / str(step))
        self._manager.reload()

    def _without_echoes(self, unraisable) -> None:
        """Silences the writes of a failed save, which still report to Orbax's event loop after it was closed."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def _write_checksums(self) -> None:
        """Called by Orbax just before it commits a step by renaming it; in a bucket nothing is renamed."""
        unfinished = list(self._path.glob(f"{self._saving}{integrity.UNFINISHED}*"))
        integrity.write_checksums(unfinished[0] if unfinished else self._path / str(self._saving))


def _is_no_echo(record: logging.LogRecord) -> bool:
    """A failed save is reported once: Orbax writes its files concurrently and waits for the first failure only."""
    return "exception was never retrieved" not in record.getMessage()


def read_meta(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """The meta saved at an intact `step`."""
    return _read(integrity.checkpoints_dir(workdir) / str(step), meta=ocp.args.JsonRestore()).meta


def read_variables(
    workdir: epath.PathLike, step: int | None, sharding: jax.sharding.Sharding
) -> tuple[int, dict[str, PyTree]]:
    """A step, None is the best, and its variables: `params`, and what was saved of the others, see `_items`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder, found = integrity.checkpoints_dir(workdir), integrity.steps(workdir)
    if step is None:
        step = integrity.best_step(workdir)
    elif step not in found:
        raise UserError(f"{folder} has no step {step}; it has {', '.join(map(str, found)) or 'none'}")
    elif reason := integrity.find_damage(workdir, step):
        others = [str(other) for other in found if other != step]
        remedy = f"Choose another --step: {', '.join(others)}" if others else "There is no other step"
        raise UserError(f"{folder / str(step)} is damaged: {reason}. {remedy}")
    place = folder / str(step)
    try:
        with ocp.StandardCheckpointer() as reader:
            stored = reader.metadata(place / "variables").item_metadata.tree
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored)
        return step, _read(place, variables=ocp.args.StandardRestore(target)).variables
    except Exception as error:
        if place.exists():
            raise
        raise UserError(f"{place} was deleted by a running training while it was read. Try again") from error


def evaluated(saved: dict[str, Any]) -> dict[str, Any]:
    """Of the variables of a checkpoint those that a network is evaluated with: what has an EMA, as its EMA."""
    batch_stats = saved.get("ema_batch_stats", saved.get("batch_stats", {}))
    return {"params": saved.get("ema", saved["params"]), "batch_stats": batch_stats}


def _read(place: epath.Path, **items):
    """Items of a step, without a manager, which would also clean up the folder."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(place, args=ocp.args.Composite(**items))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _items(state) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """The fields of a state in two items: for evaluation, and for training only. Empty fields are left out."""
    names = ("params", "batch_stats", "ema", "ema_batch_stats")
    variables = {name: getattr(state, name) for name in names}
    return {k: v for k, v in variables.items() if v}, {"step": state.step, "opt_state": state.opt_state}
