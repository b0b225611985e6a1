"""The Lovász losses: the intersection over union itself, extended to probabilities."""

import jax
import jax.numpy as jnp

from unet_jax.losses.terms import Pixels, Sums


def lovasz(pixels: Pixels) -> Sums:
    """Lovász softmax of each image over the classes it has, or Lovász hinge of each image and mask.

    Berman et al. 2018, arXiv:1705.08790, eq. 11 and 12 (and section 3.1 for the hinge), per image. The mean over
    images; those without any counted pixel weigh nothing.
    """
    if pixels.softmax:
        probability, target = pixels.by_class()
        errors = jnp.abs(target - probability)
        losses = _of_errors(errors, target)
        present = target.any((1, 2))
        loss = jnp.where(present, losses, 0).sum(-1) / jnp.maximum(present.sum(-1), 1)
    else:
        target = (pixels.label > 0) & pixels.mask
        errors = jax.nn.relu(1 - pixels.logits * (2 * target - 1)) * pixels.mask
        loss = _of_errors(errors, target).mean(-1)
    counted = pixels.counted()
    return loss * counted, counted


def _of_errors(errors: jax.Array, target: jax.Array) -> jax.Array:
    """Of errors >= 0 (0 where masked) and targets `[B, H, W, K]`: the extended Jaccard loss `[B, K]`.

    The errors in falling order are weighted by how much each more wrong pixel lowers the intersection over union. That
    order, and so the weights, have no gradient: sorting the weights back instead of differentiating the sort leaves a
    product, and no scatter.
    """
    b, h, w, k = errors.shape
    errors, target = (x.reshape(b, h * w, k).swapaxes(1, 2) for x in (errors, target))
    order = jnp.argsort(-jax.lax.stop_gradient(errors), axis=-1)
    sorted_target = jnp.take_along_axis(target, order, -1).astype(jnp.float32)
    labelled = sorted_target.sum(-1, keepdims=True)
    intersection = labelled - jnp.cumsum(sorted_target, -1)
    union = labelled + jnp.cumsum(1 - sorted_target, -1)
    jaccard = 1 - intersection / union
    steps = jnp.diff(jaccard, axis=-1, prepend=0.0)
    weights = jnp.take_along_axis(steps, jnp.argsort(order, axis=-1), -1)
    return (errors * weights).sum(-1)
