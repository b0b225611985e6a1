"""The data sets: generated shapes, files in the published layouts, and samples of the real images."""

import pathlib
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
from helpers import ROOT, make_frames, make_pets
from PIL import Image

from unet_jax import data
from unet_jax.data import carla, images, pipeline, shapes
from unet_jax.data.source import Classes, check_label
from unet_jax.errors import UserError


def _config(config, root, variant="carla23", name="carla"):
    config.data.name, config.data.root, config.data.variant = name, str(root), variant
    return config.data


def test_shapes_are_a_function_of_seed_split_and_index(config):
    config.data.variant = "multilabel"
    config.data.size = (192, 192)
    first, again = (data.load(config.data, "train").read(3) for _ in range(2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != data.load(config.data, "train").read(4)[0]).any()
    assert (first[0] != data.load(config.data, "validation").read(3)[0]).any()
    config.data.shapes_seed = 1
    assert (first[0] != data.load(config.data, "train").read(3)[0]).any()


def test_shapes_look_like_those_of_the_pytorch_u_net():
    areas = []
    for index in range(50):
        image, masks = shapes.generate((192, 192), [0, 0, index])
        assert image.shape == (192, 192, 1) and set(np.unique(image)) == {0, 255}
        assert masks.shape == (192, 192, 6) and masks.any((0, 1)).all()
        assert (masks.any(-1) == (image[..., 0] == 255)).all()
        areas.append(masks.sum((0, 1)))
        centres = np.argwhere(masks[..., 0]).mean(0)
        assert (0.1 * 192 - 1 <= centres).all() and (centres <= 0.9 * 192).all()
    square, circle, *_ = np.array(areas).T
    sides = np.sqrt(square)  # 2 (s // 2) + 1 with s from int(0.06 * 192 * 0.8) to int(0.12 * 192 * 0.8)
    assert 9 <= sides.min() and sides.max() <= 19 and sides.min() < 12 and sides.max() > 15
    assert np.pi * 4**2 < circle.min() and circle.max() < np.pi * 12**2


def test_in_multiclass_labels_later_shapes_cover_earlier_ones(config):
    _, label = data.load(config.data, "train").read(0)
    _, masks = shapes.generate((48, 48), [0, 0, 0])
    for k in range(6):
        visible = masks[..., k] & ~masks[..., k + 1 :].any(-1)
        assert (label[visible == 1] == k + 1).all()
    assert (label[~masks.any(-1)] == 0).all()


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("layout", ["root", "parts", "Train", "seg"])
def test_carla_layouts(config, tmp_path, layout, packed):
    root = tmp_path / "carla"
    if layout == "parts":
        make_frames(root / "dataA" / "dataA", [1, 2, 3])
        make_frames(root / "dataB" / "dataB", [1, 2], alpha=True)
    else:
        make_frames(
            root / ("Train" if layout == "Train" else ""), range(5), "CameraSeg" if layout == "seg" else "CameraMask"
        )
    for folder in root.rglob("CameraRGB"):
        (folder / ".DS_Store").write_bytes(b"x")
        (folder / "._000001.png").write_bytes(b"x")
    (root / "__MACOSX" / "CameraRGB").mkdir(parents=True)
    (root / "__MACOSX" / "CameraRGB" / "._000001.png").write_bytes(b"x")
    if packed:
        with zipfile.ZipFile(tmp_path / "carla.zip", "w") as archive:
            for file in root.rglob("*"):
                archive.write(file, file.relative_to(root))
        root = tmp_path / "carla.zip"
    train, validation, everything = (data.load(_config(config, root), s) for s in ("train", "validation", "all"))
    assert len(train) == 4 and len(validation) == 1 and len(everything) == 5
    assert sorted([*train.ids, *validation.ids]) == sorted(everything.ids)
    if layout == "parts":
        assert everything.ids[0] == "dataA/dataA/000001"
    assert everything.files and all(file.exists() for file in everything.files)
    for index, name in enumerate(everything.ids):
        image, label = everything.read(index)
        assert image.shape == (8, 12, 3) and image[0, 0].tolist() == [int(name[-6:]), 50, 100]
        assert label.shape == (8, 12) and (label[:4] == 1).all() and (label[4:] == 7).all()


def test_carla_is_prepared_again_when_a_file_changes(config, tmp_path):
    make_frames(tmp_path, range(5))
    before = data.load(_config(config, tmp_path), "all").read(0)[0]
    make_frames(tmp_path, range(5), size=(16, 8))
    after = data.load(_config(config, tmp_path), "all").read(0)[0]
    assert before.shape == (8, 12, 3) and after.shape == (8, 16, 3)


def test_carla_splits_by_drive(tmp_path):
    make_frames(tmp_path, range(40))
    drives = {f"{n:06d}": str(n // 4) for n in range(40)}
    lines = "".join(f"{frame}.png,{drive}\n" for frame, drive in drives.items())
    (tmp_path / "sequences.csv").write_text("frame,sequence\n" + lines)
    assert carla.read_sequences(str(tmp_path)) == drives
    splits = carla.split_pairs(carla.find_pairs(str(tmp_path)), drives, 0.2)
    train_drives, validation_drives = ({drives[pair.id] for pair in splits[s]} for s in ("train", "validation"))
    assert len(splits["validation"]) == 8 and len(splits["train"]) == 32
    assert not train_drives & validation_drives


def test_carla_without_drives_holds_out_one_block_of_frame_numbers(tmp_path):
    make_frames(tmp_path, [3, 20, 100, 1, 7])
    for old, new in (("000003", "9"), ("000020", "20"), ("000100", "100")):  # without leading zeros
        for folder in ("CameraRGB", "CameraMask"):
            (tmp_path / folder / f"{old}.png").rename(tmp_path / folder / f"{new}.png")
    pairs = carla.find_pairs(str(tmp_path))
    assert [pair.id for pair in pairs] == ["000001", "000007", "9", "20", "100"]
    splits = carla.split_pairs(pairs, None, 0.4)
    assert [pair.id for pair in splits["validation"]] == ["20", "100"]


def test_carla_frames_and_folders_of_any_name(config, tmp_path, monkeypatch):
    root = tmp_path / "data\udce9 [1]"  # not UTF-8, and to a shell a pattern
    for folder in ("a", "b"):
        make_frames(root / folder, range(2))
    for place in ("CameraRGB", "CameraMask"):
        (root / "a" / place / "000001.png").rename(root / "a" / place / "line\nbreak \udce9 9.png")
    monkeypatch.chdir(root)
    expected = ["a/000000", "a/line\nbreak \udce9 9", "b/000000", "b/000001"]
    for path in (root, "."):
        assert [pair.id for pair in carla.find_pairs(str(path))] == expected
    config.data.validation = 0.5
    assert data.load(_config(config, root), "validation").ids == expected[2:]
    (root / "a/CameraRGB/000000.PNG").write_bytes(b"")
    with pytest.raises(UserError, match=r"has the same name; remove or rename one"):
        carla.find_pairs(str(root))


def test_isbi_slices_and_folders_of_any_name(config, tmp_path):
    for name in ("1", "²", "10", "\udce9", "-", "._1"):
        for place, pixels in (("image", np.zeros), ("label", np.ones)):
            file = tmp_path / "stack[1]/train" / place / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels((4, 4), np.uint8)).save(file)
    settings = _config(config, tmp_path / "stack[1]", "multiclass", "isbi2012")
    assert data.load(settings, "all").ids == ["1", "10", "-", "²", "\udce9"]


def _break(root: pathlib.Path, fault: str) -> str:
    """Breaks one file; returns a part of the expected error message."""
    image, mask = root / "CameraRGB/000002.png", root / "CameraMask/000002.png"
    if fault == "no mask":
        mask.unlink()
        return f"image without mask: {image}"
    if fault == "no image":
        image.unlink()
        return f"mask without image: {mask}"
    if fault == "unreadable":
        image.write_bytes(image.read_bytes()[:40])
        return f"{image}: not a readable image"
    if fault == "size":
        Image.new("RGB", (10, 8)).save(mask)
        return f"{image} is 12x8 pixels but its mask {mask} is 10x8"
    if fault == "alpha":
        Image.new("LA", (12, 8), (255, 255)).save(mask)
        return f"{mask}: label 255 is not in 0..22 (23 classes). Values found: 255. A 0/255 mask"
    if fault == "range":
        Image.new("RGB", (12, 8), (23, 0, 0)).save(mask)
        return f"{mask}: label 23 is not in 0..22 (23 classes). Values found: 23. Off by one?"
    if fault == "16 bit":
        Image.fromarray(np.zeros((8, 12), np.uint16)).save(image)
        return f"{image}: a 16-bit I;16 image"
    if fault == "sequences":
        (root / "sequences.csv").write_text("name,drive\na,b\n")
        return "needs the columns frame and sequence"
    raise AssertionError(fault)


def test_a_single_drive_can_be_evaluated_as_a_whole(config, tmp_path):
    make_frames(tmp_path, range(6))
    (tmp_path / "sequences.csv").write_text("frame,sequence\n" + "".join(f"{n:06d}.png,1\n" for n in range(6)))
    assert len(data.load(_config(config, tmp_path), "all")) == 6
    with pytest.raises(UserError, match="leaves none for validation"):
        data.load(_config(config, tmp_path), "validation")


def test_masks_with_a_palette_hold_indices(config, tmp_path):
    make_frames(tmp_path, range(5))
    for file in (tmp_path / "CameraMask").iterdir():
        mask = Image.new("P", (12, 8), 7)
        mask.putpalette([10, 20, 30] * 256)
        mask.save(file)
    assert (data.load(_config(config, tmp_path), "all").read(0)[1] == 7).all()


def test_a_damaged_zip_is_named(config, tmp_path):
    make_frames(tmp_path / "carla", range(5))
    with zipfile.ZipFile(tmp_path / "carla.zip", "w") as archive:
        for file in sorted((tmp_path / "carla").rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path / "carla"))
    content = bytearray((tmp_path / "carla.zip").read_bytes())
    content[60:70] = b"damagedxxx"  # of the first file
    (tmp_path / "carla.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"carla.zip/Camera.*not a readable image"):
        data.load(_config(config, tmp_path / "carla.zip"), "all")


@pytest.mark.parametrize(
    "fault", ["no mask", "no image", "unreadable", "size", "alpha", "range", "16 bit", "sequences"]
)
def test_broken_carla_files_are_named(config, tmp_path, fault):
    make_frames(tmp_path, range(5))
    expected = _break(tmp_path, fault)
    with pytest.raises(UserError) as error:
        data.load(_config(config, tmp_path), "train")
    assert expected in str(error.value)


def test_the_error_for_missing_and_empty_folders_says_what_to_put_there(config, tmp_path):
    for root in (tmp_path / "nowhere", tmp_path, ""):
        with pytest.raises(UserError, match=r"CameraRGB(.|\n)*configs/shapes.py needs no data"):
            data.load(_config(config, root), "train")
    (tmp_path / "file.zip").write_text("not a zip")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        data.load(_config(config, tmp_path / "file.zip"), "train")


def test_the_data_set_in_the_readme_works(config, tmp_path, monkeypatch):
    code = (ROOT / "unet_jax/data/README.md").read_text().split("```python")[1].split("```")[0]
    module = types.ModuleType("unet_jax.data.cells")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(data, "NAMES", (*data.NAMES, "cells"))
    for k in range(10):
        np.savez(tmp_path / f"{k}.npz", image=np.full((9, 7, 1), k, np.uint8), label=np.full((9, 7), k % 2, np.uint8))
    settings = _config(config, tmp_path, name="cells")
    sources = {split: data.load(settings, split) for split in ("train", "validation", "all")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 8, "validation": 2, "all": 10}
    images = pipeline.Pipeline(sources["validation"], (6, 8), "nearest", 1.0)
    (batch,) = images.eval_batches(2, np.arange(2))
    assert images.cached and batch["image"].shape == (2, 6, 8, 1)
    assert (batch["image"][:, 0, 0, 0] == [8, 9]).all() and (batch["label"][:, 0, 0] == [0, 1]).all()
    assert data.classes(settings).names == ("background", "cell")
    with pytest.raises(UserError, match="holds 0 .npz files, too few to split"):
        data.load(_config(config, tmp_path / "nowhere", name="cells"), "train")


def test_unknown_names_and_splits_are_refused(config):
    with pytest.raises(UserError, match="Did you mean 'shapes'"):
        config.data.name = "shape"
        data.load(config.data, "train")
    config.data.name = "shapes"
    with pytest.raises(UserError, match="--split = 'al'.*Did you mean 'all'"):
        data.load(config.data, "al")
    assert len(data.load(config.data, "all")) == 20 + 10 + 10
    config.data.size = (48,)
    with pytest.raises(UserError, match="config.data.size"):
        data.load(config.data, "train")


def test_pets_from_an_unpacked_folder(config, tmp_path):
    make_pets(tmp_path, [f"Bengal_{i}" for i in range(12)])
    settings = _config(config, tmp_path, "trimap", "oxford_iiit_pet")
    lengths = {split: len(data.load(settings, split)) for split in ("train", "validation", "test", "all")}
    assert lengths == {"train": 8, "validation": 2, "test": 2, "all": 12}
    source = data.load(settings, "validation")
    assert source.files and all(file.exists() for file in source.files)
    assert source.classes.names == ("pet", "background", "border")
    image, label = source.read(0)
    assert image.shape == (20, 16, 3) and label.shape == (20, 16) and source.size_range() == ((20, 16), (20, 16))
    assert (label[0, 0], label[4, 4], label[8, 8]) == (1, 2, 0)
    settings.variant = "binary"
    source = data.load(settings, "validation")
    assert source.classes.task == "binary" and source.classes.num_outputs == 1
    label = source.read(0)[1]
    assert (label[0, 0], label[4, 4], label[8, 8]) == (0, 255, 1)


def test_the_error_for_missing_pets_says_where_to_put_them(config, tmp_path, monkeypatch):
    from unet_jax.data import oxford_iiit_pet

    monkeypatch.setattr(oxford_iiit_pet, "_reachable", lambda: False)
    settings = _config(config, "", "trimap", "oxford_iiit_pet")
    with pytest.raises(UserError, match=r"images\.tar\.gz and annotations\.tar\.gz .* into .*downloads/manual"):
        data.load(settings, "train")
    for name in oxford_iiit_pet.ARCHIVES:  # not the published ones
        with tarfile.open(tmp_path / name, "w"):
            pass
    settings.root = str(tmp_path)
    with pytest.raises(UserError, match="not the published archive"):
        data.load(settings, "train")
    (tmp_path / "empty").mkdir()
    settings.root = str(tmp_path / "empty")
    with pytest.raises(UserError, match="holds neither images.tar.gz"):
        data.load(settings, "train")
    settings.root = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        data.load(settings, "train")


@pytest.mark.parametrize("fault", ["no trimap", "size", "unreadable", "label", "list"])
def test_broken_pets_are_named(config, tmp_path, fault):
    make_pets(tmp_path, [f"Bengal_{i}" for i in range(12)])
    image, trimap = tmp_path / "images/Bengal_3.jpg", tmp_path / "annotations/trimaps/Bengal_3.png"
    if fault == "no trimap":
        trimap.unlink()
        expected = f"there is no {trimap}"
    elif fault == "size":
        Image.new("L", (5, 5), 1).save(trimap)
        expected = f"{image} is 16x20 pixels but its mask {trimap} is 5x5"
    elif fault == "unreadable":
        image.write_bytes(image.read_bytes()[:100])
        expected = f"{image}: not a readable image"
    elif fault == "label":
        Image.new("L", (16, 20), 4).save(trimap)
        expected = f"{trimap}, minus 1: label 3 is not in 0..2"
    else:
        (tmp_path / "annotations/trainval.txt").write_text("Bengal_1 6 1 2\nBengal_2\n")
        expected = "trainval.txt, line 2: 'Bengal_2' is not NAME CLASS SPECIES BREED"
    with pytest.raises(UserError) as error:
        data.load(_config(config, tmp_path, "trimap", "oxford_iiit_pet"), "train")
    assert expected in str(error.value)


def test_errors_about_wrong_labels_hint_at_the_cause():
    for values, hint in (([0, 255], "divide it by 255"), ([1, 2, 3], "subtract 1"), ([0, 7, 90], "coloured mask")):
        with pytest.raises(UserError, match=hint):
            check_label(np.array(values, np.uint8), 3, "mask.png")
    check_label(np.array([0, 1, 2]), 3, "mask.png")


def test_classes_survive_json():
    import json

    classes = Classes("multilabel", ("a", "b"), ((1, 2, 3), (4, 5, 6)), channels=1)
    assert Classes.from_json(json.loads(json.dumps(classes.to_json()))) == classes
    for name in ("\x1b[2J", "a\nb", "\x9b", "\ud800"):
        with pytest.raises(UserError, match="cannot be the name of a class: it holds control characters"):
            Classes.from_json(classes.to_json() | {"names": ("é 車", name)})


def test_resizing(tmp_path):
    label = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert images.resize_label(label, (4, 4)).tolist() == label[1::2, 1::2].tolist()
    assert images.resize_label(label[..., None], (16, 8)).shape == (16, 8, 1)
    checker = np.indices((8, 8)).sum(0)[..., None].astype(np.uint8) % 2 * 200
    smooth = images.resize_image(checker, (4, 4), "bilinear")
    assert smooth.shape == (4, 4, 1) and (abs(smooth.astype(int) - 100) <= 30).all()  # antialiased
    assert set(np.unique(images.resize_image(checker, (4, 4), "nearest"))) <= {0, 200}
    with pytest.raises(UserError, match="config.data.resize"):
        images.resize_image(checker, (4, 4), "bicubic")


@pytest.mark.parametrize(
    "folder, variant, size, train, validation",
    [
        ("carla", "carla23", (480, 640), 24, 6),
        pytest.param("carla_320x240", "carla23", (240, 320), 527, 149, marks=pytest.mark.slow),
        ("lyft", "lyft13", (600, 800), 4, 1),
    ],
)
def test_real_carla_frames(config, real_data, folder, variant, size, train, validation):
    settings = _config(config, real_data / folder, variant)
    sources = {split: data.load(settings, split) for split in ("train", "validation")}
    assert [len(sources[s]) for s in ("train", "validation")] == [train, validation]
    for source in sources.values():
        image, label = source.read(0)
        assert image.shape == (*size, 3) and label.shape == size
        assert image.std() > 20 and len(np.unique(label)) > 4


def test_real_pets(config, real_data):
    settings = _config(config, real_data / "pets", "trimap", "oxford_iiit_pet")
    source = data.load(settings, "all")
    assert len(source) == 25
    for index in range(25):
        image, label = source.read(index)
        assert image.shape[:2] == label.shape and set(np.unique(label)) == {0, 1, 2}
    with pytest.raises(UserError, match="no test split"):
        data.load(settings, "test")
