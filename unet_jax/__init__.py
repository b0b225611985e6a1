"""U-Nets for semantic segmentation in JAX and Flax."""


def load(workdir, step: int | None = None):
    """Loads a trained network: `unet_jax.load("runs/shapes").predict_image("photo.jpg")`.

    Args:
      workdir: the work directory of a training, or of imported weights.
      step: which checkpoint; None is the best.

    Returns:
      a `unet_jax.inference.trained.Trained`: `config`, `classes`, `network`, `variables`, `step`, and the methods
      `predict_image`, for a file or an image of any size, and `predict`, for a batch as it comes out of training.

    Raises:
      UserError: no work directory, or no such checkpoint.
    """
    from unet_jax.inference import trained  # here, so that importing the package does not import jax

    return trained.load(workdir, step)
