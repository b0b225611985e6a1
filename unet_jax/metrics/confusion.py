"""Scores from integer confusion counts: summed exactly over pixels, batches and devices, divided once on the host."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.metrics.record import Record


def predict_label(logits: jax.Array, task: str) -> jax.Array:
    """Logits `[B, H, W, K]` -> class uint8 `[B, H, W]`, or masks uint8 `[B, H, W, K]` for a multilabel task.

    A sigmoid predicts its class where the probability exceeds 0.5.
    """
    if task == "multiclass":
        return logits.argmax(-1).astype(jnp.uint8)
    positive = (logits > 0).astype(jnp.uint8)
    return positive[..., 0] if task == "binary" else positive


def confusion(prediction: jax.Array, label: jax.Array, mask: jax.Array, task: str, num_classes: int) -> jax.Array:
    """Counts the pixels of each example by ground truth (row) and prediction (column).

    Args:
      prediction: integer, the shape of `label`.
      label: integer `[B, H, W]`, or `[B, H, W, K]` for a multilabel task.
      mask: bool, the shape of `label`: which pixels count.

    Returns:
      int32 `[B, K, K]`; for a multilabel task `[B, K, 2, 2]`, one matrix per class.
    """
    label, prediction = (jnp.where(mask, x, 0).astype(jnp.int32) for x in (label, prediction))
    if task == "multilabel":
        cells = [((label == row) & (prediction == column) & mask).sum((1, 2)) for row in (0, 1) for column in (0, 1)]
        return jnp.stack(cells, -1).reshape(-1, num_classes, 2, 2)

    def count(index, counted):  # of one example, so that the batch stays sharded
        return jnp.zeros(num_classes**2, jnp.int32).at[index.ravel()].add(counted.ravel().astype(jnp.int32))

    return jax.vmap(count)(label * num_classes + prediction, mask).reshape(-1, num_classes, num_classes)


def count(prediction: np.ndarray, label: np.ndarray, mask: np.ndarray, task: str, num_classes: int) -> np.ndarray:
    """`confusion` of one image, or some rows of it, in NumPy: int64 `[K, K]`, or `[K, 2, 2]` for a multilabel task."""
    cells = lambda row, column, counted, size: np.bincount(
        row[counted].astype(np.int64) * size + column[counted], minlength=size**2
    ).reshape(size, size)
    if task != "multilabel":
        return cells(label, prediction, mask, num_classes)
    return np.stack([cells(label[..., k], prediction[..., k], mask[..., k], 2) for k in range(num_classes)])


def records(counts: np.ndarray, names: Sequence[str]) -> list[Record]:
    """Scores of the classes `names` from summed confusion counts `[K, K]` or `[K, 2, 2]`, rows are the ground truth.

    Pixel accuracy (for a multilabel task over pixels and masks), mean IoU and mean Dice (over the classes present in
    the ground truth), IoU and Dice per class. The IoU and Dice of an absent class are None, as are means of nothing.
    Of background and foreground, the Dice of the foreground comes first: background flatters the means.
    """
    counts = np.asarray(counts, np.int64)
    if counts.ndim == 3:
        hit, guess = counts[:, 1, 1], counts[:, :, 1].sum(-1)
        correct = hit.sum() + counts[:, 0, 0].sum()
    else:
        hit, guess = counts.diagonal(), counts.sum(0)
        correct = hit.sum()
    columns = list(zip(names, hit, pixel_counts(counts), guess, strict=True))
    iou = {name: _ratio(h, t + g - h) if t else None for name, h, t, g in columns}
    dice = {name: _ratio(2 * h, t + g) if t else None for name, h, t, g in columns}
    found = [
        Record("accuracy", "pixel accuracy", _ratio(correct, counts.sum())),
        Record("miou", "mean IoU", _mean(iou.values())),
        Record("mdice", "mean Dice", _mean(dice.values())),
        Record("iou", "IoU", iou),
    ]
    if counts.shape == (2, 2):
        return [Record("dice", "Dice", dice, foreground=names[1]), *found]
    return [*found, Record("dice", "Dice", dice)]


def pixel_counts(counts: np.ndarray) -> np.ndarray:
    """Pixels of each class in the ground truth, int64 `[K]`, from confusion counts `[K, K]` or `[K, 2, 2]`."""
    counts = np.asarray(counts, np.int64)
    return counts[:, 1].sum(-1) if counts.ndim == 3 else counts.sum(1)


def _ratio(part, whole) -> float | None:
    return float(part / whole) if whole else None


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
