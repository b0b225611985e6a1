"""The facts that `--mode=check` found, as lines for the screen."""

from collections.abc import Mapping
from typing import Any

from unet_jax.errors import escape_line

COLUMNS = 118  # of the table, unless a name of a class is very long
SIZES = 6  # sizes of images that are listed


def lines(facts: Mapping[str, Any]) -> list[str]:
    """Counts, sizes and a table of the classes; then notes, faults and warnings, and the verdict as the last line."""
    splits = facts["splits"]
    usable = ", ".join(f"{found['usable']} {split}" for split, found in splits.items())
    shown = [f"checked   {sum(found['pairs'] for found in splits.values())} pairs; usable: {usable}"]
    if facts["sheet"]:  # there are usable images
        shown += _sizes(facts) + _table(facts)
    shown += [f"note      {escape_line(text)}" for text in facts["notes"]]
    shown += [f"look at   {facts['sheet']}"] if facts["sheet"] else []
    shown += [f"FAULT     {escape_line(text)}" for text in facts["faults"]]
    shown += [f"warning   {escape_line(text)}" for text in facts["warnings"]]
    return [*shown, facts["verdict"]]


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    """Sizes and channels of the images, and how much the network pads them."""
    sizes, training = facts["sizes"], facts["training"]
    listed = ", ".join(f"{size['width']}x{size['height']}: {size['images']}" for size in sizes[:SIZES])
    listed += ", ..." * (len(sizes) > SIZES)
    at = f"{training['width']}x{training['height']}"
    becomes = f"{training['images']}, seen in windows of {at}" if training["windows"] else f"resized to {at}"
    padded = f"{training['padded_width']}x{training['padded_height']}"
    mirrored = "not padded" if padded == at else f"mirrored up to {padded}"
    count = sum(size["images"] for size in sizes)
    return [
        f"sizes     {listed} (width x height); {becomes}",
        f"channels  {facts['channels']}, {facts['dtype']}",
        *_values(facts["values"] or {}),
        f"network   {at} is {mirrored}; at their own size {facts['padded_at_own_size']} of {count} images are mirrored "
        "at their borders",
    ]


def _values(values: Mapping[str, Any]) -> list[str]:
    """A line for each channel."""
    named = [dict(zip(values, numbers, strict=True)) for numbers in zip(*values.values(), strict=True)]
    return [
        "values    channel {}: {min:g} to {max:g}, 99.8 % of them {low:g} to {high:g}; mean {mean:.4g}, deviation "
        "{deviation:.4g}".format(channel, **held)
        for channel, held in enumerate(named)
    ]


def _table(facts: Mapping[str, Any]) -> list[str]:
    """A line for each class: its share of the pixels, how many images it is in, and its objects in all splits."""
    width = max(len(name) for name in ("class", "ignored", *(row["name"] for row in facts["classes"])))
    head = f"{'class':{width}}   id  training  in images  validation  in images  objects  smallest     lost"
    shown = [f"{head}  smallest in"]
    for row in facts["classes"]:
        line = f"{row['name']:{width}}  {row['id']:3}{_shares(row['splits'])}"
        if row["objects"]:
            line += f"  {row['objects']:7}  {str(row['smallest']) + ' px':>8}  {row['lost']:7}"
            line += f"  {_fit(row['smallest_in'], COLUMNS - len(head) - 2)}"
        shown.append(line)
    if any(found["images"] for found in facts["ignored"].values()):
        shown.append(f"{'ignored':{width}}     {_shares(facts['ignored'])}")
    return shown


def _shares(splits: Mapping[str, Any]) -> str:
    train, validation = splits["train"], splits["validation"]
    return f"  {train['share']:8.3%}  {train['images']:9}  {validation['share']:10.3%}  {validation['images']:9}"


def _fit(name: str, length: int) -> str:
    """A name on one line, cut at its beginning, as names differ at their ends."""
    name, length = escape_line(name), max(length, 20)
    return name if len(name) <= length else "..." + name[3 - length :]
