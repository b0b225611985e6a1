import jax
import numpy as np
import pytest

from unet_jax.errors import UserError
from unet_jax.parallel import sharding


def test_meshes_and_the_sharding_of_batches():
    assert dict(sharding.create_mesh(0, 1).shape) == {"data": 8, "space": 1}
    mesh = sharding.create_mesh(0, 2)
    assert dict(mesh.shape) == {"data": 4, "space": 2}
    batch = sharding.put_batch(mesh, {"image": np.arange(8 * 4).reshape(8, 4)})
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 4)}
    assert sharding.process_rows(mesh, 8).tolist() == list(range(8))


@pytest.mark.parametrize("data, space", [(3, 1), (0, 3), (8, 2), (0, 0)])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(data, space):
    with pytest.raises(UserError, match=f"config.mesh.data={data}, config.mesh.space={space} do not divide 8"):
        sharding.create_mesh(data, space)


def test_errors_for_indivisible_batches_and_heights_suggest_the_nearest_sizes():
    mesh = sharding.create_mesh(0, 2, jax.devices())
    with pytest.raises(UserError, match="use 8 or 12"):
        sharding.check_batch_size(mesh, 9)
    with pytest.raises(UserError, match="use 4"):
        sharding.check_batch_size(mesh, 0)
    with pytest.raises(UserError, match="use 48 or 50"):
        sharding.check_height(mesh, 49)
    sharding.check_batch_size(mesh, 12)
