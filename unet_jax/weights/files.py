"""Readers for weight files of PyTorch and Keras that need neither framework and never execute anything in a file.

Such a file may come from anywhere: it must not run code, refer to other files, or take more memory than its own size.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from unet_jax.errors import UserError
from unet_jax.weights import keras_files, torch_files
from unet_jax.weights.keras_files import KerasLayer

WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep the weights
PREFIXES = ("module.", "_orig_mod.")  # added by DataParallel and torch.compile


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


def _read_torch(file: pathlib.Path) -> Weights:
    return Weights(_state_dict(file, torch_files.read(file)), None)


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


READERS = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".safetensors": _read_safetensors,
    ".keras": lambda file: Weights(*keras_files.read_keras(file)),
    ".h5": lambda file: Weights(*keras_files.read_h5(file)),
    ".hdf5": lambda file: Weights(*keras_files.read_h5(file)),
}
