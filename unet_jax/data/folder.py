"""Your own images: folders of images and masks, paired by name.

`config.data.root` holds `images/` and `masks/` (or the folders in `config.data.images` and `config.data.masks`), with
or without subfolders. The mask of `images/a/x.jpg` is `masks/a/x.png` or `masks/a/x_mask.png`. Images are PNG, JPEG,
TIFF (8 or 16 bits), GIF, BMP, WebP or JPEG 2000, grey or coloured; masks are PNG, TIFF, GIF or BMP: grey, with a
palette, or coloured.

`config.data.labels` lists the values in the masks. If it is empty, it is read off the masks, see `mask_values`.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from unet_jax.data import images, labels, mask_values, pairing
from unet_jax.data.source import Classes, Source, bullets
from unet_jax.errors import UserError, check_choice


def load(config, split: str) -> Source:
    """The source of `split`: `train`, `validation`, `test` (only with `config.lists`) or `all`.

    Raises:
      UserError: no images under `config.root`; an invalid label map; a missing or invalid list; a name without group;
        an empty split.
    """
    check_choice("--split", split, pairing.SPLITS)
    meaning, label_map = classes(config), labels.parse(config.labels)
    pairs, faults = pairing.find(config)
    chosen = pairing.choose_split(pairs, config, split, faults)
    if not chosen:
        remedy = bullets(faults) if config.lists else pairing.split_remedy(pairs, config)
        raise UserError(f"config.data.root = {config.root!r}: {len(pairs)} pair(s) leave none for {split}.{remedy}")

    def read(index):
        pair = chosen[index]
        image = images.read_image(pair.image, config.channels, config.value_range)
        mask = images.read_any(pair.mask, indices=not label_map.is_colored)
        images.check_same_size(image, mask, pair)
        return image, label_map.apply(mask, str(pair.mask))

    def read_size(index):
        return images.read_header(chosen[index].image).size

    files = tuple(file for pair in chosen for file in (pair.image, pair.mask))
    return Source(meaning, [pair.id for pair in chosen], read, tuple(faults), files, read_size=read_size)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.labels`, `config.channels` and `config.variant`, which must be set."""
    task = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    if not config.labels or not config.channels:
        raise UserError("config.data.labels and config.data.channels are not set; they can be inferred from the files")
    _check(config)
    return labels.parse(config.labels).classes(task, config.channels)


def _check(config) -> None:
    """Checks `channels`."""
    if config.channels not in (0, 1, 3):
        raise UserError(
            f"config.data.channels = {config.channels} must be 1 (grey), 3 (colours), or 0 to infer it from the files"
        )


def infer_settings(config, notify: Callable[[str], None]) -> None:
    """Infers `labels`, `channels` and `value_range` from the files, as far as they are not set; see `data`.

    Raises:
      UserError: no images, or masks whose labels cannot be guessed.
    """
    _check(config)
    if config.labels:
        labels.parse(config.labels)
        if config.channels and config.value_range:
            return
    pairs, _ = pairing.find(config)
    if not config.labels:
        config.labels = _guess_labels(pairs, notify)
    if config.channels and config.value_range:
        return
    is_grey, rotated, histogram = _inspect_images([pair.image for pair in pairs])
    if rotated:
        notify(
            f"note: the EXIF data of {len(rotated)} photo(s) say they are rotated, e.g. {rotated[0]}. Pixels are read "
            "as stored: if the masks were drawn on the rotated view, rotate the pixels of the photos"
        )
    if not config.channels:
        config.channels = 1 if all(is_grey) else 3
        mixed = f" ({sum(is_grey)} of {len(is_grey)} are grey)" if any(is_grey) and not all(is_grey) else ""
        notify(f"Images of {config.channels} channel(s){mixed}")
    if not config.value_range and not histogram.any():
        config.value_range = (0, 65535)  # no 16-bit images
    elif not config.value_range:
        share = histogram.cumsum() / histogram.sum()
        low, high = (int(np.searchsorted(share, quantile)) for quantile in (0.001, 0.999))
        config.value_range = (low, max(high, low + 1))
        notify(
            f"16-bit images: values {config.value_range[0]} to {config.value_range[1]}, all but 0.2 % of the pixels, "
            "are scaled to 0..255. Set config.data.value_range to change this"
        )


def _guess_labels(pairs: Sequence[images.Pair], notify: Callable[[str], None]) -> tuple[str, ...]:
    """Entries of `config.data.labels` for the values in the masks of `pairs`, see `mask_values.guess`."""
    masks = _map_readable(lambda pair: mask_values.inspect(pair.mask), pairs, "Reading masks")
    guessed, held = mask_values.guess(masks)
    shown = [f"\n  {labels.format_value(v)} is in {n} of {len(masks)} masks" for v, n in sorted(held.items())]
    notify(
        "Labels, as guessed from the masks; to change them or to name the classes, set\n"
        f'  --config.data.labels="{guessed!r}"' + "".join(shown)
    )
    return guessed


def _inspect_images(files: Sequence[epath.Path]) -> tuple[list[bool], list[epath.Path], np.ndarray]:
    """Of the readable images: which are grey; those rotated by EXIF; counts of all 16-bit values, int64 `[65536]`."""
    histogram, lock = np.zeros(65536, np.int64), threading.Lock()

    def inspect(file):
        header = images.read_header(file)
        if header.is_16_bit:
            counts = np.bincount(images.read_any(file).ravel(), minlength=65536)
            with lock:
                np.add(histogram, counts, out=histogram)
        return header.is_grey, file if header.orientation != 1 else None

    found = _map_readable(inspect, files, "Reading images")
    return [is_grey for is_grey, _ in found], [file for _, file in found if file], histogram


def _map_readable(function: Callable, items: Iterable, title: str) -> list[Any]:
    """Like `images.map_parallel`, but skips unreadable files, unless all are: reading the examples will name them."""

    def try_to(item):
        try:
            return function(item), None
        except UserError as error:
            return None, error

    results = images.map_parallel(try_to, items, title)
    if all(error for _, error in results):
        raise UserError(f"none of the {len(results)} files can be read, the first because: {results[0][1]}")
    return [value for value, error in results if error is None]
