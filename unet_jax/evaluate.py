"""Evaluation: a whole split, every pixel once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import linen as nn

from unet_jax import checkpoint, data, losses, mesh, metrics, state, workdir
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.models import unet


class Evaluation(NamedTuple):
    """What a split scored: the loss, `metrics.scores`, and the confusion counts behind them."""

    loss: float
    scores: dict[str, Any]
    confusion: np.ndarray


def make_eval_step(model: nn.Module, classes: data.Classes, class_weights, devices: jax.sharding.Mesh) -> Callable:
    """A jitted function of variables and a batch: confusion counts, and every loss term of each example."""

    def eval_step(variables, batch):
        image = as_float(batch["image"])
        image = jax.lax.with_sharding_constraint(image, mesh.by_example_and_height(devices))
        logits = model.apply(variables, image)
        label = unet.center_crop(batch["label"], logits.shape[1:3])
        mask = (label != classes.ignore_label) & batch["mask"].reshape(-1, *[1] * (label.ndim - 1))
        prediction = metrics.predict_label(logits, classes.task)
        counts = metrics.confusion(prediction, label, mask, classes.task, len(classes.names))
        return counts, losses.terms(logits, label, mask, classes.task, class_weights)

    return jax.jit(eval_step, out_shardings=mesh.replicated(devices))


def make_predict_step(model: nn.Module, classes: data.Classes) -> Callable:
    """A jitted function of variables and uint8 images `[B, H, W, C]`: the predicted labels."""

    def predict_step(variables, image):
        return metrics.predict_label(model.apply(variables, as_float(image)), classes.task)

    return jax.jit(predict_step)


def as_float(image: jax.Array) -> jax.Array:
    """uint8 images as float32 in 0..1, the range the network is trained on."""
    return image.astype(jnp.float32) / 255


def evaluate(
    eval_step: Callable,
    variables: Mapping,
    batches: Iterable[pipeline.Batch],
    devices: jax.sharding.Mesh,
    loss_weights: Mapping[str, float],
    names: tuple[str, ...],
) -> Evaluation:
    """Scores `variables` on all `batches`.

    Counts are added as integers. Losses are added per example in float64, so that the batch size does not show.
    """
    confusion, collected = 0, []
    for batch in batches:
        counts, terms = jax.device_get(eval_step(variables, mesh.put_batch(devices, batch)))
        confusion = confusion + counts.astype(np.int64)
        collected.append(terms)
    terms = jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64), *collected)
    return Evaluation(float(losses.combine(terms, loss_weights)), metrics.scores(confusion, names), confusion)


class Trained(NamedTuple):
    """What a work directory holds: `load` returns it."""

    config: Any
    classes: data.Classes
    model: nn.Module
    variables: dict[str, Any]
    step: int


def load(path: epath.PathLike, devices: jax.sharding.Mesh, step: int | None = None) -> Trained:
    """Loads a trained network from its work directory alone.

    Args:
      path: the work directory.
      devices: where to put the weights, whole on each.
      step: which checkpoint; None is the best.

    Raises:
      UserError: no work directory, or no such checkpoint.
    """
    path = epath.Path(path)
    config = workdir.read_config(path)
    classes = data.Classes.from_json(workdir.read_classes(path))
    model = unet.create(classes.num_outputs, **config.model)
    blank = state.create(
        seed=config.seed,
        model=model,
        image_shape=(1, *config.data.size, classes.channels),
        optimizer=optax.identity(),  # nothing is trained
        ema=config.optimizer.ema > 0,
        sharding=mesh.replicated(devices),
    )
    if not (path / "checkpoints").exists():
        raise UserError(f"--workdir={path} has no checkpoints: the training was stopped before the first one")
    checkpoints = checkpoint.Checkpoints(path)
    try:
        step = checkpoints.best_step() if step is None else step
        if step is None:
            raise UserError(f"--workdir={path} has no checkpoint: the training was stopped before the first one")
        restored = checkpoints.restore_variables(step, blank)
    finally:
        checkpoints.close()
    return Trained(config, classes, model, restored.eval_variables, step)


def evaluate_workdir(path: epath.PathLike, step: int | None, data_dir: str | None, split: str) -> Evaluation:
    """Scores a work directory, prints a table and writes `eval.json`.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      data_dir: other images than those it was trained on, for the same data set; None keeps `config.data.root`.
      split: `train`, `validation`, `test` or `all`.

    Raises:
      UserError: no work directory, checkpoint or images.
    """
    path = epath.Path(path)
    devices = mesh.create(0, 1)
    trained = load(path, devices, step)
    config, classes = trained.config, trained.classes
    if data_dir is not None:
        config.data.root = data_dir
    source = data.load(config.data, split)
    images = pipeline.Pipeline(source, config.data.size, config.data.resize, config.data.cache_gib)
    ways = devices.shape["data"]
    batch_size = -(-config.train.batch_size // ways) * ways  # the scores do not depend on it
    loss_weights = losses.term_weights(config.loss)
    result = evaluate(
        make_eval_step(trained.model, classes, tuple(config.loss.class_weights), devices),
        trained.variables,
        images.eval_batches(batch_size, mesh.process_rows(batch_size)),
        devices,
        loss_weights,
        classes.names,
    )
    if mesh.is_main_process():
        images_of = config.data.root or config.data.name
        print(f"{path}, step {trained.step}, {split} split of {images_of}: {len(source)} images")
        print(format_table(result))
        written = {
            "step": trained.step,
            "split": split,
            "data_root": config.data.root,
            "images": len(source),
            "loss": result.loss,
            **result.scores,
            "confusion": result.confusion.tolist(),
        }
        workdir.write_json(path / "eval.json", written)
    return result


def format_table(result: Evaluation) -> str:
    """The scores as text, one line per class; absent classes are shown as absent."""
    scores = result.scores
    width = max(map(len, scores["iou"]))
    lines = [f"{'class':{width}}      IoU     Dice   share of pixels"]
    total = sum(scores["pixels"].values())
    for name, iou in scores["iou"].items():
        if iou is None:
            lines.append(f"{name:{width}}   absent   absent")
        else:
            share = scores["pixels"][name] / total
            lines.append(f"{name:{width}}   {iou:6.4f}   {scores['dice'][name]:6.4f}   {share:8.3%}")
    present = sum(iou is not None for iou in scores["iou"].values())
    lines.append(
        f"pixel accuracy {_number(scores['accuracy'])}   mean IoU {_number(scores['miou'])}   mean Dice "
        f"{_number(scores['mdice'])}   (over {present} classes present)   loss {result.loss:.4f}"
    )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"
