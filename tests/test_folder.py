"""Folders of images and masks: pairing, label maps, 16-bit images, splits."""

import os

import numpy as np
import pytest
import tifffile
import tiny
from helpers import read_image, save_image
from PIL import Image

from unet_jax import data
from unet_jax.data import labels, pairing, reading
from unet_jax.errors import UserError
from unet_jax.training import loop, summary

RNG = np.random.default_rng(0)


def _config(root, **fields):
    from configs import folder

    config = folder.get_config().data
    config.root = str(root)
    for name, value in fields.items():
        config[name] = value
    return config


def _picture(h=20, w=30, channels=3):
    return RNG.integers(0, 256, (h, w, channels) if channels > 1 else (h, w), np.uint8)


def _mask(h=20, w=30, values=(0, 255)):
    mask = np.full((h, w), values[0], np.uint8)
    for k, value in enumerate(values[1:]):
        mask[2 + 4 * k : 5 + 4 * k, 3:20] = value
    return mask


def _fill(root, count=10, mask=lambda k: _mask()):
    for k in range(count):
        save_image(_picture(), root / f"images/{k}.png")
        save_image(mask(k), root / f"masks/{k}.png")
    return root


def _infer(config):
    """Infers the settings of `config`; returns what was printed."""
    texts = []
    data.infer_settings(config, texts.append)
    return "\n".join(texts)


def test_files_of_all_kinds_are_paired_by_name(tmp_path):
    pictures = {"a": _picture(), "b": _picture(), "c": _picture(channels=1), "sub/d": _picture(), "e": _picture()}
    save_image(pictures["a"], tmp_path / "images/a.png")
    save_image(pictures["b"], tmp_path / "images/b.JPG", format="JPEG", quality=95)
    save_image(pictures["c"], tmp_path / "images/c.tif")
    save_image(pictures["sub/d"], tmp_path / "images/sub/d.tiff")
    alpha = np.full((20, 30), 7, np.uint8)  # dropped by the reader
    save_image(np.dstack([pictures["e"], alpha]), tmp_path / "images/e.png")
    palette = Image.fromarray(_mask(values=(0, 1)))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    (tmp_path / "masks/sub").mkdir(parents=True)
    palette.save(tmp_path / "masks/a_mask.gif")
    palette.save(tmp_path / "masks/b.png")
    save_image(_mask(values=(0, 1)), tmp_path / "masks/c_mask.tif")
    save_image(_mask(values=(0, 1)), tmp_path / "masks/sub/d.png")
    Image.fromarray(_mask(values=(0, 1)) > 0).save(tmp_path / "masks/e.png")  # 1 bit: read as 0 and 255
    (tmp_path / "images/.DS_Store").write_text("")
    (tmp_path / "images/notes.txt").write_text("")
    config = _config(tmp_path, labels=("0 back", "1 front", "255 -> 1"))
    assert "3 channel(s) (1 of 5 are grey)" in _infer(config)
    source = data.load(config, "all")
    assert list(source.ids) == ["a", "b", "c", "e", "sub/d"] and source.classes.names == ("back", "front")
    for index, name in enumerate(source.ids):
        image, label = source.read(index)
        expected = pictures[name] if pictures[name].ndim == 3 else pictures[name][..., None].repeat(3, -1)
        if name == "b":
            assert image.shape == expected.shape
        else:
            np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(label, _mask(values=(0, 1)))


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_16_bit_images_stay_as_they_are(shape, tmp_path):
    deep = [RNG.integers(200, 4000, shape).astype(np.uint16) for _ in range(4)]
    for k, array in enumerate(deep):
        (tmp_path / "images").mkdir(exist_ok=True)
        kind = "rgb" if len(shape) == 3 else "minisblack"
        tifffile.imwrite(tmp_path / f"images/{k}.tif", array, photometric=kind)
        save_image(_mask(), tmp_path / f"masks/{k}.png")
    config = _config(tmp_path)
    assert "Images of 16 bits" in _infer(config)
    assert config.channels == (1 if len(shape) == 2 else 3) and config.dtype == "uint16"
    image, _ = data.load(config, "all").read(0)
    np.testing.assert_array_equal(image.reshape(shape), deep[0])
    png = tmp_path / "deep.png"
    Image.fromarray(deep[0] if len(shape) == 2 else deep[0][..., 0]).save(png)
    assert reading.read_any(png).dtype == np.uint16


def test_label_entries_are_parsed():
    label_map = labels.parse(("0 background", "255 -> 1 a cell", "7 -> 1", "9->ignore"))
    assert label_map.ids == {0: 0, 255: 1, 7: 1, 9: 255} and label_map.names == ("background", "a cell")
    mask = np.array([[0, 255, 7, 9]], np.uint8)
    assert label_map.apply(mask, "m.png").tolist() == [[0, 1, 1, 255]]
    assert label_map.apply(np.dstack([mask] * 3), "m.png").tolist() == [[0, 1, 1, 255]]  # grey, saved as RGB
    colors = labels.parse(("0 0 0 road", "128 0 64 car", "255, 255, 255 -> ignore"))
    assert colors.ids == {(0, 0, 0): 0, (128, 0, 64): 1, (255, 255, 255): 255}
    assert colors.classes("multiclass", 3).palette == ((0, 0, 0), (128, 0, 64))
    ranges = labels.parse(("0-127 -> 0 background", "128-254 -> 1 cell", "255 -> ignore"))
    assert ranges.apply(np.array([[0, 127, 128, 254, 255]], np.uint8), "m.png").tolist() == [[0, 0, 1, 1, 255]]
    with pytest.raises(UserError, match=r"m.png: label 300 is not in config.data.labels \(0-255\)"):
        ranges.apply(np.array([[0, 300]], np.uint16), "m.png")
    mask = np.array([[[128, 0, 64], [0, 0, 0], [255, 255, 255]]], np.uint8)
    assert colors.apply(mask, "m.png").tolist() == [[1, 0, 255]]


@pytest.mark.parametrize(
    "entries, message",
    [
        (("background",), "is not a valid entry"),
        (("0 a", "0 b"), "lists the value 0 twice"),
        (("0 a", "2 b"), r"the classes are \[0, 2\]"),
        (("0 a",), "at least two"),
        (("0 a", "1 2 3 b"), "mixes numbers and colours"),
        (("0 a", "1 a"), "uses a name twice"),
        (("0 a", "1-9 b"), "'1-9 b' is not a valid entry"),
        (("0 a", "9-1 -> 1 b"), "'9-1 -> 1 b' is not a valid entry"),
        (("0 a", "1..9 -> 1 b"), "'1..9 -> 1 b' is not a valid entry"),
        (("0 a", "1-9 -> 1 b", "5 -> ignore"), "lists the value 5 twice"),
        ((0, 255), "is not a valid entry"),
        (("0 a", "1 \x1b[31mred"), r"'1 \\x1b\[31mred' is not a valid entry"),
    ],
)
def test_invalid_labels_are_refused(entries, message):
    with pytest.raises(UserError, match=message):
        labels.parse(entries)


def test_guessed_labels_are_printed_and_recorded(tmp_path):
    config = _config(_fill(tmp_path, mask=lambda k: _mask(values=(0, 255) if k else (0, 0))))
    printed = _infer(config)
    assert """--config.data.labels="('0 -> 0 background', '255 -> 1 foreground')\"""" in printed
    assert "255 is in 9 of 10 masks" in printed
    assert config.labels == ("0 -> 0 background", "255 -> 1 foreground")
    mixed = _config(_fill(tmp_path / "mixed", mask=lambda k: _mask(values=(0, 1 if k % 2 else 255))))
    _infer(mixed)
    assert mixed.labels == ("0 background", "1 foreground", "255 -> 1")
    with pytest.raises(UserError, match="nothing but 0"):
        _infer(_config(_fill(tmp_path / "b", mask=lambda k: _mask(values=(0, 0)))))
    with pytest.raises(UserError, match="smooth edges"):
        _infer(_config(_fill(tmp_path / "c", mask=lambda k: _picture(channels=1))))


def test_groups_stay_together_and_adding_images_moves_few(tmp_path):
    for video in range(12):
        for frame in range(3):
            save_image(_picture(4, 4), tmp_path / f"images/v{video}_{frame}.png")
            save_image(_mask(4, 4), tmp_path / f"masks/v{video}_{frame}.png")
    config = _config(tmp_path, group="(.*)_", validation=0.25)
    _infer(config)
    ids = {split: set(data.load(config, split).ids) for split in ("train", "validation", "all")}
    videos = {split: {name.split("_")[0] for name in names} for split, names in ids.items()}
    assert len(videos["validation"]) == 3 and not videos["train"] & videos["validation"]
    assert ids["train"] | ids["validation"] == ids["all"] and len(ids["all"]) == 36
    for frame in range(3):
        save_image(_picture(4, 4), tmp_path / f"images/v99_{frame}.png")
        save_image(_mask(4, 4), tmp_path / f"masks/v99_{frame}.png")
    after = {name.split("_")[0] for name in data.load(config, "validation").ids}
    assert len(after & videos["validation"]) >= 2
    for pattern, message in (("(", "not a regular expression"), ("x(.*)_", "matches nothing in the name 'v0_0'")):
        with pytest.raises(UserError, match=message):
            data.load(_config(tmp_path, group=pattern, labels=config.labels, channels=3), "train")
    with pytest.raises(UserError, match="leave none for validation"):
        data.load(_config(tmp_path, group="v", labels=config.labels, channels=3), "validation")


def test_lists_name_the_splits(tmp_path):
    _fill(tmp_path, 6)
    (tmp_path / "train.txt").write_text("0\n1.png\n\n/elsewhere/images/2.png /elsewhere/masks/2.png\n")
    (tmp_path / "val.txt").write_text("images/5\n")
    config = _config(tmp_path, lists=("train.txt", "val.txt"))
    _infer(config)
    assert list(data.load(config, "train").ids) == ["0", "1", "2"]
    assert list(data.load(config, "validation").ids) == ["5"]
    assert list(data.load(config, "all").ids) == ["0", "1", "2", "5"]
    with pytest.raises(UserError, match="names no file for test"):
        data.load(config, "test")
    _fill(tmp_path / "other", 3)  # other images to score need no lists
    assert len(data.load(_config(tmp_path / "other", lists=config.lists, labels=config.labels, channels=3), "all")) == 3
    (tmp_path / "val.txt").write_text("5\n7.png\n")
    with pytest.raises(UserError, match=r"val.txt, line 2: '7.png': no image with a mask has that name"):
        data.load(config, "validation")


def test_camvid(real_data):
    from configs import camvid

    config = camvid.get_config().data
    config.root = str(real_data / "camvid/CamVid")
    data.infer_settings(config, lambda text: None)
    train, validation = (data.load(config, split) for split in ("train", "validation"))
    assert (len(train), len(validation), len(data.load(config, "all"))) == (34, 8, 42)
    image, label = train.read(0)
    raw = read_image(real_data / "camvid/CamVid/trainannot" / f"{train.ids[0].split('/')[1]}.png")
    np.testing.assert_array_equal(label, np.where(raw == 11, 255, raw))
    assert image.shape == (360, 480, 3)


def test_carvana(real_data):
    from configs import carvana

    config = carvana.get_config().data
    config.root = str(real_data / "carvana")
    data.infer_settings(config, lambda text: None)
    train, validation = (data.load(config, split) for split in ("train", "validation"))
    cars = [{name.split("_")[0] for name in source.ids} for source in (train, validation)]
    assert len(train) + len(validation) == 65 and not cars[0] & cars[1] and len(cars[0] | cars[1]) == 13
    assert train.classes.task == "binary" and train.classes.num_outputs == 1
    image, label = train.read(0)
    raw = read_image(real_data / "carvana/train_masks" / f"{train.ids[0]}_mask.gif")
    np.testing.assert_array_equal(label, raw)
    assert image.shape == (1280, 1918, 3) and 0 < label.mean() < 1


def test_a_folder_without_a_readable_image_is_named(tmp_path):
    _fill(tmp_path, 3)
    for file in (tmp_path / "images").iterdir():
        file.write_text("no image")
    with pytest.raises(UserError, match=r"none of the 3 files can be read, .*0.png: not a readable image"):
        _infer(_config(tmp_path))
    with pytest.raises(UserError, match=r"nowhere' is not a folder"):
        _infer(_config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"photos is not a folder; folders in .*: images, masks"):
        _infer(_config(tmp_path, images=("photos",)))


def test_one_folder_of_images_and_masks_with_links_and_other_formats(tmp_path):
    for k in range(3):
        save_image(_picture(), tmp_path / f"elsewhere/{k}.png")
        save_image(_mask(), tmp_path / f"elsewhere/{k}_mask.png")
    save_image(_picture(), tmp_path / "data/all/a.b.TIF")
    save_image(_mask(), tmp_path / "data/all/a.b_mask.png")
    save_image(_picture(), tmp_path / "data/all/c.tga")
    (tmp_path / "data/all/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/all/sub/circle").symlink_to(tmp_path / "data/all")
    pairs, faults = pairing.find(_config(tmp_path / "data", images=("all",), masks=("all",)))
    assert [pair.id for pair in pairs] == ["a.b", "sub/0", "sub/1", "sub/2"]
    assert len(faults) == 1 and "c.tga: .tga files are not supported" in faults[0]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("train/0.png trainm/0.png", ["train/0"]),
        ("train\\0.png", ["train/0"]),
        ("/old/place/train/frame.001 /old/place/trainm/frame.001", ["train/frame.001"]),
        ("frame.001", ["train/frame.001"]),
        ("a b.png", ["train/a b"]),
        ("c\\d.png trainm/c\\d.png", ["train/c\\d"]),
        ("train/\udce9.png", ["train/\udce9"]),  # a byte that is not UTF-8
        ("x\x85y", ["train/x\x85y"]),  # a character that `str.splitlines` takes for a line break
        ("train/9.png", "no image with a mask has that name"),  # never val/9
        ("0", "2 pairs have that name"),
    ],
)
def test_a_line_of_a_list_names_one_pair_or_is_a_fault(line, expected, tmp_path):
    for folder, names in (("train", ("0", "frame.001", "a b", "c\\d", "\udce9", "x\x85y")), ("val", ("0", "9"))):
        for name in names:
            save_image(_picture(), tmp_path / f"{folder}/{name}.png")
            save_image(_mask(), tmp_path / f"{folder}m/{name}.png")
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode(line) + b"\r\n")
    (tmp_path / "val.txt").write_text("9\n")
    folders = dict(images=("train", "val"), masks=("trainm", "valm"), lists=("train.txt", "val.txt"))
    config = _config(tmp_path, **folders, labels=("0 a", "255 -> 1"), channels=3)
    if isinstance(expected, list):
        assert list(data.load(config, "train").ids) == expected
    else:
        with pytest.raises(UserError, match=expected):
            data.load(config, "train")
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="train.txt cannot be read as text"):
        data.load(config, "train")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(channels=-1), "channels = -1 must be positive"),
        (dict(normalize="log"), "config.data.normalize = 'log' is not one of"),
        (dict(show=(0, 1)), r"config.data.show = \(0, 1\) must be the numbers of one or three channels"),
        (dict(dtype="int8"), "config.data.dtype = 'int8'"),
        (dict(orientation="up"), "config.data.orientation = 'up'"),
        (dict(value_range=(5, 5)), r"value_range = \(5, 5\) must be"),
        (dict(value_range=(5,)), "value_range"),
        (dict(group="(b)?."), "matches nothing in the name '0'"),
        (dict(labels=("0 a", "1 -> car")), "'1 -> car' is not a valid entry"),
        (dict(labels=("0 0 0 a", "0 0 300 b")), "'0 0 300 b' is not a valid entry"),
        (dict(variant="binary", labels=("0 a", "255 -> 1 b", "2 c")), "for two classes, but config.data.labels has 3"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(fields, message, tmp_path):
    _fill(tmp_path, 3)
    config = _config(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        _infer(config)
        data.load(config, "train")


def test_void_outside_the_palette_and_rotated_photos_with_previews(tmp_path):
    _fill(tmp_path, 2)
    mask = Image.fromarray(_mask(values=(0, 1, 255)))
    mask.putpalette([k % 256 for k in range(63)])  # 21 colours
    mask.save(tmp_path / "masks/0.png")
    mask.save(tmp_path / "masks/1.png")
    (tmp_path / "images/0.png").unlink()
    photo, exif = Image.fromarray(_picture()), Image.Exif()
    exif[0x0112] = 3
    photo.save(tmp_path / "images/0.jpg", "MPO", save_all=True, append_images=[photo], exif=exif)
    config = _config(tmp_path)
    printed = _infer(config)
    assert "255 -> ignore" in config.labels and "the EXIF data of 1 photo(s) say they are rotated" in printed
    assert set(np.unique(data.load(config, "all").read(0)[1])) == {0, 1, 255}


def test_names_in_either_spelling_of_unicode_pair(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for images_name, masks_name, k in ((composed, decomposed, 1), (decomposed, composed, 2)):
        save_image(_picture(), tmp_path / f"images/{images_name}{k}.png")
        save_image(_mask(), tmp_path / f"masks/{masks_name}{k}.png")
    (tmp_path / "train.txt").write_text(f"{decomposed}1\n")
    (tmp_path / "val.txt").write_text(f"{composed}2.png\n")
    config = _config(tmp_path, lists=("train.txt", "val.txt"))
    _infer(config)
    assert list(data.load(config, "train").ids) == [f"{composed}1"]
    assert list(data.load(config, "validation").ids) == [f"{decomposed}2"]  # as the file is called


def test_remedies_help(tmp_path):
    for k in range(4):
        save_image(_picture(), tmp_path / f"images/cell{k}.png")
        save_image(_mask(), tmp_path / f"masks/cell{k}_seg.png")
    with pytest.raises(
        UserError, match="4 masks have the name of their image and '_seg': --config.data.mask_suffix=_seg"
    ):
        _infer(_config(tmp_path))
    config = _config(tmp_path, mask_suffix="_seg", group="(cell)")
    _infer(config)
    with pytest.raises(UserError, match=r"group = '\(cell\)' matches 'cell' in all of their names") as error:
        data.load(config, "validation")
    assert "as '(.*)_' does" in str(error.value)
    config.group = ""
    assert len(data.load(config, "validation")) == 1


def test_a_validation_split_without_foreground_picks_no_best_checkpoint(tmp_path, capsys):
    for k in range(10):
        save_image(_picture(16, 16), tmp_path / f"data/images/{k}.png")
        save_image(_mask(16, 16, (0, 255) if k < 8 else (0,)), tmp_path / f"data/masks/{k}.png")
    (tmp_path / "data/train.txt").write_text("\n".join(map(str, range(8))))
    (tmp_path / "data/val.txt").write_text("8\n9\n")
    config = tiny.get_config()
    config.data.update(_config(tmp_path / "data", lists=("train.txt", "val.txt"), variant="binary", size=(16, 16)))
    config.model.features, config.train.epochs, config.train.panels = (4, 4), 3.0, 0
    config.train.eval_every_epochs = 1.0
    loop.train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("warning: the validation images hold only background") == 1
    assert "Finished: 3 steps; best checkpoint: step 3." in printed and "batch normalisation" not in printed


@pytest.mark.parametrize(
    "model, remedy",
    [
        ({}, "config.model.norm=group"),
        ({"name": "encoder_unet"}, "config.model.norm=group and config.model.encoder_norm=frozen"),
        ({"norm": "group"}, ""),
    ],
)
def test_batch_normalisation_over_two_images_is_warned_of(model, remedy, capsys):
    config = tiny.get_config()
    config.model.update(model)
    config.train.batch_size, config.train.accumulate = 16, 8
    summary._warn_of_small_batches(config)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(remedy) and ("over 2 image(s) at a time" in printed) == bool(remedy)
