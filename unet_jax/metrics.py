"""Metrics from integer confusion counts: summed exactly over pixels, batches and devices, divided once on the host."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def predict_label(logits: jax.Array, task: str) -> jax.Array:
    """Logits `[B, H, W, K]` -> class uint8 `[B, H, W]`, or masks uint8 `[B, H, W, K]` for a multilabel task.

    A sigmoid predicts its class where the probability exceeds 0.5.
    """
    if task == "multiclass":
        return logits.argmax(-1).astype(jnp.uint8)
    positive = (logits > 0).astype(jnp.uint8)
    return positive[..., 0] if task == "binary" else positive


def confusion(prediction: jax.Array, label: jax.Array, mask: jax.Array, task: str, num_classes: int) -> jax.Array:
    """Counts pixels by truth (row) and prediction (column).

    Args:
      prediction: integer, the shape of `label`.
      label: integer `[B, H, W]`, or `[B, H, W, K]` for a multilabel task.
      mask: bool, the shape of `label`: which pixels count.
      task: `multiclass`, `binary` or `multilabel`.
      num_classes: K.

    Returns:
      int32 `[K, K]`; for a multilabel task `[K, 2, 2]`, one matrix per class.
    """
    label, prediction = (jnp.where(mask, x, 0).astype(jnp.int32) for x in (label, prediction))
    if task == "multilabel":
        both = [
            ((label == truth) & (prediction == guess) & mask).sum((0, 1, 2)) for truth in (0, 1) for guess in (0, 1)
        ]
        return jnp.stack(both, -1).reshape(num_classes, 2, 2)

    def count(index, counted):  # of one example, so that the batch stays sharded
        return jnp.zeros(num_classes**2, jnp.int32).at[index.ravel()].add(counted.ravel().astype(jnp.int32))

    counts = jax.vmap(count)(label * num_classes + prediction, mask).sum(0)
    return counts.reshape(num_classes, num_classes)


def scores(counts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Scores from summed confusion counts.

    Args:
      counts: integer `[K, K]` or `[K, 2, 2]`, rows are the truth.
      names: of the K classes.

    Returns:
      `accuracy` (of pixels; for a multilabel task over pixels and masks), `miou` and `mdice` (means over the classes
      present in the truth), and `iou`, `dice`, `pixels` (of the truth) per class. The IoU and Dice of a class absent
      from the truth are None, as are means of nothing.
    """
    counts = np.asarray(counts, np.int64)
    if counts.ndim == 3:
        hit, truth, guess = counts[:, 1, 1], counts[:, 1].sum(-1), counts[:, :, 1].sum(-1)
        correct = hit.sum() + counts[:, 0, 0].sum()
    else:
        hit, truth, guess = counts.diagonal(), counts.sum(1), counts.sum(0)
        correct = hit.sum()
    iou = {n: _ratio(h, t + g - h) if t else None for n, h, t, g in zip(names, hit, truth, guess, strict=True)}
    dice = {n: _ratio(2 * h, t + g) if t else None for n, h, t, g in zip(names, hit, truth, guess, strict=True)}
    return {
        "accuracy": _ratio(correct, counts.sum()),
        "miou": _mean(iou.values()),
        "mdice": _mean(dice.values()),
        "iou": iou,
        "dice": dice,
        "pixels": dict(zip(names, truth.tolist(), strict=True)),
    }


def _ratio(part, whole) -> float | None:
    return float(part / whole) if whole else None


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
