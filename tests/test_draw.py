from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from unet_jax import metrics
from unet_jax.data import colors
from unet_jax.data.source import Classes
from unet_jax.evaluation import curves, pictures

CLASSES = Classes("multiclass", ("sky", "road"), ((10, 20, 250), (90, 200, 90)))


def test_a_panel_shows_image_ground_truth_prediction_and_error():
    image = np.full((64, 64, 3), 200, np.uint8)
    label = np.zeros((64, 64), np.uint8)
    label[32:] = 1
    label[:, :8] = 255
    prediction = np.zeros((64, 64), np.uint8)
    prediction[48:] = 1
    panel = np.asarray(pictures.draw_panel(image, label, prediction, CLASSES))
    tile = lambda column: panel[24 : 24 + 256, 8 + column * 264 : 8 + column * 264 + 256][2::4, 2::4]
    assert (tile(0) == 200).all()
    assert tile(1)[0, 20].tolist() == [10, 20, 250] and tile(1)[63, 20].tolist() == [90, 200, 90]
    assert (tile(1)[:, :8] == colors.IGNORED).all()
    assert tile(2)[40, 20].tolist() == [10, 20, 250]
    wrong = (tile(3) == pictures.WRONG).all(-1)
    assert wrong[32:48, 8:].all() and wrong.sum() == 16 * 56  # ignored pixels are never wrong


def test_an_error_map_separates_wrong_from_ignored_pixels():
    label = np.array([[0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 1, 1]], np.uint8)
    assert pictures.error_map(label, prediction, CLASSES).tolist() == [
        [0, pictures.WRONG_PIXEL, 0, pictures.IGNORED_PIXEL]
    ]
    masks = Classes("multilabel", ("a", "b"), CLASSES.palette)
    pairs = lambda values: np.array([values], np.uint8)
    label = pairs([(0, 1), (1, 1), (255, 255), (255, 1)])
    prediction = pairs([(0, 1), (1, 0), (0, 1), (0, 1)])
    assert pictures.error_map(label, prediction, masks).tolist() == [
        [0, pictures.WRONG_PIXEL, pictures.IGNORED_PIXEL, 0]
    ]


def test_overlapping_masks_blend():
    classes = Classes("multilabel", ("a", "b"), ((200, 0, 0), (0, 100, 0)), channels=1)
    label = np.zeros((32, 32, 2), np.uint8)
    label[10:20, 10:20] = 1
    assert colors.colorize(label, classes)[15, 15].tolist() == [100, 50, 0]
    panel = pictures.draw_panel(np.zeros((32, 32, 1), np.uint8), label, label, classes)
    wrong = (np.asarray(panel) == pictures.WRONG).all(-1)
    assert not wrong.any()


def test_loss_weights_are_drawn_beside_the_error():
    label = np.zeros((64, 64), np.uint8)
    weight = np.linspace(0, 10, 64 * 64, dtype=np.float32).reshape(64, 64)
    painted = lambda **extra: np.asarray(pictures.draw_panel(label[..., None], label, label, CLASSES, **extra))
    without, panel = painted(), painted(weight=weight)
    assert panel.shape[1] == without.shape[1] + 264
    tile = panel[24 : 24 + 256, 8 + 4 * 264 : 8 + 4 * 264 + 256][2::4, 2::4, 0]
    np.testing.assert_allclose(tile, weight * 25.5, atol=1)


def _draw_history(path, rows):
    curves.draw_history(rows, metrics.describe(CLASSES.names), path / "history.png")
    with Image.open(path / "history.png") as picture:
        return picture.size


@pytest.mark.parametrize("rows", [[], [{"step": 1, "epoch": 0.5, "train/loss": 1.0}]])
def test_history_is_drawn_from_whatever_is_there(rows, tmp_path):
    rows = [*rows, {"step": 2, "epoch": 1.0, "val/loss": 0.5, "val/accuracy": 0.9, "val/miou": None}]
    assert _draw_history(tmp_path, rows)[0] > 1000


def test_curves_are_svg_in_the_colours_of_the_page():
    rows = [{"step": s, "epoch": s / 2, "train/loss": 10.0**-s, "val/miou": None} for s in range(1, 5)]
    (chart,) = curves.charts(rows, metrics.describe(CLASSES.names))  # no score was finite
    assert [curve.title for curve in chart.curves] == ["training loss"]
    light, dark = (curves.draw_svg(chart, theme) for theme in ("light", "dark"))
    for theme, svg in (("light", light), ("dark", dark)):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert curves.THEMES[theme][2][0].encode() in svg
    assert light == curves.draw_svg(chart, "light")  # equal curves, equal files


def test_a_new_metric_is_drawn_without_another_change(monkeypatch, tmp_path):
    def distance(counts):
        return [metrics.Record("distance", "mean distance", None, higher_is_better=False)]

    rows = [{"step": s, "epoch": s, "val/loss": 1.0, "val/miou": 0.5, "val/distance": 9.0 / s} for s in (1, 2, 3)]
    narrow = _draw_history(tmp_path, rows)
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, distance))
    wide = _draw_history(tmp_path, rows)
    assert wide[0] == 1.5 * narrow[0]  # values beyond 1 have a chart of their own, so as not to flatten the others
    charts = curves.charts(rows, metrics.describe(CLASSES.names))
    assert [[curve.title for curve in chart.curves] for chart in charts] == [
        ["validation loss"],
        ["mean IoU"],
        ["mean distance"],
    ]
    assert charts[1].limits == (0, 1) and charts[2].limits is None
