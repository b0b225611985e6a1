"""Predictions of images of any size, in tiles."""

import functools
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import ndimage

from unet_jax.data import Classes
from unet_jax.errors import UserError
from unet_jax.inference import forward, tiles
from unet_jax.models.unet import UNet
from unet_jax.parallel import sharding

VALID = dict(padding="valid", kernel_init="paper")


@functools.cache
def _variables(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.smallest_input, 1)))


def _network(task="multiclass", outputs=3, mesh=None, **settings):
    """A network of random weights, on all devices unless a mesh is given, and its weights."""
    names = ("a", "b", "c")[: max(outputs, 2)]
    classes = Classes(task, names, ((0, 0, 0),) * len(names), channels=1)
    model = UNet(outputs, features=(4, 6, 8), **settings)
    return forward.Network(model, classes, mesh or sharding.create_mesh(0, 1)), _variables(model)


def _image(height, width):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((height, width)), 2)
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))[..., None]


def _whole(network, variables, image, tta="none"):
    """The whole image in one piece, operation by operation."""
    return np.asarray(network.probability(variables, image[None], tta)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "size",
    [(97, 131), (40, 201), (64, 64), (33, 17), (3, 150)],
)
@pytest.mark.parametrize("extra_conv", [False, True])
def test_tiles_of_a_valid_network_equal_the_whole_image(size, extra_conv):
    network, variables = _network(**VALID, extra_conv=extra_conv)
    predictor = tiles.Predictor(network, variables, (32, 48), batch_size=3)
    # Compiled as a predictor is.
    probability = sharding.jit_replicated(network.mesh, network.probability)
    found, whole = predictor.probability(_image(*size)), probability(variables, _image(*size)[None])[0]
    assert found.shape == (*size, 3) and found.dtype == np.float32
    # float32 sums in another order for another size of image; the tolerance is ten roundings of a number below one.
    np.testing.assert_allclose(found, whole, atol=6e-7)
    assert whole.std() > 0.01


@pytest.mark.parametrize("settings", [dict(), dict(padding="valid", upsample="nearest"), dict(norm="group")], ids=str)
@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("multilabel", 2), ("binary", 1)])
def test_tiles_of_other_networks_are_blended_smoothly_and_almost_equal_the_whole_image(settings, task, outputs):
    network, variables = _network(task, outputs, **settings)
    image = _image(200, 150)
    assert not network.model.is_local
    predictor = tiles.Predictor(network, variables, (96, 96))
    found, whole = predictor.probability(image), _whole(network, variables, image)
    error = np.abs(found - whole).mean()
    predictor._overlap = [0, 0]
    assert error < 0.7 * np.abs(predictor.probability(image) - whole).mean()  # less than without overlap
    # No seams: neighbouring pixels differ no more than in the whole image, apart from what blending adds.
    for axis in (0, 1):
        assert np.abs(np.diff(found, axis=axis)).max() < 1.5 * np.abs(np.diff(whole, axis=axis)).max()
    if task == "multiclass":
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("tta", ["flips", pytest.param("dihedral", marks=pytest.mark.slow)])
def test_flips_and_quarter_turns_keep_tiles_exact(tta):
    network, variables = _network(**VALID)
    image = _image(97, 130)
    found = tiles.Predictor(network, variables, (32, 48), tta=tta).probability(image)
    np.testing.assert_allclose(found, _whole(network, variables, image, tta), atol=6e-7)


class Pattern(nn.Module):
    """Predicts the same 4x4 pixels again and again, from the first pixel of its input on."""

    stride = 4
    is_local = False

    def __call__(self, image, keys=None):
        rows, columns = (jnp.arange(n) % 4 for n in image.shape[1:3])
        return jnp.broadcast_to((rows[:, None] - columns)[None, ..., None] * 1.0, (*image.shape[:3], 1))

    def margins(self, size):
        return ((0, 0), (0, 0))


@pytest.mark.parametrize("length, tile", [(97, 32), (20, 32), (640, 128), (129, 128)])
def test_overlapping_tiles_lie_on_the_grid_of_the_network_and_their_shares_sum_to_one(length, tile):
    """Only then is the pattern of a tile that of the image, and a blend of equal values that value."""
    classes = Classes("binary", ("a", "b"), ((0, 0, 0),) * 2, channels=1)
    predictor = tiles.Predictor(forward.Network(Pattern(), classes, helpers.one_device()), {}, (tile, tile))
    image = np.zeros((length, length, 1), np.uint8)
    expected = jax.nn.sigmoid(Pattern()(image[None]))[0]
    found, stop = np.full((length, length, 1), np.nan), 0
    for rows, band in predictor.bands(image):
        assert rows.start == stop < rows.stop  # each row once, in order
        found[rows], stop = band, rows.stop
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_images_of_any_size_need_one_compilation_and_small_ones_are_reported_as_mirrored(capsys):
    network, variables = _network(**VALID)
    predictor = tiles.Predictor(network, variables, (32, 32), batch_size=2)
    for size in ((70, 90), (33, 200), (5, 5)):
        predictor.probability(_image(*size))
    assert predictor._step._cache_size() == 1
    assert "5x5 pixels is mirrored up to a tile of 32x32" in capsys.readouterr().out


def test_neither_devices_nor_batches_change_the_result():
    network, variables = _network(**VALID, mesh=helpers.one_device())
    one = tiles.Predictor(network, variables, (32, 32))
    eight = tiles.Predictor(*_network(**VALID), (32, 32), batch_size=11)
    image = _image(70, 90)
    np.testing.assert_allclose(one.probability(image), eight.probability(image), atol=6e-7)


def test_invalid_images_and_settings_are_errors():
    predictor = tiles.Predictor(*_network(), (32, 32))
    shapes = ((8, 8), np.uint8), ((8, 8, 1), np.float32), ((0, 8, 1), np.uint8), ((8, 8, 3), np.uint8)
    for bad in (np.zeros(*shape) for shape in shapes):
        with pytest.raises(UserError, match=r"must be uint8 \[height, width, 1 channel"):
            predictor.probability(bad)
    with pytest.raises(UserError, match=r"out must be of shape \(8, 9, 3\), not \(8, 9, 2\)"):
        predictor.probability(np.zeros((8, 9, 1), np.uint8), np.zeros((8, 9, 2)))
    with pytest.raises(UserError, match="Did you mean 'flips'"):
        tiles.Predictor(*_network(), (32, 32), tta="flip")
    with pytest.raises(UserError, match="must be positive"):
        tiles.Predictor(*_network(), (0, 32))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    program = f"""
import resource, sys
sys.path.insert(0, {str(helpers.ROOT)!r})
import jax, jax.numpy as jnp, numpy as np
from unet_jax import data
from unet_jax.inference import forward, tiles
from unet_jax.models.unet import UNet
from unet_jax.parallel import sharding

model = UNet(2, features=(2, 2), padding="valid")
variables = model.init(jax.random.key(0), jnp.zeros((1, *model.smallest_input, 1)))
classes = data.Classes("multiclass", ("a", "b"), ((0, 0, 0),) * 2, channels=1)
network = forward.Network(model, classes, sharding.create_mesh(0, 1))
predictor = tiles.Predictor(network, variables, (256, 256))
def peak(height):
    image = np.memmap({str(tmp_path / "image")!r}, np.uint8, "w+", shape=(height, 2000, 1))
    out = np.memmap({str(tmp_path / "out")!r}, np.float16, "w+", shape=(height, 2000, 2))
    predictor.probability(image, out)
    out.flush()
    assert abs(out[-1].astype(float).sum(-1) - 1).max() < 1e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(1000), peak(16000))
"""
    result = helpers.run(sys.executable, "-c", program, cwd=helpers.ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    small, large = map(float, result.stdout.split()[-2:])
    # 16 times the rows: image and result would take 256 MB in float32, the pages of the two files 150 MB at most.
    assert large - small < 200, (small, large)
