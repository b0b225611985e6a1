"""What a training step needs on the devices that are here, before any image is read: memory, work and traffic."""

import collections
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from unet_jax import data, evaluate, log, make, mesh, program, state, step
from unet_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

STEPS_PER_EPOCH = 1000.0  # the schedule does not change what a step costs
MAX_COMPILATIONS = 12


class Plan(NamedTuple):
    """A compiled training step.

    Attributes:
      parts: see `make.Parts`.
      compiled: the step.
      arguments: what it takes, as shapes with shardings: state, batch, signals.
      peak: bytes on each device; None where the compiler does not tell.
    """

    parts: make.Parts
    compiled: jax.stages.Compiled
    arguments: tuple
    peak: int | None


def plan(config: "ConfigDict", memory_gib: float | None) -> None:
    """Compiles the training step for the devices that are here, and prints what it needs.

    Args:
      config: as `configs/default.py` describes it.
      memory_gib: GiB of a device, to find the largest batch that fits; None is what the device tells.

    Raises:
      UserError: a setting has no meaning, or the files that would have to tell the classes are not there.
    """
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise UserError(f"--memory_gib={memory_gib} must be positive")
    config = config.copy_and_resolve_references()
    classes = find_classes(config.data)
    devices = mesh.create(config.mesh.data, config.mesh.space)
    mesh.say(f"Compiling the training step for {_devices(devices)}.")
    made = {config.train.batch_size: compile_step(config, classes, devices)}
    mesh.say("\n".join(_describe(config, classes, devices, made[config.train.batch_size])))

    limit = memory_gib * 2**30 if memory_gib else mesh.memory_limit(devices)
    if limit is None or made[config.train.batch_size].peak is None:
        why = "no memory was given, as by --memory_gib=80" if limit is None else "the compiler does not tell its needs"
        mesh.say(f"largest batch          not looked for: {why}")
        return

    def peak(batch_size):
        if batch_size not in made:
            config.train.batch_size = batch_size
            made[batch_size] = compile_step(config, classes, devices)
        return made[batch_size].peak

    mesh.say(f"\nLooking for the largest batch that fits in {size(limit)} on each device")
    unit = devices.shape["data"] * config.train.accumulate
    mesh.say(_conclude(*largest_batch(peak, config.train.batch_size, unit, limit), unit))


def find_classes(settings: "ConfigDict") -> data.Classes:
    """What the labels mean; `config.data` tells it, but for a folder whose labels or channels are left open.

    Raises:
      UserError: a setting without meaning, or no files where they would have to tell.
    """
    if settings.name == "folder" and not (settings.labels and settings.channels):
        try:
            data.settle(settings, mesh.say)
        except UserError as error:
            raise UserError(
                f"config.data.labels and config.data.channels do not both tell what the network has to predict, so the "
                f"images have to: {error}"
            ) from error
    return data.classes(settings)


def compile_step(config: "ConfigDict", classes: data.Classes, devices: jax.sharding.Mesh) -> Plan:
    """The training step as `train.train` would compile it, for a state and a batch that do not exist."""
    evaluate.make_weigh(config.loss, classes)
    evaluate.check(config.eval, classes)
    total_steps = make.count_steps("epochs", config.train.epochs, STEPS_PER_EPOCH)
    parts = make.prepare(config, classes, devices, STEPS_PER_EPOCH, total_steps)
    shape = (1, *parts.model.smallest_input, classes.channels)
    shapes = jax.eval_shape(state.make_init(config.seed, parts.model, shape, parts.tx, config.optimizer.ema > 0))
    layout = state.shardings(shapes, devices, config.mesh.shard_optimizer)
    abstract = jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes, layout)
    arguments = (abstract, abstract_batch(config, classes, devices), mesh.put_everywhere(devices, 0))

    started = time.monotonic()
    train_step = step.make_train_step(parts.model, parts.tx, config, classes, devices, layout)
    compiled = train_step.lower(*arguments).compile()
    peak = program.peak_bytes(compiled)
    told = "" if peak is None else f", which needs {size(peak)} on each device"
    mesh.say(f"  a batch of {config.train.batch_size}{told}; compiled in {time.monotonic() - started:.1f} s")
    return Plan(parts, compiled, arguments, peak)


def flops(config: "ConfigDict", classes: data.Classes, devices: jax.sharding.Mesh, made: Plan) -> int:
    """Of the training step on all devices together, see `program.flops`."""
    layout = jax.tree.map(lambda x: x.sharding, made.arguments[0])
    # In the plain form: that for one CPU multiplies more numbers to the same end.
    model = made.parts.model.clone(one_cpu=False)
    return program.flops(step.make_train_step(model, made.parts.tx, config, classes, devices, layout), *made.arguments)


def abstract_batch(config: "ConfigDict", classes: data.Classes, devices: jax.sharding.Mesh) -> dict:
    """A batch as `pipeline.Pipeline.train_batches` yields it and `mesh.put_batch` lays it, without its values."""
    count, size = config.train.batch_size, tuple(config.data.size)
    masks = (len(classes.names),) if classes.task == "multilabel" else ()
    fields = {
        "image": (size + (classes.channels,), np.uint8),
        "label": (size + masks, np.uint8),
        "mask": ((), bool),
    }
    if config.loss.border_weight:
        fields["weight"] = (size, np.float32)
    lies = mesh.by_example(devices)
    return {n: jax.ShapeDtypeStruct((count, *shape), kind, sharding=lies) for n, (shape, kind) in fields.items()}


def largest_batch(
    peak: Callable[[int], int], first: int, unit: int, limit: float
) -> tuple[int, Mapping[int, int], bool]:
    """The largest batch that fits, by the line through two batch sizes, and then by trying.

    Args:
      peak: bytes on each device that a batch needs; compiles it.
      first: a batch size to begin with.
      unit: batch sizes are multiples of it.
      limit: bytes of each device.

    Returns:
      the batch size, or 0 if none fits; the peaks that were found; whether the next batch is known not to fit.
    """
    peaks = {first: peak(first)}
    while len(peaks) < MAX_COMPILATIONS:
        fits = max((n for n, needed in peaks.items() if needed <= limit), default=0)
        fails = min((n for n, needed in peaks.items() if needed > limit and n > fits), default=None)
        if fails is not None and fails - fits <= unit:
            return fits, peaks, True
        (a, b) = sorted(peaks, key=lambda n: abs(peaks[n] - limit))[:2] if len(peaks) > 1 else (0, 0)
        slope = (peaks[a] - peaks[b]) / (a - b) if a != b else 0.0
        if slope > 0:
            guess = int((a + (limit - peaks[a]) / slope) // unit) * unit
        else:  # nothing to go by yet
            guess = 2 * fits if fits else unit
        if fails is not None and len(peaks) > 4 and len(peaks) % 2:  # where there is no such line
            guess = (fits + fails) // 2 // unit * unit
        highest = guess if fails is None else fails - unit
        guess = max(fits + unit, min(guess, highest))
        peaks[guess] = peak(guess)
    return max((n for n, needed in peaks.items() if needed <= limit), default=0), peaks, False


def _conclude(batch_size: int, peaks: Mapping[int, int], certain: bool, unit: int) -> str:
    above = min((n for n in peaks if n > batch_size), default=None)
    if not batch_size:
        return (
            f"largest batch          none: {above} needs {size(peaks[above])}. More devices along space, "
            "config.train.accumulate, config.model.remat or a smaller config.augment.crop save memory"
        )
    beyond = f"; {above}, the next, needs {size(peaks[above])}" if certain else "; maybe more, the search was stopped"
    evenly = f", a multiple of {unit} (devices along data x accumulate)" if unit > 1 else ""
    return f"largest batch          {batch_size}{evenly}\n  compiled, it needs {size(peaks[batch_size])}{beyond}"


def _devices(devices: jax.sharding.Mesh) -> str:
    shape = devices.shape
    return f"{devices.size} x {devices.devices.flat[0].device_kind}, mesh data={shape['data']} space={shape['space']}"


def _describe(config: "ConfigDict", classes: data.Classes, devices: jax.sharding.Mesh, made: Plan) -> list[str]:
    """The lines of the table."""
    train_state, batch, _ = made.arguments
    parts, memory = made.parts, made.compiled.memory_analysis()
    count, work = config.train.batch_size, flops(config, classes, devices, made)
    held = {
        "parameters": train_state.params,
        "batch statistics": train_state.batch_stats,
        "optimizer state": train_state.opt_state,
        "averaged weights": train_state.ema,
        "batch": batch,
    }
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(train_state.params))
    lines = [
        "",
        f"network                {weights:,} weights, {config.model.dtype}, {len(classes.names)} classes "
        f"({classes.task}); {log.tiles('training', parts.crop, parts.input_size)}",
        f"devices                {_devices(devices)}",
        f"step                   {count} images of {config.data.size[0]}x{config.data.size[1]}x{classes.channels}, "
        f"accumulate={config.train.accumulate}, remat={tuple(config.model.remat)}, "
        f"shard_optimizer={config.mesh.shard_optimizer}",
        "",
        "memory of each device",
        *(f"  {name:<20} {size(program.held_bytes(tree)):>12}" for name, tree in held.items()),
    ]
    if memory is not None:
        lines += [
            f"  activations          {size(memory.temp_size_in_bytes):>12}  all that is temporary, gradients too",
            f"  peak                 {size(made.peak):>12}  arguments + temporary + results - results in place",
        ]
    lines += [
        "",
        "work of a step         convolutions and matrix products, forward and backward; a multiply-add is two",
        f"  all devices          {_flop(work)}  {_flop(work / count).strip()} an image",
        f"  each device          {_flop(work / devices.size)}",
    ]
    if (counted := (made.compiled.cost_analysis() or {}).get("flops", 0)) > 0:
        lines.append(f"  by XLA's own count   {_flop(counted)}  of each device, all operations, loops once")
    return lines + ["", *_describe_traffic(program.collectives(made.compiled))]


def _describe_traffic(found: list[program.Collective]) -> list[str]:
    formulas = {"all-reduce": "2(n-1)/n", "collective-permute": "1"}
    groups = collections.defaultdict(list)
    for collective in found:
        groups[collective.kind, collective.participants].append(collective)
    lines = ["sent by each device    in a step, in rings of n devices"]
    for (kind, n), members in sorted(groups.items(), key=lambda item: -sum(c.sent for c in item[1])):
        times, held = sum(c.executions for c in members), sum(c.size * c.executions for c in members)
        lines.append(
            f"  {kind:<20} {size(sum(c.sent for c in members)):>12}  {times} of {size(held)} together, times "
            f"{formulas.get(kind, '(n-1)/n')}, n = {n}"
        )
    return lines if groups else ["sent by each device    nothing"]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} B"


def _flop(count: float) -> str:
    scale, name = next(((n, name) for n, name in ((1e12, "T"), (1e9, "G")) if count >= n), (1e6, "M"))
    return f"{count / scale:>7.1f} {name}FLOP"
