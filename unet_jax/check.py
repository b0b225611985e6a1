"""`--mode=check`: reads all images and labels once and says what is wrong with them, before any training."""

import collections
import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from unet_jax import data, draw, mesh
from unet_jax.data import folder
from unet_jax.errors import UserError
from unet_jax.models import unet

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SHOWN = 24  # pictures on the contact sheet
SPLITS = ("train", "validation")  # and what a third list names, for testing


class Example(NamedTuple):
    """What one example was found to be; `fault` alone where it cannot be used."""

    name: str
    fault: str = ""
    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray = np.zeros(0)  # int64 [K + 1], per class, and ignored
    digest: bytes = b""


def check(config: "ConfigDict", sheet: epath.PathLike) -> bool:
    """Prints what a training of `config` would find, and draws a contact sheet.

    Args:
      config: as `configs/default.py` describes it.
      sheet: where to write the PNG.

    Returns:
      whether all is well.

    Raises:
      UserError: no images, or a configuration that says nothing about them.
    """
    config = config.copy_and_resolve_references()
    sheet = epath.Path(sheet)
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.write_bytes(b"")
        sheet.unlink()
    except OSError as error:
        raise UserError(f"{sheet} cannot be written: {error}. Choose another --workdir") from error
    data.settle(config.data, mesh.say)
    lists = config.data.lists
    has_test = len(lists) == 3 and (epath.Path(config.data.root) / lists[2]).exists()
    splits = (*SPLITS, "test") if has_test else SPLITS
    sources = {split: data.survey(config.data, split) for split in splits}
    classes = sources["train"].classes
    places = [(split, index) for split in splits for index in range(len(sources[split]))]
    examples = folder.each(lambda place: _look(sources[place[0]], *place), places, "Checking")
    good = [(split, example) for (split, _), example in zip(places, examples, strict=True) if not example.fault]
    faults = list(dict.fromkeys(fault for source in sources.values() for fault in source.faults))
    faults += [example.fault for example in examples if example.fault]
    faults += _duplicates(good)

    counts = ", ".join(f"{sum(split == s for s, _ in good)} for {split}" for split in splits)
    mesh.say(f"checked   {len(places)} pairs; good are {counts}")
    if good:
        _say_sizes(config, classes, good)
        _say_labels(classes, good)
        _draw(sources, places, examples, classes, sheet)
    for fault in faults:
        mesh.say(f"FAULT     {fault}")
    mesh.say(f"{len(faults)} fault(s)" if faults else "OK")
    return not faults


def _look(source: data.Source, split: str, index: int) -> Example:
    name = f"{split} {source.ids[index]}"
    try:
        image, label = source.read(index)
    except UserError as error:
        return Example(name, str(error))
    counts = np.zeros(len(source.classes.names) + 1, np.int64)
    if source.classes.task == "multilabel":
        counts[:-1] = (label == 1).sum((0, 1))
    else:
        values = np.bincount(label.ravel(), minlength=256)
        counts[:-1] = values[: len(counts) - 1]
        counts[-1] = values[source.classes.ignore_label]
        if counts[-1] == label.size:
            return Example(name, f"{name}: every pixel of its label is ignored")
    digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    return Example(name, "", image.shape[:2], counts, digest)


def _duplicates(good: list[tuple[str, Example]]) -> list[str]:
    """Images that stand in both splits, so that the validation would measure memory."""
    same = collections.defaultdict(list)
    for split, example in good:
        same[example.digest].append((split, example.name))
    return [
        f"the same image is in both splits: {', '.join(name for _, name in found)}"
        for found in same.values()
        if len({split for split, _ in found}) > 1
    ]


def _say_sizes(config, classes, good) -> None:
    model = unet.create(classes.num_outputs, **config.model)
    sizes = collections.Counter(example.size for _, example in good)
    shown = ", ".join(f"{w}x{h}: {count}" for (h, w), count in sizes.most_common(6))
    height, width = config.data.size
    mesh.say(f"sizes     {shown}{', ...' if len(sizes) > 6 else ''} (width x height); resized to {width}x{height}")
    mesh.say(f"channels  {classes.channels}")
    given = [n + sum(around) for n, around in zip(config.data.size, model.margins(config.data.size), strict=True)]
    padded = sum(count for size, count in sizes.items() if any(map(sum, model.margins(size))))
    mesh.say(
        f"network   {width}x{height} is "
        + ("taken as it is" if given == [height, width] else f"mirrored up to {given[1]}x{given[0]}")
        + f"; at their own size {padded} of {len(good)} images have to be padded, by mirroring"
    )


def _say_labels(classes, good) -> None:
    empty = np.zeros((0, len(classes.names) + 1), np.int64)
    pixels = {split: np.array([e.pixels for s, e in good if s == split] or empty) for split in SPLITS}
    totals = {split: counts.sum(0) for split, counts in pixels.items()}
    holding = {split: (counts > 0).sum(0) for split, counts in pixels.items()}
    width = max(map(len, (*classes.names, "ignored")))
    mesh.say(f"{'class':{width}}  id   share of training  in images   share of validation  in images")
    for row, name in enumerate((*classes.names, "ignored")):
        if name == "ignored" and not any(total[row] for total in totals.values()):
            continue
        index = row if row < len(classes.names) else classes.ignore_label
        (a, b), (c, d) = ((totals[s][row] / max(totals[s].sum(), 1), holding[s][row]) for s in SPLITS)
        mesh.say(f"{name:{width}}  {index:3}  {a:17.3%}  {b:9}   {c:19.3%}  {d:9}")
    for row, name in enumerate(classes.names):
        if not totals["train"][row]:
            mesh.say(f"note      no training image holds {name!r}: it cannot be learned")
        elif not totals["validation"][row]:
            mesh.say(f"note      no validation image holds {name!r}: it will not be scored")


def _draw(sources, places, examples, classes, sheet: epath.Path) -> None:
    """Overlays of images spread over both splits."""
    good = [place for place, example in zip(places, examples, strict=True) if not example.fault]
    chosen = [good[i] for i in np.unique(np.linspace(0, len(good) - 1, min(SHOWN, len(good))).round().astype(int))]

    def small_overlay(place):
        split, index = place
        image, label = sources[split].read(index)
        factor = min(200 / max(image.shape[:2]), 1)
        picture = Image.fromarray(draw.overlay(image, label, classes))
        small = picture.resize([max(1, round(n * factor)) for n in picture.size], Image.Resampling.BOX)
        return f"{split} {sources[split].ids[index]}", np.asarray(small)

    picture = draw.contact_sheet(folder.each(small_overlay, chosen, "Drawing"), classes)
    with sheet.open("wb") as file:
        picture.save(file, "PNG")
    mesh.say(f"look at   {sheet}")
