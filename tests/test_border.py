"""Weight maps of touching cells equal the formula of the paper."""

import numpy as np
import pytest
from scipy import ndimage

from unet_jax.data import border


def _brute_force(label, w0, sigma, ignore_label):
    """Equation 2, literally: from every pixel the distances to all cells, sorted."""
    cells = border.find_cells(label, ignore_label)
    places = [np.argwhere(cells == cell) for cell in range(1, cells.max() + 1)]
    counted = label[label != ignore_label]
    result = np.zeros(label.shape)
    for y, x in np.ndindex(*label.shape):
        value = label[y, x]
        if value == ignore_label:
            continue
        result[y, x] = counted.size / len(np.unique(counted)) / (counted == value).sum()
        if value == 0 and len(places) > 1:
            d1, d2 = sorted(np.sqrt(((p - (y, x)) ** 2).sum(1).min()) for p in places)[:2]
            result[y, x] += w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return result


@pytest.mark.parametrize("count, classes, ignored", [(0, 1, 0), (1, 1, 0), (2, 1, 0), (9, 1, 5), (25, 3, 0)])
def test_the_weight_map_equals_brute_force(count, classes, ignored):
    rng = np.random.default_rng(count)
    label = np.zeros((48, 64), np.uint8)
    for _ in range(count):
        y, x, size = rng.integers(0, 44), rng.integers(0, 60), rng.integers(1, 9)
        label[y : y + size, x : x + size] = rng.integers(1, classes + 1)
    label[:ignored] = 255
    for w0, sigma in ((10.0, 5.0), (3.0, 1.5)):
        weights = border.weight_map(label, w0, sigma, 255)
        np.testing.assert_allclose(weights, _brute_force(label, w0, sigma, 255), rtol=1e-6, atol=1e-6)


def test_narrow_gaps_get_the_largest_weights_and_classes_the_same_total():
    label = np.zeros((64, 64), np.uint8)
    label[:30, :] = label[32:, :32] = label[44:, 34:] = 1
    weight = border.weight_map(label, 10.0, 5.0, 255)
    assert weight[31, 5] == pytest.approx(64 * 64 / 2 / (label == 0).sum() + 10 * np.exp(-(3**2) / 50))
    assert weight[31, 5] > weight[38, 45] > weight[0, 0]
    plain = border.weight_map(label, 0.0, 5.0, 255)
    assert plain[label == 0].sum() == pytest.approx(plain[label == 1].sum()) == pytest.approx(64 * 64 / 2)


def test_cells_are_four_connected_and_of_one_class():
    label = np.array([[1, 0, 2], [0, 1, 2], [255, 1, 1]], np.uint8)
    cells = border.find_cells(label, 255)
    assert len(np.unique(cells[cells > 0])) == 3
    assert cells[1, 1] == cells[2, 2] != cells[0, 0] and cells[0, 2] == cells[1, 2] and cells[2, 0] == 0


def test_the_cost_does_not_grow_with_the_number_of_cells(monkeypatch):
    # Counts the pixels that go through distance transforms, which does not depend on the speed of the machine. A
    # transform of the whole image for each cell would be more than 300 images.
    y, x = np.mgrid[:512, :512]
    label = ((y % 30 > 3) & (x % 28 > 3)).astype(np.uint8)
    transformed, original = [], ndimage.distance_transform_edt

    def counting(values, **kwargs):
        transformed.append(values.size)
        return original(values, **kwargs)

    monkeypatch.setattr(border.ndimage, "distance_transform_edt", counting)
    border.weight_map(label, 10.0, 5.0, 255)
    assert border.find_cells(label, 255).max() > 300
    assert sum(transformed) < 20 * label.size
