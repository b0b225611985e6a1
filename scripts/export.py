"""Exports a trained network to a file that runs without this project.

  python scripts/export.py --workdir=runs/shapes --format=stablehlo --output=shapes.stablehlo
  python scripts/export.py --workdir=runs/shapes --format=onnx --output=shapes.onnx
  python scripts/export.py --workdir=runs/shapes --format=safetensors --output=shapes.safetensors

stablehlo and onnx files map images of any size to labels and probabilities of that size, as --mode=predict does:
resized as in training and back, and normalised, but never in tiles. safetensors files hold only weights. The written
file is read back and compared with the network. Required packages: scripts/install.sh export
"""

import argparse
import json
import logging
import os
import pathlib
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # in case unet_jax is not installed

from unet_jax import paths
from unet_jax.errors import UserError, check_choice
from unet_jax.parallel.streams import guard

# Code that reads a file of each format without this project. {0} is the file.
READ_CODE = {
    "stablehlo": """
from jax import export
network = export.deserialize(open({0!r}, "rb").read())
label, probability = network.call(image)""",
    "onnx": """
import onnxruntime
network = onnxruntime.InferenceSession({0!r}, providers=["CPUExecutionProvider"])
label, probability = network.run(None, {{"image": image}})""",
    "safetensors": """
from safetensors import safe_open
with safe_open({0!r}, "numpy") as file:
    metadata, weights = file.metadata(), {{name: file.get_tensor(name) for name in file.keys()}}""",
}
# What comes before it for graphs. {0} is the mode of a Pillow image, {1} what follows its conversion to that.
IMAGE_CODE = """
import numpy as np
from PIL import Image
image = np.asarray(Image.open("photo.jpg").convert({0!r}){1})[None{2}]"""
# Of other images than 8-bit grey and RGB.
DEEP_IMAGE_CODE = """
import numpy as np, tifffile
image = np.atleast_3d(tifffile.imread("image.tif"))[None]  # {0}, {1}"""


def main() -> None:
    """Exports a network; bad input ends with exit code 1 and one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--workdir", required=True, help="the work directory of the training run")
    parser.add_argument("--format", required=True, help=", ".join(READ_CODE))
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the file to write; must not exist")
    parser.add_argument("--step", type=int, help="the checkpoint; default: the best")
    parser.add_argument(
        "--no-resize",
        dest="resize",
        action="store_false",
        help="stablehlo, onnx: leave resizing out; images must then be of the size that training resized them to",
    )
    flags = parser.parse_args()
    try:
        check_choice("--format", flags.format, READ_CODE)
        if flags.format == "safetensors" and not flags.resize:
            raise UserError("--no-resize is for stablehlo and onnx")
        _export(flags.workdir, flags.format, flags.output, flags.step, flags.resize)
    except UserError as error:
        sys.exit(f"error: {error}")


def _export(workdir: str, kind: str, output: pathlib.Path, step: int | None, resize: bool) -> None:
    paths.check_utf8("--output", output)
    # StableHLO files cannot hold metadata such as class names.
    sidecars = [output.with_name(f"{output.name}.json")] if kind == "stablehlo" else []
    written = [output, *sidecars]
    for path in written:
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten: choose another --output, or delete it")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}; create it first")

    # Imported here, so that --help answers at once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    import unet_jax
    from unet_jax.interop import export

    trained = unet_jax.load(workdir, step)
    if kind == "onnx":
        export.optional("onnxruntime")  # fail before the export, not after it
        content = export.to_onnx(trained, resize).SerializeToString()
    elif kind == "stablehlo":
        content = export.to_stablehlo(trained, resize)
    else:
        content = export.to_safetensors(trained)
    try:
        output.write_bytes(content)
        for path in sidecars:
            path.write_text(json.dumps(export.graph_metadata(trained, resize), indent=2) + "\n")
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise UserError(f"--output={output} cannot be written: {error}") from error
    print(f"Wrote {output} ({len(content) / 1e6:.1f} MB): {workdir}, step {trained.step}")
    for path in sidecars:
        print(f"Wrote {path}: config, classes, normalization, step and input")
    code = READ_CODE[kind].format(str(output))
    try:
        _check(trained, kind, code, resize)
    except UserError:
        for path in written:
            path.unlink()
        raise
    if kind != "safetensors":
        height, width = trained.size
        must_resize = trained.resizes and not resize
        method = f", Image.Resampling.{trained.config.data.resize.upper()}"
        resized = f".resize(({width}, {height}){method})" if must_resize else ""
        classes = trained.classes
        if classes.dtype == "uint8" and classes.channels in (1, 3):
            mode, axis = ("RGB", "") if classes.channels == 3 else ("L", ", ..., None")
            opening = IMAGE_CODE.format(mode, resized, axis)
        else:
            sides = f"[1, {height}, {width}" if must_resize else "[1, height, width"
            opening = DEEP_IMAGE_CODE.format(classes.dtype, f"{sides}, {classes.channels}]")
        described = textwrap.indent(textwrap.fill(export.describe_input(trained, resize), 100), "# ")
        code = f"{opening}\n{described}{code}"
    print(f"These lines read it where neither unet_jax nor flax is installed:\n{code}")


def _check(trained, kind: str, code: str, resize: bool) -> None:
    """Runs `code`, which reads the file, and compares the predictions of its content with the network's, on noise."""
    import numpy as np

    from unet_jax.inference import forward

    # Larger than in training, and not by a whole number: most networks need margins for this size.
    height, width = (n if trained.resizes and not resize else n + 3 for n in trained.size)
    normalization = trained.network.normalization
    low, high = (np.float64(limit) for limit in (normalization.low, normalization.high))
    noise = np.random.default_rng(0).random((2, height, width, trained.classes.channels))
    image = (low + noise * (high - low)).astype(trained.classes.dtype)
    predict = (
        (lambda network: np.stack([network.predict_image(one, "fit", "none") for one in image]))
        if trained.resizes
        else (lambda network: np.asarray(network.predict(image)))
    )
    expected, names = predict(trained), {"image": image}
    exec(code, names)
    if kind == "safetensors":
        probability = predict(_rebuild(names["metadata"], names["weights"]))
        label = forward.to_label(probability, trained.classes.task)
    else:
        label, probability = (np.asarray(names[name]) for name in ("label", "probability"))
    same = np.mean(label == forward.to_label(expected, trained.classes.task))
    difference = np.abs(probability - expected)
    print(
        f"Read it back: on {len(image)} images of noise of {height}x{width} pixels, {same:.3%} of the labels equal the "
        f"network's; probabilities differ by at most {difference.max():.1e}"
    )
    if not difference.mean() < 0.01:  # well above the rounding of other precisions and devices
        raise UserError(f"the written file is not the network: its probabilities differ by {difference.mean():.2g}")


def _rebuild(metadata: dict[str, str], weights: dict):
    """The trained network, from the content of a safetensors file alone."""
    from flax import traverse_util
    from ml_collections import ConfigDict

    from unet_jax import data
    from unet_jax.inference import forward, trained
    from unet_jax.parallel import sharding

    values = {name: json.loads(value) for name, value in metadata.items()}
    classes = data.Classes.from_json(values["classes"])
    normalization = forward.Normalization.from_json(values["normalization"])
    mesh = sharding.create_mesh(0, 1)
    network = forward.create_network(values["config"]["model"], classes, mesh, normalization)
    variables = {"batch_stats": {}, **traverse_util.unflatten_dict(weights, sep="/")}
    sizes = values["image_sizes"] and tuple(map(tuple, values["image_sizes"]))
    return trained.Trained(ConfigDict(values["config"]), classes, network, variables, values["step"], sizes)


if __name__ == "__main__":
    guard()
    main()
