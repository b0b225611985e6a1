"""Your own images: folders of images and masks, paired by name.

`config.data.root` holds `images/` and `masks/` (or the folders in `config.data.images` and `config.data.masks`), with
or without subfolders. The mask of `images/a/x.jpg` is `masks/a/x.png` or `masks/a/x_mask.png`. Images are PNG, JPEG,
TIFF, GIF, BMP, WebP, JPEG 2000 or arrays (`.npy`): grey, coloured or of any number of channels, of 8 bits, 16 bits or
floats. Masks are PNG, TIFF, GIF, BMP or arrays: grey, with a palette, or coloured.

`config.data.labels` lists the values in the masks. If it is empty, it is read off the masks, see `mask_values`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unet_jax.data import images, labels, mask_values, pairing, pixel_sizes, reading
from unet_jax.data.source import Classes, Source, bullets, shorten
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
        image = reading.read_image(pair.image, config)
        mask = reading.read_any(pair.mask, not label_map.is_colored, config.orientation)
        pairing.check_same_size(image, mask, pair, config)
        label = label_map.apply(mask, str(pair.mask))
        if image.dtype == np.float32:
            label[np.isnan(image).any(-1)] = meaning.ignore_label
        return image, label

    def read_size(index):
        header = reading.read_header(chosen[index].image, config.pages)
        return header.upright_size() if config.orientation == "upright" else header.size

    def factors(index):
        return pixel_sizes.factors(config, pixel_sizes.read(chosen[index].image))

    files = tuple(file for pair in chosen for file in (pair.image, pair.mask))
    return Source(meaning, [pair.id for pair in chosen], read, tuple(faults), files, None, read_size, factors)


def classes(config) -> Classes:
    """The meaning of the labels, for `config.labels`, `config.channels` and `config.variant`, which must be set."""
    task = check_choice("config.data.variant", config.variant, ("multiclass", "binary"))
    if not config.labels or not config.channels:
        raise UserError("config.data.labels and config.data.channels are not set; they can be inferred from the files")
    _check(config)
    found = labels.parse(config.labels).classes(task, config.channels)
    return dataclasses.replace(found, dtype=config.dtype or "uint8")


def _check(config) -> None:
    """Checks `channels`."""
    if config.channels < 0:
        raise UserError(f"config.data.channels = {config.channels} must be positive, or 0 to infer it from the files")


def infer_settings(config, notify: Callable[[str], None]) -> None:
    """Infers `labels`, `channels` and `dtype` from the files, as far as they are not set; see `data`.

    Images of 8 bits leave `dtype` empty.

    Raises:
      UserError: no images, images that do not go together, or masks whose labels cannot be guessed.
    """
    _check(config)
    if config.labels:
        labels.parse(config.labels)
        if config.channels and config.dtype:
            return
    pairs, _ = pairing.find(config)
    if not config.labels:
        config.labels = _guess_labels(pairs, notify)
    read = lambda pair: (pair.image, reading.read_header(pair.image, config.pages))
    headers = dict(_map_readable(read, pairs, "Reading images"))
    _tell_what_is_left_out(headers, config.orientation, notify)
    if not config.channels:
        held = _group(headers, lambda header: header.channels)
        if len(held) > 1 and not held.keys() <= {1, 3}:
            kinds = "; ".join(f"{count} channel(s): {shorten(files)}" for count, files in sorted(held.items()))
            raise UserError(f"the images differ in their channels: {kinds}. Convert them, or move some away")
        config.channels = max(held)
        mixed = f" ({len(held[1])} of {len(headers)} are grey)" if len(held) > 1 else ""
        notify(f"Images of {config.channels} channel(s){mixed}")
    if not config.dtype:
        config.dtype = _common_dtype(headers, config.value_range)
        if config.dtype:
            notify(f"Images of {DEPTH[config.dtype]}")


DEPTH = {"uint8": "8 bits", "uint16": "16 bits", "float32": "32-bit floats"}


def _common_dtype(headers: Mapping[Any, reading.Header], value_range: Sequence[float]) -> str:
    """The `config.data.dtype` of images; "" for 8 bits, to which 16 bits may be converted by a `value_range`."""
    held = _group(headers, lambda header: header.dtype)
    has_nodata = any(header.has_nodata for header in headers.values())
    if len(held) > 1 and not (held.keys() == {"uint8", "uint16"} and value_range and not has_nodata):
        kinds = "; ".join(f"{DEPTH[dtype]}: {shorten(files)}" for dtype, files in sorted(held.items()))
        remedy = ", or set config.data.value_range=(low, high), the 16-bit values that become 0 and 255"
        remedy = remedy if held.keys() == {"uint8", "uint16"} and not has_nodata else ""
        raise UserError(f"the images differ in their depth: {kinds}. Convert them{remedy}")
    if has_nodata:
        return "float32"  # in which a pixel without data is NaN
    return "" if "uint8" in held else next(iter(held))


def _tell_what_is_left_out(
    headers: Mapping[Any, reading.Header], orientation: str, notify: Callable[[str], None]
) -> None:
    """Notes of alpha channels, and of photos that their EXIF data would turn."""
    alpha = [file for file, header in headers.items() if header.has_alpha]
    if alpha:
        notify(f"note: {len(alpha)} image(s) have an alpha channel, which is left out, e.g. {alpha[0]}")
    turned = [file for file, header in headers.items() if header.orientation != 1]
    if turned and orientation == "as_stored":
        notify(
            f"note: the EXIF data of {len(turned)} photo(s) say they are rotated, e.g. {turned[0]}. Pixels are read as "
            "stored. If the masks were drawn on the upright view, set config.data.orientation='upright'"
        )


def _group(headers: Mapping[Any, reading.Header], key: Callable[[reading.Header], Any]) -> dict[Any, list[str]]:
    """The names of the files of each kind of header."""
    groups: dict[Any, list[str]] = {}
    for file, header in headers.items():
        groups.setdefault(key(header), []).append(str(file))
    return groups


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
