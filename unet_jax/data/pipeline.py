"""Batches: order, decode, resize, cache, batch, pad and mask.

The batch of a step is a pure function of (source, seed, step): every epoch is a full shuffle drawn from (seed, epoch),
epochs follow each other without a gap, and step s takes the positions [s * B, (s + 1) * B). A run resumes at any step
without reading what came before, and any number of processes sees the same global batches.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator

import numpy as np

from unet_jax.data import border, cache, images
from unet_jax.data.source import Source

Batch = dict[str, np.ndarray]

PREFETCH = 2  # batches prepared ahead


def _tensorflow():
    """Imports TensorFlow, kept off the accelerators and quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


class Pipeline:
    """The examples of one `source` at one size, cached on disk if they fit.

    If they are `cached`, they are memory-mapped; if not, they are read again in each epoch.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        resize: str,
        cache_gib: float,
        pixel_weight_fn: border.BorderWeights | None = None,
        notify: Callable[[str], None] = print,
    ):
        """Fills the cache, reading everything once, in parallel, unless it is there already or does not fit.

        Args:
          size: height and width of the batches.
          resize: the method for images, `bilinear` or `nearest`.
          cache_gib: disk space that the examples of all sources may take; 0 for no cache.
          pixel_weight_fn: label -> loss weights float32 `[H, W]`; None for none.
          notify: called with the reason if the examples cannot be cached, unless it is their size, and if the cache is
            damaged.

        Raises:
          UserError: an example cannot be read, or a value of its label is no class.
        """
        self.source, self._size, self._resize, self._pixel_weight_fn = source, tuple(size), resize, pixel_weight_fn
        self._cached = None
        if source.files is not None and source.settings is not None:
            key_fields = {
                "ids": list(source.ids),
                "files": cache.fingerprint(source.files),
                "settings": dict(source.settings),
                "size": self._size,
                "resize": resize,
                "pixel_weight_fn": None if pixel_weight_fn is None else pixel_weight_fn.key_fields(),
            }
            names = ("image", "label") if pixel_weight_fn is None else ("image", "label", "weight")
            self._cached = cache.load_or_write(key_fields, names, len(source), self._decode, cache_gib * 2**30, notify)
        self.cached = self._cached is not None
        if not self.cached:
            self._spec = {name: (value.shape, value.dtype) for name, value in self._decode(0).items()}

    def read(self, index: int) -> Batch:
        """One example: `image` uint8 `[H, W, C]`, `label` uint8 `[H, W]` or `[H, W, K]`.

        With a `pixel_weight_fn` also `weight` float32 `[H, W]`.
        """
        if self.cached:
            return {name: array[0] for name, array in self._cached.take(np.array([index])).items()}
        return self._decode(index)

    def _decode(self, index: int) -> Batch:
        """`read`, from the source."""
        image, label = self.source[index]
        label = images.resize_label(label, self._size)
        example = {"image": images.resize_image(image, self._size, self._resize), "label": label}
        return example if self._pixel_weight_fn is None else {**example, "weight": self._pixel_weight_fn(label)}

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

    def train_batches(self, batch_size: int, seed: int, start_step: int, rows: np.ndarray) -> Iterator[Batch]:
        """Endless training batches: the arrays of `read`, each `[b, ...]`, and `mask` bool `[b]`, all true.

        Args:
          batch_size: of the global batch.
          seed: of the order.
          start_step: the step whose batch comes first.
          rows: the rows of each global batch that this process feeds, int `[b]`.
        """
        tf = _tensorflow()
        count = len(self.source)

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
        return self._fetch(order.map(own_rows), len(rows))

    def eval_batches(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """Each example once, in order, as batches like those of `train_batches`; `mask` is false for padding."""
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
