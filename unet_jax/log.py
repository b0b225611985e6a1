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


class Log:
    """Collects the metrics of steps; prints, and writes them to `metrics.jsonl` and TensorBoard."""

    def __init__(
        self,
        config: "ConfigDict",
        path: epath.Path,
        schedule: Callable[[int], float],
        steps_per_epoch: float,
        total_steps: int,
        first_step: int,
        window: Sequence[float],
    ):
        """Begins at `first_step`, with the losses of `window` not yet told."""
        self.window = list(window)  # losses since the last line; kept in checkpoints, so that lines stay exact
        self.waited = 0.0  # seconds waiting for data since the clock was started
        self._every, self._batch_size = config.train.log_every_steps, config.train.batch_size
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

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes one step's metrics, already on the host or not."""
        self.window.append(float(metrics["loss"]))
        self._timed_steps += 1
        if step % self._every and step != self._total_steps:
            return
        seconds = max(time.monotonic() - self._clock, 1e-9)
        values = {
            "train/loss": math.fsum(self.window) / len(self.window),
            "train/grad_norm": float(metrics["grad_norm"]),
            "train/learning_rate": float(self._schedule(step - 1)),
            "train/images_per_sec": self._timed_steps * self._batch_size / seconds,
            "train/data_wait": self.waited / seconds,
        }
        self.window = []
        self.restart_clock()
        left = (time.monotonic() - self._began) / (step - self._first_step) * (self._total_steps - step)
        self._write(step, values)
        mesh.say(
            f"step {step}/{self._total_steps}  epoch {step / self._steps_per_epoch:.1f}  "
            f"loss {values['train/loss']:.4f}  {values['train/images_per_sec']:.1f} images/s  "
            f"waiting for data {values['train/data_wait']:.1%}  left {int(left // 60)}:{int(left % 60):02d}"
        )

    def add_evaluation(self, step: int, result: "Evaluation") -> None:
        """Takes the scores of the validation split."""
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
