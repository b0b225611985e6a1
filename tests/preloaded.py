"""What the commands import, see `commands.py`."""

import clu.metric_writers
import clu.parameter_overview
import matplotlib.pyplot
import tensorflow

from unet_jax.data import shapes

__all__ = ["clu", "matplotlib", "shapes", "tensorflow", "train"]
