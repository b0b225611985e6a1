import dataclasses
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, one_device

from unet_jax import data, metrics
from unet_jax.data import NAMES, carla
from unet_jax.parallel import sharding
from unet_jax.training import components, plan, state

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _classes(config):
    """The classes of a data set without its images."""
    if config.data.name == "folder":  # would be inferred from the files
        config.data.labels = config.data.labels or ("0 background", "1 cell", "2 border")
        config.data.channels = config.data.channels or 3
    return data.classes(config.data)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert config.is_locked and config.data.name in NAMES
    classes = _classes(config)
    mesh = one_device()
    built = components.build(config, classes, mesh, components.count_steps(config.train, steps_per_epoch=10))
    model = built.network.model.clone(conv_impl="plain")
    built = built._replace(network=dataclasses.replace(built.network, model=model))
    shape = (1, *model.smallest_input, classes.channels)
    before = jax.eval_shape(state.make_init(0, model, shape, built.optimizer, config.optimizer.ema > 0))
    batch = plan.abstract_batch(config, built)
    train_step = components.make_train_step(config, built, state.shardings(before, mesh, False))
    after, values = jax.eval_shape(train_step, before, batch, sharding.per_device(mesh, 0))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(after) == shapes(before)
    assert values["loss"].shape == () and values["loss"].dtype == jnp.float32
    count = sum(leaf.size for leaf in jax.tree.leaves(before.params))
    known = {"carla": 8_640_471, "isbi2012": 31_030_658, "isbi2012_keras": 34_512_193}
    assert count == known.get(path.stem, count)
    if path.stem == "isbi2012":
        assert model.margins(config.augment.crop) == ((92, 92), (92, 92))  # 572 -> 388


def test_carla_tables():
    assert len(carla.NAMES) == len(carla.PALETTE) == 23 == len(set(carla.NAMES)) == len(set(carla.PALETTE))
    assert carla.NAMES[7] == "road" and carla.NAMES[12] == "traffic sign" and carla.NAMES[22] == "terrain"
    records = metrics.records(metrics.Counts(np.eye(23, dtype=int), carla.NAMES))
    assert metrics.flatten(records)["miou"] == 1
