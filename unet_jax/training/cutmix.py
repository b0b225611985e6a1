"""CutMix (Yun et al. 2019, arXiv:1905.04899) for segmentation: rectangles of other examples of the batch."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def paste(
    keys: jax.Array, batch: Mapping[str, jax.Array], share: float, margins: Sequence[tuple[int, int]]
) -> dict[str, jax.Array]:
    """Pastes a rectangle of the next example, or of the first one into the last, into a `share` of the examples.

    Image, label and weight alike. As the partner is fixed, the result is a function of the keys and of the order of the
    global batch, however that is divided among devices and microbatches.

    Args:
      keys: `[B]` random keys.
      batch: `image` `[B, H, W, C]`; `label` `[B, h, w]` or `[B, h, w, K]`; maybe `weight` `[B, h, w]`.
      share: of the examples, in 0..1.
      margins: how many pixels the image extends beyond the label: (above, below), (left, right). A rectangle that
        touches the border of the label reaches into the margin there.
    """
    size = batch["label"].shape[1:3]
    inside = jax.vmap(lambda key: draw_rectangle(key, size, share))(keys)
    inside_image = jnp.pad(inside, ((0, 0), *margins), mode="edge")

    def mix(name, values):
        chosen = inside_image if name == "image" else inside
        chosen = chosen.reshape(chosen.shape + (1,) * (values.ndim - 3))
        return jnp.where(chosen, jnp.roll(values, -1, axis=0), values)

    return {name: mix(name, values) for name, values in batch.items()}


def draw_rectangle(key: jax.Array, size: Sequence[int], share: float) -> jax.Array:
    """A random rectangle in a window of (height, width) `size`: bool `size`, true inside; empty unless for a `share`.

    As in algorithm 1 of the paper with Beta(1, 1): it has the shape of the window and a share of its area that is
    uniform in 0..1, its centre is uniform in the window, and what lies outside is cut off.
    """
    chosen, area, *center = jax.random.uniform(key, (4,))
    half = jnp.sqrt(area) / 2
    first, end = (jnp.round(jnp.array(size) * (jnp.array(center) + side)) for side in (-half, half))
    rows, columns = ((jnp.arange(n) >= first[axis]) & (jnp.arange(n) < end[axis]) for axis, n in enumerate(size))
    return rows[:, None] & columns & (chosen < share)
