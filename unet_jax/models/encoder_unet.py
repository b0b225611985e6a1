"""A U-Net whose encoder is a network that classifies images, so that it can start from published weights.

image ─ encoder ─ stride 2 ───────────── skip ────────► merge 0 ─ head ─ bilinear ─► logits
          └ stride 4 ────────── skip ───► merge 1 ─ up ──┘
              └ ... ─ stride 32 ─ up ──────┘
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from unet_jax.errors import UserError, check_choice
from unet_jax.models import encoders, ops
from unet_jax.models.conv import Conv
from unet_jax.models.unet import UPSAMPLE, ConvBlock, TransposedConv, check_deep_supervision

LEVELS = 5  # of the encoder; level n has the stride 2**n


class EncoderUNet(nn.Module):
    """Maps images to logits; meets the protocol of `unet_jax.models`."""

    num_outputs: int  # channels of the logits: the number of classes, or 1 for a binary task
    encoder_name: str = "efficientnet_lite0"  # one of `encoders.NAMES`
    # Widths of the decoder, top to bottom; the last is at stride 16. The first is that of the head: at stride 1 with
    # five widths, 2 with four, 4 with three. Logits of a head at stride 2 or 4 are doubled bilinearly, once or twice.
    features: Sequence[int] = (32, 48, 64, 128)
    upsample: str = "nearest"  # `nearest` or `bilinear`, without weights; `transposed_2x2` or `transposed_3x3`
    dropout: float = 0.0  # rate on the encoder's last features; 0 is none
    norm: str = "batch"  # of the decoder: `none`, `batch` or `group`
    deep_supervision: int = 0  # more heads, at as many levels below the top of the decoder, for training; see `UNet`
    encoder_norm: str = "batch"  # `batch`, or `frozen`: averages, scales and biases stay as they are loaded
    remat: Sequence[int] = ()  # levels of encoder and decoder whose blocks are rematerialised; level n has stride 2**n
    conv_impl: str = "plain"  # or `cpu`, on a single CPU device; the result is the same
    dtype: str = "float32"  # of the computation; parameters, normalisation statistics and logits stay float32

    def setup(self):
        conv = partial(Conv, conv_impl=self.conv_impl, dtype=self.dtype)
        glorot = nn.initializers.glorot_uniform()
        remat_block = nn.remat(ConvBlock, static_argnums=2)
        blocks = [remat_block if self.head_level + n in self.remat else ConvBlock for n in range(len(self.features))]
        self.encoder = encoders.find(self.encoder_name).make(
            frozen=self.encoder_norm == "frozen",
            remat=tuple(self.remat),
            conv_impl=self.conv_impl,
            dtype=self.dtype,
        )
        if self.upsample.startswith("transposed"):
            self.up = [TransposedConv(n, int(self.upsample[-1]), glorot, self.dtype) for n in self.features]
        doubled = self.upsample == "nearest"
        self.merge = [
            make(n, 2, conv, self.norm, self.dtype, doubled) for make, n in zip(blocks, self.features, strict=True)
        ]
        head = partial(nn.Conv, self.num_outputs, (1, 1), kernel_init=glorot, dtype=self.dtype)
        self.head, self.deep_head = head(), [head() for _ in range(self.deep_supervision)]

    def __call__(self, image: jax.Array, keys: jax.Array | None = None) -> jax.Array | tuple[jax.Array, ...]:
        """float `[B, H, W, C]` -> float32 logits `[B, H, W, num_outputs]`; H and W are multiples of 32.

        `keys` `[B]` are random keys for dropout; None at evaluation: no dropout, and the running averages of batch
        normalisation. With keys and `deep_supervision` n the logits, and those at 1/2, ..., 1/2^n of their size.
        """
        self.output_size(image.shape[1:3])
        *skips, x = self.encoder(image.astype(self.dtype), keys is not None)
        if keys is not None and self.dropout > 0:
            x = ops.dropout(x, keys, self.dropout)
        return self.decode(x, skips, train=keys is not None)

    def decode(self, x: jax.Array, skips: Sequence[jax.Array], train: bool) -> jax.Array | tuple[jax.Array, ...]:
        """From the features at stride 32, and the skips at strides 2 to 16, to the logits."""
        deep: list[jax.Array] = []
        for n, merge in reversed(list(enumerate(self.merge))):
            if self.upsample.startswith("transposed"):
                x = self.up[n](x)
            elif self.upsample == "bilinear":
                x = ops.resize_2x(x)
            level = self.head_level + n
            x = merge(x, train, skips[level - 1] if level else None)
            if 0 < n <= self.deep_supervision and (train or self.is_initializing()):
                deep.insert(0, self.enlarge(self.deep_head[n - 1](x)))
        logits = self.enlarge(self.head(x))
        return (logits, *deep) if train and deep else logits

    def enlarge(self, logits: jax.Array) -> jax.Array:
        """From the stride of the head to that of the image."""
        logits = logits.astype(jnp.float32)
        for _ in range(self.head_level):
            logits = ops.resize_2x(logits)
        return logits

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the logits, which are those of the image; a `UserError` if it cannot take them."""
        if any(length % self.stride or length < 1 for length in size):
            legal = [{max(length // self.stride, 1), -(-length // self.stride)} for length in size]
            nearest = [" or ".join(str(n * self.stride) for n in sorted(lengths)) for lengths in legal]
            raise UserError(
                f"this network (encoder {self.encoder_name!r}) does not accept images of {size[0]}x{size[1]} pixels "
                f"(height x width). Nearest heights: {nearest[0]}; nearest widths: {nearest[1]}"
            )
        return tuple(size)

    @property
    def head_level(self) -> int:
        """The head has the stride 2**head_level."""
        return LEVELS - len(self.features)

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the lowest level: accepted sizes are multiples of it."""
        return 2**LEVELS

    @property
    def is_local(self) -> bool:
        """False: zeros surround the features of every level, so that a tile sees its edge."""
        return False

    @property
    def smallest_input(self) -> tuple[int, int]:
        """Height and width of the smallest image that the network takes."""
        return self.stride, self.stride

    @property
    def first_conv(self) -> str:
        """The path below `params` of the kernel that meets the image."""
        return "encoder/stem/conv/kernel"

    def margins(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(above, below), (left, right): pixels that an image of `size` needs around it to be predicted whole."""
        return tuple((0, -length % self.stride) for length in size)


def create(num_outputs: int, **settings) -> EncoderUNet:
    """The network of `config.model`; a `UserError` names an invalid setting and what it can be."""
    encoders.find(settings["encoder"])
    check_choice("config.model.upsample", settings["upsample"], UPSAMPLE)
    check_choice("config.model.norm", settings["norm"], ("none", "batch", "group"))
    check_choice("config.model.encoder_norm", settings["encoder_norm"], ("batch", "frozen"))
    check_choice("config.model.dtype", settings["dtype"], ("float32", "bfloat16"))
    of_unet = {"padding": "same", "dropout_on_skip": False, "extra_conv": False, "kernel_init": "he", "block": "plain"}
    for name, value in of_unet.items():
        if settings[name] != value:
            raise UserError(
                f"config.model.{name} = {settings[name]!r} is for config.model.name = 'unet'; with 'encoder_unet' it "
                f"must be {value!r}"
            )
    features = settings["features"]
    if not 3 <= len(features) <= LEVELS or not all(isinstance(n, int) and n > 0 for n in features):
        raise UserError(
            f"config.model.features = {features} needs 3 to 5 positive widths of the decoder, top to bottom: with "
            "three the head is at stride 4, with four at 2, with five at 1"
        )
    check_deep_supervision(settings["deep_supervision"], len(features) - 1)
    if not 0 <= settings["dropout"] < 1:
        raise UserError(f"config.model.dropout = {settings['dropout']} is not in [0, 1)")
    if not set(settings["remat"]) <= set(range(LEVELS + 1)):
        raise UserError(
            f"config.model.remat = {settings['remat']} must be levels, 0 to {LEVELS}; level n has stride 2**n"
        )
    fields = {name: settings[name] for name in settings if name in EncoderUNet.__dataclass_fields__}
    return EncoderUNet(num_outputs, encoder_name=settings["encoder"], **fields)
