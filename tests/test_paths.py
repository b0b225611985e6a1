"""Files that are named after data, and folders of any name: none is written elsewhere, or taken for a pattern."""

import contextlib
import hashlib
import importlib
import os
import pathlib
import runpy
import shutil
import sys
import tempfile

import matplotlib.pyplot  # noqa: F401 - makes the folder for its settings when it is first imported
import numpy as np
import pytest
import tiny
from commands import ROOT
from etils import epath
from helpers import save_image

import unet_jax
from configs import folder
from unet_jax import paths, user_cache
from unet_jax.data import pairing
from unet_jax.errors import UserError
from unet_jax.evaluation import check, evaluate, report
from unet_jax.inference import predict, prediction_files
from unet_jax.training import loop
from unet_jax.workdir import integrity

LATIN_1 = os.fsdecode("café".encode("latin-1"))  # not UTF-8
ASCII = "".join(chr(code) for code in range(32, 127))  # all of it that can be printed
NAMES = [
    "0",
    "sub/0",
    "lr[1e-3]",
    "*",
    "?",
    " spaces ",
    "q'u\"o`te",
    "line\nbreak",
    "-flag",
    "é",  # one character
    "e\u0301",  # the same, as two
    LATIN_1,
    "back\\slash",
    "%2e%2e",
    "a..",
    "\x1b[31mred",
    "a.png/0",  # in a folder that is called like a file
    "a",
    "l" * 251,  # with `.png` as long as a name can be
    "l" * 250,
    "\U0001f600" * 62,
    ASCII.replace("/", ""),
]


def _save_pair(root, name, photos="images", masks="masks"):
    image = np.random.default_rng([*os.fsencode(root / photos / name)]).integers(0, 256, (24, 24), np.uint8)
    suffix = ".tif" if (root / photos / f"{name}.png").is_dir() else ".png"
    save_image(image, root / photos / f"{name}{suffix}")
    save_image((image > 128).astype(np.uint8) * 255, root / masks / f"{name}{suffix}")


def test_a_file_for_each_id_below_the_folder(tmp_path):
    spellings = ["x//y", "x/./y", "x/y", "x/y/", "./x/y", "m" * 300, "m" * 301, "m" * 300 + "/0", "m" * 301 + "/0"]
    # Those that the names above become, which a user may have copied into the images.
    copies = [str(paths.file_below("", name, ".png"))[:-4] for name in ("x//y", "m" * 300, "a.png/0", "m" * 300 + "/0")]
    folder, suffixes = tmp_path / "out", (".png", "_overlay.jpg", f"_probability_{'é' * 40}.png")
    for name in (*NAMES, *spellings, *copies):
        for suffix in suffixes:
            file = paths.file_below(folder, name, suffix)
            assert file == paths.file_below(folder, name, suffix) and file.name.endswith(suffix)
            file.parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(file).touch(exist_ok=False)  # no other id has it
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(suffixes) * len({*NAMES, *spellings, *copies}) and os.listdir(tmp_path) == ["out"]
    assert paths.file_below(folder, "a/lr[1e-3] é", ".png") == folder / "a/lr[1e-3] é.png"
    for name in ("/0", "../0", "a/../../0", "a/..", "", ".", "a\0b"):
        with pytest.raises(ValueError, match="cannot become a file below"):
            paths.file_below(folder, name, ".png")
    for suffix in ("/../0.png", "", ".exe", "é" * 100 + ".png"):
        with pytest.raises(ValueError, match="is no suffix"):
            paths.file_below(folder, "0", suffix)


@pytest.mark.parametrize(
    "folders, expected",
    [
        (["photos"], ["0"]),
        (["{tmp}/data/photos"], ["0"]),
        (["../other/photos"], ["0"]),
        (["photos", "more"], ["photos/0", "more/0"]),
        (["photos/", "./more"], ["photos//0", "./more/0"]),  # as earlier versions had it: checkpoints know the ids
        (["photos", "{tmp}/data/more"], ["photos/0", "more/0"]),
        (["photos", "../other/photos"], ["data/photos/0", "other/photos/0"]),
        (["{tmp}/other/photos", "{tmp}/other/more"], ["photos/0", "more/0"]),
        (["{tmp}/a/photos", "{tmp}/b/photos"], ["a/photos/0", "b/photos/0"]),
    ],
    ids=str,
)
def test_ids_are_relative_wherever_the_folders_are(folders, expected, tmp_path, monkeypatch):
    config = folder.get_config().data
    config.images = tuple(name.format(tmp=tmp_path) for name in folders)
    config.masks = tuple(f"{name.rstrip('/')}_masks" for name in config.images)
    (tmp_path / "data").mkdir()
    for photos, masks in zip(config.images, config.masks, strict=True):
        _save_pair(tmp_path / "data", "0", photos, masks)
    monkeypatch.chdir(tmp_path)
    for root in (str(tmp_path / "data"), "data"):
        config.root = root
        pairs, faults = pairing.find(config)
        assert ([pair.id for pair in pairs], faults) == (expected, [])


def test_an_image_that_two_folders_hold_is_a_fault(tmp_path):
    _save_pair(tmp_path, "sub/0")
    config = folder.get_config().data
    config.root, config.images, config.masks = str(tmp_path), ("images", "./images/sub"), ("masks", "masks/sub")
    pairs, (fault,) = pairing.find(config)
    assert [pair.id for pair in pairs] == ["images/sub/0"] and "Name each folder once" in fault


def test_a_folder_is_never_taken_for_a_pattern(tmp_path, monkeypatch):
    for name in ("[ab]", "a", "*", "x*"):
        (tmp_path / name / "1.tmp").mkdir(parents=True)
    for name in ("[ab]", "*"):
        assert list(paths.LiteralPath(tmp_path, name).glob("*.t?p")) == [paths.LiteralPath(tmp_path, name, "1.tmp")]
    monkeypatch.chdir(tmp_path)
    for name in ("[ab]", "a", "x*"):
        save_image(np.zeros((8, 8), np.uint8), tmp_path / name / "i[1].png")
    for inputs, names in (
        ("[ab]", {"i[1]": "[ab]"}),
        ("[ab]/i[1].png", {"i[1]": "[ab]"}),
        ("[ab]/*.png", {"i[1]": "[ab]"}),
        ("[abc]/*.png", {"a/i[1]": "a"}),
        (f"{tmp_path}/x*/i*", {"i[1]": "x*"}),
        ("[x]*/../*/i*", {"[ab]/i[1]": "[ab]", "a/i[1]": "a", "x*/i[1]": "x*"}),
        (f"../{tmp_path.name[:-1]}?/a/i*", {f"{tmp_path.name}/a/i[1]": "a"}),
    ):
        found, _ = prediction_files.find(inputs, epath.Path(tmp_path / "out"))
        assert {name: file.resolve().parent.name for name, file in found.items()} == names
    monkeypatch.chdir(tmp_path / "[ab]")  # where `*` is a folder, which a pattern leaves again
    assert list(prediction_files.find("?.tmp/../../*/i*", epath.Path("out"))[0]) == ["[ab]/i[1]", "a/i[1]", "x*/i[1]"]


@pytest.mark.parametrize("name, reason", [(LATIN_1, "is not UTF-8"), ("back\\slash", "has a backslash in it")])
def test_a_work_directory_that_the_libraries_cannot_write_is_refused(config, name, reason, tmp_path):
    for call in (lambda path: loop.train(config, path), unet_jax.load):
        with pytest.raises(UserError, match=reason):
            call(tmp_path / name / "run")
    assert not os.listdir(tmp_path)


def test_a_cache_folder_that_jax_cannot_open_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / LATIN_1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert user_cache.folder("compiled").parent.parent == tmp_path
    assert not (tmp_path / LATIN_1).exists()


_watched = []  # lists that get the path of all that this process writes to


def _note_writes(event, arguments):
    """An audit hook; it stays for good, and does nothing where nothing is watched."""
    if not _watched:
        return
    if event == "open":
        file, mode, flags = arguments
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        touched = [(file, -1)] if set(mode or "") & set("wax+") or flags & writes else []
    elif event in ("os.rename", "os.link"):
        source, target, source_folder, target_folder = arguments
        touched = [(source, source_folder), (target, target_folder)]
    elif event == "os.symlink":
        touched = [arguments[1:]]
    elif event in ("os.mkdir", "os.chmod"):
        touched = [(arguments[0], arguments[2])]
    elif event in ("os.remove", "os.rmdir"):
        touched = [arguments]
    elif event in ("os.truncate", "os.utime", "os.chown", "os.setxattr"):
        touched = [(arguments[0], -1)]
    else:
        return
    for file, opened in touched:
        if not isinstance(file, int):
            place = os.getcwd() if opened == -1 else os.readlink(f"/proc/self/fd/{opened}")
            _watched[0].append(os.path.abspath(os.path.join(place, os.fsdecode(file))))


sys.addaudithook(_note_writes)


def _snapshot(root, allowed):
    """Of all that is below `root`, but not below one of `allowed`: size, modification time and content."""
    found = {}
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(place, name) not in allowed]
        for path in (os.path.join(place, name) for name in folders + files):
            stat = os.stat(path)
            content = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else ""
            found[path] = stat.st_size, stat.st_mtime_ns, stat.st_mode, content
    return found


@contextlib.contextmanager
def _only_written(root, *allowed):
    """Checks that the body writes to nothing but the folders `allowed` (and those of Python and the user's cache)."""
    allowed = [*map(str, allowed), os.environ["XDG_CACHE_HOME"], os.environ["JAX_COMPILATION_CACHE_DIR"], os.devnull]
    before = _snapshot(root, allowed)
    _watched.append([])
    try:
        yield
    finally:
        written = _watched.pop()
    assert _snapshot(root, allowed) == before  # also what libraries write that are not in Python
    is_allowed = lambda path: any(path == place or path.startswith(f"{place}/") for place in allowed)
    assert [path for path in written if not is_allowed(path) and "__pycache__" not in path] == []
    assert any(map(is_allowed, written))


@pytest.mark.slow
def test_nothing_is_written_outside_the_work_directory_and_the_output(tmp_path, monkeypatch, capsys):
    home, hostile = tmp_path / "home", ASCII.replace("/", "").replace("\\", "")
    data, other = home / hostile / LATIN_1 / "data", home / "other"
    for name in NAMES:
        _save_pair(data, name, "photos")
    for name in ("0", "1"):
        _save_pair(other, name, "photos")  # `0` is also in the first folder
        _save_pair(data.parent, name, "photos")
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    config = tiny.get_config()
    config.data = folder.get_config().data
    config.data.root, config.data.size = str(data), (24, 24)
    config.data.images = (str(data / "photos"), str(other / "photos"), "../photos")
    config.data.masks = (str(data / "masks"), str(other / "masks"), "../masks")
    config.model.features, config.train.panels = (2, 4), 100
    config.train.epochs, config.train.checkpoint_every_epochs = 2.0, 1.0
    config.data.validation = 0.5

    # A name for the work directory and the output that has everything in it which one can have.
    path = tmp_path / "runs" / "lr[1e-3]" / "*" / "~" / "a:" / hostile / "é e\u0301 \U0001f600 \n\t\x1b[31m"
    output = tmp_path / "out" / f"{ASCII.replace('/', '')}\n" / LATIN_1
    with _only_written(tmp_path, path.parents[5], tmp_path / "out"):
        assert check.check(config, f"{path}.check.png")
        loop.train(config, path)
        first, last = integrity.steps(path)
        panels = {str(file.relative_to(path)) for file in (path / "panels" / str(last)).rglob("*.png")}
        assert len(panels) == 13
        shutil.rmtree(integrity.checkpoints_dir(path) / str(last))
        loop.train(config, path)
        assert f"Resuming from step {first}" in capsys.readouterr().out and integrity.steps(path)[-1] == last
        evaluate.evaluate_workdir(path, None, None, "all")
        evaluate.evaluate_workdir(path, None, str(data), "all")
        report.write(path)
        for name, inputs in (("photos", str(data / "photos")), ("both", f"{home}/*/photos/*.png")):
            predict.predict_files(path, inputs, output / name, probabilities="npy")
        if importlib.util.find_spec("safetensors"):
            flags = f"--workdir={path}", "--format=safetensors", f"--output={output.parent}/x.safetensors"
            monkeypatch.setattr(sys, "argv", ["export.py", *flags])
            runpy.run_path(str(ROOT / "scripts" / "export.py"))["main"]()
    assert len(list((output / "photos").rglob("*.npy"))) == len(NAMES)
