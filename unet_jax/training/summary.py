"""What a training is, in words: what is printed before its first step, and by `--mode=plan`."""

import collections
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax

from unet_jax import losses
from unet_jax.data import pipeline, pixel_sizes
from unet_jax.data.source import shorten
from unet_jax.parallel import processes
from unet_jax.training import components
from unet_jax.training import state as train_state

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def print_summary(
    config: "ConfigDict",
    built: components.Components,
    steps: components.Steps,
    images: Mapping[str, pipeline.Pipeline],
    state: train_state.TrainState,
) -> None:
    """Prints network, data, devices and steps of a training, and warns of too small batches."""
    classes, windows = built.network.classes, built.windows
    if windows:
        size, kind, again = pixel_sizes.describe(config.data), "windows", "for each window"
    else:
        size, kind, again = f"of {config.data.size[0]}x{config.data.size[1]}", "images", "each epoch"
    cached = "cached" if images["train"].cached else f"read again {again}"
    epoch = "an epoch, in which windows cover the training images once" if windows else "an epoch"
    training = tile_summary("training", built.crop, built.input_size)
    validation = tile_summary("validation", built.eval_size, built.eval_input_size)
    weights = ""
    if losses.needs_class_counts(config.loss):
        of_class = zip(classes.names, built.loss.class_weights, strict=True)
        weights = f"weights  of the classes: {shorten([f'{name} {weight:.3g}' for name, weight in of_class])}\n"
    processes.print_on_main(
        f"network  {network_summary(state.params)}\n"
        f"data     {len(images['train'].source)} training and {len(images['validation'].source)} validation images "
        f"{size}, {len(classes.names)} classes ({classes.task}), {cached}\n{weights}"
        f"tiles    {training}; {validation}\n"
        f"devices  {mesh_summary(built.network.mesh)}; {jax.process_count()} process(es)\n"
        f"steps    {steps.total} of {config.train.batch_size} {kind}, {steps.per_epoch:.1f} {epoch}"
    )
    _warn_of_small_batches(config)


def print_extension(config: "ConfigDict", built: components.Components, steps: components.Steps) -> None:
    """Prints by how much a run is extended, and what the learning rate does then."""
    before, now, kind = config.train.extends[-1], config.train.epochs, config.optimizer.extension
    rate = "starts again" if kind == "restart" else f"stays at {float(built.schedule(steps.total - 1)):.3g}"
    processes.print_on_main(
        f"Extended from {before:g} to {now:g} epochs, {steps.ends[-2]} to {steps.total} steps: the learning rate "
        f"{rate} (config.optimizer.extension={kind})"
    )


def _warn_of_small_batches(config: "ConfigDict") -> None:
    """Warns of batch normalisation over few images, whose averages in evaluation may be far from what training saw."""
    is_pretrained = config.model.name != "unet" and config.model.pretrained
    others = {"norm": "group"} | ({"encoder_norm": "frozen"} if is_pretrained else {})
    remedies = [f"config.model.{field}={other}" for field, other in others.items() if config.model[field] == "batch"]
    images = config.train.batch_size // config.train.accumulate
    if remedies and images <= 2:
        processes.print_on_main(
            f"warning: batch normalisation over {images} image(s) at a time: evaluation, which has averages instead, "
            f"can be much worse than training. Take larger batches, or {' and '.join(remedies)}"
        )


def tile_summary(use: str, size: Sequence[int], input_size: Sequence[int]) -> str:
    """What the network predicts, and how much of the image it is given for it."""
    shown = f"{use} predicts {size[0]}x{size[1]}"
    same = tuple(size) == tuple(input_size)
    return shown if same else f"{shown} from {input_size[0]}x{input_size[1]}, mirrored where needed"


def network_summary(params: Mapping) -> str:
    """The number of parameters, in all and of each part: layers of one name, as `down_0` and `down_1`, are one part."""
    parts: collections.Counter[str] = collections.Counter()
    for name, tree in params.items():
        parts[name.rstrip("0123456789").rstrip("_")] += sum(leaf.size for leaf in jax.tree.leaves(tree))
    return f"{parts.total():,} parameters: " + ", ".join(f"{name} {count:,}" for name, count in parts.items())


def mesh_summary(mesh: jax.sharding.Mesh) -> str:
    """Number and kind of the devices, and the shape of the mesh."""
    shape = mesh.shape
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh data={shape['data']} space={shape['space']}"


def memory_summary(compiled: jax.stages.Compiled) -> str:
    """What a compiled step needs on each device, if the compiler reports it."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "unknown on this device"
    held, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    return (
        f"{(held + temporary) / 2**20:.0f} MiB a step on each device: {held / 2**20:.0f} state and batch, "
        f"{temporary / 2**20:.0f} activations and gradients"
    )
