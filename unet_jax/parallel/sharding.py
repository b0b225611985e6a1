"""The device mesh, and how batches, images and states are sharded over it."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unet_jax.errors import UserError


def create_mesh(data: int, space: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` (examples) and `space` (image height), by default of all devices of all processes.

    One of `data` and `space` may be 0, for all devices divided by the other.

    Raises:
      UserError: `data * space` is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = {"data": data, "space": space}
    open_axis = next((axis for axis, ways in shape.items() if ways == 0), None)
    if open_axis is not None:
        shape[open_axis] = count // max(data, space, 1)
    if min(shape.values()) < 1 or math.prod(shape.values()) != count:
        raise UserError(
            f"config.mesh.data={data}, config.mesh.space={space} do not divide {count} devices: their product must be "
            f"{count}; one of them may be 0, for all devices that the other leaves"
        )
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 2, devices=devices)


def create_eval_mesh(data: int, space: int) -> Mesh:
    """A mesh of all devices that splits images over as many devices as in training, if their number allows it.

    `data` and `space` are `config.mesh` of the training run, which may have had other devices.
    """
    count = jax.device_count()
    return create_mesh(0, math.gcd(space or max(count // max(data, 1), 1), count))


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is a single CPU device."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Checks that each of the `accumulate` microbatches of a global batch divides evenly among the devices of `data`.

    If it does not, a `UserError` names the nearest sizes that do.
    """
    if accumulate < 1:
        raise UserError(f"config.train.accumulate = {accumulate} must be 1 or more")
    ways = mesh.shape["data"] * accumulate
    if batch_size < 1 or batch_size % ways:
        below, above = batch_size // ways * ways, -(-max(batch_size, 1) // ways) * ways
        nearest = " or ".join(str(n) for n in (below, above) if n > 0)
        microbatches = f" in {accumulate} microbatches (config.train.accumulate)" if accumulate > 1 else ""
        raise UserError(
            f"config.train.batch_size = {batch_size} cannot be divided evenly among {mesh.shape['data']} devices"
            f"{microbatches}: use {nearest}"
        )


def check_height(mesh: Mesh, height: int) -> None:
    """Raises a `UserError` if the image height cannot be divided evenly among the devices along `space`."""
    ways = mesh.shape["space"]
    if height % ways:
        raise UserError(
            f"images of {height} rows cannot be split over config.mesh.space = {ways} devices: use "
            f"{height // ways * ways or ways} or {-(-height // ways) * ways} rows"
        )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that are on the devices of this process, int `[b]`, ascending."""
    indices = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def jit_replicated(mesh: Mesh, function: Callable, **kwargs) -> Callable:
    """`jax.jit` for the mesh, with results replicated on every device; `kwargs` go to `jax.jit`."""
    return jax.jit(function, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh), **kwargs)


def by_example(mesh: Mesh) -> NamedSharding:
    """Examples split over `data`; images not split."""
    return NamedSharding(mesh, P("data"))


def split_height(mesh: Mesh, image: jax.Array) -> jax.Array:
    """Constrains `[B, H, W, ...]` in a jitted function to its height split over `space`, its examples over `data`.

    Examples are replicated if they cannot be divided evenly.
    """
    examples = "data" if image.shape[0] % mesh.shape["data"] == 0 else None
    return jax.lax.with_sharding_constraint(image, NamedSharding(mesh, P(examples, "space")))


def split_largest_axis(mesh: Mesh, tree: Any) -> Any:
    """Shardings that split each array of a pytree over `data`, along its largest axis that divides evenly.

    Arrays with no such axis are replicated: scalars and a few small arrays.
    """
    ways = mesh.shape["data"]

    def split(array):
        axes = [axis for axis, length in enumerate(array.shape) if length % ways == 0]
        largest = max(axes, key=lambda axis: array.shape[axis], default=None)
        return NamedSharding(mesh, P(*("data" if axis == largest else None for axis in range(array.ndim))))

    return jax.tree.map(split, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays `[B, ...]`, from the rows `[b, ...]` that each process reads (see `process_rows`)."""
    sharding = by_example(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    ways = mesh.shape["data"]
    batch_size = len(next(iter(batch.values()))) * ways // len(process_rows(mesh, ways))
    position = {row: i for i, row in enumerate(process_rows(mesh, batch_size).tolist())}

    def put(values):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return values[position[start] : position[start] + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

    return {name: put(np.asarray(values)) for name, values in batch.items()}


def compiler_options(mesh: Mesh, remat: bool = False) -> dict[str, str] | None:
    """XLA options for the mesh; None unless its devices are CPUs.

    On CPUs, XLA hands convolutions to YNNPACK, where they take up to twice as long as with Eigen (jaxlib 0.10.2,
    AVX-512); only reductions stay with YNNPACK.

    `remat` must be set for `jax.checkpoint` to save memory: by default XLA for CPUs drops its optimisation barriers
    before eliminating common sub-expressions, which merges the rematerialised operations with the original ones.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return {**options, "xla_disable_hlo_passes": "cse_barrier_expander"} if remat else options


def run_once_options(mesh: Mesh) -> dict[str, str] | None:
    """XLA options for a program that runs once: on CPUs it compiles in a fraction of the time, to the same bits."""
    return {"xla_backend_optimization_level": "1"} if mesh.devices.flat[0].platform == "cpu" else None


def per_device(mesh: Mesh, value: int) -> jax.Array:
    """An int32 array `[devices]` that holds, for each device, the `value` of its process."""
    sharding = NamedSharding(mesh, P(("data", "space")))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes available to arrays on each device; None if the device does not report it, as CPUs do not."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def use_deterministic_kernels() -> None:
    """Makes XLA compile deterministic GPU kernels, so that a run can be repeated bit by bit.

    It then uses neither autotuning, whose choice may differ between runs, nor kernels that add in arbitrary order. No
    effect on other devices, which are always deterministic. A `UserError` if JAX has already started a GPU backend.
    """
    flag = "--xla_gpu_deterministic_ops=true"
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flag in flags:
        return
    from jax._src import xla_bridge  # there is no public way to ask whether a backend has started

    if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
        raise UserError(f"config.deterministic = True comes too late, a GPU is in use: set XLA_FLAGS={flag} beforehand")
    os.environ["XLA_FLAGS"] = " ".join([*flags, flag])
