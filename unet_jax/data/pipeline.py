"""Batches by tf.data: order, decode, resize, cache, batch, pad and mask.

The batch of a step is a pure function of (source, seed, step): every epoch is a full shuffle drawn from (seed, epoch),
epochs follow each other without a gap, and step s takes the positions [s * B, (s + 1) * B). A run goes on at any step
without reading what came before, and any number of processes sees the same global batches.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator

import numpy as np

from unet_jax.data import images
from unet_jax.data.source import Source

Batch = dict[str, np.ndarray]


def _tensorflow():
    """Imports TensorFlow, kept off the accelerators and quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def read_resized(source: Source, index: int, size: tuple[int, int], resize: str) -> tuple[np.ndarray, np.ndarray]:
    """One example at (height, width) `size`: image uint8 `[H, W, C]`, label uint8 `[H, W]` or `[H, W, K]`."""
    image, label = source.read(index)
    return images.resize_image(image, size, resize), images.resize_label(label, size)


class Pipeline:
    """Examples of one source at one size, held in memory where they fit.

    Attributes:
      source: the examples.
      size: height and width of the batches.
      resize: how images are resized, `bilinear` or `nearest`.
      cached: whether all examples are held in memory.
    """

    def __init__(self, source: Source, size: tuple[int, int], resize: str, cache_gib: float):
        """Reads everything once, in parallel, if the resized examples fit in `cache_gib`.

        Raises:
          UserError: an example cannot be read.
        """
        self.source, self.size, self.resize = source, tuple(size), resize
        image, label = read_resized(source, 0, self.size, resize)
        self._shapes = (image.shape, label.shape)
        self.cached = (image.nbytes + label.nbytes) * len(source) <= cache_gib * 2**30
        if not self.cached:
            return
        import tqdm

        arrays = [np.empty((len(source), *shape), np.uint8) for shape in self._shapes]

        def fill(index):
            for array, value in zip(arrays, read_resized(source, index, self.size, resize), strict=True):
                array[index] = value

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(fill, range(len(source)))
            list(tqdm.tqdm(done, "Reading", len(source), unit=" images", leave=False, delay=1))
        # Gathered by TensorFlow's own threads: NumPy would wait for the interpreter. One at a time, to hold few twice.
        self._held = []
        while arrays:
            self._held.append(_tensorflow().constant(arrays.pop(0)))

    def train_batches(self, batch_size: int, seed: int, start_step: int, rows: slice) -> Iterator[Batch]:
        """Endless training batches.

        Args:
          batch_size: of the global batch.
          seed: of the order.
          start_step: the step whose batch comes first.
          rows: the part of each global batch that this process feeds.

        Yields:
          `image` uint8 `[b, H, W, C]`, `label` uint8 `[b, H, W]` or `[b, H, W, K]`, `mask` bool `[b]`, all true.
        """
        tf = _tensorflow()
        count = len(self.source)

        def shuffled(epoch):
            pair = tf.stack([tf.constant(seed, tf.int64), epoch])
            return tf.data.Dataset.from_tensor_slices(
                tf.random.experimental.stateless_shuffle(tf.range(count, dtype=tf.int64), seed=pair)
            )

        start = start_step * batch_size
        order = tf.data.Dataset.range(start // count, np.iinfo(np.int64).max).flat_map(shuffled)
        order = order.skip(start % count).batch(batch_size, drop_remainder=True)
        return self._fetch(order.map(lambda index: index[rows.start : rows.stop]))

    def eval_batches(self, batch_size: int, rows: slice) -> Iterator[Batch]:
        """Every example once, in order; the last batch is filled up with examples whose `mask` is false."""
        tf = _tensorflow()
        padded = np.full(-(-len(self.source) // batch_size) * batch_size, -1, np.int64)
        padded[: len(self.source)] = np.arange(len(self.source))
        return self._fetch(tf.data.Dataset.from_tensor_slices(padded.reshape(-1, batch_size)[:, rows]))

    def _fetch(self, indices) -> Iterator[Batch]:
        """Examples for a dataset of index batches `[b]`; index -1 gives the first example, masked."""
        tf = _tensorflow()
        if self.cached:

            def gather(index):
                row = tf.maximum(index, 0)
                image, label = (tf.gather(held, row) for held in self._held)
                return {"image": image, "label": label, "mask": index >= 0}

            yield from indices.map(gather).prefetch(2).as_numpy_iterator()
            return

        failures: list[Exception] = []
        read = self._tf_read(tf, failures)
        batches = indices.unbatch().map(read, num_parallel_calls=tf.data.AUTOTUNE)
        batches = batches.batch(indices.element_spec.shape[0])
        try:
            yield from batches.prefetch(2).as_numpy_iterator()
        except tf.errors.OpError:
            if failures:
                raise failures[0] from None
            raise

    def _tf_read(self, tf, failures: list[Exception]) -> Callable:
        """A function of an index tensor; keeps Python exceptions, which TensorFlow would turn into text."""

        def read(index):
            try:
                return read_resized(self.source, int(index), self.size, self.resize)
            except Exception as error:
                failures.append(error)
                raise

        def tf_read(index):
            image, label = tf.numpy_function(read, [tf.maximum(index, 0)], (tf.uint8, tf.uint8))
            image, label = (tf.ensure_shape(x, s) for x, s in zip((image, label), self._shapes, strict=True))
            return {"image": image, "label": label, "mask": index >= 0}

        return tf_read
