"""Scores at the images' own sizes: what `--mode=predict` would write, against the masks as they were drawn.

The other scores compare at `config.data.size`, where the network works: a thing that the resize removed is missing in
the prediction and in the mask alike.
"""

import numpy as np

from unet_jax import data
from unet_jax.inference import forward, trained
from unet_jax.metrics import confusion
from unet_jax.parallel import processes


def count(network: trained.Trained, source: data.Source, tta: str) -> np.ndarray | None:
    """Confusion counts of each image of `source`, int64 `[N, K, K]`, or `[N, K, 2, 2]` of overlapping masks.

    None if all images have the size of the training, so that there is nothing to add. The probabilities of an image are
    never held whole.

    Args:
      network: of the task of the source.
      source: the images, at their own size.
      tta: test-time augmentation, one of `forward.VIEWS`.
    """
    if source.size_range() == (network.size, network.size):
        return None
    import tqdm

    task, num_classes, ignore_label = network.classes.task, len(network.classes.names), network.classes.ignore_label
    counts = []
    quiet = None if processes.is_main() else True  # None: unless in a terminal
    for index in tqdm.trange(len(source), desc="Scoring at their own size", unit=" images", disable=quiet):
        image, label = source[index]
        total = 0
        for rows, band in network.predict_bands(image, tta=tta):
            mask = label[rows] != ignore_label
            total += confusion.count(forward.to_label(band, task), label[rows], mask, task, num_classes)
        counts.append(total)
    return np.stack(counts)
