"""The works of `benchmark.py` by unet_jax: its own training step, prediction and pipeline of images."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark_workers import Contender, Task, Work, draw_batch

from unet_jax import data
from unet_jax.inference import forward
from unet_jax.models import unet
from unet_jax.parallel import sharding
from unet_jax.training import optimizer, program, state, step

FULL_QUEUE = 3  # batches that the pipeline may have ready before they are asked for


class _Settings(dict):
    """Fields as attributes: configs/ needs a library that images of accelerators lack."""

    __getattr__ = dict.__getitem__


# What the training step reads of a configuration: no augmentation, softmax cross-entropy, Adam.
_OFF = ("flip_horizontal", "flip_vertical", "rotate", "scale", "shift", "elastic", "brightness", "contrast", "gamma")
CONFIG = _Settings(
    seed=0,
    augment={**dict.fromkeys(_OFF, 0), "elastic_grid": 3, "interpolation": "bilinear", "crop": ()},
    loss=_Settings(cross_entropy=1.0, dice=0.0, class_weights=()),
    optimizer=_Settings(name="adam", momentum=0.0, weight_decay=0.0, clip_norm=0.0, frozen=(), ema=0.0),
    train=_Settings(accumulate=1, nonfinite="stop"),
)


class Training(NamedTuple):
    """The training step of a work, and what it begins with; `plain` is the same for `program.flops` alone."""

    devices: jax.sharding.Mesh
    state: state.TrainState
    batch: dict[str, jax.Array]
    signals: jax.Array
    step: Callable
    plain: Callable


def make_model(work: Work, dtype: str, devices: jax.sharding.Mesh, plain: bool = False) -> unet.UNet:
    """The network of a work.

    Args:
      work: see there.
      dtype: of the computation.
      devices: the mesh.
      plain: in the form for any device, as operations are counted: another may multiply more numbers to the same end.
    """
    settings = {"padding": "same", "upsample": "transposed_2x2", "dropout": 0.0, **work.model}
    settings |= {"norm": "none", "kernel_init": "he", "dtype": dtype}
    model = unet.create(work.classes, **settings, one_cpu=sharding.is_one_cpu(devices) and not plain)
    left, right, above, below = work.around
    assert model.margins(work.size) == ((above, below), (left, right)), model.margins(work.size)
    return model


def make_training(work: Work, dtype: str, devices: jax.sharding.Mesh) -> Training:
    """The training step as a training makes it, on a batch that is already on the devices."""
    classes = data.Classes("multiclass", *[(str(i),) * work.classes for i in "ab"], channels=work.channels)
    tx = optimizer.make_optimizer(CONFIG.optimizer, optax.constant_schedule(1e-3))
    models = [make_model(work, dtype, devices, plain) for plain in (False, True)]
    train_state = state.create(0, models[0], (1, *models[0].smallest_input, work.channels), tx, False, devices)
    layout = jax.tree.map(lambda array: array.sharding, train_state)
    steps = [step.make_train_step(model, tx, CONFIG, classes, devices, layout) for model in models]
    batch = sharding.put_batch(devices, {**draw_batch(work), "mask": np.ones(work.batch, bool)})
    return Training(devices, train_state, batch, sharding.per_device(devices, 0), *steps)


def make_train_steps(training: Training, compiled: Callable) -> Callable[[int], float]:
    """A function that takes n steps, from where it stopped, and returns the last loss.

    As in a training, the metrics of a step are fetched when the next one is under way.
    """
    held = training.state

    def steps(count):
        nonlocal held
        pending = None
        for _ in range(count):
            held, metrics = compiled(held, training.batch, training.signals)
            jax.device_get(pending)
            pending = metrics
        jax.block_until_ready(held)
        return float(metrics["loss"])

    return steps


def start(task: Task) -> dict[str, Any]:
    """What there is."""
    import flax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
    }


def build(task: Task) -> Contender:
    """Makes the work of a task."""
    devices = sharding.create_mesh(0, 1, jax.devices()[: task.devices])
    make = {"step": _step, "predict": _predict, "matmul": _matmul, "input": _input}[task.suite]
    run, facts = make(task, devices)
    memory = devices.devices.flat[0].memory_stats
    told = memory() is not None
    return Contender(run, facts, (lambda: memory()["peak_bytes_in_use"]) if told else None)


def _compile(function: Callable, plain: Callable, *args) -> tuple[Callable, dict[str, Any]]:
    """The compiled function, how long that took, and how much it computes."""
    started = time.perf_counter()
    compiled = function.lower(*args).compile()
    facts = {"compile_s": time.perf_counter() - started, "gflop": program.flops(plain, *args) / 1e9}
    counted = (compiled.cost_analysis() or {}).get("flops", 0)
    return compiled, facts | {"xla_gflop": counted / 1e9 if counted > 0 else None}


def _count(params) -> int:
    return sum(array.size for array in jax.tree.leaves(params))


def _step(task, devices):
    training = make_training(task.work, task.dtype, devices)
    compiled, facts = _compile(training.step, training.plain, training.state, training.batch, training.signals)
    facts["parameters"] = _count(training.state.params)
    return make_train_steps(training, compiled), facts


def _predict(task, devices):
    work = task.work

    def make(model):
        def probability(variables, image):
            window = sharding.split_height(devices, forward.pad_image(model, image))
            logits = forward.logits(model, variables, window, work.size, "multiclass")
            return forward.to_probability(logits, "multiclass")

        options = sharding.compiler_options(devices)
        return jax.jit(probability, out_shardings=sharding.by_example(devices), compiler_options=options)

    model = make_model(work, task.dtype, devices)
    init = jax.jit(model.init, out_shardings=sharding.replicated(devices))
    variables = init(jax.random.key(0), jnp.zeros((1, *model.smallest_input, work.channels)))
    image = sharding.put_batch(devices, draw_batch(work))["image"]
    plain = make(make_model(work, task.dtype, devices, plain=True))
    compiled, facts = _compile(make(model), plain, variables, image)

    def predictions(count):
        pending = None
        for _ in range(count):
            found = compiled(variables, image)
            jax.block_until_ready(pending)
            pending = found
        found.block_until_ready()

    return predictions, facts | {"parameters": _count(variables)}


def _matmul(task, devices):
    n = task.work.size[0]
    a, b = (jax.random.normal(jax.random.key(i), (n, n), task.dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)

    def products(count):
        for _ in range(count):
            found = product(a, b)
        found.block_until_ready()

    return products, {"gflop": 2 * n**3 / 1e9}


def _input(task, devices):
    """The images of a folder alone, and a loop as `train.train` has it, which says how long it waited for them."""
    part, _, where = task.contender.partition(" from ")
    batches = _read_batches(task, devices, where)
    if part == "pipeline":

        def read(count):
            _drain(batches)
            started = time.perf_counter()
            for _ in range(count):
                next(batches)
            return {"seconds": time.perf_counter() - started}

        return read, {}

    training = make_training(task.work, task.dtype, devices)
    batch = sharding.put_batch(devices, next(batches))
    compiled, facts = _compile(training.step, training.plain, training.state, batch, training.signals)
    held = training.state

    def train(count):
        nonlocal held
        _drain(batches)
        batch, pending, waited = sharding.put_batch(devices, next(batches)), None, 0.0
        started = time.perf_counter()
        for _ in range(count):
            held, metrics = compiled(held, batch, sharding.per_device(devices, 0))
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
            waiting = time.perf_counter()
            rows = next(batches)
            waited += time.perf_counter() - waiting
            batch = sharding.put_batch(devices, rows)
        jax.block_until_ready((held, pending))
        return {"seconds": time.perf_counter() - started, "waited_s": waited}

    return train, facts


def _read_batches(task: Task, devices: jax.sharding.Mesh, where: str) -> Iterator[dict[str, np.ndarray]]:
    """Training batches of `task.folder`, from the cache of decoded images or read anew from its files."""
    from configs import folder
    from unet_jax.data import pipeline

    config, work = folder.get_config().data, task.work
    config.root, config.size, config.channels = task.folder, work.size, work.channels
    config.labels = tuple(f"{i} class_{i}" for i in range(work.classes))
    config.cache_gib = 4.0 if where == "cache" else 0.0
    data.infer_settings(config, lambda text: None)
    images = pipeline.Pipeline(data.load(config, "train"), config.size, config.resize, config.cache_gib)
    if images.cached != (where == "cache"):
        raise RuntimeError("the images cannot be cached")
    return images.train_batches(work.batch, 0, 0, sharding.process_rows(devices, work.batch))


def _drain(batches: Iterator) -> None:
    """Takes what was made ready while others were measured."""
    for _ in range(FULL_QUEUE):
        next(batches)
