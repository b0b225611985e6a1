"""`--mode=check`: reads all images and labels once and lists what is wrong with them, before any training."""

import collections
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from unet_jax import data, models
from unet_jax.data import colors, images, windows
from unet_jax.errors import UserError, escape_line
from unet_jax.evaluation import pictures
from unet_jax.parallel.processes import print_on_main

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SHOWN = 24  # pictures on the contact sheet
SPLITS = ("train", "validation")  # and "test", if a third list names its images


class Example(NamedTuple):
    """One example; if it has a fault, nothing is known of its image."""

    split: str
    index: int  # in the split
    name: str  # of the split and the example
    fault: str = ""  # what is wrong with it; empty if nothing is
    size: tuple[int, int] = (0, 0)  # height and width of the image
    pixels: np.ndarray = np.zeros(0)  # of each class, and ignored ones, int64 `[K + 1]`
    digest: bytes = b""  # of the image


def check(config: "ConfigDict", sheet: epath.PathLike) -> bool:
    """Prints what a training with `config` would find, and draws the PNG `sheet`; returns whether there are no faults.

    Raises:
      UserError: there are no images, the configuration does not fit them, or the sheet cannot be written.
    """
    config = config.copy_and_resolve_references()
    sheet = epath.Path(sheet)
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.write_bytes(b"")
        sheet.unlink()
    except OSError as error:
        raise UserError(f"{sheet} cannot be written: {error}. Choose another --workdir") from error
    if not config.data.size:
        windows.check_size(config.augment.crop)
    data.infer_settings(config.data, print_on_main)
    lists = config.data.lists
    has_test = len(lists) == 3 and (epath.Path(config.data.root) / lists[2]).exists()
    splits = (*SPLITS, "test") if has_test else SPLITS
    sources = {split: data.load_with_faults(config.data, split) for split in splits}
    classes = sources["train"].classes
    places = [(source, split, index) for split, source in sources.items() for index in range(len(source))]
    examples = images.map_parallel(lambda place: _inspect(*place), places, "Checking")
    good = [example for example in examples if not example.fault]
    faults = list(dict.fromkeys(fault for source in sources.values() for fault in source.faults))
    faults += [example.fault for example in examples if example.fault]
    faults += _duplicates(good)

    counts = ", ".join(f"{sum(example.split == split for example in good)} {split}" for split in splits)
    print_on_main(f"checked   {len(examples)} pairs; usable: {counts}")
    if good:
        _print_sizes(config, classes, good)
        _print_labels(classes, good)
        _draw_sheet(sources, good, classes, sheet)
    for fault in faults:
        print_on_main(f"FAULT     {escape_line(fault)}")
    print_on_main(f"{len(faults)} fault(s)" if faults else "OK")
    return not faults


def _inspect(source: data.Source, split: str, index: int) -> Example:
    name = f"{split} {source.ids[index]}"
    try:
        image, label = source[index]
    except UserError as error:
        return Example(split, index, name, str(error))
    pixels = np.zeros(len(source.classes.names) + 1, np.int64)
    if source.classes.task == "multilabel":
        pixels[:-1] = (label == 1).sum((0, 1))
    else:
        values = np.bincount(label.ravel(), minlength=256)
        pixels[:-1] = values[: len(pixels) - 1]
        pixels[-1] = values[source.classes.ignore_label]
        if pixels[-1] == label.size:
            return Example(split, index, name, f"{name}: every pixel of its label is ignored")
    digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    return Example(split, index, name, "", image.shape[:2], pixels, digest)


def _duplicates(good: Sequence[Example]) -> list[str]:
    """A fault for each image that is in more than one split: its score would measure memory, not generalisation."""
    same = collections.defaultdict(list)
    for example in good:
        same[example.digest].append(example)
    return [
        f"the same image is in more than one split: {', '.join(example.name for example in found)}"
        for found in same.values()
        if len({example.split for example in found}) > 1
    ]


def _print_sizes(config: "ConfigDict", classes: data.Classes, good: Sequence[Example]) -> None:
    """Sizes and channels of the images, and how much the network pads them."""
    model = models.create(num_outputs=classes.num_outputs, **config.model)
    sizes = collections.Counter(example.size for example in good)
    shown = ", ".join(f"{w}x{h}: {count}" for (h, w), count in sizes.most_common(6))
    height, width = tuple(config.data.size) or tuple(config.augment.crop)
    kept = "kept" if config.data.scale == 1 else f"scaled by {config.data.scale:g}"
    becomes = f"resized to {width}x{height}" if config.data.size else f"{kept}, seen in windows of {width}x{height}"
    print_on_main(f"sizes     {shown}{', ...' if len(sizes) > 6 else ''} (width x height); {becomes}")
    print_on_main(f"channels  {classes.channels}")
    rows, columns = map(sum, model.margins((height, width)))
    mirrored = f"mirrored up to {width + columns}x{height + rows}" if rows or columns else "not padded"
    if not config.data.size:
        scaled = [images.scaled_size(example.size, config.data.scale) for example in good]
        small = sum(h < height or w < width for h, w in scaled)
        if small:
            print_on_main(f"note      {small} of {len(good)} images are smaller than a window: mirrored up to it")
    padded = sum(count for size, count in sizes.items() if any(map(sum, model.margins(size))))
    print_on_main(
        f"network   {width}x{height} is {mirrored}; at their own size {padded} of {len(good)} images are mirrored at "
        "their borders"
    )


def _print_labels(classes: data.Classes, good: Sequence[Example]) -> None:
    """A line for each class: its share of the pixels, and how many images it is in."""
    none = np.zeros((0, len(classes.names) + 1), np.int64)
    pixels = {split: np.array([e.pixels for e in good if e.split == split] or none) for split in SPLITS}
    totals = {split: counts.sum(0) for split, counts in pixels.items()}
    holding = {split: (counts > 0).sum(0) for split, counts in pixels.items()}
    names = (*classes.names, "ignored")
    width = max(map(len, names))
    print_on_main(f"{'class':{width}}  id   share of training  in images   share of validation  in images")
    for row, name in enumerate(names):
        if name == "ignored" and not any(total[row] for total in totals.values()):
            continue
        index = row if row < len(classes.names) else classes.ignore_label
        (a, b), (c, d) = ((totals[s][row] / max(totals[s].sum(), 1), holding[s][row]) for s in SPLITS)
        print_on_main(f"{name:{width}}  {index:3}  {a:17.3%}  {b:9}   {c:19.3%}  {d:9}")
    for row, name in enumerate(classes.names):
        if not totals["train"][row]:
            print_on_main(f"note      {name!r} is in no training image: it cannot be learned")
        elif not totals["validation"][row]:
            print_on_main(f"note      {name!r} is in no validation image: it will not be scored")


def _draw_sheet(
    sources: Mapping[str, data.Source], good: Sequence[Example], classes: data.Classes, sheet: epath.Path
) -> None:
    """A contact sheet of images spread over all splits, under the colours of their labels."""

    def small_overlay(example):
        image, label = sources[example.split][example.index]
        factor = min(200 / max(image.shape[:2]), 1)
        overlay = Image.fromarray(colors.overlay(image, label, classes))
        small = overlay.resize([max(1, round(n * factor)) for n in overlay.size], Image.Resampling.BOX)
        return example.name, np.asarray(small)

    chosen = [good[i] for i in pictures.spread(SHOWN, len(good))]
    picture = pictures.contact_sheet(images.map_parallel(small_overlay, chosen, "Drawing"), classes)
    with sheet.open("wb") as file:
        picture.save(file, "PNG")
    print_on_main(f"look at   {sheet}")
