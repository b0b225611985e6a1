import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from unet_jax import augment, losses, mesh, metrics, optimizer, state, train
from unet_jax.data import NAMES, carla, shapes
from unet_jax.data.source import Classes
from unet_jax.models import unet

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _classes(config):
    """The classes of a data set without its images."""
    variant = config.data.variant
    if config.data.name == "carla":
        count = carla.NUM_CLASSES[variant]
        return Classes("multiclass", carla.NAMES[:count], carla.PALETTE[:count])
    if config.data.name == "shapes":
        config.data.shapes_train = 1
        return shapes.load(config.data, "train").classes
    return Classes("multiclass", ("pet", "background", "border"), ((0, 0, 0),) * 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert config.is_locked and config.data.name in NAMES
    classes = _classes(config)
    devices = mesh.create(1, 1, jax.devices()[:1])
    model = unet.create(classes.num_outputs, **config.model)
    height, width = augment.check(config.augment, config.data.size)
    losses.check({"cross_entropy": config.loss.cross_entropy}, config.loss.class_weights, len(classes.names))
    tx = optimizer.make_optimizer(config.optimizer, optimizer.make_schedule(config.optimizer, 10, 1000))
    ema = config.optimizer.ema > 0
    shape = (1, height, width, classes.channels)
    made = jax.eval_shape(lambda: state.create(0, model, shape, tx, ema, mesh.replicated(devices)))
    batch = config.train.batch_size
    label = (batch, *config.data.size) + ((len(classes.names),) if classes.task == "multilabel" else ())
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, *config.data.size, classes.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct(label, jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch,), bool),
    }
    after, values = jax.eval_shape(train.make_train_step(model, tx, config, classes, devices), made, inputs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), made)
    assert values["loss"].shape == () and values["loss"].dtype == jnp.float32
    if path.stem == "carla":
        assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) == 8_640_471


def test_carla_tables():
    assert len(carla.NAMES) == len(carla.PALETTE) == 23 == len(set(carla.NAMES)) == len(set(carla.PALETTE))
    assert carla.NAMES[7] == "road" and carla.NAMES[12] == "traffic sign" and carla.NAMES[22] == "terrain"
    assert metrics.scores(np.eye(23), carla.NAMES)["miou"] == 1
