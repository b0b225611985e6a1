"""What a training tells: lines on the screen, `metrics.jsonl`, TensorBoard."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
from etils import epath

from unet_jax import em, mesh, workdir

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from unet_jax.evaluate import Evaluation


MAX_SKIPPED = 10  # steps in a row that config.train.nonfinite = "skip" forgives


_NOTHING_KEPT = {"window": [], "skipped": 0, "in_a_row": 0}


class Log:
    """Collects the metrics of steps; prints, and writes them to `metrics.jsonl` and TensorBoard.

    Attributes:
      kept: what a checkpoint has to hold so that the lines stay exact: `window`, the losses since the last line;
        `skipped`, the steps whose update was skipped, and `in_a_row`, how many of them came last.
      blown_up: what was not finite, once that cannot be forgiven; empty as long as all is well.
      last_evaluation: the one added last.
      waited: seconds waiting for data since the clock was started.
    """

    def __init__(
        self,
        config: "ConfigDict",
        path: epath.Path,
        schedule: Callable[[int], float],
        steps_per_epoch: float,
        total_steps: int,
        first_step: int,
        kept: Mapping | None,
    ):
        """Begins at `first_step`, with `kept` of the run before."""
        self.kept = {name: (kept or {}).get(name, new) for name, new in _NOTHING_KEPT.items()}
        self.blown_up = ""
        self.last_evaluation: Evaluation | None = None
        self.waited = 0.0
        self._every, self._batch_size = config.train.log_every_steps, config.train.batch_size
        self._skips = config.train.nonfinite == "skip"
        self._path, self._schedule = path, schedule
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._began, self._first_step = time.monotonic(), first_step
        self._writer = None
        if mesh.is_main_process():
            from clu import metric_writers  # imports TensorFlow

            self._writer = metric_writers.SummaryWriter(str(path))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of images/s what is not training."""
        self.waited, self._clock, self._timed_steps = 0.0, time.monotonic(), 0

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> int:
        """Takes one step's metrics, already on the host or not; returns the signal that came with them, or 0."""
        values = {name: float(value) for name, value in metrics.items()}
        signal = int(values.pop("signal"))
        if self._is_finite(step, values):
            self.kept["window"] = [*self.kept["window"], values["loss"]]
        self._timed_steps += 1
        if step % self._every == 0 or step == self._total_steps:
            self._add_line(step, values)
        return signal

    def _is_finite(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether the step's update was made; sets `blown_up` where the training cannot go on."""
        if all(map(math.isfinite, values.values())):
            self.kept["in_a_row"] = 0
            return True
        shown = f"step {step}: not finite: {', '.join(f'{name} = {value}' for name, value in values.items())}"
        if self._skips:
            self.kept |= {"skipped": self.kept["skipped"] + 1, "in_a_row": self.kept["in_a_row"] + 1}
            mesh.say(f"{shown}. Its update is skipped, the {self.kept['skipped']}. so far")
        if not self._skips or self.kept["in_a_row"] == MAX_SKIPPED:
            self.blown_up = shown + (f", the {MAX_SKIPPED}. step in a row" if self._skips else "")
        return False

    def _add_line(self, step, values):
        window, seconds = self.kept["window"], max(time.monotonic() - self._clock, 1e-9)
        line = {
            "train/loss": math.fsum(window) / len(window) if window else math.nan,
            "train/grad_norm": values["grad_norm"],
            "train/learning_rate": float(self._schedule(step - 1 - self.kept["skipped"])),
            "train/images_per_sec": self._timed_steps * self._batch_size / seconds,
            "train/data_wait": self.waited / seconds,
        }
        if self._skips:
            line["train/skipped"] = self.kept["skipped"]
        self.kept["window"] = []
        self.restart_clock()
        left = (time.monotonic() - self._began) / (step - self._first_step) * (self._total_steps - step)
        self._write(step, line)
        mesh.say(
            f"step {step}/{self._total_steps}  epoch {step / self._steps_per_epoch:.1f}  "
            f"loss {line['train/loss']:.4f}  {line['train/images_per_sec']:.1f} images/s  "
            f"waiting for data {line['train/data_wait']:.1%}  left {int(left // 60)}:{int(left % 60):02d}"
        )

    def add_evaluation(self, step: int, result: "Evaluation") -> None:
        """Takes the scores of the validation split."""
        self.last_evaluation = result
        values = {"val/loss": result.loss, "val/accuracy": result.scores["accuracy"]}
        values |= {"val/miou": result.scores["miou"], "val/mdice": result.scores["mdice"]}
        values |= {f"val/iou/{name}": iou for name, iou in result.scores["iou"].items()}
        values |= {f"val/dice/{name}": dice for name, dice in result.scores["dice"].items()}
        values |= {f"val/{name}": result.em[name] for name in em.NAMES if result.em}
        self._write(step, values)
        shown = {"loss": "val/loss", "accuracy": "val/accuracy", "mean IoU": "val/miou"}
        shown |= {name: f"val/{name}" for name in em.NAMES if result.em}
        mesh.say(
            "  validation  " + "  ".join(f"{k} {values[v]:.4f}" for k, v in shown.items() if values[v] is not None)
        )

    def _write(self, step, values):
        if self._writer is None:
            return
        values = {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}
        workdir.append_metrics(self._path, {"step": step, "epoch": step / self._steps_per_epoch, **values})
        self._writer.write_scalars(step, {name: value for name, value in values.items() if value is not None})

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def tiles(use: str, size: Sequence[int], given: Sequence[int]) -> str:
    """What the network predicts, and from how much of the image."""
    shown = f"{use} predicts {size[0]}x{size[1]}"
    return shown if tuple(size) == tuple(given) else f"{shown} from {given[0]}x{given[1]}, mirrored where needed"


def memory(compiled) -> str:
    """What a compiled step needs on each device, as far as the compiler tells."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "unknown on this device"
    held, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return (
        f"{(held + temporary) / 2**20:.0f} MiB a step on each device: {held / 2**20:.0f} state and batch, "
        f"{temporary / 2**20:.0f} activations and gradients"
    )
