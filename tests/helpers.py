"""What several test files share: commands, small data sets on disk, single training steps, and comparisons of runs."""

import contextlib
import dataclasses
import json
import struct
import subprocess
import sys
import zlib

import chex
import jax
import numpy as np
from commands import ROOT
from etils import epath
from PIL import Image

from unet_jax import data
from unet_jax.data import pipeline
from unet_jax.parallel import sharding
from unet_jax.training import components, state
from unet_jax.workdir import checkpoints, files, integrity, metrics_log

TIMES = {"train/images_per_sec", "train/data_wait"}


# Commands.


def run(*command, timeout=120, **settings):
    """Runs a program to its end, with its output as text; `settings` go to `subprocess.run`."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, **settings)


def run_main(*flags, cwd=ROOT, timeout=120, **settings):
    """`python -m unet_jax.main FLAGS`."""
    return run(sys.executable, "-m", "unet_jax.main", *flags, cwd=cwd, timeout=timeout, **settings)


# Images and data sets on disk.


def read_image(path):
    with Image.open(path) as image:
        return np.asarray(image)


def save_image(array, path, **options):
    """Writes an image file, with the folders that it needs, and returns the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def write_rgb_png(path, width, height, depth, rows):
    """An RGB image as Pillow cannot write it.

    Args:
      path: the file.
      width, height: as the header has it.
      depth: bits per channel.
      rows: the bytes of all rows, each after its filter byte.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))


def make_frames(folder, numbers, masks="CameraMask", size=(12, 8), alpha=False):
    """CARLA frames of two colours, with class 1 in the upper half and class 7 in the lower half of the mask."""
    width, height = size
    for number in numbers:
        image = np.full((height, width, 3), (number % 256, 50, 100), np.uint8)
        image[height // 2 :] = 200, 250, 0
        mask = np.zeros((height, width, 4 if alpha else 3), np.uint8)
        mask[..., 0] = np.where(np.arange(height) < height // 2, 1, 7)[:, None]
        mask[..., 3:] = 255
        save_image(image, folder / "CameraRGB" / f"{number:06d}.png")
        save_image(mask, folder / masks / f"{number:06d}.png")


def make_pets(root, names):
    """An unpacked Oxford folder: trimaps with the pet (1), a border (3) around it, and background (2)."""
    trimap = np.full((20, 16), 2, np.uint8)
    trimap[4:16, 4:12] = 3
    trimap[6:14, 6:10] = 1
    colors = np.array([[0, 0, 0], [200, 100, 50], [40, 60, 90], [120, 80, 70]], np.uint8)
    for name in names:
        save_image(colors[trimap], root / "images" / f"{name}.jpg")
        save_image(trimap, root / "annotations" / "trimaps" / f"{name}.png")
    (root / "annotations" / "trainval.txt").write_text("".join(f"{name} 6 1 2\n" for name in names[:-2]))
    (root / "annotations" / "test.txt").write_text("".join(f"{name} 6 1 2\n" for name in names[-2:]))


# Training without the loop.


def one_device():
    return sharding.create_mesh(1, 1, jax.devices()[:1])


def two_devices():
    return sharding.create_mesh(2, 1, jax.devices()[:2])


def build(config, mesh):
    """The components of a configuration on a mesh, and a fresh state."""
    source = data.load(config.data, "train")
    steps = components.count_steps(config.train, len(source) / config.train.batch_size)
    built = components.build(config, source.classes, mesh, steps)
    model = built.network.model
    shape = (1, *model.smallest_input, source.classes.channels)
    ema, shards, statistics = config.optimizer.ema > 0, config.mesh.shard_optimizer, config.optimizer.ema_statistics
    return built, state.create(config.seed, model, shape, built.optimizer, ema, mesh, shards, statistics)


def each_step(config, mesh, steps, conv_impl="plain"):
    """Trains without the loop; yields the initial state without metrics, then state and metrics of each step."""
    built, train_state = build(config, mesh)
    model = built.network.model.clone(conv_impl=conv_impl)
    built = built._replace(network=dataclasses.replace(built.network, model=model))
    images = pipeline.Pipeline(data.load(config.data, "train"), config.data.size, config.data.resize, cache_gib=1.0)
    train_step = components.make_train_step(config, built, jax.tree.map(lambda array: array.sharding, train_state))
    size, no_signals = config.train.batch_size, sharding.per_device(mesh, 0)
    batches = images.train_batches(size, config.seed, 0, np.arange(size))
    yield jax.device_get(train_state), {}
    for _ in range(steps):
        train_state, metrics = train_step(train_state, sharding.put_batch(mesh, next(batches)), no_signals)
        yield jax.device_get(train_state), {name: float(value) for name, value in metrics.items()}


def run_steps(config, mesh, steps=5, conv_impl="plain"):
    """Trains without the loop; returns the final state and the metrics of each step."""
    states, history = zip(*each_step(config, mesh, steps, conv_impl), strict=True)
    return states[-1], history[1:]


# Work directories.


@contextlib.contextmanager
def edited_json(path):
    """The content of a JSON file, written back with what the body changes."""
    values = json.loads(path.read_text())
    yield values
    path.write_text(json.dumps(values))


def save_untrained(path, config, change=lambda params: params):
    """Makes a work directory whose only checkpoint, of step 1, holds initial weights, changed; returns the path."""
    path = epath.Path(path)
    built, untrained = build(config, sharding.create_mesh(0, 1))
    untrained = untrained.replace(params=change(untrained.params))
    path.mkdir(parents=True, exist_ok=True)
    files.claim(path, config, built.network.classes.to_json())
    writer = checkpoints.CheckpointWriter(path)
    examples = {"train": data.load(config.data, "train").ids_digest()}
    writer.save(1, untrained, {"examples": examples}, None)
    writer.close()
    return path


def metric_rows(path):
    """The lines of `metrics.jsonl`, without times."""
    return [{name: x for name, x in row.items() if name not in TIMES} for row in metrics_log.read(path)]


def final_state(path):
    """The latest state of a run, and what was saved beside it."""
    _, blank = build(files.read_config(path), sharding.create_mesh(0, 1))
    writer = checkpoints.CheckpointWriter(path)
    final, meta = writer.restore(integrity.steps(path)[-1], blank)
    writer.close()
    return jax.device_get(final), meta


def assert_same_run(path, reference):
    """Weights, optimizer, EMA weights, statistics, what the log resumes from, and all metrics, bit for bit."""
    (found, meta), (expected, expected_meta) = final_state(path), final_state(reference)
    chex.assert_trees_all_equal(found, expected)
    for record in (meta, expected_meta):
        record.pop("config", None)  # it may have been saved at other steps
    assert meta == expected_meta and metric_rows(path) == metric_rows(reference)


def flip_bit(file):
    """Flips a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
