"""Scores at the images' own sizes: what `--mode=predict` would write, against the masks as they were drawn.

Where training resizes its images, the other scores compare at `config.data.size`, where the network works: a thing that
the resize removed is missing in the prediction and in the mask alike. Where images keep their own size, `Evaluator`
computes the other scores from the same tiles.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from unet_jax import data, losses, metrics
from unet_jax.data import pipeline
from unet_jax.evaluation import scores
from unet_jax.inference import forward, trained
from unet_jax.metrics import confusion
from unet_jax.parallel import processes

Bands = Iterable[tuple[slice, np.ndarray]]  # rows and their probabilities float32 [rows, W, K], from top to bottom


def count(network: trained.Trained, source: data.Source, tta: str) -> np.ndarray | None:
    """Confusion counts of each image of `source`, int64 `[N, K, K]`, or `[N, K, 2, 2]` of overlapping masks.

    None if images are scored at their own sizes anyway. The probabilities of an image are never held whole.

    Args:
      network: of the task of the source.
      source: the images, at their own size.
      tta: test-time augmentation, one of `forward.VIEWS`.
    """
    if network.config.data.size:
        is_same = source.size_range() == (network.size, network.size)
    else:
        is_same = all(source.factors(index) == (1, 1) for index in range(len(source)))
    if is_same:
        return None
    counts = []
    for index in _progress(len(source), "Scoring at their own size"):
        image, label = source[index]
        bands = network.predict_bands(image, tta=tta, factors=source.factors(index))
        counts.append(sum(_count(band, label[rows], network.classes) for rows, band in bands))
    return np.stack(counts)


class Evaluator:
    """Scores images at the size from which training cuts its windows, tile by tile."""

    def __init__(self, loss: losses.Loss, classes: data.Classes, tile: tuple[int, int], em_scores: bool):
        """Compiles lazily, once.

        Args:
          loss: of the training, computed from parts of the images as if each were an image.
          classes: of the labels.
          tile: (height, width) of these parts.
          em_scores: whether to compute the scores of the ISBI 2012 challenge as well, for which images are held whole.
        """
        self._loss, self._classes, self._tile, self._em_scores = loss, classes, tile, em_scores

        def terms(probability, label, weight):
            logits = forward.to_logits(probability, classes.task)
            return loss.terms(logits, label, label != classes.ignore_label, weight)

        self._terms = jax.jit(terms)

    def evaluate(
        self, predict: Callable[[np.ndarray], Bands], images: pipeline.Pipeline, stop_signal: Callable[[], int]
    ) -> scores.Evaluation | None:
        """Scores all images; gives up, with None, once any process has a `stop_signal()`.

        `predict` maps an image uint8 `[H, W, C]` to bands of its probabilities.
        """
        classes, counts, terms, alone, cells = self._classes, [], [], [], []
        for index in _progress(len(images.source), "Evaluating"):
            example = images.read(index)
            total, of_image, bands = 0, [], []
            for rows, band in _regroup(predict(example["image"]), self._tile[0]):
                if processes.max_over_processes(stop_signal()):
                    return None
                part = {name: values[rows] for name, values in example.items() if name != "image"}
                total += _count(band, part["label"], classes)
                of_image += [self._terms(*window) for window in self._windows(band, **part)]
                if self._em_scores:
                    bands.append(band[..., -1])
            counts.append(total)
            terms.append(_concatenate(jax.device_get(of_image)))
            alone.append(float(self._loss.combine(terms[-1])))
            if self._em_scores:
                cells.append((np.concatenate(bands), example["label"]))
        if processes.max_over_processes(stop_signal()):
            return None
        slices = cells if self._em_scores else None
        found = metrics.records(metrics.Counts(sum(counts), classes.names, slices, classes.ignore_label))
        whole = float(self._loss.combine(_concatenate(terms)))
        return scores.Evaluation(whole, found, np.stack(counts), classes.names, alone)

    def _windows(self, band, label, weight=None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """A band cut into tiles `[1, h, w, ...]`; what is beyond its end is ignored."""
        height, width = self._tile
        for left in range(0, label.shape[1], width):
            columns = slice(left, left + width)
            missing = height - len(label), width - label[:, columns].shape[1]

            def cut(values, fill, columns=columns, missing=missing):
                pads = [(0, n) for n in missing] + [(0, 0)] * (values.ndim - 2)
                return np.pad(values[:, columns], pads, constant_values=fill)[None]

            of_weight = None if weight is None else cut(weight, 0)
            yield cut(band, 0.5), cut(label, self._classes.ignore_label), of_weight


def _count(band: np.ndarray, label: np.ndarray, classes: data.Classes) -> np.ndarray:
    prediction, mask = forward.to_label(band, classes.task), label != classes.ignore_label
    return confusion.count(prediction, label, mask, classes.task, len(classes.names))


def _regroup(bands: Bands, height: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Bands of `height` rows, but for the last."""
    top, held = 0, []
    for _, band in bands:
        held.append(band)
        while (count := sum(map(len, held))) >= height:
            rows = np.concatenate(held)
            yield slice(top, top + height), rows[:height]
            top, held = top + height, [rows[height:]] if count > height else []
    if held:
        rows = np.concatenate(held)
        yield slice(top, top + len(rows)), rows


def _concatenate(terms: list[Mapping[str, Any]]):
    return jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64), *terms)


def _progress(count: int, title: str) -> Iterable[int]:
    import tqdm

    quiet = None if processes.is_main() else True  # None: unless in a terminal
    return tqdm.trange(count, desc=title, unit=" images", leave=False, delay=1, disable=quiet)
