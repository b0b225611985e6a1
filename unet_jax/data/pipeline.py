"""Batches: order, decode, resize, cache, batch, pad and mask.

The batch of a step is a pure function of (source, seed, step): every epoch is a full shuffle drawn from (seed, epoch),
epochs follow each other without a gap, and step s takes the positions [s * B, (s + 1) * B). A run goes on at any step
without reading what came before, and any number of processes sees the same global batches.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from unet_jax.data import border, cache, images
from unet_jax.data.source import Source

Batch = dict[str, np.ndarray]

AHEAD = 2  # batches that are made before they are asked for


def _tensorflow():
    """Imports TensorFlow, kept off the accelerators and quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


class Pipeline:
    """Examples of one source at one size, kept on disk where they fit.

    Attributes:
      source: the examples.
      cached: whether all examples are mapped from the disk; if not, they are read anew each epoch.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        resize: str,
        cache_gib: float,
        weigh: border.Weigh | None = None,
        say: Callable[[str], None] = print,
    ):
        """Reads everything once, in parallel, unless the cache holds it or it does not fit there.

        Args:
          source: the examples.
          size: height and width of the batches.
          resize: how images are resized, `bilinear` or `nearest`.
          cache_gib: how much disk the examples of all sources may fill; 0 is no cache.
          weigh: makes the loss weights float32 `[H, W]` of a label; None is none.
          say: is told what keeps the examples out of the cache, if it is not their size.

        Raises:
          UserError: an example cannot be read.
        """
        self.source, self._size, self._resize, self._weigh = source, tuple(size), resize, weigh
        self._arrays = None
        if source.files is not None and source.settings is not None:
            made_of = {
                "ids": list(source.ids),
                "files": cache.stamp(source.files),
                "settings": dict(source.settings),
                "size": self._size,
                "resize": resize,
                "weigh": None if weigh is None else dataclasses.asdict(weigh),
            }
            fields = ("image", "label") if weigh is None else ("image", "label", "weight")
            self._arrays = cache.examples(made_of, fields, len(source), self._decode, cache_gib * 2**30, say)
        self.cached = self._arrays is not None
        if not self.cached:
            self._spec = {name: (value.shape, value.dtype) for name, value in self._decode(0).items()}

    def read(self, index: int) -> Batch:
        """One example: `image` uint8 `[H, W, C]`, `label` uint8 `[H, W]` or `[H, W, K]`, maybe `weight` `[H, W]`."""
        if self.cached:
            return {name: array[index].copy() for name, array in self._arrays.items()}
        return self._decode(index)

    def _decode(self, index: int) -> Batch:
        """`read`, from the source."""
        image, label = self.source.read(index)
        label = images.resize_label(label, self._size)
        example = {"image": images.resize_image(image, self._size, self._resize), "label": label}
        return example if self._weigh is None else {**example, "weight": self._weigh(label)}

    def train_batches(self, batch_size: int, seed: int, start_step: int, rows: np.ndarray) -> Iterator[Batch]:
        """Endless training batches.

        Args:
          batch_size: of the global batch.
          seed: of the order.
          start_step: the step whose batch comes first.
          rows: of each global batch, those that this process feeds, int `[b]`.

        Yields:
          the fields of `read`, each `[b, ...]`, and `mask` bool `[b]`, all true.
        """
        tf = _tensorflow()
        count = len(self.source)

        @tf.autograph.experimental.do_not_convert
        def shuffled(epoch):
            pair = tf.stack([tf.constant(seed, tf.int64), epoch])
            return tf.data.Dataset.from_tensor_slices(
                tf.random.experimental.stateless_shuffle(tf.range(count, dtype=tf.int64), seed=pair)
            )

        start = start_step * batch_size
        order = tf.data.Dataset.range(start // count, np.iinfo(np.int64).max).flat_map(shuffled)
        order = order.skip(start % count).batch(batch_size, drop_remainder=True)
        chosen = tf.autograph.experimental.do_not_convert(lambda index: tf.gather(index, rows))
        return self._fetch(order.map(chosen), len(rows))

    def eval_batches(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """Every example once, in order; the last batch is filled up with examples whose `mask` is false."""
        tf = _tensorflow()
        padded = np.full(-(-len(self.source) // batch_size) * batch_size, -1, np.int64)
        padded[: len(self.source)] = np.arange(len(self.source))
        return self._fetch(tf.data.Dataset.from_tensor_slices(padded.reshape(-1, batch_size)[:, rows]), len(rows))

    def _fetch(self, indices, count: int) -> Iterator[Batch]:
        """Examples for a dataset of index batches `[count]`; index -1 gives the first example, masked."""
        tf = _tensorflow()
        if self.cached:
            with concurrent.futures.ThreadPoolExecutor(1) as ahead:
                pending = collections.deque()
                for index in indices.as_numpy_iterator():
                    pending.append(ahead.submit(self._gather, index))
                    if len(pending) > AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            return

        failures: list[Exception] = []
        read = self._tf_read(tf, failures)
        batches = indices.unbatch().map(read, num_parallel_calls=tf.data.AUTOTUNE)
        batches = batches.batch(count)
        try:
            yield from batches.prefetch(AHEAD).as_numpy_iterator()
        except tf.errors.OpError:
            if failures:
                raise failures[0] from None
            raise

    def _gather(self, index: np.ndarray) -> Batch:
        """The examples `index`, `[b]`, copied from the disk or from what the system holds of it."""
        rows = np.maximum(index, 0)
        return {name: np.take(array, rows, axis=0) for name, array in self._arrays.items()} | {"mask": index >= 0}

    def _tf_read(self, tf, failures: list[Exception]) -> Callable:
        """A function of an index tensor; keeps Python exceptions, which TensorFlow would turn into text."""

        def read(index):
            try:
                return list(self._decode(int(index)).values())
            except Exception as error:
                failures.append(error)
                raise

        @tf.autograph.experimental.do_not_convert
        def tf_read(index):
            types = [dtype for _, dtype in self._spec.values()]
            values = tf.numpy_function(read, [tf.maximum(index, 0)], types)
            example = {n: tf.ensure_shape(x, s) for (n, (s, _)), x in zip(self._spec.items(), values, strict=True)}
            return example | {"mask": index >= 0}

        return tf_read
