"""Trains U-Nets for semantic segmentation, and scores them.

python -m unet_jax.main --config=configs/shapes.py                  # train, or go on
python -m unet_jax.main --config=configs/carla.py --config.train.batch_size=8
python -m unet_jax.main --mode=eval --workdir=runs/shapes           # score what was trained
python -m unet_jax.main --mode=report --workdir=runs/shapes         # write its report.html again
"""

import logging
import os
import pathlib
import runpy
import sys

from absl import app, flags
from ml_collections import config_flags

from unet_jax.errors import UserError, did_you_mean

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file of configs/. Its fields can be set as --config.FIELD=VALUE."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written. Default: runs/<config name>.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "report"],
    "train: train or go on; eval: score a work directory; report: write its report.html.",
)
_STEP = flags.DEFINE_integer("step", None, "eval, report: the checkpoint to score. Default: the best.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "eval: other images to score, laid out as config.data.root.")
_TTA = flags.DEFINE_string(
    "tta", None, "eval: none, flips, dihedral or rotations averaged. Default: as config.eval.tta."
)
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
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it only feeds data, and would say so at each start
    for name, level in (("absl", logging.ERROR), ("jax", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    uses = ((_CONFIG, "train"), (_STEP, "eval or report"), (_DATA_DIR, "eval"), (_SPLIT, "eval"), (_TTA, "eval"))
    for flag, modes in uses:
        if flag.present and _MODE.value not in modes.split(" or "):
            raise UserError(f"--{flag.name} is for --mode={modes}, not for --mode={_MODE.value}")
    if _MODE.value == "train":
        if not _CONFIG.present:
            raise UserError("say what to train: --config=configs/shapes.py (generated images, needs no data)")
        from unet_jax import train

        name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        train.train(_CONFIG.value, _WORKDIR.value or f"runs/{name}")
    elif _MODE.value == "report":
        if _WORKDIR.value is None:
            raise UserError("say what to report on: --workdir=runs/shapes, for example")
        from unet_jax import log, report

        log.say(f"Open {report.write(_WORKDIR.value, _STEP.value)} in a browser.")
    else:
        if _WORKDIR.value is None:
            raise UserError("say what to score: --workdir=runs/shapes, for example")
        from unet_jax import evaluate

        evaluate.evaluate_workdir(_WORKDIR.value, _STEP.value, _DATA_DIR.value, _SPLIT.value, _TTA.value)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a bad config file or a mistyped field gets a message instead of a traceback."""
    given = dict(arg.lstrip("-").partition("=")[::2] for arg in argv[1:] if arg.startswith("-"))
    if given.get("config") == "" and "--config" in argv[:-1]:  # as two words
        given["config"] = argv[argv.index("--config") + 1]
    file = given.get("config")
    if file is None:
        return app.parse_flags_with_usage(argv)
    if not os.path.isfile(file):
        sys.exit(f"error: --config={file}: no such file.{did_you_mean(file, _neighbours(file))}")
    sys.path.append(str(pathlib.Path(file).resolve().parent.parent))  # where it finds configs.default
    try:
        fields = _fields(runpy.run_path(file)["get_config"]())
    except Exception as error:
        sys.exit(f"error: --config={file}: {type(error).__name__}: {error}")
    for name in given:
        field = name.removeprefix("config.")
        if field != name and field not in fields:
            sys.exit(f"error: --{name}: there is no such field, see configs/default.py.{did_you_mean(field, fields)}")
    return app.parse_flags_with_usage(argv)


def _neighbours(file: str) -> list[str]:
    return [str(path) for path in pathlib.Path(file).parent.glob("*.py")]


def _fields(config) -> list[str]:
    """The names of all fields, as in `train` and `train.batch_size`."""
    names = []
    for name, value in config.items():
        names += [name] + ([f"{name}.{inner}" for inner in _fields(value)] if hasattr(value, "items") else [])
    return names


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
