"""The works by unet_jax: its own training step, prediction and image pipeline."""

import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Task, Work, draw_batch

from unet_jax import data, losses
from unet_jax.inference import forward
from unet_jax.models import encoder_unet, unet
from unet_jax.parallel import sharding
from unet_jax.training import augment, program, state, step

NO_AUGMENTATION = {
    **dict.fromkeys((*augment.LIMITS, "elastic", "flip_horizontal", "flip_vertical", "turns"), 0),
    "crop": (),
}
Run = Callable[[int], dict[str, float] | None]  # takes n steps and waits for their end
Prepared = tuple[Run, dict[str, Any]]  # with what is known of it besides times


def make_networks(work: Work, dtype: str, mesh: jax.sharding.Mesh) -> list[forward.Network]:
    """The network of a work as it runs on a mesh, and in the plain form, by which operations are counted."""
    classes = data.Classes("multiclass", *[(str(i),) * work.classes for i in "ab"], channels=work.channels)
    networks = []
    for conv_impl in ("cpu" if sharding.is_one_cpu(mesh) else "plain", "plain"):
        make = encoder_unet.EncoderUNet if "encoder_name" in work.model else unet.UNet
        model = make(work.classes, conv_impl=conv_impl, dtype=dtype, **work.model)
        assert np.all(np.array(model.margins(work.size)) == work.margin), model.margins(work.size)
        networks.append(forward.Network(model, classes, mesh))
    return networks


def make_train_steps(work: Work, dtype: str, mesh: jax.sharding.Mesh, batches: Iterator | None = None) -> Prepared:
    """A function that takes n steps of softmax cross-entropy and Adam without augmentation.

    As in a training, the metrics of a step are fetched while the next one runs. The function continues where it
    stopped, and returns the last `loss` and the seconds `waited_s` for images. Without `batches` (as the image pipeline
    yields them), it repeats the batch of the work.
    """
    networks = make_networks(work, dtype, mesh)
    optimizer = optax.adam(optax.constant_schedule(1e-3))
    loss = losses.Loss("multiclass", weights={"cross_entropy": 1.0}, parameters={"cross_entropy": {}})
    shape = (1, *networks[0].model.smallest_input, work.channels)
    current = state.create(0, networks[0].model, shape, optimizer, False, mesh)
    others = {"augmentation": NO_AUGMENTATION, "seed": 0, "shardings": state.shardings(current, mesh, False)}
    steps = (step.make_train_step(network, optimizer, loss, **others) for network in networks)
    batch = sharding.put_batch(mesh, {**draw_batch(work), "mask": np.ones(work.batch, bool)})
    batches, signals = batches or itertools.repeat(batch), sharding.per_device(mesh, 0)
    compiled, facts = _compile(current.params, *steps, current, batch, signals)

    def run(count):
        nonlocal current, batch
        pending, waited = None, 0.0
        for _ in range(count):
            current, metrics = compiled(current, batch, signals)
            jax.device_get(pending)
            pending = metrics
            started = time.perf_counter()
            rows = next(batches)
            waited += time.perf_counter() - started
            batch = sharding.put_batch(mesh, rows)
        jax.block_until_ready(current)
        return {"loss": float(metrics["loss"]), "waited_s": waited}

    return run, facts


def build(task: Task) -> Prepared:
    """A function that takes n steps of a task."""
    mesh = sharding.create_mesh(0, 1, jax.devices()[: task.devices])
    if task.suite == "step":
        return make_train_steps(task.work, task.dtype, mesh)
    if task.suite == "matmul":
        a, b = (jax.random.normal(jax.random.key(i), task.work.size, task.dtype) for i in (0, 1))
        return _repeat(jax.jit(jnp.matmul), a, b), {"gflop": 2 * task.work.size[0] ** 3 / 1e9}
    return (_predict if task.suite == "predict" else _input)(task, mesh)


def device_memory() -> int | None:
    """Peak bytes on the first device; None for a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _compile(params, function: Callable, plain: Callable, *args) -> tuple[Callable, dict[str, Any]]:
    """The compiled function; how long that took, how much it computes, and the number of parameters."""
    started = time.perf_counter()
    compiled = function.lower(*args).compile()
    facts = {"compile_s": time.perf_counter() - started, "gflop": program.flops(plain, *args) / 1e9}
    return compiled, facts | {"parameters": sum(array.size for array in jax.tree.leaves(params))}


def _repeat(function: Callable, *args) -> Run:
    """A function that calls n times, two calls at once at most: results take memory."""

    def run(count):
        pending = None
        for _ in range(count):
            result = function(*args)
            jax.block_until_ready(pending)
            pending = result
        jax.block_until_ready(pending)

    return run


def _predict(task: Task, mesh: jax.sharding.Mesh) -> Prepared:
    networks = make_networks(task.work, task.dtype, mesh)
    image = sharding.put_batch(mesh, draw_batch(task.work))["image"]
    shape = (1, *networks[0].model.smallest_input, task.work.channels)
    variables = sharding.jit_replicated(mesh, networks[0].model.init)(jax.random.key(0), jnp.zeros(shape))
    options = {"out_shardings": sharding.by_example(mesh), "compiler_options": sharding.compiler_options(mesh)}
    functions = (jax.jit(network.probability, **options) for network in networks)
    compiled, facts = _compile(variables["params"], *functions, variables, image)
    return _repeat(compiled, variables, image), facts


def _input(task: Task, mesh: jax.sharding.Mesh) -> Prepared:
    """Noisy images by the pipeline, alone or for training steps, from the cache or decoded from PNG files each time."""
    # These need libraries that the other suites do without.
    from configs import folder
    from unet_jax.data import pipeline

    (part, place), work = task.contender.split(" from "), task.work
    settings = folder.get_config().data
    settings.root, settings.size, settings.channels = str(_write_images(task)), work.size, work.channels
    settings.labels = tuple(f"{i} class_{i}" for i in range(work.classes))
    settings.cache_gib = 4.0 if place == "cache" else 0.0
    data.infer_settings(settings, lambda text: None)
    images = pipeline.Pipeline(data.load(settings, "train"), settings.size, settings.resize, settings.cache_gib)
    if images.cached != (place == "cache"):
        raise RuntimeError("the images cannot be cached")
    batches = images.train_batches(work.batch, 0, 0, sharding.process_rows(mesh, work.batch))
    if part == "training":
        return make_train_steps(work, task.dtype, mesh, batches)

    def run(count):
        for _ in range(count):
            next(batches)

    return run, {}


def _write_images(task: Task) -> pathlib.Path:
    """A folder of PNG files 2.5 times as high and wide as what the network sees: soft colours with a little noise."""
    from PIL import Image

    work, folder = task.work, task.settings.folder / f"images-{task.work.name}"
    if folder.exists():
        return folder
    rng, size = np.random.default_rng(0), [n * 5 // 2 for n in work.size]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(max(64, 2 * work.batch)):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
        noisy = (np.asarray(coarse, np.int16) + rng.integers(-4, 5, (*size, 3))).clip(0, 255)
        image = Image.fromarray(noisy.astype(np.uint8))
        image.convert("RGB" if work.channels == 3 else "L").save(folder / "images" / f"{i}.png")
        regions = rng.integers(0, work.classes, (6, 8), np.uint8)
        Image.fromarray(regions).resize(size[::-1], Image.Resampling.NEAREST).save(folder / "masks" / f"{i}.png")
    return folder
