"""The one forward pass: normalisation, margins, test-time augmentation."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from unet_jax.data import Classes
from unet_jax.errors import UserError
from unet_jax.inference import forward, tiles
from unet_jax.models.unet import UNet
from unet_jax.parallel import sharding

VALID = dict(padding="valid", kernel_init="paper")


def _classes(task, count, channels=1):
    return Classes(task, tuple("abc"[:count]), ((0, 0, 0),) * count, channels=channels)


@functools.cache
def _variables(model, channels=1):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.smallest_input, channels)))


def _network(task="multiclass", channels=1, normalization=forward.Normalization(), **settings):
    """A network of random weights on one device, and its weights."""
    classes = _classes(task, 2 if task == "binary" else 3, channels)
    model = UNet(classes.num_outputs, features=(4, 6, 8), **settings)
    return forward.Network(model, classes, helpers.one_device(), normalization), _variables(model, channels)


def _image(height, width, channels=1):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((height, width, channels)), (2, 2, 0))
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


@pytest.mark.slow
def test_the_probability_of_an_image_is_that_of_the_network_for_the_mirrored_image():
    network, variables = _network(**VALID)
    model, image = network.model, _image(37, 50)
    border = (60 - model.output_size((60, 60))[0]) // 2
    mirrored = np.pad(image, ((border, 60), (border, 60), (0, 0)), mode="reflect")
    height, width = (next(n for n in range(n + 2 * border, 200) if _accepts(model, n)) for n in (37, 50))
    window = mirrored[:height, :width]
    expected = jax.nn.softmax(model.apply(variables, window[None] / np.float32(255)))[0, :37, :50]
    np.testing.assert_allclose(network.probability(variables, image[None])[0], expected, atol=6e-7)


def _accepts(model, length):
    try:
        return model.output_size((length, length))
    except UserError:
        return False


def test_a_window_with_its_margins_is_predicted_as_the_whole_image_is():
    network, variables = _network(**VALID)
    image = _image(40, 48)
    margins = network.margins((40, 48))
    window = np.pad(image, (*margins, (0, 0)), mode="reflect")
    whole, part = network.logits(variables, image[None]), network.window_logits(variables, window[None], (40, 48))
    assert (part == whole).all()


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_labels_are_those_of_the_logits(task):
    network, variables = _network(task)
    images = np.stack([_image(32, 48), _image(32, 48)[::-1]])
    logits, labels = network.logits(variables, images), network.labels(variables, images)
    expected = logits.argmax(-1) if task == "multiclass" else logits > 0
    assert labels.dtype == jnp.uint8
    assert (labels == (expected[..., 0] if task == "binary" else expected)).all()
    probability = np.asarray(network.probability(variables, images))
    assert (forward.to_label(probability, task) == labels).all()
    if task == "multiclass":
        np.testing.assert_allclose(probability.sum(-1), 1, atol=1e-6)


def test_a_threshold_applies_to_sigmoids():
    probability = np.array([[0.2, 0.5, 0.6]])
    assert forward.to_label(probability, "multilabel").tolist() == [[0, 0, 1]]
    assert forward.to_label(probability, "multilabel", 0.1).tolist() == [[1, 1, 1]]
    assert forward.to_label(probability[..., None], "binary", 0.55).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("tta", ["none", "flips", pytest.param("rotations", marks=pytest.mark.slow)])
def test_normalisation_is_part_of_the_forward_pass(tta):
    """Mean and scale per channel, in pixel values; the margins of test-time augmentation are normalised too."""
    mean, scale = (100.0, 120.0, 140.0), (40.0, 50.0, 60.0)
    normalized, variables = _network(channels=3, normalization=forward.Normalization(mean, scale), **VALID)
    plain, _ = _network(channels=3, **VALID)
    image = _image(24, 24, channels=3)
    seen = []
    spy = lambda model, variables, x: seen.append(np.asarray(x)) or jnp.zeros((*x.shape[:3], 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "apply", spy)
        for network in (normalized, plain):
            network.logits(variables, image[None], tta)
    half = len(seen) // 2
    for x, unit in zip(seen[:half], seen[half:], strict=True):
        np.testing.assert_allclose(x, (unit * 255 - np.float32(mean)) / np.float32(scale), atol=1e-5)
    assert half == {"none": 1, "flips": 4, "rotations": 7}[tta]


def test_the_normalisation_is_that_of_the_work_directory():
    given = forward.Normalization((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert forward.Normalization.from_json(given.to_json()) == given
    default = forward.Normalization.from_json(None)  # of a work directory older than the field
    assert default == forward.Normalization() == forward.Normalization((0.0,), (255.0,))
    image = jnp.linspace(0, 1, 5)
    assert (default(image) == image).all()  # exactly: 0..255 divided by 255


class Blur(UNet):
    """Blurs images with a symmetric kernel, without pooling: it commutes with rotations and reflections."""

    is_local = True

    def __call__(self, image, keys=None):
        kernel = jnp.array([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[:, :, None, None] / 16
        conv = lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = conv(conv(image))
        return jnp.concatenate([4 * x, 2 - 4 * x], -1)

    def margins(self, size):
        return ((2, 2), (2, 2))


@pytest.mark.parametrize(
    "tta, tolerance", [("flips", 1e-6), ("dihedral", 1e-6), pytest.param("rotations", 0.02, marks=pytest.mark.slow)]
)
def test_test_time_augmentation_maps_every_view_back(tta, tolerance):
    network = forward.Network(Blur(2, features=(1, 1)), _classes("multiclass", 2), sharding.create_mesh(0, 1))
    image = np.uint8(ndimage.gaussian_filter(_image(61, 84)[..., 0].astype(float), 2))[..., None]
    plain = np.asarray(network.probability({}, image[None])[0])
    averaged = np.asarray(network.probability({}, image[None], tta)[0])
    # Flips and quarter turns are exact; other angles are sampled twice, which blurs a smooth image a little.
    np.testing.assert_allclose(averaged, plain, atol=tolerance)
    assert np.ptp(plain) > 0.2
    tiled = tiles.Predictor(network, {}, (32, 32), tta=tta).probability(image)
    np.testing.assert_allclose(tiled, plain, atol=tolerance)


def test_views_are_those_that_their_names_say():
    image = np.arange(24, dtype=np.int32).reshape(1, 4, 6, 1)
    views = {
        name: [np.asarray(forward._view(image, degrees // 90, mirrored)) for degrees, mirrored in forward.VIEWS[name]]
        for name in forward.VIEWS
        if name != "rotations"
    }
    across, down = image[:, :, ::-1], image[:, ::-1]
    turned = [np.rot90(image, k, (1, 2)) for k in range(4)]
    expected = {"none": [image], "horizontal": [image, across], "vertical": [image, down], "turns": turned}
    expected["flips"] = [image, across, down, down[:, :, ::-1]]
    expected["dihedral"] = [*turned, *(x[:, :, ::-1] for x in turned)]
    as_set = lambda arrays: {(x.shape, x.tobytes()) for x in arrays}
    assert {name: as_set(found) for name, found in views.items()} == {n: as_set(x) for n, x in expected.items()}
    assert [len(found) for found in forward.VIEWS.values()] == [1, 2, 2, 4, 4, 8, 7]


@pytest.mark.parametrize(
    "horizontal, vertical, turns, rotate, best, exact",
    [
        (False, False, False, 30, "none", "none"),
        (True, False, False, 15, "horizontal", "none horizontal"),
        (False, True, False, 0, "vertical", "none vertical"),
        (True, True, False, 10, "flips", "none horizontal vertical flips"),
        (True, True, False, 90, "dihedral", "none horizontal vertical flips turns dihedral rotations"),
        (False, False, False, 180, "turns", "none turns rotations"),
        (True, False, False, 180, "dihedral", "none horizontal vertical flips turns dihedral rotations"),
        (False, False, True, 0, "turns", "none turns"),
        (False, False, True, 38, "turns", "none turns"),
        (False, False, True, 39, "turns", "none turns rotations"),  # 360 / 7 is 38.6 degrees from 90
        (True, False, True, 0, "dihedral", "none horizontal vertical flips turns dihedral"),
        (False, True, True, 10, "dihedral", "none horizontal vertical flips turns dihedral"),
    ],
)
def test_auto_is_the_most_views_that_training_drew(horizontal, vertical, turns, rotate, best, exact):
    augment = {"flip_horizontal": horizontal, "flip_vertical": vertical, "turns": turns, "rotate": float(rotate)}
    assert forward.best_tta(augment) == best
    assert [name for name in forward.VIEWS if not forward.unseen_views(name, augment)] == exact.split()


def test_unseen_views_are_named():
    augment = {"flip_horizontal": True, "flip_vertical": False, "turns": False, "rotate": 120.0}
    assert forward.unseen_views("flips", augment) == ["turned by 180 degrees", "flipped vertically"]
    assert forward.unseen_views("dihedral", augment) == ["turned by 180 degrees", "flipped vertically"]
    assert forward.unseen_views("rotations", augment) == ["turned by 154 degrees", "turned by 206 degrees"]
    augment |= {"flip_horizontal": False, "turns": True, "rotate": 0.0}
    assert forward.unseen_views("flips", augment) == ["flipped horizontally", "flipped vertically"]


@pytest.mark.parametrize(
    "tta, views", [("flips", 4), ("dihedral", 8), pytest.param("rotations", 7, marks=pytest.mark.slow)]
)
def test_test_time_augmentation_averages_the_probabilities_of_its_views(monkeypatch, tta, views):
    network, variables = _network("binary")
    seen = []
    apply = UNet.apply
    monkeypatch.setattr(UNet, "apply", lambda self, v, x: seen.append(np.asarray(x)) or apply(self, v, x))
    averaged = np.asarray(network.probability(variables, _image(32, 48)[None], tta)[0])
    assert len(seen) == views == len({x.tobytes() for x in seen})
    if tta == "flips":
        by_hand = [np.asarray(jax.nn.sigmoid(apply(network.model, variables, x)))[0] for x in seen]
        by_hand = [by_hand[0], by_hand[1][:, ::-1], by_hand[2][::-1, ::-1], by_hand[3][::-1]]
        np.testing.assert_allclose(averaged, np.mean(by_hand, 0), atol=1e-6)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_logits_of_a_probability_give_it_back_and_stay_finite(task):
    logits = jnp.array([[-80.0, 80.0], [-20.0, 20.0], [-3.0, 1.0], [0.0, 0.0]])
    probability = forward.to_probability(logits, task)
    found = forward.to_logits(probability, task)
    np.testing.assert_allclose(forward.to_probability(found, task), probability, rtol=1e-5)
    assert jnp.isfinite(found).all()
    if task == "binary":  # 1 - p is 0 for logits from 17 on: not the 87 of the smallest positive number
        assert 16 < found[:2, 1].min() and found[:2, 1].max() < 17
