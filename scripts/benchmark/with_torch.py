"""The works in PyTorch: network, training step and prediction. Needs nothing of unet_jax.

Images are `[B, C, H, W]` in channels-last memory, the faster layout for convolutions on CPUs and GPUs.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Task, Work, draw_batch
from torch import nn
from torch.nn import functional as F

DEVICES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "cuda"}  # platform of JAX -> device of PyTorch
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


def make_train_steps(model: UNet, work: Work, dtype: str, compiled: bool = False) -> Callable[[int], dict]:
    """A function that takes n steps of softmax cross-entropy and Adam, and returns the last `loss`.

    Args:
      model: in training mode, channels-last, on the device to use.
      work: of which to take the batch.
      dtype: bfloat16 is `torch.autocast`; weights, loss and Adam stay float32.
      compiled: by torch.compile, forward and backward; Adam is one fused kernel in either case.
    """
    image, label = _put_batch(model, work)
    logits = _make_forward(model, work, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss_fn = lambda image, label: F.cross_entropy(logits(image), label.long())
    loss_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(image, label)
            loss.backward()
            optimizer.step()
        _wait(image)
        return {"loss": loss.item()}

    return run


def make_predictions(model: UNet, work: Work, dtype: str, compiled: bool = False) -> Callable[[int], None]:
    """A function that predicts the batch n times: class probabilities float32. Arguments as for `make_train_steps`."""
    image, _ = _put_batch(model, work)
    logits = _make_forward(model.eval(), work, dtype)
    probability = lambda image: logits(image).softmax(1)
    return _repeat(torch.compile(probability, dynamic=False) if compiled else probability, image)


def _repeat(function: Callable, *args: torch.Tensor) -> Callable[[int], None]:
    @torch.inference_mode()
    def run(steps):
        for _ in range(steps):
            function(*args)
        _wait(args[0])

    return run


def _make_forward(model: UNet, work: Work, dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 images -> logits float32: scaled to 0..1, and mirrored at the borders for an unpadded network."""

    def logits(image):
        with torch.autocast(image.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            x = image.float() / 255
            return model(F.pad(x, [work.margin] * 4, mode="reflect") if work.margin else x).float()

    return logits


def _put_batch(model: UNet, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """`image` `[B, C, H, W]` and `label` `[B, H, W]`, uint8; permuted from `[B, H, W, C]`, memory is channels-last."""
    device, batch = model.head.weight.device, draw_batch(work)
    image, label = (torch.from_numpy(batch[name]).to(device) for name in ("image", "label"))
    return image.permute(0, 3, 1, 2), label


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def build(task: Task) -> tuple[Callable[[int], dict | None], dict[str, Any]]:
    """A function that takes n steps of a task, and what is known of it besides times."""
    if task.settings.platform not in DEVICES:
        raise RuntimeError(f"PyTorch is not compared on a {task.settings.platform}")
    device, work = torch.device(DEVICES[task.settings.platform]), task.work
    if device.type == "cpu":
        torch.set_num_threads(task.settings.cores)
    elif not torch.cuda.is_available():
        raise RuntimeError("this PyTorch finds no GPU")
    # JAX's default for float32 on GPUs that have it, and a search for the fastest convolutions, as XLA makes one.
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    if task.suite == "matmul":
        a, b = (torch.randn(work.size, dtype=getattr(torch, task.dtype), device=device) for _ in range(2))
        return _repeat(torch.matmul, a, b), {"gflop": 2 * work.size[0] ** 3 / 1e9}
    model = UNet(work).to(device, memory_format=torch.channels_last)
    compiled = task.contender == "PyTorch compiled"
    run = {"step": make_train_steps, "predict": make_predictions}[task.suite](model, work, task.dtype, compiled)
    facts = {"parameters": sum(weight.numel() for weight in model.parameters())}
    if compiled:  # in the first step
        marks = [time.perf_counter()]
        for _ in range(2):
            run(1)
            marks.append(time.perf_counter())
        facts["compile_s"] = max(marks[1] - marks[0] - (marks[2] - marks[1]), 0.0)
    return run, facts


def device_memory() -> int | None:
    """Peak bytes on the GPU; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
