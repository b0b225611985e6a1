"""`--mode=check` names each fault; real images pass."""

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
    faults["images/bomb.png"] = "exceeds limit of 500000000 pixels"
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
    assert f"{len(shown)} fault(s)" in result.stdout and "OK" not in result.stdout.split()
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
    assert "42 pairs; usable: 34 train, 8 validation" in out and out.rstrip().endswith("OK")
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
