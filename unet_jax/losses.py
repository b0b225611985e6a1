"""Losses as sums and weights per example, so that means over a batch or a whole split divide once and exactly.

Pixels outside the mask count nowhere.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from unet_jax.errors import UserError

# One loss term: the weighted sum and the weight of each example, float32 [B]; its value is sum(sums) / sum(weights).
Term = tuple[jax.Array, jax.Array]


def term_weights(settings: Mapping) -> dict[str, float]:
    """The weight of each loss term in `config.loss`."""
    return {name: settings[name] for name in ("cross_entropy", "dice")}


def check(weights: Mapping[str, float], class_weights: Sequence[float], num_classes: int) -> None:
    """Checks `config.loss`.

    Raises:
      UserError: no term has weight, a weight is negative, or the number of class weights is wrong.
    """
    if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise UserError(f"config.loss needs weights >= 0, one of them > 0: {dict(weights)}")
    known = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in class_weights)
    if class_weights and not (known and len(class_weights) == num_classes and any(class_weights)):
        raise UserError(
            f"config.loss.class_weights = {tuple(class_weights)} must be empty or hold {num_classes} weights >= 0, "
            "one per class"
        )


def terms(
    logits: jax.Array,
    label: jax.Array,
    mask: jax.Array,
    task: str,
    class_weights: Sequence[float] = (),
    pixel_weights: jax.Array | None = None,
) -> dict[str, Term]:
    """All loss terms of a batch.

    Args:
      logits: float32 `[B, H, W, K]`; K = 1 for a binary task.
      label: integer `[B, H, W]`, or `[B, H, W, K]` for a multilabel task.
      mask: bool, the shape of `label`: which pixels count.
      task: `multiclass`, `binary` or `multilabel`.
      class_weights: one per class, or none: the weight of a pixel in the cross-entropy is that of its class (for a
        multilabel task, that of its mask).
      pixel_weights: float `[B, H, W]`, which multiply these weights; None is 1 everywhere.

    Returns:
      `cross_entropy` and `dice`.
    """
    label, mask, weight = _weigh_pixels(label, mask, task, class_weights, pixel_weights)
    if task == "multiclass":
        loss = _cross_entropy(logits, label)
    else:
        loss = optax.sigmoid_binary_cross_entropy(logits, label)
    pixels = tuple(range(1, loss.ndim))
    return {
        "cross_entropy": ((loss * weight).sum(pixels), weight.sum(pixels)),
        "dice": _dice(logits, label, mask, task),
    }


def totals(
    label: jax.Array,
    mask: jax.Array,
    task: str,
    class_weights: Sequence[float] = (),
    pixel_weights: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The sums of the weights of all terms: they do not depend on the logits, so that parts of a batch can share them.

    The arguments are as `terms` takes them.
    """
    _, mask, weight = _weigh_pixels(label, mask, task, class_weights, pixel_weights)
    return {"cross_entropy": weight.sum(), "dice": _counted(mask).sum()}


def _weigh_pixels(label, mask, task, class_weights, pixel_weights):
    """Label and mask in the shape of the loss, and the weight of each of its elements in the cross-entropy."""
    label = jnp.where(mask, label, 0).astype(jnp.int32)  # any legal class: masked pixels weigh nothing
    if task == "binary":
        label, mask = label[..., None], mask[..., None]
    weight = mask.astype(jnp.float32)
    if class_weights:
        weights = jnp.asarray(class_weights, jnp.float32)
        weight = weight * (weights if task == "multilabel" else weights[label])
    if pixel_weights is not None:
        weight = weight * (pixel_weights if task == "multiclass" else pixel_weights[..., None])
    return label, mask, weight


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Softmax cross-entropy, `[..., K]` and `[...]` -> `[...]`.

    As `optax.softmax_cross_entropy_with_integer_labels`, but the logit of the label is chosen by comparison: fused with
    the rest, no one-hot labels are stored, and the gradient is no scatter, which GPUs add up in any order.
    """
    logits = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    chosen = jnp.where(label[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return jnp.log(jnp.exp(logits).sum(-1)) - chosen


def _counted(mask: jax.Array) -> jax.Array:
    """1 for each image with any counted pixel, float32 `[B]`."""
    return mask.any(tuple(range(1, mask.ndim))).astype(jnp.float32)


def _dice(logits: jax.Array, label: jax.Array, mask: jax.Array, task: str, smooth: float = 1.0) -> Term:
    """Soft Dice loss, 1 - (2 sum p t + s) / (sum p + sum t + s), s = 1, over the pixels of each image and class.

    The mean over images and classes, as the test of the PyTorch U-Net takes it (Milletari et al. 2016,
    arXiv:1606.04797, eq. for D, without squares in the denominator). Images without any counted pixel weigh nothing.
    """
    if task == "multiclass":
        probability = jax.nn.softmax(logits)
        classes = jnp.arange(logits.shape[-1])
        truth = (label[..., None] == classes) & mask[..., None]
        probability = probability * mask[..., None]
    else:
        probability = jax.nn.sigmoid(logits) * mask
        truth = (label > 0) & mask
    overlap = jnp.where(truth, probability, 0).sum((1, 2))
    total = probability.sum((1, 2)) + truth.sum((1, 2))
    loss = 1 - (2 * overlap + smooth) / (total + smooth)  # [B, K]
    counted = _counted(mask)
    return loss.mean(-1) * counted, counted


def combine(values: Mapping[str, Term], weights: Mapping[str, float], totals: Mapping | None = None):
    """The weighted sum of the means of the terms; works on JAX and NumPy arrays alike.

    Args:
      values: `terms`.
      weights: of each term.
      totals: what to divide by, if `values` are a part of a batch; None is what they sum up to.
    """
    total = 0.0
    for name, weight in weights.items():
        if weight:
            sums, counts = values[name]
            total = total + weight * sums.sum() / (counts.sum() if totals is None else totals[name]).clip(1e-12)
    return total
