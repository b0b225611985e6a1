"""The cache of decoded images is never stale, never used when damaged, and never stops a run."""

import dataclasses
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from helpers import ROOT, save_image

from unet_jax import data, defaults, user_cache
from unet_jax.data import border, cache, folder, pipeline, reading
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
examples = cache.load_or_write({"key": "the same"}, ["image"], 10, read, 1e6)
print("sum", None if examples is None else int(examples.take(np.arange(10))["image"].sum()), flush=True)
"""


@pytest.fixture(autouse=True)
def entries(tmp_path, monkeypatch):
    """The folder of the cache entries; empty at the start of each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unet_jax" / "examples"


@pytest.fixture
def config(tmp_path, config):
    """Six images of 16x16 pixels with masks of two classes."""
    root = tmp_path / "photos"
    for i in range(6):
        image = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        save_image(image, root / "images" / f"{i}.png")
        save_image(np.eye(16, k=i, dtype=np.uint8), root / "masks" / f"{i}.png")
    config.data.name, config.data.root, config.data.size = "folder", str(root), (8, 8)
    config.data.labels, config.data.channels, config.data.value_range = ("0 a", "1 b"), 3, (0, 65535)
    return config


@pytest.fixture
def reads(monkeypatch):
    """The stems of the image files that were read."""
    stems, read = [], reading.read_image

    def recording(path, *args):
        stems.append(path.stem)
        return read(path, *args)

    monkeypatch.setattr(folder.reading, "read_image", recording)
    return stems


def _open(config, gib=1.0, pixel_weight_fn=None, **changed):
    settings = config.data.copy_and_resolve_references()
    with settings.unlocked():
        settings.update(changed)
    return pipeline.Pipeline(data.load(settings, "all"), settings.size, settings.resize, gib, pixel_weight_fn)


def _batches(opened):
    return list(opened.eval_batches(4, np.arange(4)))


def _assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def _cache_megabytes(name, megabytes, limit=3.0):
    """The examples of an entry of that many megabytes; None if it is not cached."""
    return cache.load_or_write(
        {"key": name}, ["image"], 1, lambda _: {"image": np.zeros(megabytes * 10**6, "u1")}, limit * 1e6
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
    assert set(reads) == {"0", "3"}  # by the pipeline without a cache
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
        save_image(np.zeros((16, 16, 3), np.uint8), file)
    else:
        save_image(np.zeros((16, 16) if change == "mask" else (16, 16, 3), np.uint8), file)
    reads.clear()
    _assert_equal(_batches(_open(config)), _batches(_open(config, gib=0.0)))
    assert len(reads) > 6 and len(list(entries.iterdir())) == 2


def test_any_change_of_the_examples_makes_a_new_entry(config, entries, monkeypatch):
    changes = [
        {},
        {"size": (8, 16)},
        {"resize": "nearest"},
        {"labels": ("0 a", "1 -> ignore", "2 -> 1 b")},
        {"value_range": (0, 100)},
        {"channels": 1},
        {"orientation": "upright"},
        {"pixel_weight_fn": border.BorderWeights(10.0, 5.0, 255)},
        {"pixel_weight_fn": border.BorderWeights(10.0, 4.0, 255)},
    ]
    for change in changes:
        _assert_equal(_batches(_open(config, **change)), _batches(_open(config, gib=0.0, **change)))
    assert len(list(entries.iterdir())) == len(changes)
    _open(config, normalize="standard", show=(1,))  # which make other inputs of the same examples
    assert len(list(entries.iterdir())) == len(changes)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    _open(config)
    assert len(list(entries.iterdir())) == len(changes) + 1
    shapes = [{}, {"shapes_seed": 1}, {"size": (48, 64)}, {"variant": "multilabel"}]
    config.data.name, config.data.size = "shapes", (48, 48)
    for change in shapes:
        _open(config, **change)
    assert len(list(entries.iterdir())) == len(changes) + 1 + len(shapes)


def _keys(entries):
    return {path.name for path in entries.iterdir()}


def test_a_new_field_at_its_default_changes_no_key(config, entries, monkeypatch):
    _open(config)
    keys = _keys(entries)
    known = {**defaults.fields(), "data.new_field": [0, 1]}
    monkeypatch.setattr(defaults, "fields", lambda: known)
    _open(config, new_field=(0, 1))
    assert _keys(entries) == keys
    _open(config, new_field=(0, 2))
    assert len(_keys(entries)) == 2
    # So that a key means the same in all versions, a default cannot change silently.
    pinned = {"name": "shapes", "variant": "multiclass", "size": [96, 96], "resize": "bilinear", "validation": 0.2}
    pinned |= {"shapes_seed": 0, "shapes_train": 800, "shapes_validation": 100, "labels": [], "channels": 0}
    pinned |= {"images": ["images"], "masks": ["masks"], "mask_suffix": "_mask", "value_range": [], "lists": []}
    pinned |= {"dtype": "", "pages": "", "orientation": "as_stored"}
    for name, default in {**pinned, "group": ""}.items():
        assert known[f"data.{name}"] == default, "the default has changed: raise cache.FORMAT, and change this test"


def test_a_new_setting_of_the_weights_at_its_default_changes_no_key(config, entries):
    @dataclasses.dataclass(frozen=True)
    class Extended(border.BorderWeights):
        new_setting: float = 1.0

    _open(config, pixel_weight_fn=border.BorderWeights(10.0, 5.0, 255))
    keys = _keys(entries)
    _open(config, pixel_weight_fn=Extended(10.0, 5.0, 255))
    assert _keys(entries) == keys
    _open(config, pixel_weight_fn=Extended(10.0, 5.0, 255, new_setting=2.0))
    assert len(_keys(entries)) == 2


def test_a_source_without_settings_is_never_cached(config, entries):
    source = folder.load(config.data, "all")  # `data.load` would add the settings
    assert not pipeline.Pipeline(source, (8, 8), "nearest", 1.0).cached
    assert not entries.exists()


@pytest.mark.parametrize("locks", [True, False])
def test_only_one_of_two_processes_writes_an_entry(entries, locks):
    both = [_start(delay=0.2, locks=locks) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert all("sum 45000" in output for output in outputs)
    if locks:
        assert "".join(outputs).count("read") <= 11  # each reads the first, to learn the size
    assert [path.suffix for path in entries.iterdir()] == [""]
    assert "read" not in _start().communicate(timeout=60)[0]


def test_the_leftovers_of_a_killed_process_are_never_used(entries):
    process = _start(delay=0.2)
    while "read 4" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = entries.glob("*.partial")
    assert not [path for path in entries.iterdir() if not path.suffix]
    assert "sum 45000" in _start().communicate(timeout=60)[0]
    assert partial.exists()  # another process might still be writing it
    long_ago = time.time() - 2 * cache.ABANDONED_AFTER
    for path in (*partial.iterdir(), partial):
        os.utime(path, (long_ago, long_ago))
    _cache_megabytes("another", 1)
    assert {path.suffix for path in entries.iterdir()} == {""}


@pytest.mark.parametrize("name", ["image", "label", "layout", "crc32"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "of another type"])
def test_a_damaged_entry_is_replaced(config, reads, entries, name, damage, capsys):
    expected = _batches(_open(config))
    (file,) = entries.glob(f"*/{name}.npy")
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        bad = {
            "truncated": whole[:-1],
            "empty": b"",
            "of another type": whole.replace(b"<i", b"<f", 1).replace(b"u", b"f", 1),
        }
        file.write_bytes(bad[damage])
    reads.clear()
    _assert_equal(_batches(_open(config)), expected)
    assert len(reads) >= 6 and len(list(entries.iterdir())) == 1 and file.read_bytes() == whole
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and f"{file.parent} is damaged and is written anew" in output


def _flip(entries, name, position, bits=255):
    """Flips bits of a byte of a file of the only entry, also for those who have mapped it."""
    (path,) = entries.glob(f"*/{name}.npy")
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ bits]))


@pytest.mark.parametrize("name", ["image", "label", "weight", "crc32"])
@pytest.mark.parametrize("is_open", [True, False])
def test_flipped_bits_never_reach_a_batch(config, reads, entries, name, is_open, capsys):
    open_again = lambda gib=1.0: _open(config, gib, border.BorderWeights(10.0, 5.0, 255))
    streamed, cached = open_again(gib=0.0), open_again()
    train = lambda opened: list(itertools.islice(opened.train_batches(4, 7, 0, np.arange(4)), 6))
    expected = train(streamed), _batches(streamed), [streamed.read(5)]
    for position, bits in ((-1, 1), (-2, 128)):  # of the last example
        _flip(entries, name, position, bits)
    damaged = cached if is_open else open_again()
    reads.clear()
    for found, batches in zip((train(damaged), _batches(damaged), [damaged.read(5)]), expected, strict=True):
        _assert_equal(found, batches)
    assert set(reads) == {"5"}  # again whenever it is needed, and no other
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "is damaged, first seen at example 5" in output
    assert not list(entries.iterdir())  # so the next start writes it anew
    _assert_equal(train(open_again()), expected[0])
    reads.clear()
    _assert_equal(_batches(open_again()), expected[1])
    assert not reads and not capsys.readouterr().out


def test_no_byte_of_an_entry_is_trusted(entries):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    open_again = lambda: cache.load_or_write({}, ["image"], 3, lambda i: {"image": images[i]}, 1e6, str)
    open_again()
    for name, size in (("image", 128 + 60), ("crc32", 128 + 16), ("layout", 128 + 3 * 32)):
        for position in range(name == "crc32", size, 6):
            _flip(entries, name, position, 1 << position % 8)
            found = open_again().take(np.array([2, 0, 0, 1]))["image"]
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, images[[2, 0, 0, 1]])
            open_again()


def test_the_least_recently_used_entries_make_room(entries):
    def sizes():
        return sorted(np.load(file, mmap_mode="r").nbytes // 10**5 for file in entries.glob("*/image.npy"))

    long_ago = time.time() - 100
    for age, megabytes in enumerate((1, 2)):
        _cache_megabytes(megabytes, megabytes, 10)
        (entry,) = (p.parent for p in entries.glob("*/image.npy") if p.stat().st_size // 10**6 == megabytes)
        for path in (*entry.iterdir(), entry):
            os.utime(path, (long_ago + age, long_ago + age))
    assert sizes() == [10, 20]
    assert _cache_megabytes(1, 1) is not None  # makes it the most recently used
    third = _cache_megabytes("third", 1, limit=3.5)
    assert sizes() == [10, 10]
    # The third is in use, so removing the other would not make enough room.
    assert _cache_megabytes("fourth", 3, limit=3.5) is None and sizes() == [10, 10]
    assert third is not None and _cache_megabytes("fourth", 3, limit=4.5) is not None and sizes() == [10, 30]


def test_examples_of_different_sizes_are_cached_if_all_of_them_fit(entries):
    sizes = [100, 50_000, 20_000]
    read = lambda index: {"image": np.full(sizes[index], index, np.uint8)}
    load = lambda limit, pixels: cache.load_or_write({"key": "sizes"}, ["image"], 3, read, limit, pixels=pixels)
    for pixels in (sizes, None):  # without their sizes, writing stops at the limit
        assert load(60_000, pixels) is None and not list(entries.iterdir())
    for _ in range(2):
        found = load(71_000, sizes)
        assert [found.shape("image", i) for i in range(3)] == [(size,) for size in sizes]
        assert all((found[i]["image"] == np.full(sizes[i], i)).all() for i in range(3))


def test_examples_that_do_not_fit_are_read_again_in_each_epoch(config, entries, reads, capsys):
    cached, gib = _open(config), 6 * 8 * 8 * 4 / 2**30
    shutil.rmtree(entries)
    assert _open(config, gib=gib).cached
    shutil.rmtree(entries)
    streamed = _open(config, gib=gib * 0.99)
    assert not streamed.cached and not list(entries.iterdir())
    reads.clear()
    for _ in range(2):
        _assert_equal(_batches(streamed), _batches(cached))
    assert len(reads) >= 12
    train = [opened.train_batches(4, 7, 0, np.arange(4)) for opened in (streamed, cached)]
    _assert_equal(*([next(batches) for _ in range(5)] for batches in train))
    assert not capsys.readouterr().out


def test_a_run_continues_without_a_cache_that_cannot_be_written(config, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    streamed = _open(config)
    output = capsys.readouterr().out
    assert not streamed.cached and output.count("\n") == 1 and "cannot be cached" in output
    _assert_equal(_batches(streamed), _batches(_open(config, gib=0.0)))


def test_a_run_continues_when_the_disk_is_full(entries):
    output = _start(file_size=5_000).communicate(timeout=60)[0]
    assert "sum None" in output and "cannot be cached and will be read again in each epoch: [Errno 27]" in output
    assert not list(entries.iterdir())


def test_nothing_is_written_if_it_cannot_fit_on_the_disk(entries, monkeypatch, capsys):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(10**9, 10**9 - 1, 1))
    assert _cache_megabytes("one", 1) is None
    assert f"they need 0.00 GiB, but 0.00 GiB are free in {entries}" in capsys.readouterr().out
    assert not list(entries.iterdir())


def test_an_image_that_cannot_be_read_is_named(config, entries):
    (pathlib.Path(config.data.root) / "images/3.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match=r"images/3.png: not a readable image"):
            _open(config)
        assert not list(entries.iterdir())


def test_the_cache_folder_belongs_to_the_user(tmp_path, monkeypatch):
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
    with pytest.raises(PermissionError, match="is not a folder that only this user can write to"):
        user_cache.folder("a")
