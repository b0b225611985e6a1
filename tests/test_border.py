import time

import numpy as np
import pytest
from scipy import ndimage

from unet_jax.data import border


def _brute_force(label, w0, sigma, ignore_label):
    """Equation 2 word by word: a distance to every cell from every pixel, sorted."""
    cells = border.find_cells(label, ignore_label)
    places = [np.argwhere(cells == cell) for cell in range(1, cells.max() + 1)]
    counted = label[label != ignore_label]
    result = np.zeros(label.shape)
    for row, column in np.ndindex(*label.shape):
        value = label[row, column]
        if value == ignore_label:
            continue
        result[row, column] = counted.size / len(np.unique(counted)) / (counted == value).sum()
        if value == 0 and len(places) > 1:
            d1, d2 = sorted(np.sqrt(((p - (row, column)) ** 2).sum(1).min()) for p in places)[:2]
            result[row, column] += w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return result


@pytest.mark.parametrize("count, classes, ignored", [(0, 1, 0), (1, 1, 0), (2, 1, 0), (9, 1, 5), (25, 3, 0)])
def test_the_weight_map_equals_brute_force(count, classes, ignored):
    rng = np.random.default_rng(count)
    label = np.zeros((48, 64), np.uint8)
    for _ in range(count):
        row, column, size = rng.integers(0, 44), rng.integers(0, 60), rng.integers(1, 9)
        label[row : row + size, column : column + size] = rng.integers(1, classes + 1)
    label[:ignored] = 255
    for w0, sigma in ((10.0, 5.0), (3.0, 1.5)):
        found = border.weight_map(label, w0, sigma, 255)
        np.testing.assert_allclose(found, _brute_force(label, w0, sigma, 255), rtol=1e-6, atol=1e-6)


def test_gaps_weigh_most_where_they_are_narrow_and_classes_weigh_the_same():
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


def test_the_work_does_not_grow_with_the_number_of_cells():
    # Counted in pixels put through distance transforms, which a slow machine does not change: one transform a cell
    # would be 300 images' worth.
    rows, columns = np.mgrid[:512, :512]
    label = ((rows % 30 > 3) & (columns % 28 > 3)).astype(np.uint8)
    transformed, original = [], ndimage.distance_transform_edt

    def counting(values, **kwargs):
        transformed.append(values.size)
        return original(values, **kwargs)

    border.ndimage.distance_transform_edt = counting
    try:
        began = time.process_time()
        border.weight_map(label, 10.0, 5.0, 255)
        spent = time.process_time() - began
    finally:
        border.ndimage.distance_transform_edt = original
    assert border.find_cells(label, 255).max() > 300
    assert sum(transformed) < 20 * label.size, spent
