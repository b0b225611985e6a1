"""The network of the work `lite0` in PyTorch. Needs nothing of unet_jax."""

import torch
from measure import Work
from torch import nn
from torch.nn import functional as F

STAGES = (  # size of the depthwise kernels, stride of the first block, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EncoderUNet(nn.Module):
    """The same function of the same weights as `unet_jax.models.encoder_unet.EncoderUNet` with EfficientNet-Lite0."""

    def __init__(self, work: Work):
        super().__init__()
        assert work.model["encoder_name"] == "efficientnet_lite0", work.model
        features = work.model["features"]
        self.stem = Layer(work.channels, 32, 3, stride=2)
        inputs, skips, self.blocks = 32, [0], nn.ModuleList()  # none at stride 1
        for size, first_stride, expansion, outputs, count in STAGES:
            for stride in (first_stride,) + (1,) * (count - 1):
                skips += [inputs] if stride == 2 else []
                self.blocks.append(Block(inputs, outputs, size, stride, expansion))
                inputs = outputs
        decoder = {"epsilon": 1e-5, "activation": F.relu}
        self.merge = nn.ModuleList()  # from stride 16 upwards
        for width, skip in zip(reversed(features), reversed(skips), strict=False):
            self.merge.append(
                nn.Sequential(Layer(inputs + skip, width, 3, **decoder), Layer(width, width, 3, **decoder))
            )
            inputs = width
        self.head = nn.Conv2d(inputs, work.classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> logits `[B, K, H, W]`."""
        x, skips = self.stem(image), []
        for block in self.blocks:
            if block.stride == 2:
                skips.append(x)
            x = block(x)
        for merge in self.merge:
            x = F.interpolate(x, scale_factor=2)
            x = merge(torch.cat([x, skips.pop()], 1) if skips else x)
        logits = self.head(x)
        while logits.shape[2:] != image.shape[2:]:
            logits = F.interpolate(logits, scale_factor=2, mode="bilinear")
        return logits


class Block(nn.Module):
    """A mobile inverted bottleneck (Sandler et al. 2018, arXiv:1801.04381, section 3.4)."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int):
        super().__init__()
        inside, self.stride = expansion * inputs, stride
        self.expand = Layer(inputs, inside, 1) if expansion > 1 else nn.Identity()
        self.depthwise = Layer(inside, inside, size, stride, groups=inside)
        self.project = Layer(inside, outputs, 1, activation=lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if x.shape == y.shape else y


class Layer(nn.Module):
    """Convolution, batch normalisation and activation; padded as TensorFlow's SAME for even sides."""

    def __init__(self, inputs, outputs, size, stride=1, groups=1, epsilon=1e-3, activation=F.relu6):
        super().__init__()
        border = size // 2 if stride == 1 else 0
        self.pad = (size // 2 - 1, size // 2) * 2 if stride == 2 else None
        self.conv = nn.Conv2d(inputs, outputs, size, stride, border, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.norm = nn.BatchNorm2d(outputs, eps=epsilon)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, self.pad) if self.pad else x
        return self.activation(self.norm(self.conv(x)))
