import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from unet_jax import augment, evaluate, losses, mesh, metrics, optimizer, state, train
from unet_jax.data import NAMES, carla, isbi2012, shapes
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
    if config.data.name == "isbi2012":
        return Classes(variant, isbi2012.NAMES, isbi2012.PALETTE, channels=1)
    return Classes("multiclass", ("pet", "background", "border"), ((0, 0, 0),) * 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert config.is_locked and config.data.name in NAMES
    classes = _classes(config)
    devices = mesh.create(1, 1, jax.devices()[:1])
    model = unet.create(classes.num_outputs, **config.model)
    augment.check(config.augment, config.data.size)
    evaluate.check(config.eval, classes)
    losses.check({"cross_entropy": config.loss.cross_entropy}, config.loss.class_weights, len(classes.names))
    tx = optimizer.make_optimizer(config.optimizer, optimizer.make_schedule(config.optimizer, 10, 1000))
    ema = config.optimizer.ema > 0
    shape = (1, *model.smallest_input, classes.channels)
    made = jax.eval_shape(lambda: state.create(0, model, shape, tx, ema, mesh.replicated(devices)))
    batch = config.train.batch_size
    label = (batch, *config.data.size) + ((len(classes.names),) if classes.task == "multilabel" else ())
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, *config.data.size, classes.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct(label, jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch,), bool),
    }
    if evaluate.make_weigh(config.loss, classes):
        inputs["weight"] = jax.ShapeDtypeStruct(label, jnp.float32)
    after, values = jax.eval_shape(train.make_train_step(model, tx, config, classes, devices), made, inputs)
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
    assert metrics.scores(np.eye(23), carla.NAMES)["miou"] == 1
