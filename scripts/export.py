"""Exports a trained network to a file that runs without this project.

  python scripts/export.py --workdir=runs/shapes --format=stablehlo --output=shapes.stablehlo
  python scripts/export.py --workdir=runs/shapes --format=onnx --output=shapes.onnx
  python scripts/export.py --workdir=runs/shapes --format=safetensors --output=shapes.safetensors

stablehlo and onnx files map uint8 images of any size to labels and probabilities; safetensors files hold only weights.
The written file is read back and compared with the network. Required packages: scripts/install.sh export
"""

import argparse
import json
import logging
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # in case unet_jax is not installed

from unet_jax.errors import UserError, check_choice

# Code that reads a file of each format without this project. {0} is the file, {1} the number of channels.
READ_CODE = {
    "stablehlo": """
from jax import export
network = export.deserialize(open({0!r}, "rb").read())
label, probability = network.call(image)  # image: uint8 [batch, height, width, {1}]""",
    "onnx": """
import onnxruntime
network = onnxruntime.InferenceSession({0!r}, providers=["CPUExecutionProvider"])
label, probability = network.run(None, {{"image": image}})  # image: uint8 [batch, height, width, {1}]""",
    "safetensors": """
from safetensors import safe_open
with safe_open({0!r}, "numpy") as file:
    metadata, weights = file.metadata(), {{name: file.get_tensor(name) for name in file.keys()}}""",
}


def main() -> None:
    """Exports a network; bad input ends with exit code 1 and one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--workdir", required=True, help="the work directory of the training run")
    parser.add_argument("--format", required=True, help=", ".join(READ_CODE))
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the file to write; must not exist")
    parser.add_argument("--step", type=int, help="the checkpoint; default: the best")
    flags = parser.parse_args()
    try:
        check_choice("--format", flags.format, READ_CODE)
        _export(flags.workdir, flags.format, flags.output, flags.step)
    except UserError as error:
        sys.exit(f"error: {error}")


def _export(workdir: str, kind: str, output: pathlib.Path, step: int | None) -> None:
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
        content = export.to_onnx(trained).SerializeToString()
    else:
        content = {"stablehlo": export.to_stablehlo, "safetensors": export.to_safetensors}[kind](trained)
    try:
        output.write_bytes(content)
        for path in sidecars:
            path.write_text(json.dumps(export.metadata(trained), indent=2) + "\n")
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise UserError(f"--output={output} cannot be written: {error}") from error
    print(f"Wrote {output} ({len(content) / 1e6:.1f} MB): {workdir}, step {trained.step}")
    for path in sidecars:
        print(f"Wrote {path}: config, classes, normalization and step")
    try:
        _check(trained, kind, READ_CODE[kind].format(str(output), trained.classes.channels))
    except UserError:
        for path in written:
            path.unlink()
        raise


def _check(trained, kind: str, code: str) -> None:
    """Runs `code`, which reads the file, and compares the predictions of its content with the network's, on noise."""
    import numpy as np

    from unet_jax.inference import forward

    height, width = (n + 3 for n in trained.config.data.size)  # most networks need margins for this size
    shape = (2, height, width, trained.classes.channels)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(trained.predict(image))
    to_label = lambda probability: forward.to_label(probability, trained.classes.task)
    names = {"image": image}
    exec(code, names)
    if kind == "safetensors":
        probability = np.asarray(_rebuild(names["metadata"], names["weights"]).predict(image))
        label = to_label(probability)
    else:
        label, probability = (np.asarray(names[name]) for name in ("label", "probability"))
    same = np.mean(label == to_label(expected))
    difference = np.abs(probability - expected)
    print(
        f"Read it back: on {shape[0]} images of noise of {height}x{width} pixels, {same:.3%} of the labels equal the "
        f"network's; probabilities differ by at most {difference.max():.1e}"
    )
    if not difference.mean() < 0.01:  # well above the rounding of other precisions and devices
        raise UserError(f"the written file is not the network: its probabilities differ by {difference.mean():.2g}")
    print(f"These lines read it where neither unet_jax nor flax is installed:\n{code}")


def _rebuild(metadata: dict[str, str], weights: dict):
    """The trained network, from the content of a safetensors file alone."""
    from flax import traverse_util

    from unet_jax import data
    from unet_jax.inference import forward, trained
    from unet_jax.parallel import sharding

    values = {name: json.loads(value) for name, value in metadata.items()}
    classes = data.Classes.from_json(values["classes"])
    normalization = forward.Normalization.from_json(values["normalization"])
    mesh = sharding.create_mesh(0, 1)
    network = forward.create_network(values["config"]["model"], classes, mesh, normalization)
    variables = {"batch_stats": {}, **traverse_util.unflatten_dict(weights, sep="/")}
    return trained.Trained(values["config"], classes, network, variables, values["step"])


if __name__ == "__main__":
    main()
