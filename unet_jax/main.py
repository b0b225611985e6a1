"""Command line: flags and dispatch, nothing else.

    python -m unet_jax.main --config=configs/shapes.py                  # train, or go on
    python -m unet_jax.main --config=configs/carla.py --config.train.batch_size=8
    python -m unet_jax.main --mode=eval --workdir=runs/shapes           # score what was trained
"""

import logging
import os
import sys

from absl import app, flags
from ml_collections import config_flags

from unet_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file of configs/. Its fields can be set as --config.FIELD=VALUE."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written. Default: runs/<config name>.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train: train or go on; eval: score a work directory.")
_STEP = flags.DEFINE_integer("step", None, "eval: the checkpoint to score. Default: the best.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "eval: other images to score, laid out as config.data.root.")
_SPLIT = flags.DEFINE_enum(
    "split", "validation", ["train", "validation", "test", "all"], "eval: the part of the images to score."
)


def main(argv: list[str]) -> None:
    """Runs the chosen mode; bad input ends with exit code 1 and one message."""
    try:
        if len(argv) > 1:
            raise UserError(f"what is {argv[1]!r}? Flags begin with --")
        _run()
    except UserError as error:
        sys.exit(f"error: {error}")


def _run() -> None:
    # Imports stay here, so that --help answers at once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if _MODE.value == "train":
        if _CONFIG.value is None:
            raise UserError("say what to train: --config=configs/shapes.py (generated images, needs no data)")
        from unet_jax import train

        name = os.path.splitext(os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"])))[0]
        train.train(_CONFIG.value, _WORKDIR.value or os.path.join("runs", name))
    else:
        if _WORKDIR.value is None:
            raise UserError("say what to score: --workdir=runs/shapes, for example")
        from unet_jax import evaluate

        evaluate.evaluate_workdir(_WORKDIR.value, _STEP.value, _DATA_DIR.value, _SPLIT.value)


if __name__ == "__main__":
    app.run(main)
