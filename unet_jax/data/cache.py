"""Resized examples on disk: decoded once, mapped into memory by every later start.

Below the user's cache folder an entry is a folder `examples/<key>/` with one `.npy` file per field. The key is a hash
of everything that the examples are made of, so that an entry is right or is never found; nothing is ever updated.

An entry is written into a folder of its own name and renamed when it is whole and on the disk: whoever is killed
leaves nothing that would be used, and of two that write the same one the second finds it there.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL
from etils import epath

from unet_jax import user_cache

FORMAT = 1  # to be raised whenever this code makes other pixels, labels or weights of the same files
ABANDONED = 3600  # seconds; an entry that was not written to for so long never will be
STATS = 16  # at once; those of network file systems take long

Read = Callable[[int], dict[str, np.ndarray]]

# Entries that this process uses: it must not remove one split to make room for the other.
_mapped: weakref.WeakValueDictionary[pathlib.Path, np.ndarray] = weakref.WeakValueDictionary()


def stamp(files: Sequence[epath.PathLike]) -> list[list[tuple]]:
    """What changes when one of `files` does: paths, sizes and times of the last change."""

    def look(file):
        path = os.fspath(file)
        try:
            if "://" in path:
                found = epath.Path(path).stat()
                return path, found.length, found.mtime
            found = os.stat(path)
        except OSError:  # it is named where it is read
            return path, None, None
        return os.path.abspath(path), found.st_size, found.st_mtime_ns

    with concurrent.futures.ThreadPoolExecutor(STATS) as pool:
        return list(pool.map(lambda first: [look(file) for file in files[first::STATS]], range(STATS)))


def examples(
    made_of: dict[str, Any],
    fields: Sequence[str],
    count: int,
    read: Read,
    limit: float,
    say: Callable[[str], None] = print,
) -> dict[str, np.ndarray] | None:
    """All examples of a split, mapped from the disk; decodes them first, in parallel, where no entry holds them.

    Args:
      made_of: everything that determines the examples, as JSON has it; the files as their `stamp`.
      fields: names of what `read` returns.
      count: number of examples.
      read: index -> array per field, each of the same shape and type for all indices. Called from several threads.
      limit: bytes that all entries together may fill; those that were not used for longest make room.
      say: is told why the examples are not kept, if it is not for the limit.

    Returns:
      read-only arrays `[count, ...]` by field, or None where they fit neither in `limit` nor on the disk.

    Raises:
      Whatever `read` raises.
    """
    if limit <= 0:
        return None
    versions = {"format": FORMAT, "numpy": np.__version__, "pillow": PIL.__version__}
    key = hashlib.sha256(json.dumps({**versions, **made_of}, sort_keys=True).encode()).hexdigest()[:32]
    try:
        entry = user_cache.folder("examples") / key
        found = _load(entry, fields, count)
        if found is None:
            first = read(0)
            size = count * sum(first[name].nbytes for name in fields)
            if size > limit:
                return None
            with _alone(entry.with_suffix(".lock")):
                found = _load(entry, fields, count)  # of the process that was waited for
                if found is None:
                    _remove(entry)  # a damaged one
                    if not _make_room(entry.parent, size, limit):
                        return None
                    _write(entry, {name: first[name] for name in fields}, count, read)
                    found = _load(entry, fields, count)
    except OSError as error:
        say(f"Images cannot be cached, so that they are read anew each epoch: {error}")
        return None
    if found is None or sum(array.nbytes for array in found.values()) > limit:
        return None
    _mapped[entry] = found[fields[0]]
    return found


def _load(entry: pathlib.Path, fields: Sequence[str], count: int) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None where there is none, or a damaged one."""
    try:
        arrays = {name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r")) for name in fields}
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):  # a file cut short is a ValueError
        return None
    if any(len(array) != count for array in arrays.values()):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # was used now
    return arrays


@contextlib.contextmanager
def _alone(lock: pathlib.Path) -> Iterator[None]:
    """Waits while another process of this computer writes the same entry. Saves work; nothing depends on it."""
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _write(entry: pathlib.Path, first: dict[str, np.ndarray], count: int, read: Read) -> None:
    """Writes an entry, or leaves the one that another process has written meanwhile.

    By calls that fail when the disk is full: writing to a mapped file would end the process.
    """
    import tqdm

    partial = entry.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        with contextlib.ExitStack() as opened:
            files = {name: opened.enter_context((partial / f"{name}.npy").open("wb", buffering=0)) for name in first}
            for name, value in first.items():
                header = {"descr": value.dtype.str, "fortran_order": False, "shape": (count, *value.shape)}
                np.lib.format.write_array_header_1_0(files[name], header)
            starts = {name: file.tell() for name, file in files.items()}

            def fill(index):
                example = read(index) if index else first
                for name, value in first.items():
                    if (example[name].shape, example[name].dtype) != (value.shape, value.dtype):
                        raise ValueError(f"{name} {index} is {example[name].dtype} {example[name].shape}")
                    _write_at(files[name].fileno(), example[name], starts[name] + index * value.nbytes)

            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                done = pool.map(fill, range(count))
                list(tqdm.tqdm(done, "Reading", count, unit=" images", leave=False, delay=1))
            for file in files.values():
                os.fsync(file.fileno())
        _sync(partial)
        try:
            partial.rename(entry)
        except OSError:
            if not entry.exists():
                raise
        _sync(entry.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_at(file: int, array: np.ndarray, start: int) -> None:
    """Writes the bytes of an array from position `start` on; a call may take only some of them."""
    rest = memoryview(np.ascontiguousarray(array)).cast("B")
    while rest:
        written = os.pwrite(file, rest, start)
        rest, start = rest[written:], start + written


def _sync(folder: pathlib.Path) -> None:
    """Puts the names in a folder on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _make_room(folder: pathlib.Path, size: int, limit: float) -> bool:
    """Removes what was abandoned, and entries, those first that were not used for longest, until `size` bytes fit.

    What another process has mapped stays readable for it.

    Returns:
      whether they fit in `limit`.

    Raises:
      OSError: they do not fit on the disk.
    """
    entries = []
    for path in folder.iterdir():
        held, used = _look(path)
        if not path.suffix:
            entries.append((used, path, held))
        elif time.time() - used > ABANDONED:
            _remove(path)
    room = limit - size - sum(held for *_, held in entries)
    unused = sorted((used, path, held) for used, path, held in entries if path not in _mapped)
    if room + sum(held for *_, held in unused) < 0:
        return False
    for _, path, held in unused:
        if room < 0:
            _remove(path)
            room += held
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"they need {size / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free in {folder}")
    return True


def _look(path: pathlib.Path) -> tuple[int, float]:
    """Bytes below an entry, and when it was last used or written to, in seconds since the epoch."""
    found = []
    with contextlib.suppress(OSError):  # removed by another process meanwhile
        found.append(path.stat())
        found += [file.stat() for file in path.iterdir()] if path.is_dir() else []
    return sum(stat.st_size for stat in found[1:]), max((stat.st_mtime for stat in found), default=0.0)


def _remove(path: pathlib.Path) -> None:
    """Removes an entry, or what is left of one: out of the way first, so that nobody finds half of it."""
    aside = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    with contextlib.suppress(OSError):
        path.rename(aside)
        aside.unlink() if aside.is_file() else shutil.rmtree(aside, ignore_errors=True)
