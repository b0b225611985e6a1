"""The networks of `benchmark.py` in PyTorch, with their training step and prediction; needs nothing of unet_jax.

Images are `[B, C, H, W]` in channels-last memory, the faster layout for convolutions on CPUs and GPUs.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from benchmark_workers import Contender, Task, Work, draw_batch
from torch import nn
from torch.nn import functional as F

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "cuda"}  # of jax -> of torch


class UNet(nn.Module):
    """The same function of the same weights as `unet_jax.models.unet.UNet`, whose settings it takes."""

    def __init__(
        self,
        channels: int,
        num_outputs: int,
        features: Sequence[int],
        padding: str = "same",
        upsample: str = "transposed_2x2",
        dropout: float = 0.0,
        dropout_on_skip: bool = False,
        extra_conv: bool = False,
    ):
        super().__init__()
        border, kernel_size = {"same": 1, "valid": 0}[padding], int(upsample[-1])
        inputs, upper = (channels, *features), features[:-1]
        self.dropout, self.dropout_on_skip = dropout, dropout_on_skip
        self.down = nn.ModuleList(_block(2, inputs[i], width, border) for i, width in enumerate(features))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(features[i + 1], width, kernel_size, stride=2) for i, width in enumerate(upper)
        )
        self.merge = nn.ModuleList(_block(2, 2 * width, width, border) for width in upper)
        self.extra = _block(1, features[0], features[0], border) if extra_conv else None
        self.head = nn.Conv2d(features[0], num_outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> logits `[B, K, H', W']`."""
        lowest, skips = len(self.down) - 1, []
        for level, block in enumerate(self.down):
            x = skip = block(x)
            if self.dropout and level >= lowest - 1:
                x = F.dropout(x, self.dropout, self.training)
            if level < lowest:
                skips.append(x if self.dropout_on_skip else skip)
                x = F.max_pool2d(x, 2)
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            height, width = x.shape[2:]
            # A 3x3 kernel reaches one pixel beyond twice the size; TensorFlow's and JAX's SAME leave out the last.
            x = up(x)[:, :, : 2 * height, : 2 * width]
            skip = skips.pop()
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            x = merge(torch.cat([x, skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]], 1))
        return self.head(x if self.extra is None else self.extra(x))


def _block(depth: int, inputs: int, outputs: int, border: int) -> nn.Sequential:
    layers = []
    for i in range(depth):
        conv = nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=border)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def as_input(image: torch.Tensor, around: Sequence[int]) -> torch.Tensor:
    """uint8 images as floats in 0..1, mirrored `around` as an unpadded network needs it: left, right, above, below."""
    image = image.float() / 255
    return F.pad(image, around, mode="reflect") if any(around) else image


def make_train_steps(
    model: UNet, batch: dict[str, np.ndarray], around: Sequence[int], dtype: str, compiled: bool = False
) -> Callable[[int], float]:
    """A function that takes n steps of softmax cross-entropy and Adam, and returns the last loss.

    Args:
      model: in training mode, channels-last, on the device to use.
      batch: `image` uint8 `[B, H, W, C]`, `label` uint8 `[B, H, W]`.
      around: as `as_input` takes it.
      dtype: bfloat16 is `torch.autocast`; weights, loss and Adam stay float32.
      compiled: by torch.compile, forward and backward; Adam is one fused kernel in either case.
    """
    image, label = _put(batch, next(model.parameters()).device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def loss_fn(image, label):
        with _autocast(image, dtype):
            logits = model(as_input(image, around))
        return F.cross_entropy(logits.float(), label.long())

    loss_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(image, label)
            loss.backward()
            optimizer.step()
        _wait(image)
        return loss.item()

    return steps


def make_predictions(
    model: UNet, batch: dict[str, np.ndarray], around: Sequence[int], dtype: str, compiled: bool = False
) -> Callable[[int], None]:
    """A function that predicts the batch n times: class probabilities float32; the arguments as of the steps."""
    image, _ = _put(batch, next(model.parameters()).device)
    model.eval()

    def probability(image):
        with _autocast(image, dtype):
            logits = model(as_input(image, around))
        return logits.float().softmax(1)

    probability = torch.compile(probability, dynamic=False) if compiled else probability

    def predictions(count):
        with torch.inference_mode():
            for _ in range(count):
                probability(image)
            _wait(image)

    return predictions


def _make_products(n: int, dtype: str, device: torch.device) -> Callable[[int], None]:
    a, b = (torch.randn((n, n), dtype=getattr(torch, dtype), device=device) for _ in range(2))

    def products(count):
        for _ in range(count):
            a @ b
        _wait(a)

    return products


def start(task: Task) -> dict:
    """Chooses device and precision; returns what there is."""
    if task.platform not in PLATFORMS:
        raise RuntimeError(f"PyTorch is not compared on a {task.platform}")
    kind = PLATFORMS[task.platform]
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("this PyTorch finds no GPU")
        # What JAX does by default in float32 on GPUs that have it, and the search for the fastest convolutions, which
        # XLA makes as well.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(task.cores)
    torch.manual_seed(0)
    return {"versions": {"torch": torch.__version__}}


def build(task: Task) -> Contender:
    """Makes the work of a task."""
    device, work = torch.device(PLATFORMS[task.platform]), task.work
    if task.suite == "matmul":
        n = work.size[0]
        return Contender(_make_products(n, task.dtype, device), {"gflop": 2 * n**3 / 1e9})
    model = make_model(work).to(device, memory_format=torch.channels_last)
    make = {"step": make_train_steps, "predict": make_predictions}[task.suite]
    compiled = task.contender == "PyTorch compiled"
    run = make(model, draw_batch(work), work.around, task.dtype, compiled)
    facts = {"parameters": sum(weight.numel() for weight in model.parameters())}
    if compiled:
        first, second = (_seconds(run) for _ in range(2))
        facts["compile_s"] = max(first - second, 0.0)
    on_gpu = device.type == "cuda"
    return Contender(run, facts, torch.cuda.max_memory_allocated if on_gpu else None)


def make_model(work: Work) -> UNet:
    """The network of a work, in training mode."""
    return UNet(work.channels, work.classes, **work.model)


def _put(batch: dict[str, np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, H, W, C]` become `[B, C, H, W]` without moving: that is channels-last."""
    return torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(device), torch.from_numpy(batch["label"]).to(device)


def _autocast(image: torch.Tensor, dtype: str) -> torch.autocast:
    return torch.autocast(image.device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _seconds(run: Callable[[int], object]) -> float:
    started = time.perf_counter()
    run(1)
    return time.perf_counter() - started
