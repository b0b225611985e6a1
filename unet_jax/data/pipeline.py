"""Batches: order, decode, resize, cache, batch, pad and mask.

The batch of a step is a pure function of (source, seed, step): every epoch is a full shuffle drawn from (seed, epoch),
epochs follow each other without a gap, and step s takes the positions [s * B, (s + 1) * B). A run resumes at any step
without reading what came before, and any number of processes sees the same global batches.

What is shuffled are images resized to one size, or, if they keep their own, windows of them, see `windows.py`.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator

import numpy as np

from unet_jax.data import border, cache, images, statistics, windows
from unet_jax.data.source import Source
from unet_jax.errors import UserError

Batch = dict[str, np.ndarray]

PREFETCH = 2  # batches prepared ahead


def _tensorflow():
    """Imports TensorFlow, kept off the accelerators and quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


class Pipeline:
    """The examples of one `source`, at one size or at their own, cached on disk if they fit.

    If they are `cached`, they are memory-mapped; if not, they are read again in each epoch.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int] | tuple[()],
        resize: str,
        cache_gib: float,
        pixel_weight_fn: border.BorderWeights | None = None,
        notify: Callable[[str], None] = print,
    ):
        """Fills the cache, reading everything once, in parallel, unless it is there already or does not fit.

        Args:
          size: height and width that the examples are resized to; () keeps their own, times `source.factors`.
          resize: the method for images, `bilinear` or `nearest`.
          cache_gib: disk space that the examples of all sources may take; 0 for no cache.
          pixel_weight_fn: label -> loss weights float32 `[H, W]`; None for none.
          notify: called with the reason if the examples cannot be cached, unless it is their size, and if the cache is
            damaged.

        Raises:
          UserError: an example cannot be read, or a value of its label is no class.
        """
        self.source, self._size, self._resize, self._pixel_weight_fn = source, tuple(size), resize, pixel_weight_fn
        self._notify = notify
        self._cached = None
        if source.files is not None and source.settings is not None:
            key_fields = {
                "ids": list(source.ids),
                "files": cache.fingerprint(source.files),
                "settings": dict(source.settings),
                "size": self._size,
                "resize": resize,
                "scale": source.settings.get("data.scale", 1.0),
                "pixel_weight_fn": None if pixel_weight_fn is None else pixel_weight_fn.key_fields(),
            }
            names = ["image", "label"] + ["weight"] * (pixel_weight_fn is not None)
            names += [] if self._size else ["pixels", "ends"]
            pixels = None if self._size or cache_gib <= 0 else [h * w for h, w in source.sizes()]
            self._cached = cache.load_or_write(
                key_fields, names, len(source), self._decode, cache_gib * 2**30, notify, pixels
            )
        self.cached = self._cached is not None
        if not self.cached:
            self._spec = {name: (value.shape, value.dtype) for name, value in self._decode(0).items()}

    def read(self, index: int) -> Batch:
        """One example: `image` `[H, W, C]`, `label` uint8 `[H, W]` or `[H, W, K]`; read-only.

        With a `pixel_weight_fn` also `weight` float32 `[H, W]`.
        """
        example = self._example(index)
        return {name: example[name] for name in ("image", "label", "weight") if name in example}

    def _example(self, index: int) -> Batch:
        """`read`, and, if it keeps its size, what `windows.index_pixels` returns."""
        return self._cached[index] if self.cached else self._decode(index)

    def _decode(self, index: int) -> Batch:
        """`_example`, from the source."""
        image, label = self.source[index]
        size = self._size or images.scaled_size(image.shape[:2], self.source.factors(index), self.source.ids[index])
        label = images.resize_label(label, size)
        example = {"image": images.resize_image(image, size, self._resize), "label": label}
        if self._pixel_weight_fn is not None:
            example["weight"] = self._pixel_weight_fn(label)
        return example if self._size else {**example, **windows.index_pixels(label, self.source.classes)}

    def values(self) -> dict[str, list[float]]:
        """What values the images hold, at the size of the batches; see `statistics.describe`."""
        return statistics.describe(self.read, len(self.source))

    def class_counts(self) -> list[int]:
        """Pixels of each class in all labels, at the size of the batches; ignored ones do not count.

        For overlapping masks, the pixels where each is set.
        """
        classes = self.source.classes

        def count(index):
            label = self.read(index)["label"]
            if classes.task == "multilabel":
                return (label == 1).sum((0, 1))
            return np.bincount(label.ravel(), minlength=256)[: len(classes.names)]

        return sum(images.map_parallel(count, range(len(self.source)), "Counting pixels")).tolist()

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int,
        rows: np.ndarray,
        drawn: windows.Windows | None = None,
    ) -> Iterator[Batch]:
        """Endless training batches: the arrays of `read`, each `[b, ...]`, and `mask` bool `[b]`, all true.

        Args:
          batch_size: of the global batch.
          seed: of the order.
          start_step: the step whose batch comes first.
          rows: the rows of each global batch that this process feeds, int `[b]`.
          drawn: how windows are drawn, if the examples keep their own size; the arrays are then those of windows.

        Raises:
          UserError: windows of examples without a labelled pixel.
        """
        if (drawn is None) != bool(self._size):
            raise ValueError("windows are drawn from images at their own size, and only from them")
        if drawn is not None:
            return self._window_batches(batch_size, seed, start_step, rows, drawn)
        return self._fetch(self._order(len(self.source), batch_size, seed, start_step, rows), len(rows))

    def _order(self, count: int, batch_size: int, seed: int, start_step: int, rows: np.ndarray):
        """A dataset of those numbers below `count` that this process feeds, int64 `[b]`, of the batches from a step."""
        tf = _tensorflow()

        @tf.autograph.experimental.do_not_convert
        def shuffled(epoch):
            seed_and_epoch = tf.stack([tf.constant(seed, tf.int64), epoch])
            return tf.data.Dataset.from_tensor_slices(
                tf.random.experimental.stateless_shuffle(tf.range(count, dtype=tf.int64), seed=seed_and_epoch)
            )

        start = start_step * batch_size
        order = tf.data.Dataset.range(start // count, np.iinfo(np.int64).max).flat_map(shuffled)
        order = order.skip(start % count).batch(batch_size, drop_remainder=True)
        own_rows = tf.autograph.experimental.do_not_convert(lambda indices: tf.gather(indices, rows))
        return order.map(own_rows)

    def _window_batches(
        self, batch_size: int, seed: int, start_step: int, rows: np.ndarray, drawn: windows.Windows
    ) -> Iterator[Batch]:
        """`train_batches` of windows."""
        classes, everything = self.source.classes, range(len(self.source))
        if self.cached:
            sizes, indexed = ([self._cached.shape(name, i) for i in everything] for name in ("label", "pixels"))
        else:
            shapes = lambda i: [self._decode(i)[name].shape for name in ("label", "pixels")]
            sizes, indexed = zip(*images.map_parallel(shapes, everything, "Reading sizes"), strict=True)
        labelled = np.flatnonzero([count for (count,) in indexed])
        if not len(labelled):
            raise UserError("config.data.labels: every pixel of every training image is ignored")
        if len(labelled) < len(sizes):
            self._notify(f"note: no window is drawn from {len(sizes) - len(labelled)} images without labelled pixels")
        small = sum(height < drawn.size[0] or width < drawn.size[1] for height, width, *_ in sizes)
        if small:
            self._notify(
                f"note: {small} of {len(sizes)} training images are smaller than a window of "
                f"{drawn.size[0]}x{drawn.size[1]} and are mirrored up to it; the mirrored part does not count"
            )
        ends = windows.per_image([size[:2] for size in sizes], drawn.size).cumsum()

        def read(place, window):
            key = seed, place
            index = int(np.searchsorted(ends, window, side="right"))
            if index not in labelled:  # has no window to draw: another image takes its place
                index = labelled[place % len(labelled)]
            example = self._example(int(index))
            return drawn.cut(example, drawn.draw(key, example, classes), classes.ignore_label)

        order = self._order(int(ends[-1]), batch_size, seed, start_step, rows)
        with concurrent.futures.ThreadPoolExecutor() as workers:
            pending: collections.deque = collections.deque()
            for step, chosen in enumerate(order.as_numpy_iterator(), start_step):
                pending.append(
                    [workers.submit(read, *pair) for pair in zip(step * batch_size + rows, chosen, strict=True)]
                )
                if len(pending) > PREFETCH:
                    yield _stack([future.result() for future in pending.popleft()])

    def eval_batches(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """Each example once, in order, as batches like those of `train_batches`; `mask` is false for padding."""
        if not self._size:
            raise ValueError("images at their own size make no batches: read them one by one")
        tf = _tensorflow()
        count = len(self.source)
        padded = np.pad(np.arange(count), (0, -count % batch_size), constant_values=-1)
        return self._fetch(tf.data.Dataset.from_tensor_slices(padded.reshape(-1, batch_size)[:, rows]), len(rows))

    def _fetch(self, index_batches, batch_size: int) -> Iterator[Batch]:
        """The batches for a dataset of index batches `[batch_size]`; index -1 gives the first example, masked."""
        if self.cached:
            with concurrent.futures.ThreadPoolExecutor(1) as worker:
                pending = collections.deque()
                for indices in index_batches.as_numpy_iterator():
                    pending.append(worker.submit(self._gather, indices))
                    if len(pending) > PREFETCH:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            return

        tf = _tensorflow()
        failures: list[Exception] = []  # of `decode`; TensorFlow keeps nothing but their text

        def decode(index):
            try:
                return list(self._decode(int(index)).values())
            except Exception as error:
                failures.append(error)
                raise

        @tf.autograph.experimental.do_not_convert
        def read(index):
            types = [dtype for _, dtype in self._spec.values()]
            values = tf.numpy_function(decode, [tf.maximum(index, 0)], types)
            example = {n: tf.ensure_shape(x, s) for (n, (s, _)), x in zip(self._spec.items(), values, strict=True)}
            return example | {"mask": index >= 0}

        batches = index_batches.unbatch().map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size)
        try:
            yield from batches.prefetch(PREFETCH).as_numpy_iterator()
        except tf.errors.OpError:
            if failures:
                raise failures[0] from None
            raise

    def _gather(self, indices: np.ndarray) -> Batch:
        """The cached examples at `indices`, `[b]`."""
        return self._cached.take(np.maximum(indices, 0)) | {"mask": indices >= 0}


def _stack(examples: list[Batch]) -> Batch:
    """Examples of one size as a batch, none of which is padding."""
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    return batch | {"mask": np.ones(len(examples), bool)}
