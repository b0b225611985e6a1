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
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from unet_jax.errors import UserError

PyTree = Any
ITEMS = ("variables", "training", "meta", "metrics")
CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: epath.PathLike):
        self.path = epath.Path(workdir).resolve() / "checkpoints"
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=2),
                # Checkpoints between evaluations have no score; a NaN score must not become the best.
                checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_score,
            create=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            self._manager = ocp.CheckpointManager(self.path, options=options)
        except Exception as error:  # whatever damaged files make of it
            raise UserError(f"{self.path} cannot be read: {_first_line(error)}") from error

    def latest_step(self) -> int | None:
        """The last step saved, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest score, or the last one where none has a score."""
        best = self._manager.best_step()
        return self.latest_step() if best is None else best

    def steps(self) -> list[int]:
        """All steps on disk, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, meta: dict[str, Any], score: float | None) -> None:
        """Starts to save `state`; it may be changed or donated as soon as this returns.

        Args:
          step: the number of steps taken.
          state: a `TrainState`.
          meta: what JSON can hold.
          score: higher is better; None where it was not evaluated.
        """
        variables, training = _items(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(variables),
                training=ocp.args.StandardSave(training),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if score is None else {"score": float(score)},
        )

    def restore(self, step: int, state) -> tuple[Any, dict[str, Any]]:
        """The state and meta saved at `step`, laid out as the arrays of `state`, which is left alone.

        Raises:
          UserError: no such step, or it is damaged.
        """
        self._check(step)
        variables, training = jax.tree.map(_abstract, _items(state))
        saved = self._restore(
            step,
            variables=ocp.args.StandardRestore(variables),
            training=ocp.args.StandardRestore(training),
            meta=ocp.args.JsonRestore(),
        )
        return state.replace(**saved.variables, **saved.training), saved.meta

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta saved at `step`.

        Raises:
          UserError: no such step, or it is damaged.
        """
        self._check(step)
        return self._restore(step, meta=ocp.args.JsonRestore()).meta

    def restore_variables(self, step: int, sharding: jax.sharding.Sharding) -> dict[str, PyTree]:
        """What evaluation needs of `step`: `params`, and where they were saved `batch_stats` and `ema`.

        Raises:
          UserError: no such step, or it is damaged.
        """
        self._check(step)
        try:
            with ocp.StandardCheckpointer() as reader:
                stored = reader.metadata(self.path / str(step) / "variables").item_metadata.tree
        except Exception as error:  # whatever damaged files make of it
            raise self._damaged(step, _first_line(error)) from error
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored)
        return self._restore(step, variables=ocp.args.StandardRestore(target)).variables

    def _restore(self, step: int, **items):
        """Reads items of `step`, which `_check` has found whole."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever damaged files make of it
            raise self._damaged(step, _first_line(error)) from error

    def _check(self, step: int) -> None:
        """Compares the files of `step` with their checksums; those of older versions have none."""
        if step not in self.steps():
            raise UserError(f"{self.path} has no step {step}; it has {', '.join(map(str, self.steps())) or 'none'}")
        folder = self.path / str(step)
        try:
            expected = json.loads((folder / CHECKSUMS).read_text()) if (folder / CHECKSUMS).exists() else {}
        except ValueError as error:
            raise self._damaged(step, f"{CHECKSUMS} cannot be read ({error})") from error
        for name, digest in expected.items():
            if not (folder / name).exists():
                raise self._damaged(step, f"{name} is missing")
            if _digest(folder / name) != digest:
                raise self._damaged(step, f"{name} is not what was written, its checksum differs")

    def _damaged(self, step: int, reason: str) -> UserError:
        others = [other for other in self.steps() if other != step]
        remedy = "There is no other step"
        if others:
            remedy = f"Evaluate another with --step={others[-1]}, or delete that folder to go on from there"
        return UserError(f"{self.path / str(step)} is damaged: {reason}. {remedy}")

    def _seal(self) -> None:
        """Adds the checksums to the step that is about to be committed: Orbax calls this just before it renames it."""
        for step in self.path.glob("*.orbax-checkpoint-tmp*"):
            items = [step / item for item in ITEMS if (step / item).exists()]
            files = [folder / file for item in items for folder, _, found in item.walk() for file in found]
            sums = {str(file.relative_to(step)): _digest(file) for file in sorted(files)}
            (step / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def exists(workdir: epath.PathLike) -> bool:
    """Whether a work directory has a checkpoint."""
    path = epath.Path(workdir) / "checkpoints"
    return path.exists() and any(step.name.isdigit() for step in path.iterdir())


def read_variables(
    workdir: epath.PathLike, step: int | None, sharding: jax.sharding.Sharding
) -> tuple[int, dict[str, PyTree]]:
    """The step and the weights (see `Checkpoints.restore_variables`) of one checkpoint of a work directory.

    Args:
      workdir: the work directory.
      step: which; None is the best.
      sharding: of every array.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if not exists(workdir):
        raise UserError(f"{workdir} has no checkpoint: the training was stopped before the first one")
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.best_step() if step is None else step
        return step, checkpoints.restore_variables(step, sharding)
    finally:
        checkpoints.close()


def _digest(file: epath.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _score(metrics: dict[str, float]) -> float:
    score = metrics["score"]
    return score if math.isfinite(score) else -math.inf


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _items(state) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """The fields of a state in two parts: for evaluation, and for training only. Empty fields stay out."""
    variables = {"params": state.params, "batch_stats": state.batch_stats, "ema": state.ema}
    return {k: v for k, v in variables.items() if v}, {"step": state.step, "opt_state": state.opt_state}


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
