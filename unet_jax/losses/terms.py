"""The terms: of pixels and of areas; those of order and of skeletons are in `lovasz.py` and `cldice.py`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# One term of a batch: the weighted sum and the weight of each example, float32 [B]. Its mean: sum(sums) / sum(weights).
Sums = tuple[jax.Array, jax.Array]


class Pixels(NamedTuple):
    """What a term is computed from; D = `[B, H, W]` for a softmax, `[B, H, W, K]` for K sigmoids."""

    logits: jax.Array  # float32 `[B, H, W, K]`; K = 1 for a binary task
    label: jax.Array  # int32 of shape D; a legal class where masked
    mask: jax.Array  # bool of shape D: which elements count
    weight: jax.Array  # float32 of shape D: mask times class and pixel weights
    softmax: bool  # whether the classes exclude each other (`multiclass`)

    def by_class(self) -> tuple[jax.Array, jax.Array]:
        """Probability and target of each class, float32 and bool `[B, H, W, K]`, both zero where masked."""
        if self.softmax:
            target = (self.label[..., None] == jnp.arange(self.logits.shape[-1])) & self.mask[..., None]
            return jax.nn.softmax(self.logits) * self.mask[..., None], target
        return jax.nn.sigmoid(self.logits) * self.mask, (self.label > 0) & self.mask

    def counted(self) -> jax.Array:
        """1 for an image with pixels that count, else 0: float32 `[B]`."""
        return self.mask.any(tuple(range(1, self.mask.ndim))).astype(jnp.float32)


# ---- of pixels: the weighted mean over pixels (and masks, for a multilabel task)


def cross_entropy(pixels: Pixels, smoothing: float = 0.0) -> Sums:
    """Softmax or sigmoid cross-entropy.

    With `smoothing` s the target is 1 - s for the label and s / K more for each of the K classes, two for a sigmoid
    (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    loss = _cross_entropy(pixels)
    if smoothing:
        if pixels.softmax:
            even = -jax.nn.log_softmax(pixels.logits).mean(-1)
        else:
            even = -(jax.nn.log_sigmoid(pixels.logits) + jax.nn.log_sigmoid(-pixels.logits)) / 2
        loss = (1 - smoothing) * loss + smoothing * even
    return _weighted(loss, pixels)


def focal(pixels: Pixels, gamma: float) -> Sums:
    """Focal loss, -(1 - p)^gamma log p of the probability p of the label (Lin et al. 2017, arXiv:1708.02002, eq. 4)."""
    loss = _cross_entropy(pixels)
    # 1 - exp(-loss), exact where it is small; a power of zero would have no gradient.
    return _weighted(jnp.maximum(-jnp.expm1(-loss), 1e-12) ** gamma * loss, pixels)


def _weighted(loss: jax.Array, pixels: Pixels) -> Sums:
    axes = tuple(range(1, loss.ndim))
    return (loss * pixels.weight).sum(axes), pixels.weight.sum(axes)


def _cross_entropy(pixels: Pixels) -> jax.Array:
    """Of each element.

    The softmax is as `optax.softmax_cross_entropy_with_integer_labels`, but the logit of the label is chosen by
    comparison: fused with the rest, no one-hot labels are stored, and the gradient is no scatter, which GPUs add up in
    any order.
    """
    if not pixels.softmax:
        return optax.sigmoid_binary_cross_entropy(pixels.logits, pixels.label)
    logits = pixels.logits - jax.lax.stop_gradient(pixels.logits.max(-1, keepdims=True))
    chosen = jnp.where(pixels.label[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return jnp.log(jnp.exp(logits).sum(-1)) - chosen


# ---- of areas: the mean over images (and classes); images without any counted pixel weigh nothing


def dice(pixels: Pixels, smooth: float = 1.0) -> Sums:
    """Soft Dice loss, 1 - (2 sum p t + s) / (sum p + sum t + s), s = 1, over the pixels of each image and class.

    The mean over images and classes, as in the test of the PyTorch U-Net (Milletari et al. 2016, arXiv:1606.04797, eq.
    for D, without squares in the denominator).
    """
    overlap, predicted, labelled = _areas(pixels)
    loss = 1 - (2 * overlap + smooth) / (predicted + labelled + smooth)
    return _mean(loss.mean(-1), pixels)


def generalized_dice(pixels: Pixels) -> Sums:
    """Generalised Dice loss, 1 - 2 sum_k w_k sum p t / sum_k w_k (sum p + sum t), w_k = 1 / (sum t)^2, of each image.

    Small classes weigh as much as large ones (Sudre et al. 2017, arXiv:1707.03237, eq. 1). A class that the image does
    not have weighs as the smallest that it has; without any class the loss is the share of the pixels predicted.
    """
    overlap, predicted, labelled = _areas(pixels)
    smallest = jnp.where(labelled > 0, labelled, jnp.inf).min(-1, keepdims=True)
    weights = jnp.where(jnp.isfinite(smallest), (smallest / jnp.maximum(labelled, smallest)) ** 2, 1)
    total = (weights * (predicted + labelled)).sum(-1)
    return _mean(1 - (2 * (weights * overlap).sum(-1) + 1e-6) / (total + 1e-6), pixels)


def tversky(pixels: Pixels, alpha: float, beta: float, gamma: float, smooth: float = 1.0) -> Sums:
    """(1 - T)^gamma, T = (TP + s) / (TP + alpha FP + beta FN + s), s = 1, of each image and class.

    With gamma = 1 the loss of Salehi et al. 2017 (arXiv:1706.05721, eq. 4): beta above alpha for fewer missed pixels,
    both 0.5 is Dice (with twice the s). Otherwise focal, a gamma below 1 for classes that are hard (Abraham and Khan
    2018, arXiv:1810.07842, eq. 4, whose 1 / gamma this is).
    """
    overlap, predicted, labelled = _areas(pixels)
    false_positive, false_negative = predicted - overlap, labelled - overlap
    index = (overlap + smooth) / (overlap + alpha * false_positive + beta * false_negative + smooth)
    # A power below 1 has an infinite gradient at zero.
    return _mean((jnp.maximum(1 - index, 1e-6) ** gamma).mean(-1), pixels)


def batch_dice(pixels: Pixels) -> tuple[jax.Array, jax.Array]:
    """What `dice_of_batch` divides: overlap, and predicted and labelled area, of each image and class, `[B, K]`."""
    overlap, predicted, labelled = _areas(pixels)
    return overlap, predicted + labelled


def dice_of_batch(overlap, area, smooth: float = 1.0):
    """Soft Dice loss as in `dice`, over the pixels of all images of the batch (or split) together, JAX or NumPy.

    A class that few images have counts where it is, and not as 0 or 1 where it is not (nnU-Net's `batch_dice`).
    """
    return (1 - (2 * overlap.sum(0) + smooth) / (area.sum(0) + smooth)).mean()


def _areas(pixels: Pixels) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each image and class: sum p t, sum p and sum t, float32 `[B, K]`."""
    probability, target = pixels.by_class()
    overlap = jnp.where(target, probability, 0).sum((1, 2))
    return overlap, probability.sum((1, 2)), target.sum((1, 2)).astype(jnp.float32)


def _mean(loss: jax.Array, pixels: Pixels) -> Sums:
    """`loss` `[B]` of the images with counted pixels."""
    counted = pixels.counted()
    return loss * counted, counted
