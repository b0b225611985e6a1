import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from scipy import ndimage

from unet_jax.data import Classes
from unet_jax.errors import UserError
from unet_jax.inference import forward, tiles
from unet_jax.models.unet import UNet
from unet_jax.parallel import sharding

THREE = Classes("multiclass", ("a", "b", "c"), ((0, 0, 0),) * 3, channels=1)
VALID = dict(padding="valid", kernel_init="paper")


@functools.cache
def _network(outputs=3, **settings):
    model = UNet(outputs, features=(4, 6, 8), **settings)
    return model, model.init(jax.random.key(0), jnp.zeros((1, *model.smallest_input, 1)))


def _image(height, width, seed=0):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).random((height, width)), 2)
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))[..., None]


def _whole(model, variables, image, task="multiclass", tta="none", compiled=False):
    """The whole image in one piece; operation by operation, or compiled as a predictor is."""
    size = image.shape[:2]
    window = forward.reflect_pad(forward.as_float(image[None]), forward.margins(model, size, tta))
    probability = lambda v, x: forward.to_probability(forward.logits(model, v, x, size, task, tta), task)
    if compiled:
        probability = sharding.jit_replicated(sharding.create_mesh(0, 1), probability)
    return np.asarray(probability(variables, window)[0])


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("size", [(97, 131), (40, 201), (64, 64), (33, 17), (3, 150)])
@pytest.mark.parametrize("extra_conv", [False, True])
def test_tiles_of_a_valid_network_equal_the_whole_image(size, extra_conv):
    model, variables = _network(**VALID, extra_conv=extra_conv)
    predictor = tiles.Predictor(model, variables, THREE, (32, 48), batch_size=3)
    found, whole = predictor.probability(_image(*size)), _whole(model, variables, _image(*size), compiled=True)
    assert found.shape == (*size, 3) and found.dtype == np.float32
    # float32 sums in another order for another size of image; the tolerance is ten roundings of a number below one.
    np.testing.assert_allclose(found, whole, atol=6e-7)
    assert whole.std() > 0.01


def test_the_whole_image_is_what_the_network_says_of_the_mirrored_one():
    model, variables = _network(**VALID)
    image = _image(37, 50)
    border = (60 - model.output_size((60, 60))[0]) // 2
    mirrored = np.pad(image, ((border, 60), (border, 60), (0, 0)), mode="reflect")
    legal = [next(n for n in range(n + 2 * border, 200) if model._output_length(n)) for n in (37, 50)]
    window = mirrored[: legal[0], : legal[1]]
    expected = jax.nn.softmax(model.apply(variables, window[None] / np.float32(255)))[0, :37, :50]
    np.testing.assert_allclose(_whole(model, variables, image), expected, atol=6e-7)


@pytest.mark.parametrize("settings", [dict(), dict(padding="valid", upsample="nearest"), dict(norm="group")], ids=str)
@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("multilabel", 2), ("binary", 1)])
def test_other_networks_blend_smoothly_and_nearly_agree(settings, task, outputs):
    model, variables = _network(outputs, **settings)
    image = _image(200, 150)
    assert not model.is_local
    names = ("a", "b", "c")[: max(outputs, 2)]
    predictor = tiles.Predictor(
        model, variables, Classes(task, names, ((0, 0, 0),) * len(names), channels=1), (96, 96)
    )
    found, whole = predictor.probability(image), _whole(model, variables, image, task)
    error = np.abs(found - whole).mean()
    predictor._overlap = [0, 0]
    assert error < 0.7 * np.abs(predictor.probability(image) - whole).mean()  # than where tiles only touch
    # No seams: steps between neighbours are no larger than in the whole image, by more than a blend adds.
    for axis in (0, 1):
        assert np.abs(np.diff(found, axis=axis)).max() < 1.5 * np.abs(np.diff(whole, axis=axis)).max()
    if task == "multiclass":
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("tta", ["flips", "dihedral"])
def test_flips_and_quarter_turns_keep_tiles_exact(tta):
    model, variables = _network(**VALID)
    image = _image(97, 130)
    found = tiles.Predictor(model, variables, THREE, (32, 48), tta=tta).probability(image)
    np.testing.assert_allclose(found, _whole(model, variables, image, tta=tta), atol=6e-7)


@pytest.mark.parametrize("length, tile", [(97, 32), (20, 32), (640, 128), (129, 128)])
def test_the_shares_of_overlapping_tiles_add_up_to_one_everywhere(length, tile):
    predictor = tiles.Predictor(*_network(), THREE, (tile, tile))
    starts = predictor._starts(length, 0)
    total = np.zeros(starts[-1] + tile)
    for start, share in zip(starts, predictor._weights(starts, 0), strict=True):
        assert start % 4 == 0 and (share >= 0).all()
        total[start : start + tile] += share
    assert len(total) >= length and len(starts) == len(set(starts))
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_images_of_any_size_need_one_compilation_and_small_ones_are_said_to_be_mirrored(capsys):
    model, variables = _network(**VALID)
    predictor = tiles.Predictor(model, variables, THREE, (32, 32), batch_size=2)
    for size in ((70, 90), (33, 200), (5, 5)):
        predictor.probability(_image(*size))
    assert predictor._step._cache_size() == 1
    assert "5x5 pixels is mirrored up to a tile of 32x32" in capsys.readouterr().out


def _equivariant_network():
    """A network whose kernels look the same turned and mirrored, and which does not pool: it turns with its input."""

    class Blur(UNet):
        @property
        def is_local(self):
            return True

        def __call__(self, image, keys=None):
            kernel = jnp.array([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[:, :, None, None] / 16
            conv = lambda x: jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = conv(conv(image))
            return jnp.concatenate([4 * x, 2 - 4 * x], -1)

        def _output_length(self, length):
            return length - 4 if length > 4 else None

    return Blur(2, features=(1, 1)), {}


@pytest.mark.parametrize("tta, tolerance", [("flips", 1e-6), ("dihedral", 1e-6), ("rotations", 0.02)])
def test_test_time_augmentation_puts_every_view_back_in_its_place(tta, tolerance):
    model, variables = _equivariant_network()
    image = np.uint8(ndimage.gaussian_filter(_image(61, 84)[..., 0].astype(float), 2))[..., None]
    plain = _whole(model, variables, image)
    averaged = _whole(model, variables, image, tta=tta)
    # Flips and quarter turns are exact; other angles are sampled twice, which blurs a smooth image a little.
    np.testing.assert_allclose(averaged, plain, atol=tolerance)
    assert np.ptp(plain) > 0.2
    classes = Classes("multiclass", ("a", "b"), ((0, 0, 0),) * 2, channels=1)
    tiled = tiles.Predictor(model, variables, classes, (32, 32), tta=tta).probability(image)
    np.testing.assert_allclose(tiled, plain, atol=tolerance)


@pytest.mark.parametrize("tta, views", [("flips", 4), ("dihedral", 8), ("rotations", 7)])
def test_test_time_augmentation_averages_probabilities_over_its_views(monkeypatch, tta, views):
    model, variables = _network(1)
    seen = []
    apply = UNet.apply
    monkeypatch.setattr(UNet, "apply", lambda self, v, x: seen.append(np.asarray(x)) or apply(self, v, x))
    image = _image(32, 48)
    averaged = _whole(model, variables, image, "binary", tta)
    assert len(seen) == views == len({x.tobytes() for x in seen})
    if tta == "flips":
        by_hand = [np.asarray(jax.nn.sigmoid(apply(model, variables, x)))[0] for x in seen]
        by_hand = [by_hand[0], by_hand[1][:, ::-1], by_hand[2][::-1, ::-1], by_hand[3][::-1]]
        np.testing.assert_allclose(averaged, np.mean(by_hand, 0), atol=1e-6)


def test_devices_and_batches_do_not_change_the_result():
    model, variables = _network(**VALID)
    one = tiles.Predictor(model, variables, THREE, (32, 32), devices=sharding.create_mesh(1, 1, jax.devices()[:1]))
    eight = tiles.Predictor(model, variables, THREE, (32, 32), batch_size=11)
    image = _image(70, 90)
    np.testing.assert_allclose(one.probability(image), eight.probability(image), atol=6e-7)


def test_what_is_no_image_is_refused():
    predictor = tiles.Predictor(*_network(), THREE, (32, 32))
    shapes = ((8, 8), np.uint8), ((8, 8, 1), np.float32), ((0, 8, 1), np.uint8), ((8, 8, 3), np.uint8)
    for bad in (np.zeros(*shape) for shape in shapes):
        with pytest.raises(UserError, match=r"must be uint8 \[height, width, 1 channel"):
            predictor.probability(bad)
    with pytest.raises(UserError, match=r"out must be of shape \(8, 9, 3\), not \(8, 9, 2\)"):
        predictor.probability(np.zeros((8, 9, 1), np.uint8), np.zeros((8, 9, 2)))
    with pytest.raises(UserError, match="Did you mean 'flips'"):
        tiles.Predictor(*_network(), THREE, (32, 32), tta="flip")
    with pytest.raises(UserError, match="must be positive"):
        tiles.Predictor(*_network(), THREE, (0, 32))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import jax, jax.numpy as jnp, numpy as np
from unet_jax import data
from unet_jax.inference import forward, tiles
from unet_jax.parallel import sharding
from unet_jax.models.unet import UNet

model = UNet(2, features=(2, 2), padding="valid")
variables = model.init(jax.random.key(0), jnp.zeros((1, *model.smallest_input, 1)))
classes = data.Classes("multiclass", ("a", "b"), ((0, 0, 0),) * 2, channels=1)
predictor = tiles.Predictor(model, variables, classes, (256, 256))
def peak(height):
    image = np.memmap({str(tmp_path / "image")!r}, np.uint8, "w+", shape=(height, 2000, 1))
    out = np.memmap({str(tmp_path / "out")!r}, np.float16, "w+", shape=(height, 2000, 2))
    predictor.probability(image, out)
    out.flush()
    assert abs(out[-1].astype(float).sum(-1) - 1).max() < 1e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(1000), peak(16000))
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    small, large = map(float, result.stdout.split()[-2:])
    # 16 times the rows: image and result would take 256 MB in float32, the pages of the two files 150 MB at most.
    assert large - small < 200, (small, large)
