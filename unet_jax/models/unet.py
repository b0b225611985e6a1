"""The U-Net of Ronneberger, Fischer and Brox, 2015 (arXiv:1505.04597), and its common variants as settings.

image ─ down 0 ──────────────── skip ───────────────► merge 0 ─ (extra) ─ head ─► logits
          └ pool ─ down 1 ───── skip ──► merge 1 ─ up ─┘
                     └ pool ─ down 2 ─ up ─┘
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
from flax import linen as nn

from unet_jax.errors import UserError, check_choice
from unet_jax.models import ops
from unet_jax.models.batch_norm import BatchNorm
from unet_jax.models.conv import Conv

UPSAMPLE = ("transposed_2x2", "transposed_3x3", "nearest", "bilinear")
_he = partial(nn.initializers.variance_scaling, mode="fan_in", distribution="normal")
INIT = {  # of the 3x3 convolutions, the up-sampling and the head
    "he": (nn.initializers.he_normal(), nn.initializers.glorot_uniform(), nn.initializers.glorot_uniform()),
    # N(0, sqrt(2/N)) for N inputs to each neuron: section 3 of the paper. A stride of two leaves a quarter of the taps.
    "paper": (_he(2.0), _he(8.0), _he(2.0)),
}


class UNet(nn.Module):
    """Maps images to logits; meets the protocol of `unet_jax.models`."""

    num_outputs: int  # channels of the logits: the number of classes, or 1 for a binary task
    features: Sequence[int] = (64, 128, 256, 512, 1024)  # width of each level, top to bottom; the last is not pooled
    padding: str = "same"  # of the 3x3 convolutions, `same` or `valid`; `valid` crops the skips and shrinks the output
    # `transposed_2x2` or `transposed_3x3` (a transposed convolution without activation); `nearest` or `bilinear` (a
    # resize, then a 3x3 convolution with activation).
    upsample: str = "transposed_2x2"
    dropout: float = 0.0  # rate at the end of the two lowest encoder blocks; 0 is none
    dropout_on_skip: bool = False  # whether the lowest skip is taken after its dropout (CARLA) or before (Keras ISBI)
    norm: str = "none"  # `none`, `batch` or `group`, before each activation
    extra_conv: bool = False  # whether one more 3x3 convolution stands before the head
    block: str = "plain"  # of the encoder, or `residual`: adds its input, as in the ResEnc presets of nnU-Net
    # `he` (truncated He-normal; Glorot-uniform where no ReLU follows) or `paper` (N(0, sqrt(2/N)) everywhere).
    kernel_init: str = "he"
    # More heads, at as many levels below the top, whose logits training sees too (Lee et al. 2015, arXiv:1409.5185).
    deep_supervision: int = 0
    # Levels, 0 is the top, whose blocks are rematerialised: they keep no activations and recompute them in the backward
    # pass (Chen et al. 2016, arXiv:1604.06174); the result is the same.
    remat: Sequence[int] = ()
    conv_impl: str = "plain"  # or `cpu`, on a single CPU device (see `ops.conv_3x3_on_cpu`); the result is the same
    dtype: str = "float32"  # of the computation; parameters, normalisation statistics and logits stay float32

    def setup(self):
        conv_init, up_init, head_init = INIT[self.kernel_init]
        conv = partial(
            Conv,
            padding=self.padding.upper(),
            kernel_init=conv_init,
            conv_impl=self.conv_impl,
            dtype=self.dtype,
        )
        block = partial(ConvBlock, conv=conv, norm=self.norm, dtype=self.dtype)
        remat_block = partial(nn.remat(ConvBlock, static_argnums=2), **block.keywords)
        blocks = [remat_block if level in self.remat else block for level in range(len(self.features))]
        upper = self.features[:-1]
        residual = self.block == "residual"
        self.down = [make(width, 2, residual=residual) for make, width in zip(blocks, self.features, strict=True)]
        self.merge = [make(width, 2) for make, width in zip(blocks, upper, strict=False)]
        if self.upsample.startswith("transposed"):
            kernel_size = int(self.upsample[-1])
            self.up = [TransposedConv(width, kernel_size, up_init, dtype=self.dtype) for width in upper]
        else:
            # Padded in a valid network too, as the paper's up-convolution keeps twice the size.
            doubled = self.upsample == "nearest"
            self.up = [block(width, 1, conv=partial(conv, padding="SAME"), doubled=doubled) for width in upper]
        self.extra = block(self.features[0], 1, norm="none") if self.extra_conv else None
        head = partial(nn.Conv, self.num_outputs, (1, 1), kernel_init=head_init, dtype=self.dtype)
        self.head, self.deep_head = head(), [head() for _ in range(self.deep_supervision)]

    def __call__(self, image: jax.Array, keys: jax.Array | None = None) -> jax.Array | tuple[jax.Array, ...]:
        """float `[B, H, W, C]` -> float32 logits `[B, H', W', num_outputs]`, (H', W') = `output_size((H, W))`.

        `keys` `[B]` are random keys for dropout; None at evaluation: no dropout, and the running averages of batch
        normalisation. With keys and `deep_supervision` n the logits, and those at 1/2, ..., 1/2^n of their size.
        """
        x, skips = self.encode(image.astype(self.dtype), keys)
        logits = self.decode(x, skips, train=keys is not None)
        found, expected = jax.tree.leaves(logits)[0].shape[1:3], self.output_size(image.shape[1:3])
        assert found == expected, f"{found} is not {expected}"
        return logits

    def encode(self, x: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
        """The contracting path: the lowest features, and the skips from top to bottom."""
        lowest = len(self.down) - 1
        skips = []
        for level, block in enumerate(self.down):
            x = skip = block(x, keys is not None)
            if keys is not None and self.dropout > 0 and level >= lowest - 1:
                level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level)
                x = ops.dropout(x, level_keys, self.dropout)
            if level < lowest:
                skips.append(x if self.dropout_on_skip else skip)
                x = ops.max_pool_2x2(x)
        return x, skips

    def decode(self, x: jax.Array, skips: Sequence[jax.Array], train: bool) -> jax.Array | tuple[jax.Array, ...]:
        """The expanding path: consumes every skip, from the last to the first."""
        skips, deep = list(skips), []
        for level, (up, merge) in reversed(list(enumerate(zip(self.up, self.merge, strict=True)))):
            if self.upsample == "bilinear":
                x = ops.resize_2x(x)
            x = up(x) if self.upsample.startswith("transposed") else up(x, train)
            x = merge(x, train, center_crop(skips.pop(), x.shape[1:3]))
            if 0 < level <= self.deep_supervision and (train or self.is_initializing()):
                deep.insert(0, self.deep_head[level - 1](x).astype(jnp.float32))
        assert not skips, f"{len(skips)} skips were not consumed"
        if self.extra is not None:
            x = self.extra(x, train)
        logits = self.head(x).astype(jnp.float32)
        return (logits, *deep) if train and deep else logits

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the logits for images of (height, width) `size`.

        Raises:
          UserError: the network cannot take that size; names the nearest that it can.
        """
        output = tuple(self._output_length(length) for length in size)
        if None not in output:
            return output
        legal = [self._nearest_lengths(length) for length in size]
        raise UserError(
            f"this network (padding {self.padding!r}, {len(self.features) - 1} poolings) does not accept images of "
            f"{size[0]}x{size[1]} pixels (height x width). Nearest heights: {legal[0]}; nearest widths: {legal[1]}"
        )

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the lowest level: accepted sizes differ by multiples of it."""
        return 2 ** (len(self.features) - 1)

    @property
    def is_local(self) -> bool:
        """Whether an output pixel depends only on its neighbourhood: tiles then predict what the whole image would."""
        return self.padding == "valid" and self.upsample == "transposed_2x2" and self.norm != "group"

    @property
    def smallest_input(self) -> tuple[int, int]:
        """Height and width of the smallest image that the network takes."""
        height, width = self.margins((1, 1))
        return 1 + sum(height), 1 + sum(width)

    @property
    def first_conv(self) -> str:
        """The path below `params` of the kernel that meets the image."""
        return "down_0/Conv_0/kernel"

    def margins(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(above, below), (left, right): pixels that an image of `size` needs around it for all of it to be predicted.

        The prediction begins at the first pixel; its `size` is the first part of the output.
        """
        return tuple(self._margin(length) for length in size)

    def _margin(self, length: int) -> tuple[int, int]:
        needed = length  # the input is never smaller than the output
        while (output := self._output_length(needed)) is None or output < length:
            needed += 1
        before = (needed - output) // 2
        return before, needed - length - before

    def _output_length(self, length: int) -> int | None:
        """One side of the output; None if the network cannot take an input of that length."""
        border = 4 if self.padding == "valid" else 0  # two 3x3 convolutions
        poolings = len(self.features) - 1
        for _ in range(poolings):
            length -= border
            if length % 2:
                return None
            length //= 2
        length -= border
        if length < 1:
            return None
        for _ in range(poolings):
            length = 2 * length - border
        length -= 2 if self.extra_conv and border else 0
        return length if length >= 1 else None

    def _nearest_lengths(self, length: int) -> str:
        above = next(n for n in range(max(length, 1), length + 4096) if self._output_length(n))
        below = next((n for n in range(length, 0, -1) if self._output_length(n)), above)
        return " or ".join(str(n) for n in sorted({below, above}))


class ConvBlock(nn.Module):
    """`depth` times: 3x3 convolution, normalisation, ReLU; `doubled` and `skip` are those of the first `Conv`.

    A residual one adds its input before the last ReLU, projected if it is of another width (He et al. 2015,
    arXiv:1512.03385, section 3.3, option B) and cropped if the convolutions are not padded.
    """

    features: int
    depth: int
    conv: partial
    norm: str
    dtype: str
    doubled: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, skip: jax.Array | None = None) -> jax.Array:
        entering, conv = x, partial(self.conv, self.features, use_bias=self.norm == "none")  # a norm brings its own
        for i in range(self.depth):
            x = conv(3, doubled=self.doubled and i == 0)(x, skip if i == 0 else None)
            x = self.normalize(x, train, None if self.residual and i + 1 == self.depth else nn.relu)
        if not self.residual:
            return x
        if entering.shape[-1] != self.features:
            entering = self.normalize(conv(1, name="shortcut")(entering), train, None, name="shortcut_norm")
        return nn.relu(x + center_crop(entering, x.shape[1:3]))

    def normalize(self, x: jax.Array, train: bool, activation: Callable | None, name: str | None = None) -> jax.Array:
        if self.norm == "batch":
            return BatchNorm(not train, activation=activation, dtype=self.dtype, name=name)(x)
        if self.norm == "group":
            x = nn.GroupNorm(num_groups=gcd(8, self.features), dtype=self.dtype, name=name)(x)
        return activation(x) if activation else x


class TransposedConv(nn.Module):
    """Up-sampling by two, with a bias and no activation; the parameters of `flax.linen.ConvTranspose`."""

    features: int
    kernel_size: int
    kernel_init: Callable
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return ops.conv_transpose_2x(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


def create(num_outputs: int, **settings) -> UNet:
    """The U-Net of `config.model`; a `UserError` names an invalid setting and what it can be."""
    check_choice("config.model.padding", settings["padding"], ("same", "valid"))
    check_choice("config.model.upsample", settings["upsample"], UPSAMPLE)
    check_choice("config.model.norm", settings["norm"], ("none", "batch", "group"))
    check_choice("config.model.kernel_init", settings["kernel_init"], INIT)
    check_choice("config.model.block", settings["block"], ("plain", "residual"))
    check_choice("config.model.dtype", settings["dtype"], ("float32", "bfloat16"))
    if not 2 <= len(settings["features"]) <= 10 or not all(isinstance(n, int) and n > 0 for n in settings["features"]):
        raise UserError(f"config.model.features = {settings['features']} needs 2 to 10 positive widths, top to bottom")
    if not 0 <= settings["dropout"] < 1:
        raise UserError(f"config.model.dropout = {settings['dropout']} is not in [0, 1)")
    model = UNet(num_outputs, **{name: settings[name] for name in settings if name in UNet.__dataclass_fields__})
    lowest = len(model.features) - 1
    if not set(model.remat) <= set(range(lowest + 1)):
        raise UserError(f"config.model.remat = {model.remat} must be levels of the network, 0 to {lowest}")
    check_deep_supervision(model.deep_supervision, lowest - 1)
    if model.deep_supervision and model.padding != "same":
        raise UserError("config.model.deep_supervision needs config.model.padding = 'same'")
    return model


def check_deep_supervision(heads: int, highest: int) -> None:
    """Raises a `UserError` unless so many more heads fit below the top of a decoder, at most `highest`."""
    if not isinstance(heads, int) or not 0 <= heads <= highest:
        raise UserError(f"config.model.deep_supervision = {heads} is not in 0..{highest}, the levels below the top")


def center_crop(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """The central `size` (height, width) of `x` `[B, H, W, ...]`."""
    top, left = (x.shape[1] - size[0]) // 2, (x.shape[2] - size[1]) // 2
    return x[:, top : top + size[0], left : left + size[1]]
