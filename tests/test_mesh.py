import jax
import numpy as np
import pytest

from unet_jax import mesh
from unet_jax.errors import UserError


def test_meshes_and_the_layout_of_batches():
    assert dict(mesh.create(0, 1).shape) == {"data": 8, "space": 1}
    devices = mesh.create(0, 2)
    assert dict(devices.shape) == {"data": 4, "space": 2}
    batch = mesh.put_batch(devices, {"image": np.arange(8 * 4).reshape(8, 4)})
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 4)}
    assert mesh.process_rows(devices, 8).tolist() == list(range(8))


@pytest.mark.parametrize("data, space", [(3, 1), (0, 3), (8, 2), (0, 0)])
def test_a_mesh_that_does_not_fit_is_named(data, space):
    with pytest.raises(UserError, match=f"config.mesh.data={data}, config.mesh.space={space} do not divide 8"):
        mesh.create(data, space)


def test_batches_and_heights_that_do_not_divide_name_the_nearest():
    devices = mesh.create(0, 2, jax.devices())
    with pytest.raises(UserError, match="use 8 or 12"):
        mesh.check_batch_size(devices, 9)
    with pytest.raises(UserError, match="use 4"):
        mesh.check_batch_size(devices, 0)
    with pytest.raises(UserError, match="use 48 or 50"):
        mesh.check_height(devices, 49)
    mesh.check_batch_size(devices, 12)
