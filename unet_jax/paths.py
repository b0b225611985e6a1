"""Files that are named after data, and folders of any name.

A file name is any bytes but `/`: pattern characters, line breaks, other encodings than UTF-8. As `str` it holds a lone
surrogate for each byte that is not UTF-8, as `os.fsdecode` has it.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence

from etils import epath
from etils.epath import gpath

from unet_jax.errors import UserError, escape_line

LONGEST = 255  # bytes of a file name, on all usual file systems
# Endings of files that are named after data; no folder beside them has one.
_FILES = (".png", ".jpg", ".npy", ".json", ".tif", ".gpkg", ".geojson")
_MARK = re.compile("~[0-9a-f]{16}$")


def file_below(folder: epath.PathLike, name: str, suffix: str) -> epath.Path:
    """The file for an example: `folder / (name + suffix)`, if `name` is the relative path of a file.

    Distinct names give distinct files, none of which is the folder of another. Where `name + suffix` cannot do that (a
    part is too long for a file system, ends like a file though it is a folder, or is spelled in another way, as in
    `a//b`), the file is called after a part of the name, `~` and a hash of all of it.

    Args:
      folder: where the file lies, at any depth.
      name: the id of an example, with `/` between its parts.
      suffix: the end of the file name, such as `_overlay.jpg`; at most 200 bytes.

    Raises:
      ValueError: an absolute or empty name, one that leaves the folder, or an unknown suffix. No data set has such ids.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or "\0" in name:
        raise ValueError(f"{name!r} cannot become a file below {folder}")
    if not suffix.endswith(_FILES) or _size(suffix) > 200 or "/" in suffix:
        raise ValueError(f"{suffix!r} is no suffix of a file that is named after data")
    *folders, last = parts
    is_unfit = lambda part: part.endswith(_FILES) or _size(part) > LONGEST
    kept = [_cut(part, LONGEST - 1) + "~" if is_unfit(part) else part for part in folders]
    if "/".join([*kept, last]) != name or _size(last + suffix) > LONGEST or _MARK.search(last):
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        last = f"{_cut(last, LONGEST - 17 - _size(suffix))}~{digest}"
    return epath.Path(folder).joinpath(*kept, last + suffix)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _cut(text: str, size: int) -> str:
    """The start of a text, of at most `size` bytes."""
    while _size(text) > size:
        text = text[:-1]
    return text


def names_below(root: epath.PathLike, paths: Sequence[epath.PathLike]) -> list[str]:
    """The relative paths of `paths`: to `root`, or, if one lies outside of it, to the deepest folder above them all."""
    whole = [_absolute(path) for path in paths]
    base = _absolute(root)
    if any(os.path.commonpath([base, os.path.dirname(path)]) != base for path in whole):
        base = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, base) for path in whole]


def _absolute(path: epath.PathLike) -> str:
    """A normal spelling; a bucket as a folder of its own."""
    scheme, separator, rest = os.fspath(path).partition("://")
    return os.path.normpath(f"/{scheme}:/{rest}") if separator else os.path.abspath(scheme)


def check_utf8(setting: str, folder: epath.PathLike) -> None:
    """Raises a `UserError` if the path of a folder is not UTF-8, which TensorStore, TensorFlow and TFDS need.

    `setting` names it as the user knows it, such as `--workdir`.
    """
    path = os.path.abspath(os.fspath(folder))
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{setting} = {escape_line(path)} is not UTF-8, and the libraries that write there open no other paths: "
            "rename the folder, or choose another"
        ) from error


def check_workdir(folder: epath.PathLike) -> None:
    """Raises a `UserError` for a work directory that TensorStore cannot write to, or writes elsewhere instead."""
    check_utf8("--workdir", folder)
    path = os.path.abspath(os.fspath(folder))
    if "\\" in path:
        raise UserError(
            f"--workdir = {escape_line(path)} has a backslash in it, which TensorStore takes for another /: rename the "
            "folder, or choose another"
        )


class LiteralPath(gpath.PosixGPath):
    """A path whose own characters are never taken for a pattern: in `runs/lr[1e-3]`, `epath` would find no file.

    Orbax keeps the class of the path that it is given.
    """

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        """The files below that match `pattern`."""
        path = os.fspath(self)
        literal = path if "://" in path else glob.escape(path)
        return (type(self)(found) for found in epath.Path(literal).glob(pattern))
