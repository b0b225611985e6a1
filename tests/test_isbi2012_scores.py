import itertools

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import adapted_rand_error, variation_of_information

from unet_jax import metrics
from unet_jax.metrics import isbi2012


def _scores(probabilities, labels):
    """The records of a stack by their key."""
    cells = list(zip(probabilities, labels, strict=True))
    return {record.key: record for record in isbi2012.records(cells, ignore_label=255)}


def _random_segmentation(rng, size, count, lines):
    seeds = rng.integers(0, size, (count, 2))
    rows, columns = np.mgrid[:size, :size]
    label = np.argmin([(rows - r) ** 2 + (columns - c) ** 2 for r, c in seeds], axis=0) + 1
    if lines:
        label[rng.random(label.shape) < 0.2] = 0
    return label


def _brute_force_v_rand(segmentation, truth):
    """Counts ordered pairs of foreground pixels, also of each with itself; a line pixel is a segment of its own."""
    pixels = [(s, t) for s, t in zip(segmentation.ravel(), truth.ravel(), strict=True) if t > 0]
    same_s = same_t = same_both = 0
    for (i, (s, t)), (j, (u, v)) in itertools.product(enumerate(pixels), repeat=2):
        in_s, in_t = i == j or (s == u and s > 0), t == v
        same_s, same_t, same_both = same_s + in_s, same_t + in_t, same_both + (in_s and in_t)
    return same_both / (0.5 * same_s + 0.5 * same_t)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_v_rand_equals_a_count_of_all_pairs(seed, lines):
    rng = np.random.default_rng(seed)
    segmentation, truth = _random_segmentation(rng, 14, 6, lines), _random_segmentation(rng, 14, 5, True)
    assert isbi2012.compare(segmentation, truth)[0] == pytest.approx(
        _brute_force_v_rand(segmentation, truth), rel=1e-12
    )


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_scikit_image_on_labels_without_lines(seed):
    rng = np.random.default_rng(seed)
    segmentation, truth = _random_segmentation(rng, 60, 12, False), _random_segmentation(rng, 60, 9, seed % 2 == 1)
    v_rand, v_info = isbi2012.compare(segmentation, truth)
    error, _, _ = adapted_rand_error(truth, segmentation, ignore_labels=(0,))
    # scikit-image leaves out the pair of a pixel with itself: a difference of the order of 1 / (pixels in a segment).
    assert v_rand == pytest.approx(1 - error, abs=2e-3)
    inside = truth > 0
    s, t = segmentation[inside], truth[inside]
    split, merged = variation_of_information(t, s)  # H(S|T), H(T|S), in bits
    entropy = lambda x: -(p := np.unique(x, return_counts=True)[1] / x.size) @ np.log2(p)
    mutual = entropy(s) - split
    assert mutual == pytest.approx(entropy(t) - merged)
    assert v_info == pytest.approx(mutual / (entropy(s) / 2 + entropy(t) / 2), rel=1e-9)


def test_cases_worked_by_hand():
    truth = np.repeat([[1, 2]], 4, axis=0).repeat(2, axis=1)  # two cells of 8 pixels
    merged, split = np.ones((4, 4), int), np.array([[1, 1, 2, 2]] * 2 + [[3, 3, 2, 2]] * 2)
    assert isbi2012.compare(truth, truth) == (1.0, 1.0)
    assert isbi2012.compare(truth + 7, truth) == (1.0, 1.0)  # renumbering changes nothing
    # Merged: p = (1/2, 1/2), s = (1), t = (1/2, 1/2): (1/2) / (1/2 + 1/4); S contains no information about T.
    assert isbi2012.compare(merged, truth) == pytest.approx((2 / 3, 0.0))
    # Split: p = s = (1/4, 1/4, 1/2), t = (1/2, 1/2): (3/8) / (3/16 + 1/4); H(S) = 3/2 bits, H(T) = I = 1 bit.
    assert isbi2012.compare(split, truth) == pytest.approx((6 / 7, 0.8))
    # A line pixel is a segment of its own: p = s = (7/16, 1/16, 1/2).
    lined = truth.copy()
    lined[0, 0] = 0
    squares = (49 + 1 + 64) / 256
    assert isbi2012.compare(lined, truth)[0] == pytest.approx(squares / (squares / 2 + 1 / 4))
    # Both are a single cell: there is no information to lose.
    assert isbi2012.compare(merged, merged) == (1.0, 1.0)
    # Only the cells of the ground truth count.
    framed = np.pad(truth, 3)
    assert isbi2012.compare(np.pad(split, 3, constant_values=9), framed) == pytest.approx((6 / 7, 0.8))
    with pytest.raises(ValueError, match="no cells"):
        isbi2012.compare(truth, np.zeros((4, 4), int))


def test_borders_are_thinned_to_lines_of_one_pixel_and_cells_stay_separate():
    cells = np.zeros((40, 60), bool)
    cells[5:35, 4:20] = cells[5:35, 30:56] = True
    grown = isbi2012.thin_borders(cells)
    assert sorted(np.unique(grown)) == [0, 1, 2]
    assert ((grown == 0).sum(1) == 1).all()  # one pixel in each row
    assert abs(np.argmax(grown == 0, axis=1) - 24.5).max() <= 1  # half way between the two
    assert (grown[cells] > 0).all()
    assert not isbi2012.thin_borders(np.zeros((8, 8), bool)).any()
    assert (isbi2012.thin_borders(np.ones((8, 8), bool)) == 1).all()


def test_thick_membranes_cost_nothing_but_a_gap_merges_two_cells():
    truth = np.ones((60, 60), np.uint8)
    truth[29:31] = truth[:, 29:31] = 0
    thick = ndimage.binary_erosion(truth, iterations=4, border_value=1).astype(np.float32)
    result = _scores([thick], [truth])
    assert (
        result["v_rand"].value > 0.99 and result["pixel_error"].value > 0.1
    )  # thinning forgives what the pixel error counts
    leaky = truth.astype(np.float32)
    leaky[29:31, 10:14] = 1
    assert _scores([leaky], [truth])["v_rand"].value < 0.85


def test_each_score_is_that_of_the_best_threshold_of_the_mean_over_slices():
    truth = np.ones((40, 40), np.uint8)
    truth[:, 19:21] = 0
    p = [np.where(truth == 1, high, low).astype(np.float32) for high, low in ((0.95, 0.35), (0.65, 0.05))]
    result = _scores(p, [truth, truth])
    sweep = lambda scores, key: scores[key].details["sweep"]
    assert len(sweep(result, "v_rand")) == len(isbi2012.THRESHOLDS) == 11
    assert result["v_rand"].value == 1
    assert result["v_rand"].details["threshold"] == 0.4  # the first that separates the cells of both slices
    assert result["pixel_error"].value == 0 and result["pixel_error"].details["threshold"] == 0.4
    assert result["v_rand"].higher_is_better and not result["pixel_error"].higher_is_better
    assert sweep(result, "v_rand")[0] == pytest.approx(2 / 3, rel=1e-3)  # everything is one cell
    ignored = truth.copy()
    ignored[:20] = 255
    assert _scores([p[0]], [ignored])["pixel_error"].value == 0
    # A slice without cells has nothing to compare, but every pixel of it can be wrong.
    more = _scores([*p, p[0]], [truth, truth, np.zeros_like(truth)])
    assert sweep(more, "v_rand") == sweep(result, "v_rand")
    assert sweep(more, "pixel_error")[4] == pytest.approx(0.95 / 3)
    nothing = _scores([p[0]], [np.full_like(truth, 255)])
    assert nothing["v_rand"].value is nothing["v_info"].details["threshold"] is nothing["pixel_error"].value is None


def test_records_have_these_keys_and_titles_if_the_scores_are_on():
    titles = {record.key: record.title for record in metrics.describe(("membrane", "cell"), cells=True)}
    assert list(titles)[-3:] == ["v_rand", "v_info", "pixel_error"]
    assert [titles[key] for key in list(titles)[-3:]] == ["V_rand", "V_info", "pixel error"]
    assert "v_rand" not in {record.key for record in metrics.describe(("membrane", "cell"))}
