"""What a training step needs on the available devices, before any image is read: memory, FLOPs and traffic."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from unet_jax import data
from unet_jax.errors import UserError
from unet_jax.evaluation import recipe
from unet_jax.parallel import processes, sharding
from unet_jax.training import augment, components, program, state, summary

if TYPE_CHECKING:
    from ml_collections import ConfigDict

STEPS_PER_EPOCH = 1000.0  # the schedule does not change what a step costs
MAX_COMPILATIONS = 12
FITS = 0.9  # share of the memory of a device that a step may take


class Plan(NamedTuple):
    """A compiled training step."""

    components: components.Components  # network, loss, optimizer, sizes
    compiled: jax.stages.Compiled  # the step
    arguments: tuple  # of the step, as shapes with shardings: state, batch, signals
    peak: int | None  # bytes on each device; None if the compiler does not report it


def plan(config: "ConfigDict", memory_gib: float | None) -> None:
    """Compiles the training step for the available devices; prints what it needs, and the largest batch that fits.

    Args:
      config: as in `configs/default.py`.
      memory_gib: of each device; None: as the device reports.

    Raises:
      UserError: an invalid setting, or no files to infer the classes from.
    """
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise UserError(f"--memory_gib={memory_gib} must be positive")
    config = config.copy_and_resolve_references()
    classes = find_classes(config.data)
    if config.auto:
        recipe.apply(config, data.load(config.data, "train"), processes.print_on_main)
    augment.apply_strength(config.augment, classes.channels, config.keep)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.space)
    processes.print_on_main(f"Compiling the training step for {summary.mesh_summary(mesh)}.")
    planned, batch_size = compile_step(config, classes, mesh), config.train.batch_size
    processes.print_on_main("\n".join(_describe(config, planned)))

    limit = memory_gib * 2**30 if memory_gib else sharding.memory_limit(mesh)
    if limit is None or planned.peak is None:
        why = "no --memory_gib was given" if limit is None else "the compiler does not report memory"
        processes.print_on_main(f"largest batch          not searched for: {why}")
        return

    def peak(other):
        if other == batch_size:
            return planned.peak
        config.train.batch_size = other
        return compile_step(config, classes, mesh).peak

    processes.print_on_main(f"\nLooking for the largest batch that fits in {size(limit)} on each device")
    unit = mesh.shape["data"] * config.train.accumulate
    if config.augment.cutmix:
        unit = max(unit, 2)  # it pastes from one example into another
    processes.print_on_main(_describe_largest(*largest_batch(peak, batch_size, unit, limit), unit))


def find_classes(settings: "ConfigDict") -> data.Classes:
    """What the labels mean: from `config.data` alone, or from files if a folder's labels or channels are not set."""
    if settings.name == "folder" and not (settings.labels and settings.channels):
        try:
            data.infer_settings(settings, processes.print_on_main)
        except UserError as error:
            why = "config.data.labels and config.data.channels are not both set, so they have to be inferred from the"
            raise UserError(f"{why} images: {error}") from error
    return data.classes(settings)


def compile_step(config: "ConfigDict", classes: data.Classes, mesh: jax.sharding.Mesh) -> Plan:
    """The training step as `loop.train` would compile it, for a state and a batch that do not exist."""
    built = components.build(config, classes, mesh, components.count_steps(config.train, STEPS_PER_EPOCH))
    model = built.network.model
    shape = (1, *model.smallest_input, classes.channels)
    ema, ema_statistics = config.optimizer.ema > 0, config.optimizer.ema_statistics
    shapes = jax.eval_shape(state.make_init(config.seed, model, shape, built.optimizer, ema, ema_statistics))
    shardings = state.shardings(shapes, mesh, config.mesh.shard_optimizer)
    abstract = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)
    arguments = (abstract, abstract_batch(config, built), sharding.per_device(mesh, 0))

    started = time.monotonic()
    compiled = components.make_train_step(config, built, shardings).lower(*arguments).compile()
    peak = program.peak_bytes(compiled)
    needed = "" if peak is None else f", which needs {size(peak)} on each device"
    seconds = time.monotonic() - started
    processes.print_on_main(f"  a batch of {config.train.batch_size}{needed}; compiled in {seconds:.1f} s")
    return Plan(built, compiled, arguments, peak)


def shrink_batch(config: "ConfigDict", classes: data.Classes) -> None:
    """Halves `config.train.batch_size` until a step fits into the memory of the devices, if they report it."""
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.space)
    limit, unit = sharding.memory_limit(mesh), mesh.shape["data"] * config.train.accumulate

    def fits():
        peak = compile_step(config, classes, mesh).peak
        return peak is None or peak <= FITS * limit

    while limit is not None and config.train.batch_size >= 2 * unit:
        if processes.max_over_processes(not fits()) == 0:  # the same everywhere, though a device may have less left
            return
        config.train.batch_size = config.train.batch_size // 2 // unit * unit
        processes.print_on_main(f"auto     train.batch_size={config.train.batch_size}: the one before does not fit")


def flops(config: "ConfigDict", planned: Plan) -> int:
    """FLOPs of the training step on all devices together, see `program.flops`."""
    network = planned.components.network
    # In the plain form: the one for a single CPU multiplies more numbers for the same result.
    plain = dataclasses.replace(network, model=network.model.clone(conv_impl="plain"))
    shardings = jax.tree.map(lambda x: x.sharding, planned.arguments[0])
    step = components.make_train_step(config, planned.components._replace(network=plain), shardings)
    return program.flops(step, *planned.arguments)


def abstract_batch(config: "ConfigDict", built: components.Components) -> dict:
    """A batch as `Pipeline.train_batches` yields it and `sharding.put_batch` shards it, without its values."""
    count, classes = config.train.batch_size, built.network.classes
    size = built.windows.extent if built.windows else tuple(config.data.size)
    masks = (len(classes.names),) if classes.task == "multilabel" else ()
    image = (*size, classes.channels), np.dtype(classes.dtype)
    fields = {"image": image, "label": (size + masks, np.uint8), "mask": ((), bool)}
    if config.loss.border_weight:
        fields["weight"] = (size, np.float32)
    where = sharding.by_example(built.network.mesh)
    return {n: jax.ShapeDtypeStruct((count, *shape), kind, sharding=where) for n, (shape, kind) in fields.items()}


def largest_batch(
    peak: Callable[[int], int], first: int, unit: int, limit: float
) -> tuple[int, Mapping[int, int], bool]:
    """The largest batch that fits, by the line through two batch sizes, and then by trying.

    Args:
      peak: batch size -> bytes that its step needs on each device.
      first: a batch size to start with.
      unit: batch sizes are multiples of it.
      limit: bytes of each device.

    Returns:
      the batch size, or 0 if none fits; the peaks measured; whether the next batch is known not to fit.
    """
    peaks = {first: peak(first)}
    while True:
        fits = max((n for n, needed in peaks.items() if needed <= limit), default=0)
        fails = min((n for n, needed in peaks.items() if needed > limit and n > fits), default=None)
        certain = fails is not None and fails - fits <= unit
        if certain or len(peaks) == MAX_COMPILATIONS:
            return fits, peaks, certain
        (a, b) = sorted(peaks, key=lambda n: abs(peaks[n] - limit))[:2] if len(peaks) > 1 else (0, 0)
        slope = (peaks[a] - peaks[b]) / (a - b) if a != b else 0.0
        if slope > 0:
            guess = int((a + (limit - peaks[a]) / slope) // unit) * unit
        else:  # no second point yet
            guess = 2 * fits if fits else unit
        if fails is not None and len(peaks) > 4 and len(peaks) % 2:  # where peaks do not lie on a line
            guess = (fits + fails) // 2 // unit * unit
        highest = guess if fails is None else fails - unit
        guess = max(fits + unit, min(guess, highest))
        peaks[guess] = peak(guess)


def _describe_largest(batch_size: int, peaks: Mapping[int, int], certain: bool, unit: int) -> str:
    above = min((n for n in peaks if n > batch_size), default=None)
    if not batch_size:
        return (
            f"largest batch          none: {above} needs {size(peaks[above])}. More devices along space, "
            "config.train.accumulate, config.model.remat or a smaller config.augment.crop save memory"
        )
    beyond = f"{above}, the next, needs {size(peaks[above])}" if certain else "maybe more fit, the search was stopped"
    evenly = f", a multiple of {unit} (devices along data x accumulate)" if unit > 1 else ""
    return f"largest batch          {batch_size}{evenly}\n  compiled, it needs {size(peaks[batch_size])}; {beyond}"


def _describe(config: "ConfigDict", planned: Plan) -> list[str]:
    """The lines of the table."""
    (train_state, batch, _), built = planned.arguments, planned.components
    classes, mesh = built.network.classes, built.network.mesh
    count, work = config.train.batch_size, flops(config, planned)
    held = {
        "parameters": train_state.params,
        "batch statistics": train_state.batch_stats,
        "optimizer state": train_state.opt_state,
        "EMA weights": (train_state.ema, train_state.ema_batch_stats),
        "batch": batch,
    }
    kind = "windows, with what surrounds them," if built.windows else "images"
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(train_state.params))
    lines = [
        "",
        f"network                {weights:,} weights, {config.model.dtype}, {len(classes.names)} classes "
        f"({classes.task}); {summary.tile_summary('training', built.crop, built.input_size)}",
        f"devices                {summary.mesh_summary(mesh)}",
        f"step                   {count} {kind} of {'x'.join(map(str, batch['image'].shape[1:]))}, "
        f"accumulate={config.train.accumulate}, remat={tuple(config.model.remat)}, "
        f"shard_optimizer={config.mesh.shard_optimizer}",
        "",
        "memory of each device",
        *(f"  {name:<20} {size(program.held_bytes(tree)):>12}" for name, tree in held.items()),
    ]
    if planned.peak is not None:
        temporary = planned.compiled.memory_analysis().temp_size_in_bytes
        lines += [
            f"  activations          {size(temporary):>12}  all that is temporary, gradients too",
            f"  peak                 {size(planned.peak):>12}  arguments + temporary + results - results in place",
        ]
    lines += [
        "",
        "work of a step         convolutions and matrix products, forward and backward; a multiply-add is two",
        f"  all devices          {_flop(work)}  {_flop(work / count).strip()} an image",
        f"  each device          {_flop(work / mesh.size)}",
    ]
    if (counted := (planned.compiled.cost_analysis() or {}).get("flops", 0)) > 0:
        lines.append(f"  by XLA's own count   {_flop(counted)}  of each device, all operations, loops once")
    return lines + ["", *_describe_traffic(program.collectives(planned.compiled))]


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
    """Bytes with a unit."""
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} B"


def _flop(count: float) -> str:
    scale, name = next(((n, name) for n, name in ((1e12, "T"), (1e9, "G")) if count >= n), (1e6, "M"))
    return f"{count / scale:>7.1f} {name}FLOP"
