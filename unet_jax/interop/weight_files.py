"""Readers for weight files of PyTorch and Keras that need neither framework and never execute anything in a file.

Such a file may come from anywhere: it must not run code, refer to other files, or take more memory than its own size.
"""

import io
import json
import math
import pathlib
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unet_jax.errors import UserError

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of a file of torch before 1.6
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
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep the weights
PREFIXES = ("module.", "_orig_mod.")  # added by DataParallel and torch.compile
OVERSIZED = "it is compressed or declares more data than it holds, which files of torch.save and Keras never do"


class KerasLayer(NamedTuple):
    """A layer of a Keras model: its class, name and config, and the names of its input layers."""

    class_name: str
    name: str
    config: dict[str, Any]
    inputs: tuple[str, ...]


class Storage(NamedTuple):
    """A storage of a state dict: the memory that its tensors are views of."""

    array: np.ndarray


class Weights(NamedTuple):
    """The contents of a file."""

    arrays: dict[str, np.ndarray]  # by name; `<layer>/kernel` and `<layer>/bias` for Keras. Some are strided views
    layers: tuple[KerasLayer, ...] | None  # those of a Keras model, in order; None for a state dict


def read(file: str | pathlib.Path) -> Weights:
    """Reads a state dict (`.pth`, `.pt`, `.safetensors`) or a whole Keras model (`.keras`, `.h5`, `.hdf5`).

    Raises:
      UserError: the file does not exist, is damaged, or holds another format or more than weights; names the remedy.
    """
    file = pathlib.Path(file)
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: weights are read only from files that end in {', '.join(READERS)}")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return reader(file)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{file}: {error}. Install the packages that read it: scripts/install.sh convert") from error
    except Exception as error:  # damaged files raise all kinds of errors
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(f"{file} cannot be read; it is damaged or truncated ({reason}). Copy it again") from error


def _open_zip(file: pathlib.Path) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise UserError(f"{file} is refused: {OVERSIZED}. Save the model again")
    return archive


def _read_torch(file: pathlib.Path) -> Weights:
    """Reads the zip format of `torch.save`: `NAME/data.pkl` describes tensors, `NAME/data/KEY` hold their bytes."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            if opened.read(len(LEGACY_TORCH)) == LEGACY_TORCH:
                raise UserError(
                    f"{file} is in the format of torch before 1.6. Save it again with a newer version: "
                    "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
                )
        raise UserError(f"{file} was not written by torch.save, or is damaged or truncated. Copy it again")
    with _open_zip(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{file} is a zip archive, but was not written by torch.save: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{file} was saved on a big-endian machine. Save it again on a little-endian one")
        return Weights(_state_dict(file, _unpickle(file, archive, folder)), None)


def _unpickle(file: pathlib.Path, archive: zipfile.ZipFile, folder: str) -> Any:
    """Loads `data.pkl`, which may hold only tensors, containers, numbers and strings."""
    storages = {}

    def tensor(stored, offset, size, stride, *_):
        if type(stored) is not Storage:  # a view of another tensor could reach beyond the part which that one shows
            raise ValueError("a tensor that is not a view of a storage")
        storage = stored.array
        if 0 in size:
            return np.empty(size, storage.dtype)
        # The pickle may claim anything: beyond these limits the view would expose other memory, or be huge when copied.
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(offset, *size, *stride, 0) < 0 or end >= storage.size or math.prod(size) > storage.size:
            raise ValueError(f"a tensor of shape {size} reaches beyond its storage")
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)

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
            _, kind, key, _, _ = pid
            if key not in storages:
                storages[key] = Storage(np.frombuffer(archive.read(f"{folder}data/{key}"), STORAGES[kind]))
            return storages[key]

    content = archive.read(f"{folder}data.pkl")
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and argument > len(content):  # the unpickler would allocate a table of that length
            raise ValueError(f"a memo of {argument} entries")
    return Restricted(io.BytesIO(content)).load()


def _read_safetensors(file: pathlib.Path) -> Weights:
    from safetensors.numpy import load_file

    return Weights(_state_dict(file, load_file(file)), None)


def _state_dict(file: pathlib.Path, value: Any) -> dict[str, np.ndarray]:
    """The tensors of a state dict, without the wrappers and other values of a checkpoint."""
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    items = value.items() if isinstance(value, dict) else ()
    arrays = {name: array for name, array in items if isinstance(name, str) and isinstance(array, np.ndarray)}
    if not arrays:
        raise UserError(f"{file} holds no state dict, such as torch.save(model.state_dict(), FILE) writes")
    for prefix in PREFIXES * 2:  # they can be nested
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _read_keras(file: pathlib.Path) -> Weights:
    """Reads a zip archive of `config.json` and `model.weights.h5`."""
    with _open_zip(file) as archive:
        layers = _keras_layers(json.loads(archive.read("config.json")))
        hdf5 = archive.read("model.weights.h5")
    datasets = _read_datasets(io.BytesIO(hdf5), len(hdf5), "layers/", file)[0]
    arrays = {}
    for class_name, folder in (("Conv2D", "conv2d"), ("Conv2DTranspose", "conv2d_transpose")):
        # The file names weights by class and position, not by the name of the layer.
        for n, layer in enumerate(layer for layer in layers if layer.class_name == class_name):
            position = f"_{n}" if n else ""
            for index, name in enumerate(("kernel", "bias")):
                path = f"layers/{folder}{position}/vars/{index}"
                if path in datasets:
                    arrays[f"{layer.name}/{name}"] = datasets.pop(path)
    return Weights(arrays | datasets, layers)


def _read_h5(file: pathlib.Path) -> Weights:
    """Reads the older format of whole Keras models, whose layers are JSON in an attribute."""
    datasets, model = _read_datasets(file, file.stat().st_size, "model_weights/", file)
    if model is None:
        raise UserError(f"{file} holds weights without the model. Save the whole model: model.save('NAME.keras')")
    paths = [(name.split("/"), array) for name, array in datasets.items()]
    arrays = {f"{path[1]}/{path[-1].removesuffix(':0')}": array for path, array in paths}
    return Weights(arrays, _keras_layers(json.loads(model)))


def _read_datasets(hdf5, size: int, prefix: str, file: pathlib.Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The float arrays of an HDF5 file of `size` bytes whose names start with `prefix`, and its `model_config`."""
    import h5py

    datasets = {}

    def collect(name, item):  # soft and external links are not visited
        if isinstance(item, h5py.Dataset) and name.startswith(prefix):
            datasets[name] = item

    with h5py.File(hdf5, "r") as opened:
        opened.visititems(collect)
        if any(dataset.external or dataset.is_virtual for dataset in datasets.values()):
            raise UserError(f"{file} is refused: it refers to weights in other files. Save the model again")
        if sum(dataset.nbytes for dataset in datasets.values()) > size:
            raise UserError(f"{file} is refused: {OVERSIZED}. Save the model again")
        floats = {name: dataset for name, dataset in datasets.items() if dataset.dtype.kind == "f"}
        return {name: dataset[()] for name, dataset in floats.items()}, opened.attrs.get("model_config")


def _keras_layers(model: dict[str, Any]) -> tuple[KerasLayer, ...]:
    layers = []
    for layer in model["config"]["layers"]:
        name, inputs = layer.get("name", layer["config"]["name"]), _input_names(layer["inbound_nodes"])
        layers.append(KerasLayer(str(layer["class_name"]), str(name), dict(layer["config"]), tuple(inputs)))
    return tuple(layers)


def _input_names(nodes: Any) -> list[str]:
    """The names in the `inbound_nodes` of Keras 3 (`keras_history`) or Keras 2 (`[name, 0, 0, ...]`)."""
    if isinstance(nodes, dict):
        history = nodes.get("keras_history")
        return [str(history[0])] if history else [name for inner in nodes.values() for name in _input_names(inner)]
    if not isinstance(nodes, list):
        return []
    if len(nodes) > 2 and isinstance(nodes[0], str):
        return [nodes[0]]
    return [name for inner in nodes for name in _input_names(inner)]


READERS = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".safetensors": _read_safetensors,
    ".keras": _read_keras,
    ".h5": _read_h5,
    ".hdf5": _read_h5,
}
