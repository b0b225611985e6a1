"""Trains U-Nets for semantic segmentation, scores them, and predicts files.

python -m unet_jax.main --config=configs/shapes.py                  # train, or resume
python -m unet_jax.main --config=configs/folder.py --config.data.root=DIR --mode=check   # look for faults in the images
python -m unet_jax.main --config=configs/carla.py --mode=plan       # memory, FLOPs and traffic of a step, without data
python -m unet_jax.main --mode=eval --workdir=runs/shapes           # score a trained network
python -m unet_jax.main --mode=report --workdir=runs/shapes         # write report.html again
python -m unet_jax.main --mode=predict --workdir=runs/folder --input=photos --output=masks
"""

import logging
import os
import pathlib
import runpy
import sys

from absl import app, flags
from ml_collections import config_flags

from unet_jax import user_cache
from unet_jax.errors import Interrupted, UserError, describe, did_you_mean
from unet_jax.parallel import distributed, processes, signals, streams

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a file of configs/. Its fields can be set as --config.FIELD=VALUE."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of a training and all its output. Default for train and check: runs/<config name>."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "check", "plan", "eval", "report", "predict"],
    "check: look for faults in all images and labels; plan: what a training step needs on these devices; train: train, "
    "or resume; eval: score a work directory; report: write its report.html; predict: label image files with it.",
)
_JSON = flags.DEFINE_bool(
    "json", False, "check: print one JSON object on standard output, and all else on standard error."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "train, eval: HOST:PORT of process 0, where several processes work together and cannot find each other by "
    "themselves (as they do on TPU pods, Slurm, Open MPI and Kubernetes).",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "train, eval: the number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "train, eval: the number of this process, from 0.")
_MEMORY_GIB = flags.DEFINE_float(
    "memory_gib", None, "plan: GiB of a device, to find the largest batch that fits. Default: as the device reports."
)
_STEP = flags.DEFINE_integer("step", None, "eval, report, predict: the checkpoint. Default: the best.")
_TTA = flags.DEFINE_string(
    "tta",
    None,
    "eval, predict: average the predictions of several views of an image: auto (flips and turns as training drew "
    "them), none, horizontal, vertical, flips, turns, dihedral or rotations. Default: config.eval.tta.",
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "eval, report: other images to score, laid out as config.data.root.")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "validation", "test", "all"],
    "eval, report: the part of the images to score. Default: validation, or all images of --data_dir.",
)
_INPUT = flags.DEFINE_string("input", None, "predict: an image file, a folder of them, or a quoted pattern.")
_OUTPUT = flags.DEFINE_string("output", None, "predict: the folder to write to.")
flags.DEFINE_enum(
    "scale",
    "train",
    ["train", "fit", "native"],
    "predict: train resizes each image as training resized its images, larger ones no further, or none if training saw "
    "windows; fit to config.data.size whatever its size; native not at all. What is then not of the size of the "
    "training is predicted in overlapping tiles.",
)
flags.DEFINE_enum(
    "interpolation", "bilinear", ["bilinear", "nearest"], "predict: of probabilities back to the image's own size."
)
flags.DEFINE_enum(
    "probabilities",
    "none",
    ["none", "png", "npy"],
    "predict: also 16-bit PNG files, or float32 [H, W, K] NumPy files; of a GeoTIFF, either way 16-bit GeoTIFF files.",
)
flags.DEFINE_enum(
    "vector",
    "none",
    ["none", "gpkg", "geojson"],
    "predict: of GeoTIFF files also a polygon for each region of a class, with its area, as GeoPackage or GeoJSON.",
)
flags.DEFINE_float("threshold", 0.5, "predict: the probability above which a sigmoid predicts its class.")
_PREDICT_OPTIONS = ("scale", "interpolation", "probabilities", "threshold", "vector")
_FLAG_MODES = {  # flag -> the modes that it is for
    "config": ("train", "check", "plan"),
    "json": ("check",),
    **dict.fromkeys(("coordinator", "num_processes", "process_id"), ("train", "eval")),
    "memory_gib": ("plan",),
    "step": ("eval", "report", "predict"),
    "tta": ("eval", "predict"),
    "data_dir": ("eval", "report"),
    "split": ("eval", "report"),
    **dict.fromkeys(("input", "output", *_PREDICT_OPTIONS), ("predict",)),
}


def main(argv: list[str]) -> None:
    """Runs the chosen mode; bad input ends with exit code 1, a signal with 128 + its number, and one message."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it only feeds data, and would print a line at each start
    # Orbax also raises what it logs as an error with a traceback; pyogrio counts the records that it writes.
    for name, level in (("absl", logging.CRITICAL), ("jax", logging.WARNING), ("pyogrio", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    signals.end_at_once()
    try:
        _check_flags(argv)
        _set_compile_cache()
        if _MODE.value in _FLAG_MODES["coordinator"]:
            with distributed.initialized(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
                _run()
        else:
            _run()
    except (Exception, Interrupted) as error:
        signals.ignore()
        text, code = describe(error)
        print(text, file=sys.stderr)
        sys.exit(code)


def _check_flags(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: flags start with --")
    mode = _MODE.value
    for flag, modes in _FLAG_MODES.items():
        if flags.FLAGS[flag].present and mode not in modes:
            raise UserError(f"--{flag} is for --mode={' and --mode='.join(modes)}, not for --mode={mode}")
    if mode in _FLAG_MODES["config"] and not _CONFIG.present:
        raise UserError("--config is required, e.g. --config=configs/shapes.py (generated images, needs no data)")
    if mode not in _FLAG_MODES["config"] and _WORKDIR.value is None:
        raise UserError("--workdir is required, e.g. --workdir=runs/shapes")
    if mode == "predict" and (_INPUT.value is None or _OUTPUT.value is None):
        raise UserError("--input and --output are required, e.g. --input=photos --output=masks")


def _set_compile_cache() -> None:
    """Keeps what JAX compiles in the user's cache folder; JAX reads these variables when it is imported."""
    try:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache.folder("compiled")))
    except OSError:
        return  # every start compiles everything
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))  # bytes, least recently used out


def _run() -> None:
    # Imports stay here, so that --help answers at once.
    mode, workdir = _MODE.value, _WORKDIR.value
    if mode in _FLAG_MODES["config"]:
        _CONFIG.value.data.root = os.path.expanduser(_CONFIG.value.data.root)
        if _CONFIG.value.auto or _CONFIG.value.augment.strength:  # a flag counts, even if it is the default
            _CONFIG.value.keep = (*_CONFIG.value.keep, *config_flags.get_override_values(flags.FLAGS["config"]))
        name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        workdir = workdir or f"runs/{name}"
    if mode == "train":
        from unet_jax.training import loop

        processes.check_same({"workdir": workdir, "config": _CONFIG.value.to_dict()})
        loop.train(_CONFIG.value, workdir)
    elif mode == "check":
        from unet_jax.evaluation import check

        if not check.check(_CONFIG.value, f"{workdir.rstrip('/')}.check.png", _JSON.value):
            sys.exit(1)
    elif mode == "plan":
        from unet_jax.training import plan

        plan.plan(_CONFIG.value, _MEMORY_GIB.value)
    elif mode == "eval":
        from unet_jax.evaluation import evaluate

        settings = (workdir, _STEP.value, _DATA_DIR.value, _SPLIT.value, _TTA.value)
        processes.check_same({"eval": settings})
        evaluate.evaluate_workdir(*settings)
    elif mode == "report":
        from unet_jax.evaluation import report

        written = report.write(workdir, _STEP.value, _DATA_DIR.value, _SPLIT.value)
        processes.print_on_main(f"Open {written} in a browser.")
    else:
        from unet_jax.inference import predict

        options = {name: flags.FLAGS[name].value for name in _PREDICT_OPTIONS}
        predict.predict_files(workdir, _INPUT.value, _OUTPUT.value, step=_STEP.value, tta=_TTA.value, **options)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a bad config file or a mistyped field gets a message instead of a traceback."""
    argv = _plain(argv)
    given = dict(arg.lstrip("-").partition("=")[::2] for arg in argv[1:] if arg.startswith("-"))
    if given.get("config") == "" and "--config" in argv[:-1]:  # as two words
        given["config"] = argv[argv.index("--config") + 1]
    file = given.get("config")
    if file is None:
        return app.parse_flags_with_usage(argv)
    if not os.path.isfile(file):
        others = map(str, pathlib.Path(file).parent.glob("*.py"))
        sys.exit(f"error: --config={file}: no such file.{did_you_mean(file, others)}")
    sys.path.append(str(pathlib.Path(file).resolve().parent.parent))  # where it finds configs.default
    try:
        fields = _fields(runpy.run_path(file)["get_config"]())
    except Exception as error:
        sys.exit(f"error: --config={file}: {type(error).__name__}: {error}")
    for name in given:
        field = name.removeprefix("config.")
        if field != name and field not in fields:
            sys.exit(f"error: --{name}: no such field, see configs/default.py.{did_you_mean(field, fields)}")
    return app.parse_flags_with_usage(argv)


def _plain(argv: list[str]) -> list[str]:
    """The arguments with `~` expanded, which shells leave after `=`, and of a field that is set twice the last value.

    `config_flags` would join the values of a field that is a tuple.
    """
    parts = [arg.partition("=") for arg in argv]
    names = [name for name, _, _ in parts]
    is_again = lambda i: names[i].startswith("--config.") and parts[i][1] and names[i] in names[i + 1 :]
    return [
        f"{name}{mark}{os.path.expanduser(value)}" for i, (name, mark, value) in enumerate(parts) if not is_again(i)
    ]


def _fields(config) -> list[str]:
    """The names of all fields, as in `train` and `loop.batch_size`."""
    names = []
    for name, value in config.items():
        names += [name] + ([f"{name}.{inner}" for inner in _fields(value)] if hasattr(value, "items") else [])
    return names


def _use_huge_pages() -> None:
    """Restarts the program with huge pages of memory, which glibc only looks for when a program starts.

    On a CPU each step allocates its memory again; in pages of 4 KiB that is about a tenth of its time.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    streams.guard()
    _use_huge_pages()
    app.run(main, flags_parser=_parse_flags)
