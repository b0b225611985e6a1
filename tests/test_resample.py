import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from unet_jax.inference import resample


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).random((23, 31, 2), np.float32))


def _grid(image):
    return jnp.meshgrid(jnp.arange(float(image.shape[0])), jnp.arange(float(image.shape[1])), indexing="ij")


@pytest.mark.parametrize("method", resample.INTERPOLATION)
def test_whole_coordinates_are_exact_and_mirrored_outside(image, method):
    rows, columns = _grid(image)
    assert (resample.sample(image, rows, columns, method) == image).all()
    moved = resample.sample(image, rows - 5, columns + 40, method)
    mirrored = np.pad(image, ((5, 0), (0, 40), (0, 0)), mode="reflect")
    assert (moved == mirrored[:23, 40:]).all()


def test_bilinear_equals_scipy(image):
    rows, columns = jax.random.uniform(jax.random.key(0), (2, 40, 50), minval=-8, maxval=38)
    ours = resample.sample(image, rows, columns, "bilinear")
    for k in range(2):
        theirs = ndimage.map_coordinates(image[..., k], [rows, columns], order=1, mode="mirror")
        np.testing.assert_allclose(ours[..., k], theirs, atol=1e-5)  # float32 coordinates


def test_cubic_reproduces_polynomials_up_to_the_second_degree():
    # The reason to choose Keys' kernel with a = -1/2; bilinear reproduces only the first degree.
    y, x = np.meshgrid(np.arange(20.0), np.arange(24.0), indexing="ij")
    f = lambda y, x: 0.02 * y**2 - 0.03 * x**2 + 0.01 * x * y + 0.5 * x - 0.2 * y + 3
    rows, columns = jax.random.uniform(jax.random.key(0), (2, 9, 9), minval=3, maxval=16)
    image = jnp.asarray(f(y, x), jnp.float32)[..., None]
    found = {
        m: np.abs(resample.sample(image, rows, columns, m)[..., 0] - f(rows, columns)).max()
        for m in ("bilinear", "cubic")
    }
    assert found["cubic"] < 1e-4 < 1e-3 < found["bilinear"]


def test_nearest_copies_pixels_and_marks_those_outside_the_image():
    values = jnp.arange(12, dtype=jnp.uint8).reshape(3, 4)
    rows, columns = jnp.array([[0.4, 1.6, -0.6, 2.4]]), jnp.array([[0.6, 3.4, 0.0, 3.6]])
    assert resample.nearest(values, rows, columns, 255).tolist() == [[1, 11, 255, 255]]


def test_a_quarter_turn_swaps_rows_and_columns():
    offsets = jnp.arange(-6.0, 7.0)
    rows, columns = resample.rotate(offsets, offsets, np.pi / 2, 1.0)
    # A row of the output is a column of the image.
    np.testing.assert_allclose(rows, -np.broadcast_to(offsets, (13, 13)), atol=1e-5)
    np.testing.assert_allclose(columns, np.broadcast_to(offsets[:, None], (13, 13)), atol=1e-5)


def test_elastic_fields_are_smooth_and_have_the_standard_deviation_of_the_settings():
    keys = jax.random.split(jax.random.key(0), 300)
    fields = jax.vmap(lambda key: resample.elastic(key, (90, 60), 10.0, 3))(keys)
    assert fields.shape == (300, 2, 90, 60)
    # The centre of the image is a lattice point (90 and 60 pixels, three points of 30 and 20 pixels each: half way
    # between two pixels): the standard deviation of 600 draws of N(0, 10) is within 0.87 of 10 in 99.7% of cases.
    center = fields[:, :, 44:46, 29:31].mean((2, 3))
    assert abs(center.std() - 10) < 0.9 and abs(center.mean()) < 1.3
    # The absolute slopes of the four weights of Keys' kernel sum to at most 3, over 30 pixels between lattice points.
    coarse = jax.vmap(lambda key: 10.0 * jax.random.normal(key, (2, 3, 3)))(keys)
    jumps = jnp.abs(jnp.diff(fields, axis=2)).max((1, 2, 3))
    assert (jumps < 3 / 30 * jnp.abs(coarse).max((1, 2, 3))).all()
