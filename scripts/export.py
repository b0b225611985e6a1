"""Exports a trained network to a file that runs without this project.

  python scripts/export.py --workdir=runs/shapes --format=stablehlo --output=shapes.stablehlo
  python scripts/export.py --workdir=runs/shapes --format=onnx --output=shapes.onnx
  python scripts/export.py --workdir=runs/shapes --format=safetensors --output=shapes.safetensors

stablehlo and onnx take uint8 images of any size and give labels and probabilities; safetensors are the weights alone.
What was written is read again and compared with the network. Needs once: scripts/install.sh export
"""

import argparse
import json
import logging
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # where unet_jax is not installed

from unet_jax.errors import UserError, check_choice

# What reads a file of each format without this project. {0} is the file, {1} the channels of the images.
READ = {
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
    """Exports; bad input ends with exit code 1 and one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--workdir", required=True, help="of the training")
    parser.add_argument("--format", required=True, help=", ".join(READ))
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the file to write; must not exist")
    parser.add_argument("--step", type=int, help="the checkpoint; default: the best")
    flags = parser.parse_args()
    try:
        check_choice("--format", flags.format, READ)
        _export(flags.workdir, flags.format, flags.output, flags.step)
    except UserError as error:
        sys.exit(f"error: {error}")


def _export(workdir: str, kind: str, output: pathlib.Path, step: int | None) -> None:
    # StableHLO has no place for the names of the classes.
    beside = [output.with_name(f"{output.name}.json")] if kind == "stablehlo" else []
    for path in (output, *beside):
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten: choose another --output, or remove it")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}, make it first")

    # Imports stay here, so that --help answers at once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    import unet_jax
    from unet_jax import export

    trained = unet_jax.load(workdir, step)
    if kind == "onnx":
        export.optional("onnxruntime")  # before the work rather than after it
        data = export.to_onnx(trained).SerializeToString()
    else:
        data = {"stablehlo": export.to_stablehlo, "safetensors": export.to_safetensors}[kind](trained)
    try:
        output.write_bytes(data)
        for path in beside:
            path.write_text(json.dumps(export.metadata(trained), indent=2) + "\n")
    except OSError as error:
        for path in (output, *beside):
            path.unlink(missing_ok=True)
        raise UserError(f"--output={output} cannot be written: {error}") from error
    print(f"Wrote {output} ({len(data) / 1e6:.1f} MB): {workdir}, step {trained.step}")
    for path in beside:
        print(f"Wrote {path}: config, classes and step")
    try:
        _compare(trained, kind, READ[kind].format(str(output), trained.classes.channels))
    except UserError:
        for path in (output, *beside):
            path.unlink()
        raise


def _compare(trained, kind: str, code: str) -> None:
    """Runs `code`, which reads the file, and compares what it holds with the network, on noise."""
    import numpy as np

    from unet_jax import metrics

    height, width = (n + 3 for n in trained.config.data.size)  # which most networks do not take as they are
    shape = (2, height, width, trained.classes.channels)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(trained.predict(image))
    to_label = lambda probability: metrics.predict_label(probability - 0.5, trained.classes.task)
    names = {"image": image}
    exec(code, names)
    if kind == "safetensors":
        found = np.asarray(_rebuild(names["metadata"], names["weights"]).predict(image))
        label = to_label(found)
    else:
        label, found = (np.asarray(names[name]) for name in ("label", "probability"))
    same = np.mean(label == to_label(expected))
    difference = np.abs(found - expected)
    print(
        f"Read it again: {same:.3%} of the labels of {shape[0]} images of {height}x{width} "
        f"pixels of noise equal the network's; probabilities differ by {difference.max():.1e} at most"
    )
    if not difference.mean() < 0.01:  # other precisions and devices round, but not like this
        raise UserError(f"what was written is not the network: its probabilities differ by {difference.mean():.2g}")
    print(f"These lines read it where neither unet_jax nor flax is installed:\n{code}")


def _rebuild(metadata: dict[str, str], weights: dict):
    """The network of a safetensors file, from nothing else."""
    from flax import traverse_util

    from unet_jax import data, mesh, trained
    from unet_jax.models import unet

    config, classes = (json.loads(metadata[name]) for name in ("config", "classes"))
    classes = data.Classes.from_json(classes)
    variables = {"batch_stats": {}, **traverse_util.unflatten_dict(weights, sep="/")}
    model = unet.create(classes.num_outputs, **config["model"])
    return trained.Trained(config, classes, model, variables, 0, mesh.create(0, 1))


if __name__ == "__main__":
    main()
