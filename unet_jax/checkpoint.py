"""Checkpoints by Orbax: asynchronous, the latest and the best, each with the whole state.

checkpoints/<step>/variables   weights, averaged weights, batch statistics: all that evaluation needs
                   training    optimizer state
                   meta        JSON: what else the loop needs to go on
                   metrics     JSON: the score by which the best is chosen
"""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from unet_jax.errors import UserError

PyTree = Any


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
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_score, create=True)
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
        variables, training = jax.tree.map(_abstract, _items(state))
        saved = self._restore(
            step,
            variables=ocp.args.StandardRestore(variables),
            training=ocp.args.StandardRestore(training),
            meta=ocp.args.JsonRestore(),
        )
        return state.replace(**saved.variables, **saved.training), saved.meta

    def restore_variables(self, step: int, state) -> Any:
        """As `restore`, but only what evaluation needs: the optimizer state of `state` stays as it is."""
        variables, _ = jax.tree.map(_abstract, _items(state))
        return state.replace(**self._restore(step, variables=ocp.args.StandardRestore(variables)).variables)

    def _restore(self, step: int, **items):
        if step not in self.steps():
            raise UserError(f"{self.path} has no step {step}; it has {', '.join(map(str, self.steps())) or 'none'}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever damaged files make of it
            others = [other for other in self.steps() if other != step]
            remedy = f"delete that folder to go on from step {others[-1]}" if others else "there is no other step"
            raise UserError(f"{self.path / str(step)} cannot be read: {remedy}. {_first_line(error)}") from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


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
