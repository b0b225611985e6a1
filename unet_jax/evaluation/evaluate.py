"""Evaluation: a whole split, every pixel once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath

from unet_jax import data, losses, metrics
from unet_jax.data import border, pipeline
from unet_jax.errors import UserError, check_choice
from unet_jax.inference import forward, trained
from unet_jax.metrics import confusion
from unet_jax.parallel import processes, sharding
from unet_jax.workdir import files

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Evaluation(NamedTuple):
    """The scores of a split."""

    loss: float  # of the whole split
    records: list[metrics.Record]  # see `metrics.records`
    confusion: np.ndarray  # counts of each image, int64 `[N, K, K]`, or `[N, K, 2, 2]` of overlapping masks, in order
    names: Sequence[str]  # of the classes


def check(settings: Mapping, classes: data.Classes) -> None:
    """Raises a `UserError` for an unknown `tta` or `best_metric`, or `em_scores` of other than two classes."""
    check_choice("config.eval.tta", settings["tta"], forward.TTA)
    if settings["em_scores"] and (len(classes.names) != 2 or classes.task == "multilabel"):
        raise UserError(f"config.eval.em_scores is for two classes, background and cells, not for {classes.names}")
    known = metrics.flatten(metrics.describe(classes.names, settings["em_scores"]))
    check_choice("config.eval.best_metric", settings["best_metric"], known)


def make_eval_step(network: forward.Network, loss: losses.Loss, tta: str = "none", em_scores: bool = False) -> Callable:
    """A jitted function of variables and a batch.

    For each example it returns whether it counts (the last batch is padded), the confusion counts, the loss terms and,
    for `em_scores`, the probability of class 1 with the label.
    """
    classes = network.classes

    def eval_step(variables, batch):
        label = batch["label"]
        logits = network.logits(variables, batch["image"], tta)
        mask = (label != classes.ignore_label) & batch["mask"].reshape(-1, *[1] * (label.ndim - 1))
        # Of logits, not probabilities: those close to 1 can be equal where logits are not.
        prediction = confusion.predict_label(logits, classes.task)
        counts = confusion.confusion(prediction, label, mask, classes.task, len(classes.names))
        cells = (forward.to_probability(logits, classes.task)[..., -1], label) if em_scores else None
        return batch["mask"], counts, loss.terms(logits, label, mask, batch.get("weight")), cells

    return sharding.jit_replicated(network.mesh, eval_step)


def evaluate(
    eval_step: Callable,
    variables: Mapping,
    batches: Iterable[pipeline.Batch],
    loss: losses.Loss,
    network: forward.Network,
    stop_signal: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Scores `variables` on all `batches`; gives up, with None, once any process has a `stop_signal()`.

    Counts are added as integers. Losses are added per example in float64, so that the batch size makes no difference.
    """
    pending, results = None, []  # fetched one batch late, so that the device never waits for the host
    for batch in batches:
        if processes.max_over_processes(stop_signal()):
            return None
        running = eval_step(variables, sharding.put_batch(network.mesh, batch))
        if pending is not None:
            results.append(jax.device_get(pending))
        pending = running
    results.append(jax.device_get(pending))
    if processes.max_over_processes(stop_signal()):
        return None
    counted, counts, terms, cells = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    terms = jax.tree.map(lambda values: values[counted].astype(np.float64), terms)
    counts = counts[counted].astype(np.int64)
    slices = None if cells is None else list(zip(*(values[counted] for values in cells), strict=True))
    names, ignore_label = network.classes.names, network.classes.ignore_label
    found = metrics.records(metrics.Counts(counts.sum(0), names, slices, ignore_label))
    return Evaluation(float(loss.combine(terms)), found, counts, names)


def open_images(source: data.Source, config: "ConfigDict", classes: data.Classes) -> pipeline.Pipeline:
    """The images of a source as `config` describes them, with the pixel weights of its loss."""
    settings, pixel_weight_fn = config.data, border.pixel_weight_fn(config.loss, classes)
    return pipeline.Pipeline(
        source, settings.size, settings.resize, settings.cache_gib, pixel_weight_fn, processes.print_on_main
    )


class Split(NamedTuple):
    """One split of the images of a work directory, and how its scores are computed."""

    images: pipeline.Pipeline
    loss: losses.Loss
    batch_size: int


def open_split(
    network: trained.Trained, path: epath.PathLike, split: str, images: pipeline.Pipeline | None = None
) -> Split:
    """Opens a split of `config.data`, as the training did; `images` are those of the split, if they are open already.

    Raises:
      UserError: no such split, no images, or images of another task than the network's.
    """
    config, classes = network.config, network.classes
    if images is None:
        with processes.main_first("data"):
            source = data.load(config.data, split)
        trained.check_source(path, classes, source)
        images = open_images(source, config, classes)
    devices = network.mesh.shape["data"]
    batch_size = -(-config.train.batch_size // devices) * devices  # the scores do not depend on it
    return Split(images, losses.make(config.loss, classes.task, len(classes.names)), batch_size)


def evaluate_split(network: trained.Trained, split: Split, tta: str) -> Evaluation:
    """Scores a trained network on an open split, with test-time augmentation `tta`."""
    rows = sharding.process_rows(network.mesh, split.batch_size)
    step = make_eval_step(network.network, split.loss, tta, network.config.eval.em_scores)
    batches = split.images.eval_batches(split.batch_size, rows)
    return evaluate(step, network.variables, batches, split.loss, network.network)


def evaluate_workdir(
    path: epath.PathLike, step: int | None, data_dir: str | None, split: str, tta: str | None = None
) -> Evaluation:
    """Scores a work directory, prints a table and writes `eval.json`.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      data_dir: other images than those it was trained on, for the same data set; None keeps `config.data.root`.
      split: `train`, `validation`, `test` or `all`.
      tta: test-time augmentation, one of `forward.TTA`; None is `config.eval.tta`.

    Raises:
      UserError: no work directory, checkpoint or images, or images of another task.
    """
    path = epath.Path(path)
    if tta is not None:
        check_choice("--tta", tta, forward.TTA)
    network = trained.load(path, step)
    config = network.config
    if data_dir is not None:
        config.data.root = data_dir
    opened = open_split(network, path, split)
    tta = config.eval.tta if tta is None else tta
    result = evaluate_split(network, opened, tta)
    count = len(opened.images.source)
    processes.print_on_main(
        f"{path}, step {network.step}, {split} split of {config.data.root or config.data.name}: {count} images; "
        f"test-time augmentation {tta}\n{format_table(result)}"
    )
    if processes.is_main():
        described = {"step": network.step, "split": split, "data_root": config.data.root, "images": count, "tta": tta}
        files.write_json(path / "eval.json", {**described, **to_json(result)})
    return result


def to_json(result: Evaluation) -> dict[str, Any]:
    """The scores as they are in `eval.json`."""
    values: dict[str, Any] = {"loss": result.loss}
    for record in result.records:
        values[record.key] = record.value
        values |= {f"{record.key}_{name}": detail for name, detail in record.details.items()}
    total = result.confusion.sum(0)
    pixels = dict(zip(result.names, confusion.pixel_counts(total).tolist(), strict=True))
    return {**values, "pixels": pixels, "confusion": total.tolist()}


def format_table(result: Evaluation) -> str:
    """The scores as text: a line per class, then those of the whole split."""
    pixels = confusion.pixel_counts(result.confusion.sum(0))
    width = max(map(len, (*result.names, "class")))
    columns = [record for record in result.records if record.per_class]
    lines = [f"{'class':{width}}" + "".join(f"   {record.title:>6}" for record in columns) + "   share of pixels"]
    for name, count in zip(result.names, pixels, strict=True):
        shares = "" if not count else f"   {count / pixels.sum():8.3%}"
        lines.append(f"{name:{width}}" + "".join(f"   {_number(r.value[name]):>6}" for r in columns) + shares)
    scalars = [f"{r.title} {_number(r.value)}{_threshold(r)}" for r in result.records if not r.per_class]
    scalars += [f"(over {(pixels > 0).sum()} classes present)", f"loss {result.loss:.4f}"]
    notes = {f"({record.note})": None for record in result.records if record.note}
    return "\n".join([*lines, "   ".join([*scalars, *notes])])


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"


def _threshold(record: metrics.Record) -> str:
    threshold = record.details.get("threshold")
    return "" if threshold is None else f" at threshold {threshold}"
