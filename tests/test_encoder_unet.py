"""The network that starts from a pretrained encoder, with a tiny encoder in the place of EfficientNet-Lite0."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_device

from unet_jax import models
from unet_jax.errors import UserError
from unet_jax.models import encoders
from unet_jax.models.encoder_unet import EncoderUNet
from unet_jax.models.encoders import efficientnet_lite
from unet_jax.models.encoders.layers import Settings
from unet_jax.parallel import sharding


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    def make(**settings):
        return efficientnet_lite.EfficientNetLite((4, 4, 6, 6, 8, 8, 8), (1,) * 7, Settings(**settings))

    tiny = encoders.find("efficientnet_lite0")._replace(make=make)
    monkeypatch.setitem(efficientnet_lite.ENCODERS, "efficientnet_lite0", tiny)


RUN_ONCE = {"compiler_options": {"xla_backend_optimization_level": "1"}}  # compiles faster


def init(model, image):
    return jax.jit(model.init, **RUN_ONCE)(jax.random.key(0), image)


@pytest.fixture
def config(config):
    config.model.update(name="encoder_unet", pretrained="", features=(4, 6, 6, 8), norm="batch", upsample="nearest")
    return config


def test_parameters_of_the_default_network(monkeypatch):
    monkeypatch.undo()
    model = EncoderUNet(11)
    shapes = models.shapes(models.abstract_variables(model, 3)["params"])
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert count == 3_825_451
    assert {name.split("/")[0] for name in shapes} == {"encoder", "merge_0", "merge_1", "merge_2", "merge_3", "head"}
    assert shapes[model.first_conv] == (3, 3, 3, 32)
    assert shapes["merge_3/Conv_0/kernel"] == (3, 3, 320 + 112, 128)
    assert shapes["merge_0/Conv_0/kernel"] == (3, 3, 48 + 16, 32)


@pytest.mark.parametrize(
    "settings",
    [
        dict(features=(4, 6, 6)),
        dict(features=(4, 4, 6, 6, 8), upsample="bilinear", norm="group"),
        dict(features=(4, 6, 6, 8), upsample="transposed_2x2", norm="none"),
    ],
    ids=str,
)
def test_every_skip_reaches_the_logits(settings):
    model = EncoderUNet(3, **settings)
    variables = init(model, jnp.zeros((1, 32, 32, 1)))
    skips = [
        jax.random.normal(jax.random.key(n), (2, 64 >> n, 96 >> n, c)) for n, c in ((1, 4), (2, 4), (3, 6), (4, 8))
    ]
    lowest = jax.random.normal(jax.random.key(9), (2, 2, 3, 8))

    def loss(skips, lowest):
        logits = model.apply(variables, lowest, skips, False, method="decode")
        chex.assert_shape(logits, (2, 64, 96, 3))
        return (logits**2).sum()

    *gradients, of_lowest = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)), **RUN_ONCE)(skips, lowest))
    assert jnp.abs(of_lowest).max() > 1e-6
    for level, gradient in enumerate(gradients, 1):
        assert (jnp.abs(gradient).max() > 1e-6) == (level >= model.head_level), f"features of stride {2**level}"


def test_an_image_moved_by_a_stride_has_the_same_logits_moved_away_from_its_borders():
    model = EncoderUNet(2, features=(4, 6, 6))
    image = jax.random.normal(jax.random.key(1), (1, 512, 32, 1))
    variables = init(model, image[:, :32])
    apply = jax.jit(model.apply, **RUN_ONCE)
    whole, moved = apply(variables, image), apply(variables, jnp.roll(image, -32, 1))
    np.testing.assert_allclose(whole[0, 256:288], moved[0, 224:256], atol=1e-5)
    assert np.abs(whole[0, 256:288] - moved[0, 256:288]).max() > 1e-3


def test_margins_and_sizes_are_multiples_of_32():
    model = EncoderUNet(2)
    assert model.margins((360, 480)) == ((0, 24), (0, 0)) and model.margins((1, 33)) == ((0, 31), (0, 31))
    assert model.output_size((384, 480)) == (384, 480) and model.smallest_input == (32, 32)
    with pytest.raises(UserError, match="Nearest heights: 352 or 384; nearest widths: 480"):
        model.output_size((360, 480))


@pytest.mark.slow
def test_devices_that_share_batch_and_rows_compute_what_one_does():
    """Statistics are those of the whole batch: only the order of sums differs."""
    model = EncoderUNet(2, features=(4, 6, 6))
    image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    variables = init(model, image)

    def loss(params, image):
        values = {"params": params, "batch_stats": variables["batch_stats"]}
        keys = jax.random.split(jax.random.key(2), 2)
        logits, updates = model.apply(values, sharding.split_height(mesh, image), keys, mutable=["batch_stats"])
        return (sharding.split_height(mesh, logits) ** 2).mean(), updates

    found = []
    for mesh in (one_device(), sharding.create_mesh(2, 2, jax.devices()[:4])):
        params = jax.device_put(variables["params"], sharding.replicated(mesh))
        batch = jax.device_put(image, sharding.by_example(mesh))
        found.append(jax.device_get(jax.jit(jax.grad(loss, has_aux=True), **RUN_ONCE)(params, batch)))
    alone, shared = found
    chex.assert_trees_all_close(shared, alone, rtol=1e-3, atol=1e-5)


def test_rematerialised_levels_give_the_same_gradients():
    image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    keys = jax.random.split(jax.random.key(2), 2)
    variables = init(EncoderUNet(2, features=(4, 6, 6)), image)

    def gradients(remat):
        model = EncoderUNet(2, features=(4, 6, 6), remat=remat)

        def loss(params):
            values = {"params": params, "batch_stats": variables["batch_stats"]}
            return (model.apply(values, image, keys, mutable=["batch_stats"])[0] ** 2).mean()

        return jax.jit(jax.grad(loss), **RUN_ONCE)(variables["params"])

    plain, saved = gradients(()), gradients((1, 2, 3, 4, 5))
    chex.assert_trees_all_close(plain, saved, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_statistics_and_logits_in_float32():
    image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    model = EncoderUNet(2, features=(4, 6, 6), dtype="bfloat16")
    variables = init(model, image)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    keys = jax.random.split(jax.random.key(2), 2)
    trained = jax.eval_shape(lambda: model.apply(variables, image, keys, mutable=["batch_stats"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    exact, logits = (
        jax.jit(m.apply, **RUN_ONCE)(variables, image) for m in (EncoderUNet(2, features=(4, 6, 6)), model)
    )
    # bfloat16 has 8 bits: thirty layers, each with a relative error of 2^-8, on logits of size one.
    assert 0 < jnp.abs(logits - exact).max() < 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [("encoder", "efficientnet_lite9"), ("padding", "valid"), ("upsample", "deconv"), ("norm", "layer")]
    + [("features", (8, 8)), ("features", (8,) * 6), ("features", (8, 0, 8)), ("dropout", 1.0), ("remat", (6,))]
    + [("encoder_norm", "group"), ("extra_conv", True), ("kernel_init", "paper"), ("dtype", "float16")],
)
def test_an_invalid_setting_is_an_error_that_names_it(config, field, value):
    with pytest.raises(UserError, match=f"config.model.{field}"):
        models.create(num_outputs=2, **(config.model.to_dict() | {field: value}))


def test_the_first_convolution_for_another_number_of_channels():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype(np.float32)
    grey = np.random.default_rng(1).normal(size=(3, 3, 1)).astype(np.float32)
    colours = np.einsum("hwc,hwcf->f", np.repeat(grey, 3, 2), kernel)
    adapted = models.adapt_channels(kernel, 1)
    np.testing.assert_allclose(np.einsum("hwc,hwcf->f", grey, adapted), colours, rtol=1e-5, atol=1e-5)
    five = models.adapt_channels(kernel, 5)
    np.testing.assert_allclose(five[:, :, 3], kernel[:, :, 0] * 3 / 5, rtol=1e-6)
    # A constant image of any number of channels gives about as much.
    assert models.adapt_channels(kernel, 6).sum(2) == pytest.approx(kernel.sum(2), rel=1e-4, abs=1e-5)
    assert models.adapt_channels(kernel, 3) is kernel
    assert models.adapt_channels(models.adapt_channels(kernel, 1), 3).sum(2) == pytest.approx(kernel.sum(2), abs=1e-5)
