"""ISBI 2012: slices in folders and in stacks, errors in the files, and the whole recipe on small images."""

import json

import numpy as np
import pytest
import tifffile
from helpers import save_image, write_rgb_png
from PIL import Image

from unet_jax import data, metrics
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate, pictures
from unet_jax.training import loop
from unet_jax.workdir import metrics_log


def make_stack(count, size=(40, 56)):
    """Noisy images of cells and their labels 0/255, both uint8 `[count, h, w]`."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    labels = np.stack([np.uint8(255 * (((y + k) % 16 > 2) & (x % 14 > 2))) for k in range(count)])
    images = np.uint8(np.clip(labels * 0.6 + 40 + rng.normal(0, 20, labels.shape), 0, 255))
    return images, labels


def write_16_bit_png(path, grey):
    """A grey image as 16-bit RGB, which Pillow reads but cannot write."""
    pixels = np.stack([grey.astype(">u2")] * 3, -1).tobytes()
    rows = np.frombuffer(pixels, np.uint8).reshape(len(grey), -1)
    rows = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # each after its filter byte
    write_rgb_png(path, *grey.shape[::-1], 16, rows)


def write_folders(root, images, labels):
    for name, stack in (("image", images), ("label", labels)):
        for k, one in enumerate(stack):
            save_image(one, root / "train" / name / f"{k}.png")


def write_stacks(root, images, labels):
    root.mkdir(parents=True, exist_ok=True)
    rgb = {"photometric": "rgb"} if images.ndim == 4 else {"photometric": "minisblack"}
    tifffile.imwrite(root / "train-volume.tif", images, **rgb)
    tifffile.imwrite(root / "train-labels.tif", labels, photometric="minisblack")


def _config(config, root, **fields):
    with config.unlocked():
        config.data.update(name="isbi2012", root=str(root), variant="binary", validation=0.2, **fields)
    return config.data


@pytest.mark.parametrize("layout", ["folders", "membrane", "stacks"])
@pytest.mark.parametrize("variant", ["binary", "multiclass"])
def test_folders_and_stacks_give_the_same_slices(config, tmp_path, layout, variant):
    images, labels = make_stack(12)
    root = tmp_path / "data"
    if layout == "stacks":
        write_stacks(root, images, labels)
    else:
        write_folders(root / layout if layout == "membrane" else root, images, labels)
    _config(config, root).variant = variant
    sources = {split: data.load(config.data, split) for split in ("train", "validation", "all")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 10, "validation": 2, "all": 12}
    assert [int(i) for i in sources["validation"].ids] == [10, 11]  # one block, in numerical order
    assert [int(i) for i in sources["all"].ids] == list(range(12))
    assert sources["train"].classes.task == variant and sources["train"].classes.names == ("membrane", "cell")
    for index, k in ((0, 10), (1, 11)):
        image, label = sources["validation"].read(index)
        assert image.shape == (40, 56, 1) and image.dtype == label.dtype == np.uint8
        assert (image[..., 0] == images[k]).all() and (label == labels[k] // 255).all()


def _break_folder(root, fault):
    images, labels = make_stack(5)
    write_folders(root, images, labels)
    image, label = root / "train" / "image" / "3.png", root / "train" / "label" / "3.png"
    if fault == "count":
        label.unlink()
        return r"5 slices and .* 4: .*image/3.png has no partner"
    if fault == "empty":
        for file in (*image.parent.iterdir(), *label.parent.iterdir()):
            file.unlink()
        return r"train/image holds no \.png files"
    if fault == "values":
        Image.fromarray(np.uint8(labels[3] * 0.5)).save(label)
        return r"label/3.png: labels must be 0 \(membrane\) and 255 \(cell\), or 0 and 1, but the values are 0, 127"
    if fault == "16 bit":
        Image.fromarray(images[3].astype(np.uint16) * 256).save(image)
        return r"image/3.png: a 16-bit I;16 image; 8-bit grey"
    if fault == "16 bit RGB":
        write_16_bit_png(image, images[3])
        return r"image/3.png: a 16-bit RGB image; 8-bit grey"
    if fault == "colour":
        Image.fromarray(np.stack([images[3], images[3], 255 - images[3]], -1)).save(image)
        return r"image/3.png: a coloured image"
    if fault == "size":
        Image.fromarray(labels[3][:20]).save(label)
        return r"label/3.png is 56x20 pixels but its image is 56x40"
    image.write_bytes(image.read_bytes()[:100])
    return r"image/3.png: not a readable image"


@pytest.mark.parametrize("fault", ["count", "empty", "values", "16 bit", "16 bit RGB", "colour", "size", "truncated"])
def test_broken_slices_are_named(config, tmp_path, fault):
    message = _break_folder(tmp_path, fault)
    with pytest.raises(UserError, match=message):
        data.load(_config(config, tmp_path), "train")


def _break_stack(root, fault):
    images, labels = make_stack(5)
    if fault == "count":
        write_stacks(root, images, labels[:4])
        return r"train-volume.tif holds 5 slices of 56x40 pixels but .*train-labels.tif 4 of 56x40"
    if fault == "16 bit":
        write_stacks(root, images.astype(np.uint16) * 256, labels)
        return r"train-volume.tif: uint16 values of shape \(5, 40, 56\); 8-bit grey"
    if fault == "values":
        labels[2, 0, 0] = 7
        write_stacks(root, images, labels)
        return r"train-labels.tif, slice 2: labels must be .* the values are 0, 7, 255"
    if fault == "colour":
        write_stacks(root, np.stack([images, images, 255 - images], -1), labels)
        return r"train-volume.tif: a RGB image; 8-bit grey"
    if fault == "two stacks":
        write_stacks(root, images, labels)
        tifffile.imwrite(root / "train-labels.tif", labels[:3, :20], photometric="minisblack", append=True)
        return r"train-labels.tif holds 2 stacks, or pages of different sizes"
    write_stacks(root, images, labels)
    (root / "train-labels.tif").write_bytes(b"II*\0no")
    return r"train-labels.tif: not a readable TIFF stack"


@pytest.mark.parametrize("fault", ["count", "16 bit", "values", "colour", "two stacks", "damaged"])
def test_broken_stacks_are_named(config, tmp_path, fault):
    message = _break_stack(tmp_path, fault)
    with pytest.raises(UserError, match=message):
        data.load(_config(config, tmp_path), "train")


def test_other_forms_of_grey_are_converted_without_loss(config, tmp_path):
    images, labels = make_stack(5)
    write_folders(tmp_path / "a", images, labels // 255)  # 0 and 1
    Image.fromarray(images[0]).convert("RGB").save(tmp_path / "a" / "train" / "image" / "0.png")
    Image.fromarray(images[1]).convert("RGBA").save(tmp_path / "a" / "train" / "image" / "1.png")
    write_stacks(tmp_path / "b", np.stack([images] * 3, -1), labels)
    write_stacks(tmp_path / "c", images, labels)
    tifffile.imwrite(tmp_path / "c" / "train-volume.tif", 255 - images, photometric="miniswhite")
    for folder in ("a", "b", "c"):
        source = data.load(_config(config, tmp_path / folder), "all")
        for k in range(5):
            image, label = source.read(k)
            assert (image[..., 0] == images[k]).all() and (label == labels[k] // 255).all()


def test_the_error_for_missing_slices_says_what_to_put_there(config, tmp_path):
    with pytest.raises(UserError, match=r"is not a folder\. Put the slices there as train/image/K\.png"):
        data.load(_config(config, tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="holds no slices"):
        data.load(_config(config, tmp_path), "train")
    write_stacks(tmp_path, *make_stack(2))
    with pytest.raises(UserError, match=r"validation = 0\.2 of 2 slices leaves none for validation"):
        data.load(_config(config, tmp_path), "train")
    assert len(data.load(_config(config, tmp_path), "all")) == 2  # such as other slices to score
    with pytest.raises(UserError, match="--split = 'test'"):
        data.load(_config(config, tmp_path), "test")


@pytest.mark.slow
@pytest.mark.parametrize("variant, padding", [("multiclass", "valid"), ("binary", "same")])
def test_the_whole_recipe_on_small_images(config, tmp_path, variant, padding, capsys):
    """Weight map, elastic crops, valid network, EM scores, rotations in the evaluation: from the files to the table."""
    write_stacks(tmp_path / "data", *make_stack(10))
    _config(config, tmp_path / "data", size=(40, 56)).variant = variant
    config.update_from_flattened_dict(
        {
            "model.padding": padding,
            "model.norm": "none",
            "model.kernel_init": "paper",
            "augment.crop": (26, 30),
            "augment.elastic": 2.0,
            "loss.border_weight": 10.0,
            "eval.em_scores": True,
            "eval.tta": "rotations",
            "optimizer.name": "sgd",
            "optimizer.momentum": 0.99,
            "optimizer.learning_rate": 1e-3,
            "train.epochs": 3.0,
        }
    )
    path = tmp_path / "run"
    loop.train(config, path)
    out = capsys.readouterr().out
    assert "training predicts 26x30 from" in out and "V_rand" in out
    evaluated = [line for line in metrics_log.read(path) if "val/v_rand" in line]
    assert evaluated and all(0 <= line[key] <= 1 for line in evaluated for key in ("val/v_rand", "val/pixel_error"))
    with Image.open(next((path / "panels").rglob("*.png"))) as picture:
        # Image, ground truth, prediction, error and loss weights, each enlarged seven times.
        assert picture.size[0] == pictures.MARGIN + 5 * (7 * 56 + pictures.MARGIN)

    plain = evaluate.evaluate_workdir(path, None, None, "validation", "none")
    assert plain.confusion.sum() == 2 * 40 * 56  # every pixel, though the network has no padding
    step = json.loads((path / "eval.json").read_text())["step"]
    (line,) = [line for line in evaluated if line["step"] == step]
    assert metrics.flatten(plain.records)["v_rand"] == pytest.approx(line["val/v_rand"], abs=1e-6)
    rotated = evaluate.evaluate_workdir(path, None, None, "validation", None)
    written = json.loads((path / "eval.json").read_text())
    assert written["tta"] == "rotations" and len(written["v_rand_sweep"]) == 11
    assert written["v_rand"] == metrics.flatten(rotated.records)["v_rand"] and rotated.loss != plain.loss
    with pytest.raises(UserError, match="--tta = 'rotation'.*Did you mean 'rotations'"):
        evaluate.evaluate_workdir(path, None, None, "validation", "rotation")


def test_settings_that_do_not_fit_the_data_are_named(config, tmp_path):
    config.data.variant = "multilabel"
    config.loss.border_weight = 10.0
    with pytest.raises(UserError, match="border_weight is for labels of one class per pixel"):
        loop.train(config, tmp_path / "run")
    config.loss.border_weight, config.eval.em_scores = 0.0, True
    with pytest.raises(UserError, match="em_scores is for two classes"):
        loop.train(config, tmp_path / "run")
    config.eval.em_scores, config.eval.tta = False, "rotated"
    with pytest.raises(UserError, match=r"config\.eval\.tta = 'rotated'"):
        loop.train(config, tmp_path / "run")
    config.eval.tta, config.loss.border_sigma = "none", 0.0
    with pytest.raises(UserError, match=r"border_sigma = 0\.0 must be positive"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_real_slices(config, real_data, tmp_path):
    source = data.load(_config(config, real_data / "isbi2012"), "validation")
    assert list(source.ids) == ["18", "19", "20", "21", "22"]
    slices = [source.read(k) for k in range(5)]
    assert all(image.shape == (512, 512, 1) and set(np.unique(label)) == {0, 1} for image, label in slices)
    assert 0.7 < np.mean([label.mean() for _, label in slices]) < 0.85
    everything = [data.load(config.data, "all").read(k) for k in range(23)]
    write_stacks(tmp_path, np.stack([x[..., 0] for x, _ in everything]), np.stack([y * 255 for _, y in everything]))
    stacked = data.load(_config(config, tmp_path), "validation")
    for (image, label), k in zip(slices, range(5), strict=True):
        assert all((a == b).all() for a, b in zip((image, label), stacked.read(k), strict=True))
