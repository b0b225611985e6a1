"""`--mode=predict`: files in, files out."""

import json
import os
import shutil

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from helpers import read_image, save_image
from PIL import Image

import unet_jax
from configs import folder
from unet_jax.data import images
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.inference import predict, prediction_files, tiles
from unet_jax.training import loop

RNG = np.random.default_rng(0)


def test_a_folder_of_many_sizes(trained, tmp_path):
    sizes = {"a.png": (48, 48), "sub/b.png": (100, 70), "c.png": (20, 31)}
    pictures = {
        name: save_image(RNG.integers(0, 256, size, np.uint8), tmp_path / "in" / name) for name, size in sizes.items()
    }
    output = tmp_path / "in/out"  # below the inputs, but in a folder of its own
    predict.predict_files(trained, str(tmp_path / "in"), output, scale="fit", probabilities="npy")
    network = unet_jax.load(trained)
    made = json.loads((output / "predictions.json").read_text())
    assert (made["scale"], made["interpolation"], made["step"]) == ("fit", "bilinear", network.step)
    for name, picture in pictures.items():
        stem = str(output / name).removesuffix(".png")
        with Image.open(f"{stem}.png") as label:
            assert label.mode == "P" and label.size == picture.shape[::-1]
            assert label.getpalette()[3:6] == list(network.classes.palette[1])
            label = np.asarray(label)
        probability = np.load(f"{stem}_probability.npy")
        assert probability.shape == (*picture.shape, 7)
        np.testing.assert_allclose(probability.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(label, probability.argmax(-1))
        shares = made["shares"][str(tmp_path / "in" / name)]
        assert shares["background"] == pytest.approx((label == 0).mean())
        assert read_image(f"{stem}_overlay.jpg").shape == (*picture.shape, 3)
    whole = np.asarray(network.predict(pictures["a.png"][None, ..., None])[0])
    np.testing.assert_allclose(np.load(output / "a_probability.npy"), whole, atol=1e-6)  # as in evaluation


def test_images_at_the_scale_of_the_training_are_tiled(trained, tmp_path, capsys):
    """The generated shapes were not resized, so a larger image has more pixels of the same scale."""
    picture = save_image(RNG.integers(0, 256, (100, 130), np.uint8), tmp_path / "a.png")
    predict.predict_files(trained, str(tmp_path / "a.png"), tmp_path / "out", probabilities="png")
    assert "at their own size as in training, in tiles if that is not 48x48" in capsys.readouterr().out

    network = unet_jax.load(trained)
    assert network.source_sizes == ((48, 48), (48, 48))
    expected = tiles.Predictor(network.network, network.variables, (48, 48)).probability(picture[..., None])
    np.testing.assert_array_equal(read_image(tmp_path / "out/a.png"), expected.argmax(-1))
    circle = read_image(tmp_path / "out/a_probability_circle.png") / 65535
    np.testing.assert_allclose(circle, expected[..., 2], atol=1e-5)


def test_images_larger_than_in_training_are_resized_by_its_factor_and_tiled(config, tmp_path, capsys):
    path = helpers.save_untrained(tmp_path / "run", config)
    with helpers.edited_json(path / "classes.json") as classes:
        classes["image_sizes"] = [[80, 96], [96, 120]]  # resized to 48x48
    network = unet_jax.load(path)
    sizes = {"seen": (90, 100), "tall": (240, 120), "large": (360, 480)}
    for name, size in sizes.items():
        save_image(RNG.integers(0, 256, size, np.uint8), tmp_path / f"in/{name}.png")
    predict.predict_files(path, str(tmp_path / "in"), tmp_path / "out", probabilities="npy")
    out = capsys.readouterr().out
    assert "resized as in training (96x80 to 120x96 became 48x48) and back, in tiles if that is not 48x48" in out
    assert "3 of 3 images predicted, 2 of them in tiles" in out and "--scale=fit" in out and "warning" not in out
    made = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (made["scale"], made["train_size"], made["source_sizes"]) == ("train", [48, 48], [[80, 96], [96, 120]])
    expected = {"seen": [48, 48], "tall": [120, 48], "large": [180, 192]}
    for name, size in sizes.items():
        file = tmp_path / f"in/{name}.png"
        is_tiled = name != "seen"
        described = {"size": list(size), "predicted_at": expected[name], "in_tiles": is_tiled}
        assert made["images"][str(file)] == described
        small = images.resize_image(read_image(file)[..., None], tuple(expected[name]), "bilinear")
        predictor = tiles.Predictor(network.network, network.variables, (48, 48))
        whole = predictor.probability(small) if is_tiled else np.asarray(network.predict(small[None])[0])
        channels = [Image.fromarray(np.ascontiguousarray(one)) for one in np.moveaxis(whole, -1, 0)]
        back = np.stack([one.resize(size[::-1], Image.Resampling.BILINEAR) for one in channels], -1)
        np.testing.assert_allclose(np.load(tmp_path / f"out/{name}_probability.npy"), back, atol=1e-6)
        np.testing.assert_allclose(network.predict_image(file), back, atol=1e-6)

    predict.predict_files(path, str(tmp_path / "in"), tmp_path / "fit", scale="fit")
    out = capsys.readouterr().out
    assert "warning: 2 image(s) were shrunk much further than any in training, one 4.0 times as far" in out
    with pytest.raises(UserError, match="scale = 'nativ' is not one of.*Did you mean 'native'"):
        network.predict_image(file, scale="nativ")
    with pytest.raises(UserError, match=r"must be uint8 \[height, width, 1 channel"):
        network.predict_image(np.zeros((20, 20), np.uint8))


def test_overlapping_masks_are_written_one_file_each(config, tmp_path):
    config.data.variant = "multilabel"
    path = helpers.save_untrained(tmp_path / "lr[1e-3]", config)  # to Orbax and to a shell, a pattern
    picture = save_image(RNG.integers(0, 256, (48, 48), np.uint8), tmp_path / "a.png")
    probability = np.asarray(unet_jax.load(path).predict(picture[None, ..., None])[0])
    threshold = float(np.median(probability[..., 1]))
    predict.predict_files(path, str(tmp_path / "a.png"), tmp_path / "out", scale="fit", threshold=threshold)
    mask = read_image(tmp_path / "out/a_circle.png")
    np.testing.assert_array_equal(mask, (probability[..., 1] > threshold) * 255)
    assert json.loads((tmp_path / "out/predictions.json").read_text())["threshold"] == threshold


def test_photos_that_are_to_be_turned_are_named(config, tmp_path, capsys):
    path, exif = helpers.save_untrained(tmp_path / "run", config), Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(RNG.integers(0, 256, (40, 60), np.uint8)).save(tmp_path / "in/a.png", exif=exif)
    predict.predict_files(path, str(tmp_path / "in"), tmp_path / "stored")
    assert "EXIF data of 1 photo(s) say they are rotated" in capsys.readouterr().out
    assert read_image(tmp_path / "stored/a.png").shape == (40, 60)
    config.data.orientation = "upright"
    path = helpers.save_untrained(tmp_path / "upright run", config)
    predict.predict_files(path, str(tmp_path / "in"), tmp_path / "upright")
    assert "rotated" not in capsys.readouterr().out
    assert read_image(tmp_path / "upright/a.png").shape == (60, 40)


@pytest.mark.slow
def test_a_binary_network_on_a_folder_of_16_bit_images(tmp_path, capsys):
    config = folder.get_config()
    config.data.root, config.data.size, config.data.variant = str(tmp_path / "data"), (32, 32), "binary"
    config.model.name, config.model.features = "unet", (4, 8)
    config.train.batch_size, config.train.epochs = 8, 2.0
    (tmp_path / "data/images").mkdir(parents=True)
    for k in range(10):
        mask = np.zeros((40, 40), np.uint8)
        mask[10:20, 5 + k : 25] = 255
        image = RNG.normal(300, 20, (40, 40)) + 500 * (mask > 0)
        tifffile.imwrite(tmp_path / f"data/images/{k}.tif", image.astype(np.uint16), photometric="minisblack")
        save_image(mask, tmp_path / f"data/masks/{k}.png")
    loop.train(config, tmp_path / "run")
    predict.predict_files(tmp_path / "run", str(tmp_path / "data/images/*.tif"), tmp_path / "out", probabilities="png")
    out = capsys.readouterr().out
    assert "resized as in training (40x40 became 32x32) and back" in out and "threshold 0.5" in out
    label, probability = (read_image(tmp_path / f"out/3{name}.png") for name in ("", "_probability_foreground"))
    np.testing.assert_array_equal(label, probability > 0.5 * 65535)

    result = evaluate.evaluate_workdir(tmp_path / "run", None, None, "validation", None)
    assert result.confusion.sum() == 2 * 32 * 32


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(inputs="nothing*"), "names no image"),
        (dict(threshold=0.3), "this network has a softmax"),
        (dict(threshold=2.0), "must be between 0 and 1"),
        (dict(output="."), "holds the inputs, and would overwrite them"),
        (dict(output="full"), "is not empty, it holds note.txt"),
        (dict(output="full/note.txt"), "cannot be written"),
        (dict(inputs="clash"), "two outputs would be called x_probability_circle.png"),
        (dict(tta="flip"), "Did you mean 'flips'"),
        (dict(vector="gpgk"), "--vector = 'gpgk' is not one of.*Did you mean 'gpkg'"),
        (dict(vector="gpkg"), "--vector=gpkg is for GeoTIFF files, .*; a.png does not"),
        (dict(inputs="twins"), "would be written to the same file"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_any_work(trained, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    save_image(np.zeros((48, 48), np.uint8), tmp_path / "a.png")
    for name in ("x.png", "x.jpg"):
        save_image(np.zeros((48, 48), np.uint8), tmp_path / "twins" / name)
    for name in ("x.png", "x_probability_circle.png"):
        save_image(np.zeros((48, 48), np.uint8), tmp_path / "clash" / name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        predict.predict_files(trained, **{"inputs": "a.png", "output": "out", **change})
    assert sorted(tmp_path.rglob("*")) == before


def test_classes_whose_names_are_alike_as_file_names_are_numbered(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with helpers.edited_json(tmp_path / "run/classes.json") as classes:
        classes["names"] = ["a b", "a_b", "c/d", "e.f", "g-h", "é", "i" * 300]
    save_image(np.zeros((48, 48), np.uint8), tmp_path / "x.png")
    predict.predict_files(tmp_path / "run", str(tmp_path / "x.png"), tmp_path / "out", probabilities="png")
    written = {file.stem.removeprefix("x_probability_") for file in (tmp_path / "out").glob("x_probability_*.png")}
    assert written == {"0_a_b", "1_a_b", "c_d", "e.f", "g-h", "é", "i" * 40}


def test_unreadable_files_are_listed_and_the_others_predicted(trained, tmp_path):
    place, shown = tmp_path / os.fsdecode("café".encode("latin-1")), f"{tmp_path}/caf\\udce9"  # not UTF-8
    save_image(np.full((48, 48), 255, np.uint8), place / "in/good.png")
    (place / "in/bad.png").write_text("no image")
    flags = [f"--workdir={trained}", f"--input={place}/in", f"--output={place}/out"]
    result = helpers.run_main("--mode=predict", *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "1 of 2 files could not be predicted" in result.stderr
    assert f"{shown}/in/bad.png: not a readable image" in result.stderr
    assert "1 of 2 images predicted" in result.stdout and f"see {shown}/out" in result.stdout
    assert (place / "out/good.png").exists() and not (place / "out/bad.png").exists()
    made = json.loads((place / "out/predictions.json").read_text())
    assert made["shares"].keys() == {str(place / "in/good.png")}


def test_every_file_is_predicted_or_listed(trained, tmp_path, capsys):
    picture = RNG.integers(0, 256, (48, 48), np.uint8)
    for suffix in (".png", ".jpg", ".tif", ".gif", ".bmp", ".webp", ".jp2"):
        save_image(picture, tmp_path / f"in/{suffix[1:]}{suffix}")
    np.save(tmp_path / "in/npy.npy", picture)
    for name in ("phone.heic", "scan.nii.gz", "notes.txt", "form.pdf"):
        (tmp_path / "in" / name).write_text("")
    with pytest.raises(UserError, match="2 of 10 files could not be predicted") as error:
        predict.predict_files(trained, str(tmp_path / "in"), tmp_path / "out")
    for name in ("phone.heic", "scan.nii.gz"):
        assert f"{tmp_path}/in/{name}: .{name.split('.')[-1]} files are not supported" in str(error.value)
    printed = capsys.readouterr().out
    assert "left alone, as they are no images: form.pdf, notes.txt" in printed and "8 of 8 images predicted" in printed
    made = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(made["shares"]) == 8 and len(made["failures"]) == 2 and "unfinished" not in made
    for suffix in ("png", "tif", "bmp", "npy"):  # lossless: the same label
        np.testing.assert_array_equal(read_image(tmp_path / f"out/{suffix}.png"), read_image(tmp_path / "out/png.png"))


@pytest.mark.parametrize("variant", ["multiclass", "multilabel"])
def test_a_prediction_that_was_stopped_goes_on(trained, config, variant, tmp_path, monkeypatch, capsys):
    if variant == "multilabel":
        config.data.variant, config.train.epochs = variant, 0.5
        loop.train(config, trained := tmp_path / "run")
    for k in range(5):
        save_image(RNG.integers(0, 256, (48, 48 + k), np.uint8), tmp_path / f"in/{k}.png")
    arguments = trained, str(tmp_path / "in")
    predict.predict_files(*arguments, tmp_path / "whole")
    write, calls = prediction_files.write, []

    def stopped(place, *more):
        calls.append(place(".png").stem)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(place, *more)

    monkeypatch.setattr(prediction_files, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict.predict_files(*arguments, tmp_path / "out")
    cut = tmp_path / "out/1_overlay.jpg"
    cut.write_bytes(cut.read_bytes()[:-9])  # as if it had been killed there
    with pytest.raises(UserError, match="with other settings: input '.*/in', now '.*/in/0.png'"):
        predict.predict_files(trained, str(tmp_path / "in/0.png"), tmp_path / "out")
    with pytest.raises(
        UserError, match="was stopped, with other settings: scale 'train', now 'native'. Choose another"
    ):
        predict.predict_files(*arguments, tmp_path / "out", scale="native")
    predict.predict_files(*arguments, tmp_path / "out")
    assert (
        calls[3:] == ["1", "2", "3", "4"]
        and "1 already predicted by the run that was stopped" in capsys.readouterr().out
    )
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    with pytest.raises(UserError, match="is not empty"):  # it has ended
        predict.predict_files(*arguments, tmp_path / "out")


def test_constant_predictions_are_warned_of(trained, tmp_path, capsys, monkeypatch):
    save_image(np.zeros((48, 48), np.uint8), tmp_path / "a.png")
    network = unet_jax.load(trained)
    network.variables["params"]["head"] = {"kernel": jnp.zeros((1, 1, 4, 7)), "bias": jnp.eye(7)[3]}
    monkeypatch.setattr(predict.trained, "load", lambda *_: network)
    predict.predict_files(trained, str(tmp_path / "a.png"), tmp_path / "out")
    assert "warning: every pixel of every image is triangle" in capsys.readouterr().out
