"""Devices and processes: the mesh, how batches and states lie on it, and what processes tell each other."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unet_jax.errors import UserError

PyTree = Any


def create(data: int, space: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` (examples) and `space` (image height).

    Args:
      data: devices along the batch; 0 = all that `space` leaves.
      space: devices along the height of each image; 0 = all that `data` leaves.
      devices: which to use; None is all, of all processes.

    Raises:
      UserError: the product is not the number of devices.
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
            f"{count}, and one of them may be 0, for all that the other leaves"
        )
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axis_types, devices=devices)


def create_for_evaluation(data: int, space: int) -> Mesh:
    """A mesh of all devices that splits images over as many of them as training did, as far as these allow it.

    Args:
      data, space: `config.mesh` of the training, perhaps on other devices.
    """
    count = jax.device_count()
    return create(0, math.gcd(space or max(count // data, 1), count))


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether there is one device, and it is a CPU."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Checks that the devices can share each part of a batch evenly.

    Raises:
      UserError: they cannot; names the nearest sizes that they can.
    """
    if accumulate < 1:
        raise UserError(f"config.train.accumulate = {accumulate} must be 1 or more")
    ways = mesh.shape["data"] * accumulate
    if batch_size < 1 or batch_size % ways:
        below, above = batch_size // ways * ways, -(-max(batch_size, 1) // ways) * ways
        nearest = " or ".join(str(n) for n in sorted({below, above}) if n > 0)
        parts = f" in {accumulate} parts (config.train.accumulate)" if accumulate > 1 else ""
        raise UserError(
            f"config.train.batch_size = {batch_size} cannot be shared by {mesh.shape['data']} devices evenly{parts}: "
            f"use {nearest}"
        )


def check_height(mesh: Mesh, height: int) -> None:
    """Checks that the height of an image can be shared by the devices along `space`.

    Raises:
      UserError: it cannot.
    """
    ways = mesh.shape["space"]
    if height % ways:
        raise UserError(
            f"images of {height} rows cannot be split over config.mesh.space = {ways} devices: use "
            f"{height // ways * ways or ways} or {-(-height // ways) * ways} rows"
        )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of each global batch that the devices of this process hold, int `[b]`, in order."""
    indices = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def is_main_process() -> bool:
    """Whether this process writes logs and files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, on the main process alone."""
    if is_main_process():
        print(text, flush=True)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Lets the main process go through the body first, the others once it is done: it may prepare files for all."""
    if jax.process_count() > 1 and not is_main_process():
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_count() > 1 and is_main_process():
        multihost_utils.sync_global_devices(name)


def from_main(function: Callable[..., int | None], *args) -> int | None:
    """What `function` returns on the main process, which alone calls it, told to all."""
    if jax.process_count() == 1:
        return function(*args)
    value = function(*args) if is_main_process() else None
    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return None if told == -1 else told


def largest(value: int) -> int:
    """The largest `value` of all processes, told to all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, P())


def jit_replicated(mesh: Mesh, function: Callable, **others) -> Callable:
    """`function`, jitted for the mesh, with results that lie whole on every device.

    Args:
      mesh: the devices.
      function: what to compile.
      **others: for `jax.jit`.
    """
    return jax.jit(function, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh), **others)


def by_example(mesh: Mesh) -> NamedSharding:
    """Examples over `data`, images whole."""
    return NamedSharding(mesh, P("data"))


def split_height(mesh: Mesh, image: jax.Array) -> jax.Array:
    """Within a jitted function: `[B, H, W, ...]` with its height over `space`, and its examples over `data`.

    A batch that `data` cannot share lies whole on each of its devices.
    """
    examples = "data" if image.shape[0] % mesh.shape["data"] == 0 else None
    return jax.lax.with_sharding_constraint(image, NamedSharding(mesh, P(examples, "space")))


def split_largest_axis(mesh: Mesh, tree: PyTree) -> PyTree:
    """Shardings that share each array among the devices along `data`, by its largest axis that they can divide.

    What they cannot divide lies whole on every device: scalars, and few small arrays.
    """
    ways = mesh.shape["data"]

    def split(array):
        axes = [axis for axis, length in enumerate(array.shape) if length % ways == 0]
        largest = max(axes, key=lambda axis: array.shape[axis], default=None)
        return NamedSharding(mesh, P(*("data" if axis == largest else None for axis in range(array.ndim))))

    return jax.tree.map(split, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays `[B, ...]` of the rows `[b, ...]` that each process holds, see `process_rows`."""
    sharding = by_example(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    ways = mesh.shape["data"]
    batch_size = len(next(iter(batch.values()))) * ways // len(process_rows(mesh, ways))
    place = {row: place for place, row in enumerate(process_rows(mesh, batch_size).tolist())}

    def put(values):
        def piece(index):
            start, stop, _ = index[0].indices(batch_size)
            return values[place[start] : place[start] + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, piece)

    return {name: put(np.asarray(values)) for name, values in batch.items()}


def compiler_options(mesh: Mesh, remat: bool = False) -> dict[str, str] | None:
    """What XLA's compiler for CPUs has to be told; None where it needs nothing.

    Of what it gives to YNNPACK by default, only sums stay there: convolutions take up to twice as long as by Eigen
    (jaxlib 0.10.2, AVX-512).

    Args:
      mesh: what is compiled for.
      remat: whether `jax.checkpoint` shall have its effect: before it looks for common sub-expressions, the compiler
        removes the barriers, and so merges what is to be computed again with what was computed first.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return {**options, "xla_disable_hlo_passes": "cse_barrier_expander"} if remat else options


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes of a device that arrays can fill, as far as it tells; a CPU does not."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def put_everywhere(mesh: Mesh, value: int) -> jax.Array:
    """An int32 `[devices]` array whose elements are the `value` of the process of each device."""
    sharding = NamedSharding(mesh, P(("data", "space")))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))
