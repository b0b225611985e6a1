"""The cache of decoded images: right, or not used; and never in the way."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from unet_jax import data, user_cache
from unet_jax.data import border, cache, folder, images, pipeline
from unet_jax.errors import UserError

# A process that caches ten examples of 1,000 bytes, each after `delay` seconds, and prints their sum.
PROGRAM = """
import fcntl, resource, sys, time
import numpy as np
from unet_jax.data import cache
delay, locks, file_size = float(sys.argv[1]), sys.argv[2] == "locks", int(sys.argv[3])
def refuse(*_):
    raise OSError("no locks here")
if not locks:
    fcntl.flock = refuse
if file_size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
def read(index):
    time.sleep(delay)
    print("read", index, flush=True)
    return {"image": np.full((10, 100), index, np.uint8)}
found = cache.examples({"made of": "the same"}, ["image"], 10, read, 1e6)
print("sum", None if found is None else int(found["image"].sum()), flush=True)
"""


@pytest.fixture(autouse=True)
def entries(tmp_path, monkeypatch):
    """The folder of the entries, empty, of one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unet_jax" / "examples"


@pytest.fixture
def config(tmp_path, config):
    """Six images of 16x16 pixels with masks of two classes."""
    root = tmp_path / "photos"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(
            root / "images" / f"{i}.png"
        )
        Image.fromarray(np.eye(16, k=i, dtype=np.uint8)).save(root / "masks" / f"{i}.png")
    config.data.name, config.data.root, config.data.size = "folder", str(root), (8, 8)
    config.data.labels, config.data.channels, config.data.value_range = ("0 a", "1 b"), 3, (0, 65535)
    return config


@pytest.fixture
def reads(monkeypatch):
    """The images that were read from their files."""
    found, read = [], images.read_image

    def noted(path, *args):
        found.append(path.stem)
        return read(path, *args)

    monkeypatch.setattr(folder.images, "read_image", noted)
    return found


def _open(config, gib=1.0, weigh=None, **changed):
    settings = config.data.copy_and_resolve_references()
    settings.update(changed)
    return pipeline.Pipeline(data.load(settings, "all"), settings.size, settings.resize, gib, weigh)


def _batches(opened):
    return list(opened.eval_batches(4, np.arange(4)))


def _assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def _put(name, megabytes, limit=3.0):
    """An entry of that many megabytes, or None."""
    return cache.examples(
        {"of": name}, ["image"], 1, lambda _: {"image": np.zeros(megabytes * 10**6, "u1")}, limit * 1e6
    )


def _start(delay=0.0, locks=True, file_size=0):
    command = [sys.executable, "-c", PROGRAM, str(delay), "locks" if locks else "none", str(file_size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_second_start_reads_no_image(config, reads, entries):
    first = _open(config)
    assert first.cached and set(reads) == set("012345")
    reads.clear()
    again = _open(config)
    _assert_equal(_batches(first), _batches(again))
    _assert_equal([again.read(3)], [_open(config, gib=0.0).read(3)])
    assert set(reads) == {"0", "3"}  # by the one without a cache
    assert [path.suffix for path in entries.iterdir()] == [""]


@pytest.mark.parametrize("change", ["time", "size", "content", "replaced", "mask"])
def test_a_changed_file_is_read_again(config, reads, entries, change):
    _open(config)
    file = pathlib.Path(config.data.root) / ("masks/2.png" if change == "mask" else "images/2.png")
    stat = file.stat()
    if change == "time":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        file.write_bytes(file.read_bytes() + b"\0")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "replaced":
        file.unlink()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file)
    else:
        Image.fromarray(np.zeros((16, 16) if change == "mask" else (16, 16, 3), np.uint8)).save(file)
    reads.clear()
    _assert_equal(_batches(_open(config)), _batches(_open(config, gib=0.0)))
    assert len(reads) > 6 and len(list(entries.iterdir())) == 2


def test_whatever_changes_the_examples_has_an_entry_of_its_own(config, entries, monkeypatch):
    changes = [
        {},
        {"size": (8, 16)},
        {"resize": "nearest"},
        {"labels": ("0 a", "1 -> ignore", "2 -> 1 b")},
        {"value_range": (0, 100)},
        {"channels": 1},
        {"weigh": border.Weigh(10.0, 5.0, 255)},
        {"weigh": border.Weigh(10.0, 4.0, 255)},
    ]
    for change in changes:
        _assert_equal(_batches(_open(config, **change)), _batches(_open(config, gib=0.0, **change)))
    assert len(list(entries.iterdir())) == len(changes)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    _open(config)
    assert len(list(entries.iterdir())) == len(changes) + 1
    shapes = [{}, {"shapes_seed": 1}, {"size": (48, 64)}, {"variant": "multilabel"}]
    config.data.name, config.data.size = "shapes", (48, 48)
    for change in shapes:
        _open(config, **change)
    assert len(list(entries.iterdir())) == len(changes) + 1 + len(shapes)


def test_examples_of_unknown_origin_are_never_cached(config, entries):
    source = folder.load(config.data, "all")  # `data.load` would tell its settings
    assert not pipeline.Pipeline(source, (8, 8), "nearest", 1.0).cached
    assert not entries.exists()


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_processes_one_writes_the_entry(entries, locks):
    both = [_start(delay=0.2, locks=locks) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert all("sum 45000" in output for output in outputs)
    if locks:
        assert "".join(outputs).count("read") <= 11  # to know how large they are, each reads one
    assert [path.suffix for path in entries.iterdir()] == [""]
    assert "read" not in _start().communicate(timeout=60)[0]


def test_what_a_killed_process_leaves_is_never_used(entries):
    process = _start(delay=0.2)
    while "read 4" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = entries.glob("*.partial")
    assert not [path for path in entries.iterdir() if not path.suffix]
    assert "sum 45000" in _start().communicate(timeout=60)[0]
    assert partial.exists()  # it might still be written
    long_ago = time.time() - 2 * cache.ABANDONED
    for path in (*partial.iterdir(), partial):
        os.utime(path, (long_ago, long_ago))
    _put("another", 1)
    assert {path.suffix for path in entries.iterdir()} == {""}


@pytest.mark.parametrize("damage", ["cut short", "empty", "missing"])
def test_a_damaged_entry_is_made_again(config, reads, entries, damage):
    expected = _batches(_open(config))
    (file,) = entries.glob("*/label.npy")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-1])
    reads.clear()
    _assert_equal(_batches(_open(config)), expected)
    assert len(reads) >= 6 and len(list(entries.iterdir())) == 1


def test_those_not_used_for_longest_make_room(entries):
    def held():
        return sorted(np.load(file, mmap_mode="r").nbytes // 10**5 for file in entries.glob("*/image.npy"))

    long_ago = time.time() - 100
    for age, megabytes in enumerate((1, 2)):
        _put(megabytes, megabytes, 10)
        (entry,) = (p.parent for p in entries.glob("*/image.npy") if p.stat().st_size // 10**6 == megabytes)
        for path in (*entry.iterdir(), entry):
            os.utime(path, (long_ago + age, long_ago + age))
    assert held() == [10, 20]
    assert _put(1, 1) is not None  # used again
    third = _put("third", 1, limit=3.5)
    assert held() == [10, 10]
    assert _put("fourth", 3, limit=3.5) is None and held() == [10, 10]  # one is in use, so that nothing would help
    assert third is not None and _put("fourth", 3, limit=4.5) is not None and held() == [10, 30]


def test_what_does_not_fit_is_read_anew(config, entries, reads, capsys):
    cached, gib = _open(config), 6 * 8 * 8 * 4 / 2**30
    for path in entries.iterdir():
        cache._remove(path)
    assert _open(config, gib=gib).cached
    for path in entries.iterdir():
        cache._remove(path)
    anew = _open(config, gib=gib * 0.99)
    assert not anew.cached and not list(entries.iterdir())
    reads.clear()
    for _ in range(2):
        _assert_equal(_batches(anew), _batches(cached))
    assert len(reads) >= 12
    train = [opened.train_batches(4, 7, 0, np.arange(4)) for opened in (anew, cached)]
    _assert_equal(*([next(batches) for _ in range(5)] for batches in train))
    assert not capsys.readouterr().out


def test_a_cache_that_cannot_be_written_stops_nothing(config, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    anew = _open(config)
    output = capsys.readouterr().out
    assert not anew.cached and output.count("\n") == 1 and "cannot be cached" in output
    _assert_equal(_batches(anew), _batches(_open(config, gib=0.0)))


def test_a_full_disk_stops_nothing(entries):
    output = _start(file_size=5_000).communicate(timeout=60)[0]
    assert "sum None" in output and "cannot be cached, so that they are read anew each epoch: [Errno 27]" in output
    assert not list(entries.iterdir())


def test_more_than_the_disk_has_is_not_begun(entries, monkeypatch, capsys):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(10**9, 10**9 - 1, 1))
    assert _put("one", 1) is None
    assert f"they need 0.00 GiB, but 0.00 GiB are free in {entries}" in capsys.readouterr().out
    assert not list(entries.iterdir())


def test_an_image_that_cannot_be_read_is_named(config, entries):
    (pathlib.Path(config.data.root) / "images/3.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match=r"images/3.png: not a readable image"):
            _open(config)
        assert not list(entries.iterdir())


def test_the_folder_is_of_the_user(tmp_path, monkeypatch):
    assert user_cache.folder("a") == tmp_path / "cache" / "unet_jax" / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache.folder("a") == tmp_path / "home" / ".cache" / "unet_jax" / "a"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = user_cache.folder("a")
    assert path == tmp_path / f"unet_jax-{os.getuid()}" / "a" and path.is_dir()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="is not a folder of this user alone"):
        user_cache.folder("a")
