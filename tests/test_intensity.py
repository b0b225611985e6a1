"""Changes of the values of a window, against SciPy, Pillow, colorsys and formulas in float64."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from unet_jax.training import intensity

KEYS = jax.random.split(jax.random.key(3), 12)
CHANGES = dict(hue=0.3, saturation=0.8, blur=1.7, noise=0.2)


def _image(height=20, width=28, channels=3):
    return np.random.default_rng(0).random((height, width, channels), np.float32)


def _all(name, image, value=None):
    """What each of `KEYS` makes of an image, float32 `[12, H, W, C]`."""
    change, settings = getattr(intensity, name), {name: CHANGES[name] if value is None else value}
    return np.asarray(jax.jit(jax.vmap(lambda key: change(key, jnp.asarray(image), settings)))(KEYS))


def _uniform(key, low, high):
    return float(jax.random.uniform(key, minval=low, maxval=high))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_is_off_returns_the_image_itself(name):
    image = jnp.asarray(_image())
    assert getattr(intensity, name)(KEYS[0], image, {name: 0.0}) is image


@pytest.mark.parametrize("name", CHANGES)
def test_values_stay_in_range_and_each_key_draws_its_own_change(name):
    image = np.concatenate([_image(), np.zeros((20, 4, 3), np.float32), np.ones((20, 4, 3), np.float32)], 1)
    changed = _all(name, image)
    assert changed.dtype == np.float32 and changed.shape == (12, *image.shape)
    assert changed.min() >= 0 and changed.max() <= 1
    assert len({x.tobytes() for x in changed}) >= 10  # the narrowest Gaussians change nothing
    np.testing.assert_array_equal(changed, _all(name, image))


@pytest.mark.parametrize("shape", [(20, 28, 1), (20, 28, 4), (3, 5, 2), (1, 9, 1)])
@pytest.mark.parametrize("blur", [0.4, 1.0, 2.5])
def test_blur_is_that_of_scipy(shape, blur):
    image, radius = _image(*shape), int(np.ceil(3 * blur))
    for key, found in zip(KEYS, _all("blur", image, blur), strict=True):
        sigma = blur * _uniform(key, 0, 1)
        expected = ndimage.gaussian_filter(image.astype(float), sigma, mode="mirror", radius=radius, axes=(0, 1))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_blur_of_nothing_changes_nothing(monkeypatch):
    image = _image()
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.zeros(()))
    np.testing.assert_array_equal(intensity.blur(KEYS[0], jnp.asarray(image), {"blur": 2.0}), image)


def test_noise_is_normal_and_its_deviation_uniform():
    keys = jax.random.split(jax.random.key(0), 400)
    image = jnp.full((24, 24, 3), 0.5)
    noise = np.asarray(jax.vmap(lambda key: intensity.noise(key, image, {"noise": 0.1}))(keys)) - 0.5
    assert np.abs(noise).max() < 0.5  # nothing is clipped
    deviation = noise.std((1, 2, 3))
    assert 0 <= deviation.min() < 0.005 and 0.095 < deviation.max() < 0.105
    np.testing.assert_allclose(np.quantile(deviation, [0.25, 0.5, 0.75]), [0.025, 0.05, 0.075], atol=0.01)
    standard = noise / deviation[:, None, None, None]
    assert np.abs(noise.mean((1, 2, 3)) / deviation).max() < 0.12  # 5 standard errors of 1728 values
    assert abs((standard**4).mean() - 3) < 0.05  # as of a normal distribution
    neighbours = [(standard[:, 1:] * standard[:, :-1]).mean(), (standard[..., 1:] * standard[..., :-1]).mean()]
    assert np.abs(neighbours).max() < 0.01  # each pixel and each channel has its own


def test_hue_is_a_rotation_of_the_chrominance_of_yiq():
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    image = 0.4 + 0.2 * _image()  # nothing is clipped
    for key, found in zip(KEYS, _all("hue", image, 0.5), strict=True):
        angle = 2 * np.pi * _uniform(key, -1, 1) / 2
        turn = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]])
        expected = image.astype(float) @ (np.linalg.inv(to_yiq) @ turn @ to_yiq).T
        np.testing.assert_allclose(found, expected, atol=1e-3)  # the coefficients of YUV have three digits
        np.testing.assert_allclose(found @ to_yiq[0], image @ to_yiq[0], atol=1e-6)

        pixel = image[3, 5].astype(float)
        y, i, q = colorsys.rgb_to_yiq(*pixel)  # of 1953, with two digits
        chroma = (i + 1j * q) * np.exp(-1j * angle)
        np.testing.assert_allclose(found[3, 5], colorsys.yiq_to_rgb(y, chroma.real, chroma.imag), atol=0.02)


def test_hue_and_saturation_leave_grey_as_it_is():
    grey = np.repeat(_image(channels=1), 3, -1)
    for name in ("hue", "saturation"):
        np.testing.assert_allclose(_all(name, grey), np.broadcast_to(grey, (12, *grey.shape)), atol=1e-6)


def test_saturation_is_that_of_pillow():
    image = _image()
    eight_bits = np.rint(image * 255).astype(np.uint8)
    for key, found in zip(KEYS, _all("saturation", eight_bits / np.float32(255)), strict=True):
        factor = 1 + CHANGES["saturation"] * _uniform(key, -1, 1)
        expected = np.asarray(ImageEnhance.Color(Image.fromarray(eight_bits)).enhance(factor))
        np.testing.assert_allclose(found * 255, expected, atol=1.5)  # it rounds the grey, and cuts off the result
