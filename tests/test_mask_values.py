"""The meaning of masks read off the masks: what is clear, and what is asked."""

import numpy as np
import pytest
from helpers import save_image
from PIL import Image
from skimage import measure

from unet_jax import data
from unet_jax.data import labels, mask_values, reading
from unet_jax.errors import UserError


@pytest.mark.parametrize(
    "found, expected",
    [
        ({0, 255}, ("0 -> 0 background", "255 -> 1 foreground")),
        ({1, 2}, ("1 -> 0 background", "2 -> 1 foreground")),
        ({0, 1, 3, 255}, ("0 class 0", "1 class 1", "2 class 2", "3 class 3", "255 -> ignore")),
        ({0, 128, 255}, ("0 -> 0 class 0", "128 -> 1 class 1", "255 -> 2 class 2")),
        ({(0, 0, 0), (9, 0, 0), (0, 5, 5)}, ("0 0 0 -> 0 class 0", "0 5 5 -> 1 class 1", "9 0 0 -> 2 class 2")),
    ],
)
def test_labels_are_guessed(found, expected):
    assert mask_values.entries(found) == expected
    labels.parse(expected)


def _cells(count, seed, size=96):
    """A mask of up to `count` round cells, some of which touch."""
    rng, mask = np.random.default_rng(seed), np.zeros((size, size), bool)
    y, x = np.mgrid[:size, :size]
    for _ in range(count):
        a, b = rng.integers(8, size - 8, 2)
        mask |= (y - a) ** 2 + (x - b) ** 2 < 36
    return mask


def _guess(tmp_path, masks):
    """What is guessed for masks, arrays or pictures, saved as `0.png`, `1.png`, ..."""
    for k, mask in enumerate(masks):
        picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        picture.save(tmp_path / f"{k}.png")
    return mask_values.guess([mask_values.inspect(tmp_path / f"{k}.png") for k in range(len(masks))])


CELLS = [_cells(k, k) for k in range(1, 13)]
FOREGROUND = ("0 -> 0 background", "255 -> 1 foreground")
RANGES = ("0-127 -> 0 background", "128-255 -> 1 foreground")


def test_pixels_and_areas_of_a_mask_are_counted(tmp_path):
    mask = np.zeros((9, 9), np.uint8)
    mask[1:4, 1:4], mask[:, 6], mask[5:8, 0:3] = 3, 9, 3
    save_image(mask, tmp_path / "m.png")
    found = mask_values.inspect(tmp_path / "m.png")
    assert found.pixels == {0: 54, 3: 18, 9: 9} and found.areas == {0, 3} and found.regions == 3
    colors = np.array([[0, 0, 0]] * 3 + [[1, 2, 3]] * 6 + [[255, 255, 255]], np.uint8)[mask]
    save_image(colors, tmp_path / "c.png")
    found = mask_values.inspect(tmp_path / "c.png")
    assert found.pixels == {(0, 0, 0): 54, (1, 2, 3): 18, (255, 255, 255): 9}
    assert found.areas == {(0, 0, 0), (1, 2, 3)} and found.is_colored


def test_what_is_clear_is_not_asked(tmp_path):
    filled = [(cells * 255).astype(np.uint8) for cells in CELLS]
    assert _guess(tmp_path, filled) == (FOREGROUND, {0: 12, 255: 12})
    mixed = [(cells * (255 if k % 2 else 1)).astype(np.uint8) for k, cells in enumerate(CELLS)]
    assert _guess(tmp_path, mixed)[0] == ("0 background", "1 foreground", "255 -> 1")
    ignored = [cells.astype(np.uint8) for cells in CELLS]
    for mask in ignored:
        mask[:9] = 255
    assert _guess(tmp_path, ignored)[0] == ("0 class 0", "1 class 1", "255 -> ignore")
    bordered = [cells * np.uint8(2) for cells in CELLS]
    for mask in bordered:  # a thin class between two others
        mask[(mask == 2) & (np.roll(mask, 1, 0) == 0)] = 1
    assert _guess(tmp_path, bordered)[0] == ("0 class 0", "1 class 1", "2 class 2")
    organs = [np.repeat(np.repeat(np.array([[0, 1, 2], [3, 0, 4]], np.uint8), 20, 0), 20, 1) for _ in range(6)]
    organs[3][:20, 20:40] = 0  # one region each, and one mask lacks one
    for mask in organs[2:4]:
        mask[:3] = 255
    assert _guess(tmp_path, organs)[0] == (*(f"{k} class {k}" for k in range(5)), "255 -> ignore")
    teeth = [np.repeat(np.arange(1, 4, dtype=np.uint8), 20)[None].repeat(20, 0) for _ in range(6)]
    assert _guess(tmp_path, teeth)[0] == tuple(f"{k} -> {k - 1} class {k - 1}" for k in (1, 2, 3))
    colors = [np.array([[0, 0, 0], [200, 0, 0], [0, 90, 0]], np.uint8)[mask] for mask in bordered]
    assert len(_guess(tmp_path, colors)[0]) == 3


def test_smooth_edges_are_named_and_ranges_offered(tmp_path):
    masks = [Image.fromarray((cells * 255).astype(np.uint8)) for cells in CELLS]
    shrunk = [mask.resize((48, 48), Image.Resampling.BOX) for mask in masks]
    with pytest.raises(UserError, match="3 value.s. between 0 and 255, such as 64, 128, 192, in .*0.png") as asked:
        _guess(tmp_path, shrunk)
    assert f'--config.data.labels="{RANGES!r}"' in str(asked.value) and "255 -> 4 class 4" in str(asked.value)
    smooth = [mask.resize((70, 70), Image.Resampling.BILINEAR) for mask in masks]
    with pytest.raises(UserError, match="smooth edges") as asked:
        _guess(tmp_path, smooth)
    assert f'--config.data.labels="{RANGES!r}"' in str(asked.value) and "They are classes" not in str(asked.value)
    with pytest.raises(UserError, match="smooth edges"):  # the same, saved in colour
        _guess(tmp_path, [mask.convert("RGB") for mask in shrunk])
    for k, mask in enumerate(smooth):
        mask.save(tmp_path / f"{k}.png")
    label = labels.parse(RANGES).apply(reading.read_any(tmp_path / "3.png"), "3.png")
    np.testing.assert_array_equal(label, np.asarray(smooth[3]) >= 128)
    # One among many is named.
    with pytest.raises(UserError, match="/5.png, are"):
        _guess(tmp_path, [shrunk[k] if k == 5 else mask for k, mask in enumerate(masks)])


@pytest.mark.parametrize("count, size", [(10, 96), (90, 400)])
@pytest.mark.parametrize("unique", [False, True])
def test_numbers_of_objects_are_no_classes(count, size, unique, tmp_path):
    masks, used = [], 0
    for k in range(4):
        objects = measure.label(_cells(count, k, size))
        masks.append(np.where(objects, objects + used, 0).astype(np.uint16))
        used = masks[-1].max() if unique else 0
    with pytest.raises(UserError, match="do they number objects") as asked:
        _guess(tmp_path, masks)
    last = max(mask.max() for mask in masks)
    entries = ("0 background", f"1-{last} -> 1 object")
    assert f'--config.data.labels="{entries!r}"' in str(asked.value)
    np.testing.assert_array_equal(labels.parse(entries).apply(masks[1], "1.png"), masks[1] > 0)


def test_ignored_borders_of_numbered_objects_stay_ignored(tmp_path):
    masks = [measure.label(_cells(9, k)).astype(np.uint8) for k in range(6)]
    for mask in masks:
        mask[:2] = 255
    with pytest.raises(UserError, match="do they number objects") as asked:
        _guess(tmp_path, masks)
    assert "-> 1 object', '255 -> ignore')" in str(asked.value) and "class 1', " in str(asked.value)


def test_objects_in_colours_and_sparse_numbers_are_asked(tmp_path):
    rng, drawn = np.random.default_rng(0), []
    for k in range(5):
        colors = rng.integers(1, 256, (99, 3), np.uint8)
        colors[0] = 0
        drawn.append(colors[measure.label(_cells(10, k))])
    with pytest.raises(UserError, match="do they number objects. If so, draw those of one class in one colour"):
        _guess(tmp_path, drawn)
    panoptic = [(np.kron([[0, 1001], [1001, 2001]], np.ones((9, 9), int))).astype(np.uint16) for _ in range(6)]
    with pytest.raises(UserError, match="the masks hold 0, 1001, 2001. Choose one") as asked:
        _guess(tmp_path, panoptic)
    assert "('0 -> 0 class 0', '1001 -> 1 class 1', '2001 -> 2 class 2')" in str(asked.value)


def test_a_value_that_few_speak_for_is_asked(tmp_path):
    masks = [cells.astype(np.uint8) for cells in CELLS]
    masks[3][5, 5] = 7
    with pytest.raises(UserError, match=r"7 has 1 pixel\(s\) in .*/3.png") as asked:
        _guess(tmp_path, masks)
    assert "'0 -> 0 background', '1 -> 1 foreground', '7 -> ignore'" in str(asked.value)
    masks[3][5, 5], masks[4][:30] = 0, 2
    with pytest.raises(UserError, match=r"2 has 2880 pixel\(s\) in .*/4.png") as asked:
        _guess(tmp_path, masks)
    masks[5][:30] = 2
    assert len(_guess(tmp_path, masks)[0]) == 3


def test_a_mask_of_1_and_255_does_not_ignore_the_foreground_of_the_others(tmp_path):
    masks = [(cells * 255).astype(np.uint8) for cells in CELLS]
    masks[2][3:30, 3:30] = 1
    with pytest.raises(
        UserError, match=r"11 hold only 0 and 255 .*, and 1 other numbers as well \(.*/2.png\)"
    ) as asked:
        _guess(tmp_path, masks)
    for entries in (("0 background", "1-255 -> 1 foreground"), (*FOREGROUND, "1-254 -> ignore")):
        assert f'--config.data.labels="{entries!r}"' in str(asked.value)
        labels.parse(entries)


def test_numbers_with_gaps_are_asked(tmp_path):
    masks = [(cells * (7 if k % 2 else 1)).astype(np.uint8) for k, cells in enumerate(CELLS)]
    with pytest.raises(UserError, match="of the numbers 0 to 7, the masks hold only 0, 1, 7") as asked:
        _guess(tmp_path, masks)
    assert "('0 -> 0 class 0', '1 -> 1 class 1', '7 -> 2 class 2')" in str(asked.value)


def test_palettes_must_agree(tmp_path):
    from configs import folder

    config = folder.get_config().data
    config.root = str(tmp_path)
    mask = CELLS[0].astype(np.uint8)
    for k, colors in enumerate(([0, 0, 0, 255, 255, 255], [255, 255, 255, 0, 0, 0])):
        save_image(np.zeros((96, 96, 3), np.uint8), tmp_path / f"images/{k}.png")
        picture = Image.fromarray(mask)
        picture.putpalette(colors)
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture.save(tmp_path / f"masks/{k}.png")
    with pytest.raises(UserError, match="different palettes"):
        data.infer_settings(config, print)
    config.labels = ("255 255 255 paper", "0 0 0 ink")
    data.infer_settings(config, print)
    first, second = (data.load(config, "all").read(k)[1] for k in (0, 1))
    np.testing.assert_array_equal(first, 1 - second)  # colours, not indices
    save_image(mask, tmp_path / "masks/1.png")
    config.labels = ()
    with pytest.raises(
        UserError, match=r"some masks have a palette, .*/0.png, and some are grey, .*/1.png.*1 is 255 255 255"
    ):
        data.infer_settings(config, print)
    picture = Image.fromarray(mask)
    picture.putpalette([0, 0, 0, 1, 1, 1])  # an index is the grey value itself
    picture.save(tmp_path / "masks/0.png")
    data.infer_settings(config, print)
    assert config.labels == ("0 -> 0 background", "1 -> 1 foreground")
