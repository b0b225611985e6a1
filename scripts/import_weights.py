"""Converts the weights of a PyTorch or Keras U-Net to a work directory, for evaluation, prediction and fine-tuning.

python scripts/import_weights.py unet.pth --workdir=runs/imported
python scripts/import_weights.py carla.keras --workdir=runs/imported --config=configs/carla.py --classes="road,car"
"""

import argparse
import logging
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for configs/, and in case unet_jax is not installed

from unet_jax.errors import UserError  # noqa: E402
from unet_jax.parallel.streams import guard  # noqa: E402


def main() -> None:
    """Imports weights; bad input ends with exit code 1 and one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="state dict (.pth, .pt, .safetensors) or whole Keras model (.keras, .h5)")
    parser.add_argument("--workdir", required=True, help="where to write; it must be empty or not exist")
    parser.add_argument(
        "--config",
        help="a file of configs/ for the images, so that --mode=eval finds them; its network settings are replaced by "
        "those of the weights. Default: configs/default.py",
    )
    parser.add_argument("--classes", default="", help="class names, comma-separated, in the order of the outputs")
    parser.add_argument("--multilabel", action="store_true", help="the masks may overlap: one sigmoid per class")
    flags = parser.parse_args()
    try:
        import_weights(flags)
    except UserError as error:
        sys.exit(f"error: {error}")


def import_weights(flags: argparse.Namespace) -> None:
    """Converts the weights, and prints a summary and the commands for the next steps."""
    config = _read_config(flags.config or str(ROOT / "configs" / "default.py"))

    import jax  # here, so that --help answers at once

    from unet_jax import data
    from unet_jax.interop import convert

    for name, level in (("absl", logging.ERROR), ("jax", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    names = [name.strip() for name in flags.classes.split(",")] if flags.classes else []
    task = "multilabel" if flags.multilabel else ""
    can_evaluate = bool(flags.config)
    if config.data.name == "folder":
        can_evaluate &= pathlib.Path(config.data.root).is_dir()
        if can_evaluate:
            data.infer_settings(config.data)  # a work directory records the meaning of the masks
    network, classes = convert.convert(flags.weights, flags.workdir, config, names, task)
    count = sum(array.size for array in jax.tree.leaves(network.variables["params"]))
    differing = {name: value for name, value in network.settings.items() if value != config.model[name]}
    settings = "".join(f' --config.model.{name}="{value}"' for name, value in differing.items())
    print(
        f"{flags.weights} is {network.source}: {count:,} parameters\n"
        f"widths    {', '.join(map(str, network.settings['features']))}\n"
        f"images    {network.channels} channel(s), 0..255, scaled to 0..1 for the network\n"
        f"classes   {len(classes.names)} ({classes.task}): {', '.join(classes.names)}\n"
        f"Written to {flags.workdir}. Next:\n"
        f"predict   python -m unet_jax.main --mode=predict --workdir={flags.workdir} --input=IMAGES --output=FOLDER"
    )
    if can_evaluate:
        print(f"evaluate  python -m unet_jax.main --mode=eval --workdir={flags.workdir}   # on {config.data.name}")
    print(
        f"fine-tune python -m unet_jax.main --config={flags.config or 'configs/NAME.py'} "
        f"--config.init_from={flags.workdir} --workdir=runs/NAME{settings}"
    )


def _read_config(file: str):
    if not pathlib.Path(file).is_file():
        raise UserError(f"--config={file}: no such file")
    try:
        return runpy.run_path(file)["get_config"]()
    except Exception as error:  # a config file is code and can raise anything
        raise UserError(f"--config={file}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    guard()
    main()
