"""Decoded examples on disk: decoded once, and memory-mapped from then on.

An entry is a folder `examples/<key>/` in the user's cache folder, see `entry_files.py`. The key is a hash of everything
that determines the examples, so an entry never goes stale: if anything changes, so does the key.
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
from unet_jax.data import entry_files

# Raise it if this package makes other pixels, labels or weights of the same files and settings, or if a default of
# config.data changes: a field at its default is not part of the key.
FORMAT = 4
ABANDONED_AFTER = 3600  # seconds without a write, after which a temporary folder is removed
STAT_THREADS = 16  # files looked up at once: a network file system takes long to answer

Read = Callable[[int], dict[str, np.ndarray]]  # index -> one array per name


class Examples:
    """The examples of an entry, memory-mapped; each is checked when it is first read.

    One that is damaged is read again from where it came from, and the entry is removed: the next start writes it anew.
    """

    def __init__(self, entry: pathlib.Path, opened: entry_files.Entry, read: Read, notify: Callable):
        """Takes what `entry_files.read` returns; `read` and `notify` as in `load_or_write`."""
        self._entry, self._opened, self._read, self._notify = entry, opened, read, notify
        self._checked = np.zeros(len(opened.layout), bool)
        self._is_damaged = False

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._opened.arrays.values())

    def shape(self, name: str, index: int) -> tuple[int, ...]:
        """The shape of an array of an example, without reading it."""
        return self._opened.shape(name, index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example: name -> array; read-only, of the mapped file unless it is damaged."""
        example = self._opened.example(index)
        if not self._checked[index]:
            if entry_files.checksum(example) != self._opened.checksums[1 + index]:
                self._report_damage(index)
                return self._read(index)
            self._checked[index] = True
        return example

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices`, int `[b]`, all of the same shapes: name -> array `[b, ...]`, a copy."""
        taken = self._opened.take(indices)
        for row in np.flatnonzero(~self._checked[indices]):
            index = int(indices[row])
            example = {name: values[row] for name, values in taken.items()}
            if entry_files.checksum(example) == self._opened.checksums[1 + index]:
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


def sizes_digest(files: Sequence[epath.PathLike] | None) -> str:
    """A hash of the sizes of `Source.files`, by which they are known again in another place; "" if they are unknown."""
    if files is None:
        return ""
    sizes = [[size for _, size, _ in share] for share in fingerprint(files)]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def load_or_write(
    key_fields: dict[str, Any],
    names: Sequence[str],
    count: int,
    read: Read,
    limit: float,
    notify: Callable[[str], None] = print,
    pixels: Sequence[int] | None = None,
) -> Examples | None:
    """All examples of a split, memory-mapped from the cache; reads and writes them first if they are not there.

    Args:
      key_fields: everything that determines the examples, as JSON values; files as their `fingerprint`.
      names: of the arrays that `read` returns, each of the same type and number of axes for all `count` examples.
      read: called from several threads; what it raises is raised. `Examples.take` calls it for a damaged example.
      limit: bytes that all entries together may take; the least recently used ones are removed to make room.
      notify: called with the reason if the examples cannot be cached, unless it is `limit`, and if some are damaged.
      pixels: of each example, if they differ in size: how much room they need is estimated from the first.

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
            opened = entry_files.read(entry, names, count)
            if opened is None:
                first = read(0)
                first = {name: first[name] for name in names}
                size = sum(value.nbytes for value in first.values())
                size = count * size if pixels is None else size * sum(pixels) // pixels[0]
                if entry.exists():
                    notify(f"The cache {entry} is damaged and is written anew")
                    _remove(entry)
                room = _make_room(entry.parent, size, limit)
                if room < size or not entry_files.write(entry, first, count, read, room):
                    return None
                opened = entry_files.read(entry, names, count)
    except OSError as error:
        notify(f"Images cannot be cached and will be read again in each epoch: {error}")
        return None
    if opened is None:
        return None
    examples = Examples(entry, opened, read, notify)
    if examples.nbytes > limit:
        return None
    _in_use[entry] = examples
    return examples


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


def _make_room(folder: pathlib.Path, size: int, limit: float) -> float:
    """Removes abandoned temporary folders, and the least recently used entries until `size` more bytes fit in `limit`.

    A process that has mapped an entry can still read it after that. Returns the bytes that are left in `limit`, which
    are less than `size` if removing would not help; raises `OSError` if they do not fit on the disk.
    """
    entries = []
    for path in folder.iterdir():
        taken, last_used = _size_and_last_use(path)
        if not path.suffix:
            entries.append((last_used, path, taken))
        elif time.time() - last_used > ABANDONED_AFTER:
            _remove(path)
    room = limit - sum(taken for *_, taken in entries)
    unused = sorted(entry for entry in entries if entry[1] not in _in_use)
    if room + sum(taken for *_, taken in unused) < size:
        return room
    for _, path, taken in unused:
        if room < size:
            _remove(path)
            room += taken
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"they need {size / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free in {folder}")
    return room


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
