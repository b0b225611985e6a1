"""Evaluation: a whole split, every pixel once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from etils import epath

from unet_jax import data, losses, metrics
from unet_jax.data import border, pipeline
from unet_jax.errors import UserError, check_choice, escape_line
from unet_jax.evaluation import own_size, scores
from unet_jax.inference import forward, tiles, trained
from unet_jax.metrics import confusion
from unet_jax.parallel import processes, sharding
from unet_jax.workdir import checkpoints

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def check(settings: Mapping, classes: data.Classes) -> None:
    """Raises a `UserError` for an unknown `tta` or `best_metric`, or `em_scores` of other than two classes."""
    check_choice("config.eval.tta", settings["tta"], forward.TTA)
    if settings["em_scores"] and (len(classes.names) != 2 or classes.task == "multilabel"):
        raise UserError(f"config.eval.em_scores is for two classes, background and cells, not for {classes.names}")
    known = metrics.flatten(metrics.describe(classes.names, classes.task, settings["em_scores"]))
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
) -> scores.Evaluation | None:
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
    of_image = [jax.tree.map(lambda values, i=i: values[i : i + 1], terms) for i in range(len(counts))]
    alone = [float(loss.combine(one)) for one in of_image]
    return scores.Evaluation(float(loss.combine(terms)), found, counts, names, alone)


class Scorer:
    """Scores the images of a split, and predicts some of them, with any weights of a network; compiled once."""

    def __init__(
        self,
        network: forward.Network,
        images: pipeline.Pipeline,
        loss: losses.Loss,
        batch_size: int,
        *,
        tile: tuple[int, int] | None = None,
        tta: str = "none",
        em_scores: bool = False,
    ):
        """Compiles lazily.

        Args:
          network: the network.
          images: of the split.
          loss: of the training.
          batch_size: of images of one size, or of tiles.
          tile: (height, width) predicted at a time, if the images keep their own size.
          tta: test-time augmentation, one of `forward.VIEWS`.
          em_scores: whether to compute the scores of the ISBI 2012 challenge as well.
        """
        self._network, self._images, self._loss, self._batch_size = network, images, loss, batch_size
        self._rows = sharding.process_rows(network.mesh, batch_size)
        self._predictor = tile and tiles.Predictor(network, None, tile, tta, batch_size)
        if tile:
            self._at_own_size = own_size.Evaluator(loss, network.classes, tile, em_scores)
            return
        self._step = make_eval_step(network, loss, tta, em_scores)
        self._labels = sharding.jit_replicated(network.mesh, lambda *inputs: network.labels(*inputs, tta=tta))

    def score(self, variables: Mapping, stop_signal: Callable[[], int] = lambda: 0) -> scores.Evaluation | None:
        """Scores all images; gives up, with None, once any process has a `stop_signal()`."""
        if self._predictor:
            return self._at_own_size.evaluate(lambda x: self._bands(variables, x), self._images, stop_signal)
        batches = self._images.eval_batches(self._batch_size, self._rows)
        return evaluate(self._step, variables, batches, self._loss, self._network, stop_signal)

    def labels(self, variables: Mapping, indices: Sequence[int]) -> list[np.ndarray]:
        """The predicted labels of some images, uint8 `[H, W]`, or `[H, W, K]` for a multilabel task."""
        found, read = [], lambda index: self._images.read(index)["image"]
        if self._predictor:
            for index in indices:
                bands = self._bands(variables, read(index))
                found.append(np.concatenate([forward.to_label(band, self._network.task) for _, band in bands]))
            return found
        for start in range(0, len(indices), self._batch_size):  # batches as those scored, so that logits round alike
            chosen = [read(index) for index in indices[start : start + self._batch_size]]
            padded = np.stack(chosen + chosen[:1] * (self._batch_size - len(chosen)))[self._rows]
            batch = sharding.put_batch(self._network.mesh, {"image": padded})
            found += list(jax.device_get(self._labels(variables, batch["image"])))[: len(chosen)]
        return found

    def _bands(self, variables, image):
        return self._predictor.bands(image, variables=variables)


def open_images(source: data.Source, config: "ConfigDict", classes: data.Classes) -> pipeline.Pipeline:
    """The images of a source as `config` describes them, with the pixel weights of its loss."""
    settings, pixel_weight_fn = config.data, border.pixel_weight_fn(config.loss, classes)
    notify = processes.print_on_main
    return pipeline.Pipeline(source, settings.size, settings.resize, settings.cache_gib, pixel_weight_fn, notify)


class Split(NamedTuple):
    """One split of the images of a work directory, and what scores it."""

    images: pipeline.Pipeline
    scorer: Scorer


def open_split(
    network: trained.Trained,
    path: epath.PathLike,
    split: str,
    tta: str,
    data_dir: str | None = None,
    images: pipeline.Pipeline | None = None,
) -> Split:
    """Opens a split of `config.data`, as the training did.

    Args:
      network: of the work directory `path`.
      path: the work directory.
      split: `train`, `validation`, `test` or `all`.
      tta: test-time augmentation, one of `forward.VIEWS`.
      data_dir: the root of other images, which becomes `config.data.root`. If all of them are opened and have the names
        of the training images, a warning is printed: they may be those, moved, most of which the network has seen.
      images: those of the split, if they are open already.

    Raises:
      UserError: no such split, no images, or images of another task than the network's.
    """
    config, classes = network.config, network.classes
    check(config.eval, classes)
    if data_dir is not None:
        config.data.root = data_dir
    if images is None:
        with processes.main_first("data"):
            source = data.load(config.data, split)
        _check_source(path, classes, source)
        if data_dir is not None and split == "all":
            _warn_of_same_names(path, network)
        images = open_images(source, config, classes)
    devices = network.mesh.shape["data"]
    batch_size = -(-config.train.batch_size // devices) * devices  # the scores do not depend on it
    loss = losses.make(config.loss, classes.task, len(classes.names), network.class_counts)
    tile = None if config.data.size else network.size
    scorer = Scorer(network.network, images, loss, batch_size, tile=tile, tta=tta, em_scores=config.eval.em_scores)
    return Split(images, scorer)


def evaluate_workdir(
    path: epath.PathLike, step: int | None, data_dir: str | None, split: str | None = None, tta: str | None = None
) -> scores.Evaluation:
    """Scores a work directory, prints a table and writes `eval.json` and the files in `eval/`, see `scores.write`.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      data_dir: other images than those it was trained on, for the same data set; None keeps `config.data.root`.
      split: `train`, `validation`, `test` or `all`; None is `validation`, or all images of `data_dir`.
      tta: test-time augmentation, one of `forward.TTA`; None is `config.eval.tta`.

    Raises:
      UserError: no work directory, checkpoint or images, or images of another task.
    """
    path = epath.Path(path)
    if tta is not None:
        check_choice("--tta", tta, forward.TTA)
    network = trained.load(path, step)
    settings, trained_root = network.config.data, network.config.data.root
    split = split or default_split(data_dir)
    tta = network.resolve_tta(tta)
    opened = open_split(network, path, split, tta, data_dir)
    source = opened.images.source
    result = opened.scorer.score(network.variables)._replace(own_size=own_size.count(network, source, tta))
    total = len(source) if split == "all" else len(data.load_with_faults(settings, "all"))
    processes.print_on_main(
        f"{path}, step {network.step}, {describe_split(split, len(source), total, settings.root or settings.name)}; "
        f"test-time augmentation {tta}\n{scores.format_evaluation(result)}"
    )
    if processes.is_main():
        described = {"step": network.step, "split": split, "data_root": settings.root, "images": len(source)}
        name = scores.data_name(settings.root, trained_root, settings.name)
        stem = scores.file_stem(name, split, network.step, tta)
        scores.write(path, stem, {**described, "tta": tta}, result, source.ids)
    return result


def _check_source(path: epath.PathLike, classes: data.Classes, source: data.Source) -> None:
    """Raises a `UserError` if a network is for another task, or number of classes or channels, than the images."""
    kinds = [(c.task, len(c.names), c.channels, c.dtype) for c in (classes, source.classes)]
    if kinds[0] != kinds[1]:
        given, held = (
            f"{task} task of {count} classes, {channels} channel(s) of {dtype}"
            for task, count, channels, dtype in kinds
        )
        raise UserError(f"{path} is a network for a {given}; the images in config.data.root are for a {held}")


def default_split(data_dir: str | None) -> str:
    """What is scored unless a split is named: of other images than those of the training, all."""
    return "validation" if data_dir is None else "all"


def _warn_of_same_names(path: epath.Path, network: trained.Trained) -> None:
    """Prints a warning if the images of `config.data` have the names of those that the network was trained on."""
    settings = network.config.data
    try:
        source = data.load_with_faults(settings, "train")
    except UserError:  # such as too few images for a split
        return
    if checkpoints.read_meta(path, network.step).get("examples", {}).get("train") == source.ids_digest():
        processes.print_on_main(
            f"warning: the images in --data_dir={escape_line(settings.root)} have the names of those of the "
            "training. If they are the same, --split=validation scores the ones that it did not see"
        )


def describe_split(split: str, count: int, total: int, root: str) -> str:
    """Which images are scored, and how many of how many."""
    shown = f"{escape_line(root)}: {count} image{'s' if count != 1 else ''} of {total}"
    return f"all images of {shown}" if split == "all" else f"{split} split of {shown}"
