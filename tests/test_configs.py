import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from unet_jax import data, losses
from unet_jax.data import NAMES, carla
from unet_jax.evaluation import evaluate
from unet_jax.metrics import confusion
from unet_jax.models import unet
from unet_jax.parallel import sharding
from unet_jax.training import augment, optimizer, plan, state, step

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _classes(config):
    """The classes of a data set without its images."""
    if config.data.name == "folder":  # what its files would settle
        config.data.labels = config.data.labels or ("0 background", "1 cell", "2 border")
        config.data.channels = config.data.channels or 3
    return data.classes(config.data)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert config.is_locked and config.data.name in NAMES
    classes = _classes(config)
    devices = sharding.create_mesh(1, 1, jax.devices()[:1])
    model = unet.create(classes.num_outputs, **config.model)
    augment.check(config.augment, config.data.size)
    evaluate.check(config.eval, classes)
    losses.check({"cross_entropy": config.loss.cross_entropy}, config.loss.class_weights, len(classes.names))
    tx = optimizer.make_optimizer(config.optimizer, optimizer.make_schedule(config.optimizer, 10, 1000))
    shape = (1, *model.smallest_input, classes.channels)
    made = jax.eval_shape(state.make_init(0, model, shape, tx, config.optimizer.ema > 0))
    inputs = plan.abstract_batch(config, classes, devices)
    layout = state.shardings(made, devices, False)
    train_step = step.make_train_step(model, tx, config, classes, devices, layout)
    after, values = jax.eval_shape(train_step, made, inputs, sharding.per_device(devices, 0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), made)
    assert values["loss"].shape == () and values["loss"].dtype == jnp.float32
    count = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    known = {"carla": 8_640_471, "isbi2012": 31_030_658, "isbi2012_keras": 34_512_193}
    assert count == known.get(path.stem, count)
    if path.stem == "isbi2012":
        assert model.margins(config.augment.crop) == ((92, 92), (92, 92))  # 572 -> 388


def test_carla_tables():
    assert len(carla.NAMES) == len(carla.PALETTE) == 23 == len(set(carla.NAMES)) == len(set(carla.PALETTE))
    assert carla.NAMES[7] == "road" and carla.NAMES[12] == "traffic sign" and carla.NAMES[22] == "terrain"
    assert confusion.scores(np.eye(23), carla.NAMES)["miou"] == 1
