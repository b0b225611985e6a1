"""U-Nets for semantic segmentation in JAX and Flax."""


def load(workdir, step: int | None = None):
    """Loads what was trained: `unet_jax.load("runs/shapes").predict(images)`.

    Args:
      workdir: the work directory of a training, or of converted weights.
      step: which checkpoint; None is the best.

    Returns:
      a `unet_jax.inference.trained.Trained`: `config`, `classes`, `model`, `variables`, `step`, and `predict`.

    Raises:
      UserError: no work directory, or no such checkpoint.
    """
    from unet_jax.inference import trained

    return trained.load(workdir, step)
