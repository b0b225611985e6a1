"""Checkpoints by Orbax: asynchronous, the latest and the best, each with the whole state.

checkpoints/<step>/variables   weights, averaged weights, batch statistics: all that evaluation needs
                   training    optimizer state
                   meta        JSON: what else the loop needs to go on
                   metrics     JSON: the score by which the best is chosen
                   checksums.json  SHA-256 of every file of these: Orbax restores a flipped bit without a word
"""

import hashlib
import json
import math
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from unet_jax import mesh, processes
from unet_jax.errors import UserError

PyTree = Any
ITEMS = ("variables", "training", "meta", "metrics")
CHECKSUMS = "checksums.json"
UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """Writes the checkpoints of one work directory; all processes do so together."""

    def __init__(self, workdir: epath.PathLike):
        """The steps that are there must be whole, see `newest_good_step`."""
        self._path, self._saving, self._failure = _folder(workdir), 0, None
        sys.unraisablehook = _without_echoes
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=2),
                # Checkpoints between evaluations have no score; a NaN score must not become the best.
                checkpoint_managers.BestN(get_metric_fn=_finite_score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_finite_score,
            create=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal, barrier_sync_fn=self._barrier),
        )
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except Exception as error:  # whatever damaged files make of it
            raise UserError(f"{self._path} cannot be read: {_first_line(error)}") from error

    def save(self, step: int, state, meta: dict[str, Any], score: float | None, replace: bool = False) -> None:
        """Starts to save `state`; it may be changed or donated as soon as this returns.

        Args:
          step: the number of steps taken.
          state: a `TrainState`.
          meta: what JSON can hold.
          score: higher is better; None where it was not evaluated.
          replace: whether `step` was saved before, without its score.

        Raises:
          UserError: this step, or the one before, cannot be written.
        """
        variables, training = _items(state)
        try:
            self._manager.wait_until_finished()
            if replace:
                self._manager.delete(step)
            self._saving = step
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
        """Tells whether the save under way has failed.

        Raises:
          UserError: it has; the steps before it are as they were.
        """
        if self._failure is not None:
            raise self._not_saved(self._failure) from self._failure

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: the last step cannot be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as error:
            raise self._not_saved(error) from error

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Where the processes wait for each other while they save, in a thread of Orbax.

        A process whose save has failed comes here too, while the exception is on its way, and would wait for those that
        wait for its files.
        """
        error = sys.exception()
        if error is not None:
            self._failure = error
            raise error
        processes.wait_for_all(key, timeout_ms / 1000)

    def restore(self, step: int, state) -> tuple[Any, dict[str, Any]]:
        """The state and meta saved at `step`, laid out as the arrays of `state`, which is left alone.

        Raises:
          UserError: it holds another state.
        """
        variables, training = jax.tree.map(_abstract, _items(state))
        items = ocp.args.Composite(
            variables=ocp.args.StandardRestore(variables),
            training=ocp.args.StandardRestore(training),
            meta=ocp.args.JsonRestore(),
        )
        try:
            saved = self._manager.restore(step, args=items)
        except Exception as error:  # whatever foreign files make of it
            raise UserError(f"{self._path / str(step)} cannot be read: {_first_line(error)}") from error
        return state.replace(**saved.variables, **saved.training), saved.meta

    def _not_saved(self, error: Exception) -> UserError:
        kept = [step for step in steps(self._path.parent) if step != self._saving]
        remedy = f"Step {kept[-1]} is as it was; the same command goes on from it" if kept else "There is no other step"
        return UserError(
            f"{self._path / str(self._saving)} could not be saved: {_first_line(error)}. Is the disk full? {remedy}"
        )

    def _seal(self) -> None:
        """Adds the checksums to the step that is about to be committed: Orbax calls this just before it renames it."""
        unfinished = list(self._path.glob(f"{self._saving}{UNFINISHED}*"))
        step = unfinished[0] if unfinished else self._path / str(self._saving)  # an object store renames nothing
        items = [step / item for item in ITEMS if (step / item).exists()]
        files = [folder / file for item in items for folder, _, found in item.walk() for file in found]
        sums = {str(file.relative_to(step)): _digest(file) for file in sorted(files)}
        (step / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def steps(workdir: epath.PathLike) -> list[int]:
    """All steps on disk, good or damaged, in order."""
    path = _folder(workdir)
    return sorted(int(step.name) for step in path.iterdir() if step.name.isdigit()) if path.exists() else []


def fault(workdir: epath.PathLike, step: int) -> str | None:
    """What is wrong with the files of a step; None if they are those that were written."""
    folder = _folder(workdir) / str(step)
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        if not (folder / CHECKSUMS).exists():
            return f"{CHECKSUMS} is missing: it was never finished, or files were deleted"
        return f"{CHECKSUMS} cannot be read ({error})"
    for name, digest in expected.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not what was written, its checksum differs"
    return None


def newest_good_step(workdir: epath.PathLike) -> int | None:
    """The step to go on from, with the damaged ones moved to `damaged/` in the work directory; None if it has none.

    Names each step that is damaged or was not finished. The main process looks, the others are told.

    Raises:
      UserError: there are steps, but no good one; nothing is moved then.
    """
    return mesh.from_main(_newest_good_step, workdir)


def _newest_good_step(workdir: epath.PathLike) -> int | None:
    path = _folder(workdir)
    found = steps(workdir)
    faults = {step: reason for step in found if (reason := fault(workdir, step))}
    good = [step for step in found if step not in faults]
    unfinished = sorted(folder.name for folder in path.glob(f"*{UNFINISHED}*")) if path.exists() else []
    for name in unfinished:
        mesh.say(f"{path / name.partition('.')[0]} was not finished when the run ended, and is left out")
    if not good:
        if not faults:
            return None
        listed = "".join(f"\n  {path / str(step)}: {reason}" for step, reason in faults.items())
        raise UserError(
            f"{workdir} has no step that is whole:{listed}\nPut these files back, or begin anew in another --workdir"
        )
    for step, reason in faults.items():
        aside = path.parent / "damaged" / str(step)
        while aside.exists():
            aside = aside.parent / f"{aside.name}_again"
        aside.parent.mkdir(exist_ok=True)
        (path / str(step)).rename(aside)
        mesh.say(f"{path / str(step)} is damaged: {reason}. It is now {aside}; the newest good step is {good[-1]}")
    return good[-1]


def read_meta(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """The meta saved at a good `step`."""
    return _read(workdir, step, meta=ocp.args.JsonRestore()).meta


def best_step(workdir: epath.PathLike) -> int:
    """The step with the highest score that is whole, or else the newest that is; names those that are damaged.

    Raises:
      UserError: there is none.
    """
    return mesh.from_main(_best_step, workdir)


def _best_step(workdir: epath.PathLike) -> int:
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir} has no checkpoint: the training was stopped before the first one")
    order = sorted(found, key=lambda step: (_read_score(workdir, step), step))
    faults = []
    for step in reversed(order):
        reason = fault(workdir, step)
        if reason is None:
            for text in faults:
                mesh.say(f"{text}; step {step} is taken instead")
            return step
        faults.append(f"{_folder(workdir) / str(step)} is damaged: {reason}")
    raise UserError("\n".join([*faults, f"{workdir} has no step that is whole"]))


def read_variables(
    workdir: epath.PathLike, step: int | None, sharding: jax.sharding.Sharding
) -> tuple[int, dict[str, PyTree]]:
    """The step and the weights of one checkpoint: `params`, and where they were saved `batch_stats` and `ema`.

    Args:
      workdir: the work directory.
      step: which; None is the best.
      sharding: of every array.

    Raises:
      UserError: there is none, or it is damaged.
    """
    found = steps(workdir)
    if step is None:
        step = best_step(workdir)
    elif step not in found:
        raise UserError(f"{_folder(workdir)} has no step {step}; it has {', '.join(map(str, found)) or 'none'}")
    elif reason := fault(workdir, step):
        others = [str(other) for other in found if other != step]
        remedy = f"Choose another --step: {', '.join(others)}" if others else "There is no other step"
        raise UserError(f"{_folder(workdir) / str(step)} is damaged: {reason}. {remedy}")
    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(_folder(workdir) / str(step) / "variables").item_metadata.tree
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored)
    return step, _read(workdir, step, variables=ocp.args.StandardRestore(target)).variables


def _read(workdir: epath.PathLike, step: int, **items):
    """Items of a step, without a manager, which would also tidy the folder up."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(_folder(workdir) / str(step), args=ocp.args.Composite(**items))


def _folder(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir).resolve() / "checkpoints"


def _digest(file: epath.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_score(workdir: epath.PathLike, step: int) -> float:
    """The score of a step; less than any where it has none, or where the file is damaged."""
    file = _folder(workdir) / str(step) / "metrics" / "metrics"  # Orbax would want all processes to read it together
    try:
        return _finite_score(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError):
        return -math.inf


def _finite_score(metrics: dict[str, float]) -> float:
    score = metrics["score"]
    return score if math.isfinite(score) else -math.inf


def _without_echoes(unraisable) -> None:
    """Leaves out what each write of a failed save tells Orbax's event loop, which is closed by then."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _items(state) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """The fields of a state in two parts: for evaluation, and for training only. Empty fields stay out."""
    variables = {"params": state.params, "batch_stats": state.batch_stats, "ema": state.ema}
    return {k: v for k, v in variables.items() if v}, {"step": state.step, "opt_state": state.opt_state}


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
