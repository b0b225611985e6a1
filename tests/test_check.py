"""`--mode=check` names each fault; real images pass."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from helpers import ROOT, run_main, save_image, write_rgb_png
from PIL import Image

from unet_jax.errors import UserError
from unet_jax.evaluation import check

RNG = np.random.default_rng(0)


def _broken_folder(root):
    """Twelve good pairs, and one of each fault; returns the message expected for each."""

    def save(name, image=None, mask=None, image_suffix=".png", mask_suffix=".png"):
        image = RNG.integers(0, 256, (20, 30, 3), np.uint8) if image is None else image
        mask = np.pad(np.full((8, 8), 255, np.uint8), ((4, 8), (4, 18))) if mask is None else mask
        save_image(image, root / f"images/{name}{image_suffix}")
        save_image(mask, root / f"masks/{name}{mask_suffix}")
        return root / f"images/{name}{image_suffix}", root / f"masks/{name}{mask_suffix}"

    for k in range(12):
        save(f"good{k}")
    faults = {}
    save("lonely")[1].unlink()
    faults["images/lonely.png"] = "no mask of that name"
    save("orphan")[0].unlink()
    faults["masks/orphan.png"] = "no image of that name"
    file, _ = save("truncated")
    file.write_bytes(file.read_bytes()[:700])
    faults["images/truncated.png"] = "not a readable image"
    save("text")[0].write_text("this is no image")
    faults["images/text.png"] = "not a readable image"
    save("\x1b[2Jclears the screen")[0].write_text("this is no image")
    faults["images/\\x1b[2Jclears the screen.png"] = "not a readable image"
    save("empty")[1].write_bytes(b"")
    faults["masks/empty.png"] = "not a readable image"
    save("size", mask=np.zeros((30, 20), np.uint8))
    faults["images/size.png"] = "is 30x20 pixels but its mask"
    save("range", mask=np.full((20, 30), 7, np.uint8))
    faults["masks/range.png"] = "label 7 is not in config.data.labels"
    save("jpeg", mask_suffix=".jpg")
    faults["masks/jpeg.jpg"] = "a .jpg mask"
    save("smooth", mask=np.linspace(0, 255, 600).reshape(20, 30).astype(np.uint8))
    faults["masks/smooth.png"] = "Smooth edges"
    save("colored", mask=RNG.integers(0, 2, (20, 30, 3), np.uint8) * 200)
    faults["masks/colored.png"] = "a coloured mask"
    write_rgb_png(save("bomb")[0], 40_000, 40_000, 8, b"")
    faults["images/bomb.png"] = "40000x40000 pixels are more than 500000000"
    save("twice")
    Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8)).save(root / "images/twice.jpg")
    faults["images/twice.png"] = "twice.jpg has the same name"
    save("pages")[0].unlink()
    stack = np.zeros((3, 20, 30), np.uint8)
    tifffile.imwrite(root / "images/pages.tif", stack, photometric="minisblack")
    faults["images/pages.tif"] = "holds 3 pages"
    save("void", mask=np.full((20, 30), 9, np.uint8))
    faults["void"] = "every pixel of its label is ignored"
    return faults


def _run(root, *flags, workdir):
    config = f"--config={ROOT / 'configs' / 'folder.py'}"
    return run_main(config, "--mode=check", f"--config.data.root={root}", f"--workdir={workdir}", *flags)


def test_every_fault_is_named(tmp_path):
    faults = _broken_folder(tmp_path / "data")
    # The same image in both splits, through a list.
    good = [f"good{k}" for k in range(12)]
    for folder in ("images", "masks"):
        shutil.copy(tmp_path / f"data/{folder}/good0.png", tmp_path / f"data/{folder}/copy.png")
    found = sorted({path.stem for path in (tmp_path / "data/images").iterdir()} - {"copy", "lonely", "jpeg"})
    (tmp_path / "data/train.txt").write_text("\n".join(found))
    (tmp_path / "data/val.txt").write_text("copy\n")
    result = _run(
        tmp_path / "data",
        "--config.data.lists=('train.txt','val.txt')",
        "--config.data.labels=('0 background','255 -> 1 cell','9 -> ignore')",
        workdir=tmp_path / "run",
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "\x1b" not in result.stdout
    shown = [line for line in result.stdout.splitlines() if line.startswith("FAULT")]
    for file, message in faults.items():
        assert any(file in line and message in line for line in shown), (file, message, shown)
    assert any("in more than one split: train good0, validation copy" in line for line in shown)
    assert len(shown) == len(faults) + 1 >= 12
    assert not any(f"{name}.png" in line for line in shown for name in good)
    assert result.stdout.splitlines()[-1] == f"{len(shown)} fault(s)"
    with Image.open(tmp_path / "run.check.png") as sheet:
        assert sheet.size[0] > 150


def test_a_smooth_or_coloured_mask_does_not_spoil_the_guess(tmp_path):
    _broken_folder(tmp_path / "data")
    (tmp_path / "data/masks/range.png").unlink()
    (tmp_path / "data/masks/void.png").unlink()
    result = _run(tmp_path / "data", workdir=tmp_path / "run")
    assert result.returncode == 1
    assert "('0 -> 0 background', '255 -> 1 foreground')" in result.stdout


def test_images_without_faults_are_ok(tmp_path, real_data, capsys):
    from configs import camvid

    config = camvid.get_config()
    config.data.root = str(real_data / "camvid/CamVid")
    assert check.check(config, tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert "42 pairs; usable: 34 train, 8 validation" in out and out.splitlines()[-1] == "OK"
    assert "480x360: 42 (width x height); resized to 480x360" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("pedestrian"))
    assert row[1] == "9" and row[3] == "26" and row[5] == "8"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 20


def test_every_data_set_can_be_checked(tmp_path, config, capsys):
    config.data.variant = "multilabel"
    assert check.check(config, tmp_path / "sheet.png")
    assert "usable: 20 train, 10 validation" in capsys.readouterr().out


def test_faults_of_every_list_are_printed_and_the_test_split_is_read(tmp_path, capsys):
    from configs import folder

    _broken_folder(tmp_path / "data")
    for name, lines in (("train", "good0\ngood1"), ("val", "good2\nnothing"), ("test", "good3\nrange")):
        (tmp_path / f"data/{name}.txt").write_text(lines)
    config = folder.get_config()
    config.data.root, config.data.lists = str(tmp_path / "data"), ("train.txt", "val.txt", "test.txt")
    config.data.labels = ("0 background", "255 -> 1 cell")
    assert not check.check(config, tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert "val.txt, line 2: 'nothing': no image with a mask has that name" in out
    assert "range.png: label 7" in out and "usable: 2 train, 1 validation, 1 test" in out
    with pytest.raises(UserError, match="cannot be written"):
        check.check(config, "/proc/nowhere/sheet.png")


def _write_pairs(root, pairs):
    """Writes images and masks, and the lists of the splits; `pairs` is split -> name -> image, mask."""
    for split, examples in pairs.items():
        for name, (image, mask) in examples.items():
            save_image(image, root / f"images/{name}.png")
            save_image(mask, root / f"masks/{name}.png")
        (root / f"{split}.txt").write_text("\n".join(examples))
    return f"--config.data.lists={tuple(f'{split}.txt' for split in pairs)}"


def _scene():
    """An image uint8 `[128, 128, 3]` of soft blobs, and a mask of one large object."""
    image = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
    mask = np.zeros((128, 128), np.uint8)
    mask[20:60, 30:90] = 1
    return np.asarray(image), mask


def test_the_verdict_tells_duplicates_lost_objects_and_missing_classes(tmp_path):
    train = {f"t{k:02}": _scene() for k in range(12)}
    validation = {f"v{k}": _scene() for k in range(6)}
    train["t00"][1][[100, 110, 120], [100, 110, 120]] = 1  # the resize picks odd rows and columns
    train["t05"][1][100:120, 20:40] = 2
    image, mask = train["t01"]
    train |= {"twice": (image, mask), "contradiction": (image, mask.T)}
    image, mask = train["t02"]
    validation["copy"] = np.rot90(Image.fromarray(image).reduce(2)), np.rot90(mask[::2, ::2])
    blank = np.full((128, 128, 3), 9, np.uint8)  # of which there may be many
    train["blank1"], validation["blank2"] = (blank, mask), (blank, mask.T)
    lists = _write_pairs(tmp_path / "data", {"train": train, "validation": validation})
    labels = "--config.data.labels=('0 background','1 cell','2 dirt')"
    flags = (lists, labels, "--config.data.size=(64,64)")
    shown = _run(tmp_path / "data", *flags, workdir=tmp_path / "run")
    assert shown.returncode == 1 and "Traceback" not in shown.stderr, shown.stderr
    *lines, fault, missing, lost, copies, verdict = shown.stdout.splitlines()
    contradicting = "contradicting masks: the same image has different labels"
    assert fault == f"FAULT     {contradicting}: train t01, train twice, train contradiction"
    assert missing.startswith("warning   in no validation image, so not scored: 'dirt'. ")
    assert lost.startswith(
        "warning   objects lost when images are resized to 64x64: 'cell' 3 of 26 (up to 1 px), e.g. "
    )
    assert "train t00: choose a larger --config.data.size" in lost
    assert copies.startswith("warning   1 image(s) are near-duplicates of one in another split, e.g. train t02 and ")
    assert verdict == "1 fault(s)"
    row = next(line for line in lines if line.startswith("cell"))
    assert row.split()[6:] == ["26", "1", "px", "3", "train", "t00"]
    assert max(map(len, lines)) <= 120

    result = _run(tmp_path / "data", *flags, "--json", workdir=tmp_path / "run")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert [f"FAULT     {text}" for text in found["faults"]] == [fault]
    assert [f"warning   {text}" for text in found["warnings"]] == [missing, lost, copies]
    assert found["verdict"] == verdict and found["splits"]["train"] == {"pairs": 15, "usable": 15}
    (copy,) = found["near_duplicates"]
    assert (copy["first"], copy["second"]) == ("train t02", "validation copy") and copy["distance"] <= 12
    assert found["sheet"] == str(tmp_path / "run.check.png")
    _, cell, dirt = found["classes"]
    assert (cell["objects"], cell["lost"], cell["smallest_in"]) == (26, 3, "train t00")
    assert dirt["splits"]["train"]["images"] == 1 and dirt["splits"]["validation"]["images"] == 0


def test_json_is_alone_on_standard_output_and_for_this_mode_only(tmp_path):
    pairs = {"train": {"a": _scene(), "b": _scene()}, "validation": {"c": _scene()}}
    root = tmp_path / "data"
    shown = _run(root, _write_pairs(root, pairs), "--json", workdir=tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["verdict"] == "OK, with 2 warning(s)" and found["faults"] == []
    assert "only 2 training image(s)" in found["warnings"][0] and "only 1 validation" in found["warnings"][1]
    assert "Labels, as guessed from the masks" in shown.stderr
    refused = run_main("--mode=eval", "--json", f"--workdir={tmp_path}")
    assert refused.returncode == 1 and "--json is for --mode=check, not for --mode=eval" in refused.stderr
