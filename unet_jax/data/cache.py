"""Resized examples on disk: decoded once, and memory-mapped from then on.

An entry is a folder `examples/<key>/` in the user's cache folder, with one `.npy` file per array and `crc32.npy`, a
checksum per example. The key is a hash of everything that determines the examples, so an entry never goes stale: if
anything changes, so does the key. No byte of an entry is trusted: each example is checked when it is first read.

An entry is written to a temporary folder, and renamed when it is complete and on the disk. So a killed process leaves
nothing that would be used, and if two processes write the same entry, the second keeps that of the first.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL
from etils import epath

from unet_jax import user_cache
from unet_jax.data import images

# Raise it if this package makes other pixels, labels or weights of the same files and settings, or if a default of
# config.data changes: a field at its default is not part of the key.
FORMAT = 3
CHECKSUMS = "crc32"  # the file of the checksums, beside those of the arrays
ABANDONED_AFTER = 3600  # seconds without a write, after which a temporary folder is removed
STAT_THREADS = 16  # files looked up at once: a network file system takes long to answer

Read = Callable[[int], dict[str, np.ndarray]]  # index -> one array per name


class Examples:
    """The examples of an entry, memory-mapped; each is checked when it is first read.

    One that is damaged is read again from where it came from, and the entry is removed: the next start writes it anew.
    """

    def __init__(
        self, entry: pathlib.Path, arrays: dict[str, np.ndarray], checksums: np.ndarray, read: Read, notify: Callable
    ):
        """Takes what `_open` returns; `read` and `notify` as in `load_or_write`."""
        self._entry, self._arrays, self._checksums, self._read, self._notify = entry, arrays, checksums, read, notify
        self._checked = np.zeros(len(checksums), bool)
        self._is_damaged = False

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices`, int `[b]`: name -> array `[b, ...]`, a copy."""
        taken = {name: np.take(array, indices, axis=0) for name, array in self._arrays.items()}
        for row in np.flatnonzero(~self._checked[indices]):
            index = int(indices[row])
            if checksum({name: values[row] for name, values in taken.items()}) == self._checksums[index]:
                self._checked[index] = True
                continue
            self._report_damage(index)
            for name, value in self._read(index).items():
                taken[name][row] = value
        return taken

    def _report_damage(self, index: int) -> None:
        """Prints the first damaged example, and removes the entry."""
        if not self._is_damaged:
            self._is_damaged = True
            _remove(self._entry)  # what is mapped can still be read
            self._notify(
                f"The cache {self._entry} is damaged, first seen at example {index}. Damaged examples are read from "
                "where they came from, and the next start writes the cache anew"
            )


def checksum(example: dict[str, np.ndarray]) -> int:
    """CRC-32 of the names, types, shapes and bytes of the arrays of an example.

    It finds any 32 neighbouring bits that changed, and other damage with a probability of 1 - 2^-32. In the standard
    library it is the fastest: 4,200 MB/s on one core of an AMD EPYC, SHA-1 1,900, SHA-256 1,800, BLAKE2b 950.
    """
    value = 0
    for name, array in sorted(example.items()):
        value = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array), value)
    return value


# Entries that this process uses: making room for one split must not remove another.
_in_use: weakref.WeakValueDictionary[pathlib.Path, Examples] = weakref.WeakValueDictionary()


def fingerprint(files: Sequence[epath.PathLike]) -> list[list[tuple]]:
    """Path, size and modification time of each file, as JSON values: different if any file has changed."""

    def look_up(file):
        path = os.fspath(file)
        try:
            if "://" in path:
                stat = epath.Path(path).stat()
                return path, stat.length, stat.mtime
            stat = os.stat(path)
        except OSError:  # reading the file will raise an error that names it
            return path, None, None
        return os.path.abspath(path), stat.st_size, stat.st_mtime_ns

    with concurrent.futures.ThreadPoolExecutor(STAT_THREADS) as pool:
        shares = [files[first::STAT_THREADS] for first in range(STAT_THREADS)]
        return list(pool.map(lambda share: [look_up(file) for file in share], shares))


def load_or_write(
    key_fields: dict[str, Any],
    names: Sequence[str],
    count: int,
    read: Read,
    limit: float,
    notify: Callable[[str], None] = print,
) -> Examples | None:
    """All examples of a split, memory-mapped from the cache; reads and writes them first if they are not there.

    Args:
      key_fields: everything that determines the examples, as JSON values; files as their `fingerprint`.
      names: of the arrays that `read` returns, each of the same shape and type for all `count` examples.
      read: called from several threads; what it raises is raised. `Examples.take` calls it for a damaged example.
      limit: bytes that all entries together may take; the least recently used ones are removed to make room.
      notify: called with the reason if the examples cannot be cached, unless it is `limit`, and if some are damaged.

    Returns:
      the examples, or None if they do not fit in `limit` or cannot be written.
    """
    if limit <= 0:
        return None
    versions = {"format": FORMAT, "numpy": np.__version__, "pillow": PIL.__version__}
    key = hashlib.sha256(json.dumps({**versions, **key_fields}, sort_keys=True).encode()).hexdigest()[:32]
    try:
        entry = user_cache.folder("examples") / key
        with _locked(entry.with_suffix(".lock")):
            opened = _open(entry, names, count)
            if opened is None:
                first = read(0)
                if entry.exists():
                    notify(f"The cache {entry} is damaged and is written anew")
                    _remove(entry)
                if not _make_room(entry.parent, count * sum(value.nbytes for value in first.values()), limit):
                    return None
                _write(entry, first, count, read)
                opened = _open(entry, names, count)
    except OSError as error:
        notify(f"Images cannot be cached and will be read again in each epoch: {error}")
        return None
    if opened is None:
        return None
    examples = Examples(entry, *opened, read, notify)
    if examples.nbytes > limit:
        return None
    _in_use[entry] = examples
    return examples


def _open(entry: pathlib.Path, names: Sequence[str], count: int) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """The arrays of an entry, `[count, ...]`, and the checksums of its examples, uint32 `[count]`.

    None if it is missing, or if a file is damaged so that its examples cannot be told apart.
    """
    try:
        arrays = {name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r")) for name in (*names, CHECKSUMS)}
        counts = {len(array) for array in arrays.values()}
        checksums = arrays.pop(CHECKSUMS)
        # That of the first example also tells whether the types and shapes are right, which hold for all of them.
        if counts != {count} or checksum({name: array[0] for name, array in arrays.items()}) != checksums[0]:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        raise
    except Exception:  # damaged headers raise all kinds of exceptions
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # marks it as recently used
    return arrays, checksums


@contextlib.contextmanager
def _locked(lock: pathlib.Path) -> Iterator[None]:
    """Waits while another process on this computer writes the same entry. It saves work, nothing relies on it."""
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _write(entry: pathlib.Path, first: dict[str, np.ndarray], count: int, read: Read) -> None:
    """Writes an entry; if another process has written it meanwhile, that one stays.

    It uses system calls that fail when the disk is full: writing to a memory-mapped file would kill the process.
    """
    partial = entry.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((partial / f"{name}.npy").open("wb")) for name in (*first, CHECKSUMS)}
            for name, value in first.items():
                header = {"descr": value.dtype.str, "fortran_order": False, "shape": (count, *value.shape)}
                np.lib.format.write_array_header_1_0(files[name], header)
            starts = {name: files[name].tell() for name in first}
            checksums, lock = np.zeros(count, np.uint32), threading.Lock()

            def write_example(index):
                example = read(index) if index else first
                for name, value in first.items():
                    if (example[name].shape, example[name].dtype) != (value.shape, value.dtype):
                        raise ValueError(f"{name} {index} is {example[name].dtype} {example[name].shape}")
                    with lock:
                        files[name].seek(starts[name] + index * value.nbytes)
                        files[name].write(np.ascontiguousarray(example[name]))
                checksums[index] = checksum(example)

            images.map_parallel(write_example, range(count), "Reading images")
            np.save(files[CHECKSUMS], checksums)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(partial)
        try:
            partial.rename(entry)
        except OSError:
            if not entry.exists():
                raise
        _sync_folder(entry.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_folder(folder: pathlib.Path) -> None:
    """Puts the names of the files in a folder on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _make_room(folder: pathlib.Path, size: int, limit: float) -> bool:
    """Removes abandoned temporary folders, and the least recently used entries until `size` more bytes fit in `limit`.

    A process that has mapped an entry can still read it after that. Returns whether they fit in `limit`; raises
    `OSError` if they do not fit on the disk.
    """
    entries = []
    for path in folder.iterdir():
        taken, last_used = _size_and_last_use(path)
        if not path.suffix:
            entries.append((last_used, path, taken))
        elif time.time() - last_used > ABANDONED_AFTER:
            _remove(path)
    room = limit - size - sum(taken for *_, taken in entries)
    unused = sorted(entry for entry in entries if entry[1] not in _in_use)
    if room + sum(taken for *_, taken in unused) < 0:
        return False
    for _, path, taken in unused:
        if room < 0:
            _remove(path)
            room += taken
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"they need {size / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free in {folder}")
    return True


def _size_and_last_use(path: pathlib.Path) -> tuple[int, float]:
    """The bytes in an entry, and when it was last used or written to, in seconds since the epoch."""
    stats = []
    with contextlib.suppress(OSError):  # another process may be removing it
        stats.append(path.stat())
        stats += [file.stat() for file in path.iterdir()] if path.is_dir() else []
    return sum(stat.st_size for stat in stats[1:]), max((stat.st_mtime for stat in stats), default=0.0)


def _remove(path: pathlib.Path) -> None:
    """Removes an entry or a leftover; renames it first, so that no process finds half of it."""
    renamed = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    with contextlib.suppress(OSError):
        path.rename(renamed)
        renamed.unlink() if renamed.is_file() else shutil.rmtree(renamed, ignore_errors=True)
