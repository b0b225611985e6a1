"""Training logs: console, `metrics.jsonl` and TensorBoard."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath

from unet_jax import metrics
from unet_jax.evaluation.scores import Evaluation
from unet_jax.parallel import processes
from unet_jax.workdir import metrics_log

MAX_SKIPPED = 10  # steps in a row that config.train.nonfinite = "skip" forgives

# What a checkpoint holds so that the lines stay exact: the losses since the last line, the number of steps whose update
# was skipped, and how many of the latest steps in a row were; the best score, and the evaluations since then.
INITIAL = {"window": [], "skipped": 0, "in_a_row": 0, "best": None, "since_best": 0}


class TrainingLog:
    """Collects the metrics of steps; prints them, and writes them to `metrics.jsonl` and TensorBoard."""

    def __init__(
        self,
        path: epath.Path,  # the work directory
        *,
        schedule: Callable[[int], float],  # step -> learning rate
        steps_per_epoch: float,  # may be fractional
        ends: Sequence[int],  # steps at which a line is written as well; the last is that of the run
        batch_size: int,  # over all devices
        every: int,  # steps between two lines
        skips_nonfinite: bool,  # whether the step skips updates that are not finite
        first_step: int = 0,  # steps taken before
        resume_state: Mapping | None = None,  # from the checkpoint of `first_step`
    ):
        """Starts at `first_step`."""
        self.resume_state = {name: (resume_state or {}).get(name, value) for name, value in INITIAL.items()}
        self.nonfinite_error = ""  # what was not finite, once that cannot be forgiven
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step = first_step  # of `last_evaluation`
        self._path, self._schedule = path, schedule
        self._steps_per_epoch, self._ends, self._total_steps = steps_per_epoch, ends, ends[-1]
        self._batch_size, self._every, self._skips = batch_size, every, skips_nonfinite
        self._started, self._first_step = time.monotonic(), first_step
        self._writer = None
        if processes.is_main():
            from clu import metric_writers  # imports TensorFlow

            self._writer = metric_writers.SummaryWriter(str(path))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of images/s what is not training."""
        self.waited = 0.0  # seconds spent waiting for data since now
        self._clock, self._timed_steps = time.monotonic(), 0

    def add(self, step: int, step_metrics: Mapping[str, jax.Array]) -> int:
        """Adds the metrics of one step, on the host or still on the device; returns their signal, or 0."""
        values = {name: float(value) for name, value in step_metrics.items()}
        signal, labelled = int(values.pop("signal")), values.pop("labelled")
        if self._is_finite(step, values) and labelled:
            self.resume_state["window"] = [*self.resume_state["window"], values["loss"]]
        self._timed_steps += 1
        if step % self._every == 0 or step in self._ends:
            self._add_line(step, values)
        return signal

    def _is_finite(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether the step's update was applied; sets `nonfinite_error` if the training cannot continue."""
        if all(map(math.isfinite, values.values())):
            self.resume_state["in_a_row"] = 0
            return True
        shown = f"step {step}: not finite: {', '.join(f'{name} = {value}' for name, value in values.items())}"
        if self._skips:
            skipped, in_a_row = self.resume_state["skipped"] + 1, self.resume_state["in_a_row"] + 1
            self.resume_state |= {"skipped": skipped, "in_a_row": in_a_row}
            processes.print_on_main(f"{shown}: skipped update ({skipped} so far)")
        if not self._skips or self.resume_state["in_a_row"] == MAX_SKIPPED:
            self.nonfinite_error = shown + (f", {MAX_SKIPPED} steps in a row" if self._skips else "")
        return False

    def _add_line(self, step: int, values: Mapping[str, float]) -> None:
        window, seconds = self.resume_state["window"], max(time.monotonic() - self._clock, 1e-9)
        line = {
            "train/loss": math.fsum(window) / len(window) if window else math.nan,
            "train/grad_norm": values["grad_norm"],
            "train/learning_rate": float(self._schedule(step - 1 - self.resume_state["skipped"])),
            "train/images_per_sec": self._timed_steps * self._batch_size / seconds,
            "train/data_wait": self.waited / seconds,
        }
        if self._skips:
            line["train/skipped"] = self.resume_state["skipped"]
        self.resume_state["window"] = []
        self.restart_clock()
        left = (time.monotonic() - self._started) / (step - self._first_step) * (self._total_steps - step)
        self._write(step, line)
        loss = f"{line['train/loss']:.4f}" if window else "unknown"  # no step counted
        processes.print_on_main(
            f"step {step}/{self._total_steps}  epoch {step / self._steps_per_epoch:.1f}  loss {loss}  "
            f"{line['train/images_per_sec']:.1f} images/s  "
            f"waiting for data {line['train/data_wait']:.1%}  left {int(left // 60)}:{int(left % 60):02d}"
        )

    def add_evaluation(self, step: int, result: Evaluation, score: float | None) -> None:
        """Adds the scores of the validation split after `step` steps; `score` is what chooses the best, if it tells."""
        is_first, self.last_evaluation = self.last_evaluation is None, result
        self.evaluated_step = step
        if score is not None:
            best, count = self.resume_state["best"], self.resume_state["since_best"]
            is_better = best is None or score > best
            self.resume_state |= {"best": score, "since_best": 0} if is_better else {"since_best": count + 1}
        scores = {"loss": result.loss, **metrics.flatten(result.records)}
        self._write(step, {f"val/{key}": value for key, value in scores.items()})
        shown = [("loss", result.loss), *((r.title, r.value) for r in metrics.summary(result.records))]
        line = "  ".join(f"{title} {value:.4f}" for title, value in shown if value is not None)
        processes.print_on_main(f"  validation  {line}")
        if is_first and not result.is_telling:
            held = ", ".join(name for name, count in result.pixels.items() if count) or "no class"
            processes.print_on_main(
                f"warning: the validation images hold only {held}: these scores do not say whether other classes are "
                "found, and the latest checkpoint counts as the best. See config.data.validation and config.data.lists"
            )

    def is_patience_lost(self, patience: int) -> bool:
        """Whether this run evaluated, and found the latest `patience` scores no better than one before; 0 is never."""
        return self.last_evaluation is not None and 0 < patience <= self.resume_state["since_best"]

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._writer is None:
            return
        values = {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}
        metrics_log.append(self._path, {"step": step, "epoch": step / self._steps_per_epoch, **values})
        self._writer.write_scalars(step, {name: value for name, value in values.items() if value is not None})

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
