from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import models
from unet_jax.errors import UserError
from unet_jax.models.conv import Conv
from unet_jax.models.unet import ConvBlock, UNet

PAPER = dict(num_outputs=2, padding="valid", dropout=0.5)
CARLA = dict(
    num_outputs=23,
    features=(32, 64, 128, 256, 512),
    upsample="transposed_3x3",
    dropout=0.3,
    dropout_on_skip=True,
    extra_conv=True,
)
PYTORCH = dict(num_outputs=1)
KERAS = dict(num_outputs=1, upsample="nearest", dropout=0.5)


@pytest.mark.parametrize(
    "settings, image, parameters, output",
    [
        (PAPER, (572, 572, 1), 31_030_658, (388, 388)),
        (CARLA, (96, 128, 3), 8_640_471, (96, 128)),
        (PYTORCH, (192, 192, 3), 31_031_745, (192, 192)),
        (PYTORCH | dict(num_outputs=6), (192, 192, 3), 31_032_070, (192, 192)),
        (KERAS, (256, 256, 1), 34_512_193, (256, 256)),
    ],
    ids=["paper", "carla", "pytorch", "pytorch_6", "keras"],
)
def test_published_networks_have_their_number_of_parameters(settings, image, parameters, output):
    model = UNet(**settings)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, *image)))
    chex.assert_shape(logits, (2, *output, settings["num_outputs"]))


def test_the_network_of_the_paper_has_23_convolutions_and_its_sizes():
    model = UNet(**PAPER)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 572, 572, 1)))
    kernels = [leaf for leaf in jax.tree.leaves(variables) if leaf.ndim == 4]
    assert sorted(kernel.shape[0] for kernel in kernels) == [1] + 4 * [2] + 18 * [3]
    for b in (8, 9, 32):  # it accepts sizes of 16 b + 60
        assert model.output_size((16 * b + 60, 572)) == (16 * b + 60 - 184, 388)
    lowest, skips = jax.eval_shape(
        lambda v, x: model.apply(v, x, None, method="encode"), variables, jnp.zeros((1, 572, 572, 1))
    )
    assert lowest.shape[1:3] == (28, 28)
    assert [skip.shape[1] for skip in skips] == [568, 280, 136, 64]


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(padding="valid"),
        dict(upsample="transposed_3x3", extra_conv=True),
        dict(upsample="nearest", norm="batch"),
        pytest.param(dict(upsample="bilinear", norm="group"), marks=pytest.mark.slow),
        dict(padding="valid", upsample="nearest"),
    ],
    ids=str,
)
def test_every_skip_reaches_the_logits(settings):
    model = UNet(2, features=(4, 6, 8), **settings)
    image = jax.random.normal(jax.random.key(1), (1, 60, 60, 3))
    variables = model.init(jax.random.key(0), image)
    lowest, skips = model.apply(variables, image, None, method="encode")
    assert len(skips) == 2

    def loss(skips):
        return (model.apply(variables, lowest, skips, False, method="decode") ** 2).sum()

    for level, gradient in enumerate(jax.grad(loss)(skips)):
        assert jnp.abs(gradient).max() > 1e-6, f"skip {level} is not used"
    expected = model.output_size((60, 60))
    chex.assert_shape(model.apply(variables, image), (1, *expected, 2))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_residual_block_adds_its_input_before_the_last_relu(padding):
    """With zeros for the last convolution, the shortcut remains: cropped, and projected to another width."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 9, 3)), jnp.float32)
    inner = x if padding == "SAME" else x[:, 2:-2, 2:-2]
    for features in (3, 5):
        block = ConvBlock(features, 2, partial(Conv, padding=padding), "none", "float32", residual=True)
        params = block.init(jax.random.key(0), x, False)["params"]
        assert ("shortcut" in params) == (features == 5)
        kernel = params["shortcut"]["kernel"][0, 0] if features == 5 else np.eye(3)
        zeros = jax.tree.map(jnp.zeros_like, params["Conv_1"])
        found = block.apply({"params": {**params, "Conv_1": zeros}}, x, False)
        np.testing.assert_allclose(found, np.maximum(inner @ kernel, 0), atol=1e-6)
    normalized = ConvBlock(5, 2, partial(Conv, padding=padding), "batch", "float32", residual=True)
    variables = normalized.init(jax.random.key(0), x, False)
    assert set(variables["batch_stats"]) == {"BatchNorm_0", "BatchNorm_1", "shortcut_norm"}
    assert (normalized.apply(variables, x, False) >= 0).all()


def test_an_unused_skip_is_an_error():
    model = UNet(2, features=(4, 8))
    image = jnp.zeros((1, 8, 8, 3))
    variables = model.init(jax.random.key(0), image)
    lowest, skips = model.apply(variables, image, None, method="encode")
    with pytest.raises(AssertionError, match="1 skips were not consumed"):
        model.apply(variables, lowest, [*skips, *skips], False, method="decode")


def test_dropout_on_skip_decides_where_the_lowest_skip_is_taken():
    image = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    keys = jax.random.split(jax.random.key(2), 1)
    zeros = {}
    for on_skip in (False, True):
        model = UNet(2, features=(4, 6, 8), dropout=0.5, dropout_on_skip=on_skip)
        variables = model.init(jax.random.key(0), image)
        plain, plain_skips = model.apply(variables, image, None, method="encode")
        lowest, skips = model.apply(variables, image, keys, method="encode")
        assert (lowest != plain).any()
        assert (skips[0] == plain_skips[0]).all()  # only the two lowest blocks drop
        zeros[on_skip] = int(((skips[1] == 0) & (plain_skips[1] != 0)).sum())
    assert zeros[False] == 0 and zeros[True] > 50


def test_dropout_of_an_example_does_not_depend_on_its_batch():
    model = UNet(2, features=(4, 8), dropout=0.5)
    image = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    keys = jax.random.split(jax.random.key(2), 4)
    variables = model.init(jax.random.key(0), image)
    whole = model.apply(variables, image, keys)
    part = model.apply(variables, image[2:], keys[2:])
    # The same draws; convolutions of another batch size may round differently.
    np.testing.assert_allclose(whole[2:], part, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_logits_in_float32():
    image = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    model = UNet(2, features=(4, 8), norm="batch", dtype="bfloat16")
    variables = model.init(jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    lowest, _ = model.apply(variables, image.astype(jnp.bfloat16), None, method="encode")
    assert lowest.dtype == jnp.bfloat16
    logits = model.apply(variables, image)
    assert logits.dtype == jnp.float32
    exact = UNet(2, features=(4, 8), norm="batch").apply(variables, image)
    # bfloat16 has 8 bits: five layers of relative error 2^-8 each, on logits of size one.
    assert 0 < jnp.abs(logits - exact).max() < 0.1


@pytest.mark.parametrize(
    "settings, size, nearest",
    [
        (dict(), (100, 97), "Nearest heights: 96 or 112; nearest widths: 96 or 112"),
        (dict(padding="valid"), (572, 570), "Nearest heights: 572; nearest widths: 556 or 572"),
        (dict(padding="valid"), (100, 572), "Nearest heights: 188"),
    ],
)
def test_an_illegal_size_is_an_error_that_names_the_nearest_legal_ones(settings, size, nearest):
    with pytest.raises(UserError, match=nearest):
        UNet(2, **settings).output_size(size)


def _output_height(model, height):
    """The height of the output; 0 if the network does not accept images of `height`."""
    try:
        return model.output_size((height, model.smallest_input[1]))[0]
    except UserError:
        return 0


@pytest.mark.parametrize("settings", [dict(), dict(padding="valid"), dict(padding="valid", extra_conv=True)], ids=str)
def test_margins_are_the_smallest_that_predict_every_pixel(settings):
    model = UNet(2, features=(4, 8, 8), **settings)
    for size in (1, 2, 20, 37, 48, 63):
        (before, after), _ = model.margins((size, 48))
        needed = before + size + after
        (output, _) = model.output_size((needed, model.smallest_input[1]))
        assert output >= size and 2 * before == needed - output  # the output starts at the first pixel
        assert all(_output_height(model, smaller) < size for smaller in range(size, needed))
    assert UNet(2, padding="valid").margins((388, 388)) == ((92, 92), (92, 92))
    assert UNet(2).margins((96, 100)) == ((0, 0), (0, 12))


@pytest.mark.slow
def test_initialisation_of_the_paper():
    """Kernels are drawn from N(0, sqrt(2 / N)), N being the number of inputs of one output."""
    model = UNet(2, features=(32, 64, 128), kernel_init="paper")
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            assert (kernel == 0).all()
            continue
        height, width, channels, _ = kernel.shape
        inputs = (
            channels if "up" in name else height * width * channels
        )  # with a stride of two each output uses one tap of four
        # The standard deviation of n draws has a relative error of 1 / sqrt(2 n); five of these.
        assert kernel.std() * np.sqrt(inputs / 2) == pytest.approx(1, abs=5 / np.sqrt(2 * kernel.size)), name
        if kernel.size > 10_000:
            assert np.abs(kernel).max() > 2.2 * kernel.std()  # not truncated at two standard deviations


@pytest.mark.parametrize(
    "field, value",
    [("padding", "vaild"), ("upsample", "deconv"), ("norm", "layer"), ("dtype", "float16"), ("features", (8,))]
    + [("features", (8, 0)), ("features", (8, "a")), ("dropout", 1.0), ("kernel_init", "papr")],
)
def test_an_invalid_setting_is_an_error_that_names_it(config, field, value):
    with pytest.raises(UserError, match=f"config.model.{field}"):
        models.create(num_outputs=2, **(config.model.to_dict() | {field: value}))
