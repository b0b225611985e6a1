"""Devices and processes: the mesh, and how batches and states lie on it. No other module knows of them."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unet_jax.errors import UserError


def create(data: int, space: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` (examples) and `space` (image height).

    Args:
      data: devices along the batch; 0 = all that `space` leaves.
      space: devices along the height of each image.
      devices: which to use; None is all.

    Raises:
      UserError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if space < 1 or count % space or (data or count // space) * space != count:
        raise UserError(
            f"config.mesh.data={data}, config.mesh.space={space} do not divide {count} devices: their product must be "
            f"{count}, and data=0 takes all that space leaves"
        )
    shape, axis_types = (count // space, space), (AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "space"), axis_types=axis_types, devices=devices)


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether there is one device, and it is a CPU."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Checks that the devices can share a batch evenly.

    Raises:
      UserError: they cannot; names the nearest sizes that they can.
    """
    ways = mesh.shape["data"]
    if batch_size < 1 or batch_size % ways:
        below, above = batch_size // ways * ways, -(-max(batch_size, 1) // ways) * ways
        nearest = " or ".join(str(n) for n in sorted({below, above}) if n > 0)
        raise UserError(
            f"config.train.batch_size = {batch_size} cannot be shared by {ways} devices evenly: use {nearest}"
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


def process_rows(batch_size: int) -> slice:
    """The rows of each global batch that this process feeds."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def is_main_process() -> bool:
    """Whether this process writes logs and files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, on the main process alone."""
    if is_main_process():
        print(text, flush=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, P())


def by_example(mesh: Mesh) -> NamedSharding:
    """Examples over `data`, images whole."""
    return NamedSharding(mesh, P("data"))


def by_example_and_height(mesh: Mesh) -> NamedSharding:
    """Examples over `data`, the height of images over `space`."""
    return NamedSharding(mesh, P("data", "space"))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that each process holds."""
    sharding = by_example(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
