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


class Pipeline:
    """Examples of one source at one size, held in memory where they fit.

    Attributes:
      source: the examples.
      cached: whether all examples are held in memory.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        resize: str,
        cache_gib: float,
        weigh: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        """Reads everything once, in parallel, if the resized examples fit in `cache_gib`.

        Args:
          source: the examples.
          size: height and width of the batches.
          resize: how images are resized, `bilinear` or `nearest`.
          cache_gib: how much memory the examples may fill.
          weigh: makes the loss weights float32 `[H, W]` of a label; None is none.

        Raises:
          UserError: an example cannot be read.
        """
        self.source, self._size, self._resize, self._weigh = source, tuple(size), resize, weigh
        first = self.read(0)
        self._spec = {name: (value.shape, value.dtype) for name, value in first.items()}
        self.cached = sum(value.nbytes for value in first.values()) * len(source) <= cache_gib * 2**30
        if not self.cached:
            return
        import tqdm

        arrays = {name: np.empty((len(source), *shape), dtype) for name, (shape, dtype) in self._spec.items()}

        def fill(index):
            for name, value in self.read(index).items():
                arrays[name][index] = value

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(fill, range(len(source)))
            list(tqdm.tqdm(done, "Reading", len(source), unit=" images", leave=False, delay=1))
        # Gathered by TensorFlow's own threads: NumPy would wait for the interpreter. One at a time, to hold few twice.
        self._held = {name: _tensorflow().constant(arrays.pop(name)) for name in self._spec}

    def read(self, index: int) -> Batch:
        """One example: `image` uint8 `[H, W, C]`, `label` uint8 `[H, W]` or `[H, W, K]`, maybe `weight` `[H, W]`."""
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

            @tf.autograph.experimental.do_not_convert
            def gather(index):
                row = tf.maximum(index, 0)
                return {name: tf.gather(held, row) for name, held in self._held.items()} | {"mask": index >= 0}

            yield from indices.map(gather).prefetch(2).as_numpy_iterator()
            return

        failures: list[Exception] = []
        read = self._tf_read(tf, failures)
        batches = indices.unbatch().map(read, num_parallel_calls=tf.data.AUTOTUNE)
        batches = batches.batch(count)
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
                return list(self.read(int(index)).values())
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
