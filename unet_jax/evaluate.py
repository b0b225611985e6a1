"""Evaluation: a whole split, every pixel once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import linen as nn

from unet_jax import data, em, losses, mesh, metrics, predict, workdir
from unet_jax import trained as trained_network
from unet_jax.data import border, pipeline
from unet_jax.errors import UserError, check_choice

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Evaluation(NamedTuple):
    """What a split scored: the loss, `metrics.scores`, and the confusion counts behind them."""

    loss: float
    scores: dict[str, Any]
    confusion: np.ndarray
    em: dict[str, Any]  # `em.scores`; empty where they are off


def make_weigh(settings: Mapping, classes: data.Classes) -> border.Weigh | None:
    """The function of a label that makes its loss weights, by `config.loss`; None where they are off.

    Raises:
      UserError: a setting has no meaning.
    """
    w0, sigma = settings["border_weight"], settings["border_sigma"]
    if not 0 <= w0 < float("inf") or not 0 < sigma < float("inf"):
        raise UserError(
            f"config.loss.border_weight = {w0} must be 0 or more, config.loss.border_sigma = {sigma} positive"
        )
    if w0 and classes.task == "multilabel":
        raise UserError("config.loss.border_weight is for labels of one class per pixel, not for overlapping masks")
    return border.Weigh(w0, sigma, classes.ignore_label) if w0 else None


def check(settings: Mapping, classes: data.Classes) -> None:
    """Checks `config.eval`.

    Raises:
      UserError: an unknown `tta`, or `em_scores` of other than two classes.
    """
    check_choice("config.eval.tta", settings["tta"], predict.TTA)
    if settings["em_scores"] and (len(classes.names) != 2 or classes.task == "multilabel"):
        raise UserError(f"config.eval.em_scores is for two classes, background and cells, not for {classes.names}")


def make_eval_step(
    model: nn.Module, classes: data.Classes, config: "ConfigDict", devices: jax.sharding.Mesh, tta: str = "none"
) -> Callable:
    """A jitted function of variables and a batch.

    It returns confusion counts, every loss term of each example, and, for `config.eval.em_scores`, the probability of
    class 1 with the labels and the mask of the batch.
    """
    class_weights, em_scores = tuple(config.loss.class_weights), config.eval.em_scores

    def eval_step(variables, batch):
        label = batch["label"]
        window = predict.surround_image(model, batch["image"], tta)
        window = mesh.split_height(devices, window)
        logits = predict.logits(model, variables, window, label.shape[1:3], classes.task, tta)
        mask = (label != classes.ignore_label) & batch["mask"].reshape(-1, *[1] * (label.ndim - 1))
        prediction = metrics.predict_label(logits, classes.task)
        counts = metrics.confusion(prediction, label, mask, classes.task, len(classes.names))
        terms = losses.terms(logits, label, mask, classes.task, class_weights, batch.get("weight"))
        cells = (predict.to_probability(logits, classes.task)[..., -1], label, batch["mask"]) if em_scores else ()
        return counts, terms, cells

    return mesh.jit_replicated(devices, eval_step)


def make_predict_step(model: nn.Module, classes: data.Classes, devices: jax.sharding.Mesh) -> Callable:
    """A jitted function of variables and uint8 images `[B, H, W, C]`: the predicted labels."""

    def predict_step(variables, image):
        window = mesh.split_height(devices, predict.surround_image(model, image, "none"))
        return metrics.predict_label(
            predict.logits(model, variables, window, image.shape[1:3], classes.task), classes.task
        )

    return mesh.jit_replicated(devices, predict_step)


def evaluate(
    eval_step: Callable,
    variables: Mapping,
    batches: Iterable[pipeline.Batch],
    devices: jax.sharding.Mesh,
    loss_weights: Mapping[str, float],
    classes: data.Classes,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Scores `variables` on all `batches`; gives up, with None, once `stopped()`.

    Counts are added as integers. Losses are added per example in float64, so that the batch size does not show.
    """
    confusion, collected, slices = 0, [], []

    def add(result):
        nonlocal confusion
        counts, terms, cells = jax.device_get(result)
        confusion = confusion + counts.astype(np.int64)
        collected.append(terms)
        slices.extend((p, y) for p, y, counted in zip(*cells, strict=True) if counted)

    pending = None  # fetched one batch late, so that the device never waits for the next one
    for batch in batches:
        if mesh.largest(stopped()):
            return None
        result = eval_step(variables, mesh.put_batch(devices, batch))
        if pending is not None:
            add(pending)
        pending = result
    add(pending)
    if mesh.largest(stopped()):
        return None
    terms = jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64), *collected)
    loss = float(losses.combine(terms, loss_weights))
    em_scores = em.scores(*zip(*slices, strict=True), classes.ignore_label) if slices else {}
    return Evaluation(loss, metrics.scores(confusion, classes.names), confusion, em_scores)


def evaluate_workdir(
    path: epath.PathLike, step: int | None, data_dir: str | None, split: str, tta: str | None = None
) -> Evaluation:
    """Scores a work directory, prints a table and writes `eval.json`.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      data_dir: other images than those it was trained on, for the same data set; None keeps `config.data.root`.
      split: `train`, `validation`, `test` or `all`.
      tta: see `predict.logits`; None is `config.eval.tta`.

    Raises:
      UserError: no work directory, checkpoint or images, or images of another task.
    """
    path = epath.Path(path)
    if tta is not None:
        check_choice("--tta", tta, predict.TTA)
    trained = trained_network.load(path, step)
    config, classes, devices = trained.config, trained.classes, trained.devices
    if data_dir is not None:
        config.data.root = data_dir
    with mesh.main_first("data"):
        source = data.load(config.data, split)
    trained_network.check_source(path, classes, source)
    weigh = make_weigh(config.loss, classes)
    images = pipeline.Pipeline(source, config.data.size, config.data.resize, config.data.cache_gib, weigh, mesh.say)
    tta = config.eval.tta if tta is None else tta
    ways = devices.shape["data"]
    batch_size = -(-config.train.batch_size // ways) * ways  # the scores do not depend on it
    loss_weights = losses.term_weights(config.loss)
    result = evaluate(
        make_eval_step(trained.model, classes, config, devices, tta),
        trained.variables,
        images.eval_batches(batch_size, mesh.process_rows(devices, batch_size)),
        devices,
        loss_weights,
        classes,
    )
    if mesh.is_main_process():
        images_of = config.data.root or config.data.name
        print(
            f"{path}, step {trained.step}, {split} split of {images_of}: {len(source)} images; test-time augmentation "
            f"{tta}"
        )
        print(format_table(result))
        written = {
            "step": trained.step,
            "split": split,
            "data_root": config.data.root,
            "images": len(source),
            "tta": tta,
            "loss": result.loss,
            **result.scores,
            **result.em,
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
    if result.em:
        lines.append(
            "   ".join(f"{n} {_number(result.em[n])} at threshold {result.em[f'{n}_threshold']}" for n in em.NAMES)
            + "   (line pixels as segments of their own)"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"
