"""Reads what torch.save writes, without torch: a pickle that describes tensors, and the bytes of their storages.

Both formats end in the same unpickler, which builds tensors, containers, numbers and strings and refuses anything else.
"""

import io
import math
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unet_jax.errors import UserError
from unet_jax.weights.zip_files import open_zip

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle that files of torch before 1.6 begin with
LEGACY_PROTOCOL = 1001
STORAGES = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}
BIG_ENDIAN = "was saved on a big-endian machine. Save it again on a little-endian one"


class Storage(NamedTuple):
    """The memory that tensors are views of."""

    array: np.ndarray  # [size]


def read(file: pathlib.Path) -> Any:
    """What was given to torch.save; tensors become read-only arrays, some of them strided views.

    Raises:
      UserError: another format, a big-endian machine, or objects other than tensors, which are refused.
      Exception: of any kind if the file is damaged or truncated.
    """
    if zipfile.is_zipfile(file):
        return _read_zip(file)
    with file.open("rb") as opened:
        if opened.read(len(LEGACY)) != LEGACY:
            raise UserError(f"{file} was not written by torch.save, or is damaged or truncated. Copy it again")
    return _read_legacy(file)


def _read_zip(file: pathlib.Path) -> Any:
    """`NAME/data.pkl` describes tensors, `NAME/data/KEY` hold their bytes."""
    with open_zip(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{file} is a zip archive, but was not written by torch.save: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{file} {BIG_ENDIAN}")
        storages = {}

        def storage(_, kind, key, *__):
            if key not in storages:
                storages[key] = Storage(np.frombuffer(archive.read(f"{folder}data/{key}"), STORAGES[kind]))
            return storages[key]

        return _unpickle(file, io.BytesIO(archive.read(f"{folder}data.pkl")), storage)


def _read_legacy(file: pathlib.Path) -> Any:
    """The format before torch 1.6: five pickles, then the bytes of the storages, in the order of the fifth.

    The pickles are a magic number, a version, facts about the machine, the object, and the keys of its storages. Each
    storage is its number of elements, an int64, and its bytes.
    """
    content, storages = io.BytesIO(file.read_bytes()), {}
    remaining = len(content.getbuffer())

    def storage(_, kind, key, __, length, view):
        nonlocal remaining
        dtype = STORAGES[kind]
        if key not in storages:
            # Tensors are views of storages whose bytes come later: the memory is allocated as the pickle declares it.
            if type(length) is not int or not 0 <= length <= remaining // dtype.itemsize:
                raise ValueError(f"a storage of {length} elements in a file of {file.stat().st_size} bytes")
            remaining -= length * dtype.itemsize
            storages[key] = Storage(np.empty(length, dtype))
        if view is not None or (dtype, length) != (storages[key].array.dtype, storages[key].array.size):
            raise ValueError(f"another view of storage {key}, which torch has not written for years")
        return storages[key]

    _, version, machine = (_unpickle(file, content, None) for _ in range(3))
    if version != LEGACY_PROTOCOL:
        raise ValueError(f"version {version} of the format")
    if not machine["little_endian"]:
        raise UserError(f"{file} {BIG_ENDIAN}")
    value = _unpickle(file, content, storage)
    keys = _unpickle(file, content, None)
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        array = storages[key].array
        (length,) = struct.unpack("<q", content.read(8))
        if length != array.size or content.readinto(array.view(np.uint8)) != array.nbytes:
            raise ValueError(f"storage {key} does not hold {array.size} elements")
    return value


def _unpickle(file: pathlib.Path, content: io.BytesIO, storage: Callable[..., Storage] | None) -> Any:
    """Loads the pickle at the position of `content`, which may hold only tensors, containers, numbers and strings.

    `storage` returns the storage of a persistent id; None: the pickle has no tensors.
    """

    def tensor(stored, offset, size, stride, *_):
        if type(stored) is not Storage:  # a view of another tensor could reach beyond the part which that one shows
            raise ValueError("a tensor that is not a view of a storage")
        array = stored.array
        if 0 in size:
            return np.empty(size, array.dtype)
        # The pickle may claim anything: beyond these limits the view would expose other memory, or be huge when copied.
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(offset, *size, *stride, 0) < 0 or end >= array.size or math.prod(size) > array.size:
            raise ValueError(f"a tensor of shape {size} reaches beyond its storage")
        strides = [step * array.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(array[offset:], size, strides, writeable=False)

    allowed = {
        ("collections", "OrderedDict"): lambda: OrderedDict(),  # with arguments it could copy endlessly
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): lambda value, *_: value,
        **{("torch", name): name for name in STORAGES},
    }

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in allowed:
                return allowed[module, name]
            raise UserError(
                f"{file} holds {module}.{name}, which is not a tensor. Loading such a file could run any code, so it "
                "was refused, and nothing in it was run. If you trust it, save only the weights where it was made: "
                "torch.save(model.state_dict(), FILE)"
            )

        def persistent_load(self, pid):
            return storage(*pid)

    start = content.tell()
    largest = max((argument for opcode, argument, _ in pickletools.genops(content) if "PUT" in opcode.name), default=0)
    if largest > content.tell() - start:  # the unpickler would allocate a table of that length
        raise ValueError(f"a memo of {largest} entries")
    content.seek(start)
    return Restricted(content).load()
