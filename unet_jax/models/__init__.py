"""Networks, one file each."""

from unet_jax.models.unet import UNet

__all__ = ["UNet"]
