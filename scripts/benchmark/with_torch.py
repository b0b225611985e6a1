"""The works in PyTorch: network, training step and prediction. Needs nothing of unet_jax.

Images are `[B, C, H, W]` in channels-last memory, the faster layout for convolutions on CPUs and GPUs.
"""

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Task, Work, draw_batch
from torch import nn
from torch.nn import functional as F
from torch_encoder_unet import EncoderUNet

DEVICES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "cuda"}  # platform of JAX -> device of PyTorch
Run = Callable[[int], dict[str, float] | None]  # takes n steps and waits for their end
DEFAULTS = {"padding": "same", "upsample": "transposed_2x2", "dropout": 0.0}


class UNet(nn.Module):
    """The same function of the same weights as `unet_jax.models.unet.UNet`, whose settings `work.model` has."""

    def __init__(self, work: Work):
        super().__init__()
        self.settings = settings = DEFAULTS | work.model
        features, border = settings["features"], {"same": 1, "valid": 0}[settings["padding"]]
        inputs, upper = (work.channels, *features), features[:-1]
        self.down = nn.ModuleList(_block(inputs[i], width, border) for i, width in enumerate(features))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(features[i + 1], width, int(settings["upsample"][-1]), stride=2)
            for i, width in enumerate(upper)
        )
        self.merge = nn.ModuleList(_block(2 * width, width, border) for width in upper)
        self.extra = _block(features[0], features[0], border, depth=1) if settings.get("extra_conv") else None
        self.head = nn.Conv2d(features[0], work.classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> logits `[B, K, H', W']`."""
        lowest, skips = len(self.down) - 1, []
        for level, block in enumerate(self.down):
            x = skip = block(x)
            if self.settings["dropout"] and level >= lowest - 1:
                x = F.dropout(x, self.settings["dropout"], self.training)
            if level < lowest:
                skips.append(x if self.settings.get("dropout_on_skip") else skip)
                x = F.max_pool2d(x, 2)
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            height, width = x.shape[2:]
            # A 3x3 kernel reaches one pixel beyond twice the size; SAME in JAX and TensorFlow drops the last one.
            x = up(x)[:, :, : 2 * height, : 2 * width]
            skip = skips.pop()
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            x = merge(torch.cat([x, skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]], 1))
        return self.head(x if self.extra is None else self.extra(x))


def _block(inputs: int, outputs: int, border: int, depth: int = 2) -> nn.Sequential:
    layers = []
    for i in range(depth):
        conv = nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=border)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def make_network(work: Work) -> UNet | EncoderUNet:
    """The network of a work in training mode, channels-last, on the CPU."""
    make = EncoderUNet if "encoder_name" in work.model else UNet
    return make(work).to(memory_format=torch.channels_last)


def make_run(suite: str, model: nn.Module, work: Work, dtype: str, compiled: bool = False) -> Run:
    """A function that takes n steps of softmax cross-entropy and Adam and returns the last `loss`, or that predicts.

    The `model` is in training mode, channels-last, on the device to use. bfloat16 is `torch.autocast`: weights, loss,
    Adam and probabilities stay float32. What is compiled are forward and backward; Adam is one fused kernel anyway.
    """
    batch, device = draw_batch(work), model.head.weight.device
    image, label = (torch.from_numpy(batch[name]).to(device) for name in ("image", "label"))
    image = image.permute(0, 3, 1, 2)  # which is channels-last without moving anything

    def logits(image):  # scaled to 0..1, and mirrored at the borders for an unpadded network
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            x = image.float() / 255
            return model(F.pad(x, [work.margin] * 4, mode="reflect") if work.margin else x).float()

    compile = partial(torch.compile, dynamic=False) if compiled else lambda function: function
    if suite == "predict":
        model.eval()
        return _repeat(compile(lambda image: logits(image).softmax(1)), image)
    loss_fn = compile(lambda image, label: F.cross_entropy(logits(image), label.long()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def run(count):
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(image, label)
            loss.backward()
            optimizer.step()
        if image.is_cuda:
            torch.cuda.synchronize()
        return {"loss": loss.item()}

    return run


def _repeat(function: Callable, *args: torch.Tensor) -> Run:
    @torch.inference_mode()
    def run(count):
        for _ in range(count):
            function(*args)
        if args[0].is_cuda:
            torch.cuda.synchronize()

    return run


def build(task: Task) -> tuple[Run, dict[str, Any]]:
    """A function that takes n steps of a task, and what is known of it besides times."""
    if task.settings.platform not in DEVICES:
        raise RuntimeError(f"PyTorch is not compared on a {task.settings.platform}")
    device, work = torch.device(DEVICES[task.settings.platform]), task.work
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(task.settings.cores)
    elif not torch.cuda.is_available():
        raise RuntimeError("this PyTorch finds no GPU")
    else:  # as in JAX: TensorFloat-32 if there is one, and a search for the fastest convolutions
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if task.suite == "matmul":
        a, b = (torch.randn(work.size, dtype=getattr(torch, task.dtype), device=device) for _ in range(2))
        return _repeat(torch.matmul, a, b), {"gflop": 2 * work.size[0] ** 3 / 1e9}
    model = make_network(work).to(device)
    compiled = task.contender == "PyTorch compiled"
    run = make_run(task.suite, model, work, task.dtype, compiled)
    facts = {"parameters": sum(weight.numel() for weight in model.parameters())}
    if compiled:
        first, second = (timeit.timeit(lambda: run(1), number=1) for _ in range(2))
        facts["compile_s"] = max(first - second, 0.0)
    return run, facts


def device_memory() -> int | None:
    """Peak bytes on the GPU; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
