"""`--mode=check`: reads all images and labels once and says what a training would see, and what is wrong with it."""

import collections
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from unet_jax import data, models
from unet_jax.data import images, pixel_sizes, windows
from unet_jax.errors import UserError
from unet_jax.evaluation import check_sheet, check_text, duplicates, evaluate, inspection, recipe
from unet_jax.evaluation.inspection import Example
from unet_jax.inference import normalization
from unet_jax.parallel.processes import print_on_main

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SPLITS = ("train", "validation")  # and "test", if a third list names its images
FEW_TRAINING, FEW_VALIDATION = 10, 5  # images, below which a warning is due
LOST = 0.05  # share of the objects of a class that may be lost before a warning is due: masks have specks
LISTED = 4  # classes in the warning about them
SHIFT = 0.1  # relative change of the share of a class by the resize, above which it is told

Facts = dict[str, Any]  # JSON values, as `--json` prints them


def check(config: "ConfigDict", sheet: epath.PathLike, as_json: bool = False) -> bool:
    """Prints what a training with `config` would find, and draws the PNG `sheet`; returns whether there are no faults.

    With `as_json`, standard output is one JSON object; what else would be printed goes to standard error.

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
    recipe.check_kept(config)
    if not config.data.size and not config.auto:
        windows.check_size(config.augment.crop)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        facts = _find(config, sheet)
    if as_json:
        print_on_main(json.dumps(facts, indent=1))
    else:
        print_on_main("\n".join(check_text.lines(facts)))
    return not facts["faults"]


def _find(config: "ConfigDict", sheet: epath.Path) -> Facts:
    """Reads everything and draws the sheet."""
    data.infer_settings(config.data, print_on_main)
    chosen = _read_recipe(config) if config.auto else []
    lists = config.data.lists
    has_test = len(lists) == 3 and (epath.Path(config.data.root) / lists[2]).exists()
    splits = (*SPLITS, "test") if has_test else SPLITS
    sources = {split: data.load_with_faults(config.data, split) for split in splits}
    classes = sources["train"].classes
    data.check_show(config.data, classes)
    places = [(source, split, index, config.data) for split, source in sources.items() for index in range(len(source))]
    examples = images.map_parallel(lambda place: inspection.inspect(*place), places, "Checking")
    good = [example for example in examples if not example.fault]
    faults = list(dict.fromkeys(fault for source in sources.values() for fault in source.faults))
    faults += [example.fault for example in examples if example.fault]
    contradictions, notes = duplicates.same_images(good)
    faults += contradictions
    copies = []
    if len(good) > duplicates.MAX_COMPARED:
        notes.append(f"more than {duplicates.MAX_COMPARED} images: not searched for near-duplicates")
    else:
        copies = duplicates.near_copies(good)

    facts = {
        "splits": {
            split: {"pairs": len(source), "usable": sum(example.split == split for example in good)}
            for split, source in sources.items()
        },
        **_sizes(config, classes, good),
        "channels": classes.channels,
        "dtype": classes.dtype,
        "values": _values(config, sources["train"], faults),
        "task": classes.task,
        "classes": [_describe_class(k, name, good, splits) for k, name in enumerate(classes.names)],
        "ignored": _describe_pixels(len(classes.names), good, splits),
        "near_duplicates": [
            {"first": copy.first.name, "second": copy.second.name, "distance": copy.distance} for copy in copies
        ],
        "faults": faults,
    }
    if config.auto:
        facts["recipe"] = [{"fields": dict(choice.values), "why": choice.why} for choice in chosen]
    facts["warnings"], more = _judge(facts, good, copies)
    facts["notes"] = notes + more
    count = len(facts["warnings"])
    verdict = f"{len(faults)} fault(s)" if faults else "OK" + f", with {count} warning(s)" * (count > 0)
    if good:
        check_sheet.draw(sources, good, copies, classes, config.data.show, sheet)
    return {**facts, "sheet": str(sheet) if good else None, "verdict": verdict}


def _read_recipe(config: "ConfigDict") -> list[recipe.Choice]:
    """What a training would read off the images, set in `config`; nothing if an image cannot be read."""
    try:
        return recipe.apply(config, data.load(config.data, "train"), print_on_main)
    except UserError as error:
        print_on_main(f"auto     no recipe before this is put right: {str(error).partition(chr(10))[0]}")
        return []


def _values(config: "ConfigDict", source: data.Source, faults: Sequence[str]) -> Facts | None:
    """What values the training images hold, as the training finds them, if it needs to know and can read them."""
    if faults or not normalization.needs_values(config.data, source.classes):
        return None
    return evaluate.open_images(source, config, source.classes).values()


def _describe_class(k: int, name: str, good: Sequence[Example], splits: Sequence[str]) -> Facts:
    """Shares, images and objects of a class."""
    having = [example for example in good if example.objects.count[k]]
    losing = sorted((e for e in good if e.objects.lost[k]), key=lambda e: -e.objects.lost[k])
    smallest = min(having, key=lambda e: e.objects.smallest[k], default=None)
    return {
        "id": k,
        "name": name,
        "splits": _describe_pixels(k, good, splits),
        "objects": int(sum(e.objects.count[k] for e in having)),  # in all splits; none of the background
        "smallest": int(smallest.objects.smallest[k]) if smallest else None,
        "smallest_in": smallest.name if smallest else None,
        "lost": int(sum(e.objects.lost[k] for e in losing)),
        "largest_lost": int(max((e.objects.largest_lost[k] for e in losing), default=0)),
        "most_lost_in": [e.name for e in losing[:2]],
    }


def _describe_pixels(row: int, good: Sequence[Example], splits: Sequence[str]) -> Facts:
    """For each split, the share of a class, or of ignored pixels, and the number of images that have any."""
    facts = {}
    for split in splits:
        chosen = [example for example in good if example.split == split]
        shares = {}
        for key, counts in (("share", [e.pixels for e in chosen]), ("share_in_training", [e.seen for e in chosen])):
            total = np.sum(counts, 0) if counts else np.zeros(row + 1)
            shares[key] = float(total[row] / max(total.sum(), 1))
        facts[split] = {**shares, "images": sum(int(e.pixels[row] > 0) for e in chosen)}
    return facts


def _sizes(config: "ConfigDict", classes: data.Classes, good: Sequence[Example]) -> Facts:
    """Sizes of the images, at which size training sees them, and how much the network pads them."""
    model = models.create(num_outputs=classes.num_outputs, **config.model)
    sizes = collections.Counter(example.size for example in good)
    height, width = tuple(config.data.size) or tuple(config.augment.crop)
    rows, columns = map(sum, model.margins((height, width)))
    trained = [example.trained_size for example in good]
    return {
        "sizes": [{"height": h, "width": w, "images": count} for (h, w), count in sizes.most_common()],
        "training": {
            "height": height,
            "width": width,
            "windows": not config.data.size,  # of the images, rather than all of them resized
            "scale": config.data.scale,
            "pixel_size": config.data.pixel_size or None,  # that images are scaled to, if they are
            "images": pixel_sizes.describe(config.data),  # in words, of windows
            "padded_height": height + rows,
            "padded_width": width + columns,
            "smaller_than_window": 0 if config.data.size else sum(h < height or w < width for h, w in trained),
        },
        "padded_at_own_size": sum(count for size, count in sizes.items() if any(map(sum, model.margins(size)))),
    }


def _judge(facts: Facts, good: Sequence[Example], copies: Sequence[duplicates.NearCopy]) -> tuple[list[str], list[str]]:
    """Warnings, each with its remedy, and notes, which need no action."""
    warnings, notes = [], []
    training, rows = facts["training"], facts["classes"]
    pairs = {split: found["pairs"] for split, found in facts["splits"].items()}
    if pairs["train"] < FEW_TRAINING:
        warnings.append(f"only {pairs['train']} training image(s): expect poor results on new images. Label more")
    if pairs["validation"] < FEW_VALIDATION:
        warnings.append(
            f"only {pairs['validation']} validation image(s): scores will depend on which these are. Hold out more by "
            "--config.data.validation or --config.data.lists, or label more"
        )
    if not good:
        return warnings, notes
    absent = [row["name"] for row in rows if not row["splits"]["train"]["images"]]
    if absent:
        warnings.append(
            f"in no training image, so not learned: {_quoted(absent)}. Add images that show it, or move some here from "
            "another split (--config.data.lists)"
        )
    unscored = [r["name"] for r in rows if r["name"] not in absent and not r["splits"]["validation"]["images"]]
    if unscored:
        warnings.append(
            f"in no validation image, so not scored: {_quoted(unscored)}. Choose the validation images by "
            "--config.data.lists, or hold out more by --config.data.validation"
        )
    found, remedy = _lost_objects(rows, training)
    warnings += [f"{found}: {remedy}"] if remedy else []
    notes += [found] if found and not remedy else []
    if copies:
        shown = "; ".join(f"{copy.first.name} and {copy.second.name}" for copy in copies[:2])
        warnings.append(
            f"{len(copies)} image(s) are near-duplicates of one in another split, e.g. {shown}: remove them, or keep "
            "them in one split (--config.data.group, --config.data.lists)"
        )
    flat = [example.name for example in good if not example.hashes.contrast]
    if flat:
        notes.append(f"{len(flat)} image(s) have one value throughout, e.g. {flat[0]}")
    if training["smaller_than_window"]:
        notes.append(
            f"{training['smaller_than_window']} of {len(good)} images are smaller than a window: mirrored up to it"
        )
    shifted = [
        f"{row['name']} {found['share']:.3%} -> {found['share_in_training']:.3%}"
        for row in rows
        if abs((found := row["splits"]["train"])["share_in_training"] - found["share"]) > SHIFT * found["share"]
    ]
    if shifted:
        notes.append(f"shares of the training pixels change {_resized(training)}: {', '.join(shifted)}")
    return warnings, notes


def _lost_objects(rows: Sequence[Facts], training: Facts) -> tuple[str, str]:
    """Which classes lose objects, most of them first, and the remedy; empty if there are none, or only a few specks."""

    share = lambda row: row["lost"] / row["objects"]
    losing = [row for row in rows if row["lost"]]
    serious = [row for row in losing if share(row) > LOST]
    chosen = sorted(serious or losing, key=share, reverse=True)
    if not chosen:
        return "", ""
    parts = [
        f"{row['name']!r} {'all' if row['lost'] == row['objects'] else row['lost']} of {row['objects']} (up to "
        f"{row['largest_lost']} px), e.g. in {row['most_lost_in'][0]}"
        for row in chosen[:LISTED]
    ]
    more = f"; and of {len(chosen) - LISTED} more classes" if len(chosen) > LISTED else ""
    text = f"objects lost {_resized(training)}: {'; '.join(parts)}{more}"
    if not serious:
        return text, ""
    if training["windows"]:
        field, change = ("pixel_size", "lower") if training["pixel_size"] else ("scale", "raise")
        return text, f"{change} --config.data.{field} ({training[field]:g})"
    return text, 'choose a larger --config.data.size, or --config.data.size="()" --config.augment.crop="(256,256)"'


def _resized(training: Facts) -> str:
    if training["windows"]:
        return f"when images are {training['images']}"
    return f"when images are resized to {training['width']}x{training['height']}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
