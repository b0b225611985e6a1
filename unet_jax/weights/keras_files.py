"""Reads whole Keras models, without Keras."""

import io
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from unet_jax.errors import UserError
from unet_jax.weights.zip_files import OVERSIZED, open_zip


class KerasLayer(NamedTuple):
    """A layer of a Keras model: its class, name and config, and the names of its input layers."""

    class_name: str
    name: str
    config: dict[str, Any]
    inputs: tuple[str, ...]


def read_keras(file: pathlib.Path) -> tuple[dict[str, np.ndarray], tuple[KerasLayer, ...]]:
    """Reads a zip archive of `config.json` and `model.weights.h5`."""
    with open_zip(file) as archive:
        layers = keras_layers(json.loads(archive.read("config.json")))
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
    return arrays | datasets, layers


def read_h5(file: pathlib.Path) -> tuple[dict[str, np.ndarray], tuple[KerasLayer, ...]]:
    """Reads the older format of whole Keras models, whose layers are JSON in an attribute."""
    datasets, model = _read_datasets(file, file.stat().st_size, "model_weights/", file)
    if model is None:
        raise UserError(f"{file} holds weights without the model. Save the whole model: model.save('NAME.keras')")
    paths = [(name.split("/"), array) for name, array in datasets.items()]
    arrays = {f"{path[1]}/{path[-1].removesuffix(':0')}": array for path, array in paths}
    return arrays, keras_layers(json.loads(model))


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


def keras_layers(model: dict[str, Any]) -> tuple[KerasLayer, ...]:
    """The layers in the JSON of a model, in order."""
    layers = []
    for layer in model["config"]["layers"]:
        name, inputs = layer.get("name", layer["config"]["name"]), input_names(layer["inbound_nodes"])
        layers.append(KerasLayer(str(layer["class_name"]), str(name), dict(layer["config"]), tuple(inputs)))
    return tuple(layers)


def input_names(nodes: Any) -> list[str]:
    """The names in the `inbound_nodes` of Keras 3 (`keras_history`) or Keras 2 (`[name, 0, 0, ...]`)."""
    if isinstance(nodes, dict):
        history = nodes.get("keras_history")
        return [str(history[0])] if history else [name for inner in nodes.values() for name in input_names(inner)]
    if not isinstance(nodes, list):
        return []
    if len(nodes) > 2 and isinstance(nodes[0], str):
        return [nodes[0]]
    return [name for inner in nodes for name in input_names(inner)]
