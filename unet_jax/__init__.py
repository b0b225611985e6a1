"""U-Nets for semantic segmentation in JAX and Flax."""
