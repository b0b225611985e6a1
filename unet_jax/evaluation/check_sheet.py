"""The contact sheet of `--mode=check`: first the examples to look at and why, then others of all splits."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from unet_jax import data
from unet_jax.data import colors, images
from unet_jax.evaluation import duplicates, image_hash, pictures
from unet_jax.evaluation.inspection import Example

SHOWN = 24  # pictures on the sheet
PER_REASON = 6  # of them for each reason to look, at most
USUAL = 0.9  # share of the images: a class in more of them is missed where it is not
SIDE = 200  # pixels of a picture, at most


def draw(
    sources: Mapping[str, data.Source],
    good: Sequence[Example],
    copies: Sequence[duplicates.NearCopy],
    classes: data.Classes,
    show: Sequence[int],
    file: epath.Path,
) -> None:
    """Writes a PNG of examples under the colours of their labels; `show` is `config.data.show`."""

    def picture(choice):
        example, reason = choice
        image, label = sources[example.split][example.index]
        factor = min(SIDE / max(image.shape[:2]), 1)
        overlay = Image.fromarray(colors.overlay(_visible(image, show), label, classes))
        small = overlay.resize([max(1, round(n * factor)) for n in overlay.size], Image.Resampling.BOX)
        return example.name, np.asarray(_with_reason(small, reason) if reason else small)

    chosen = choose(good, copies, classes)
    sheet = pictures.contact_sheet(images.map_parallel(picture, chosen, "Drawing"), classes)
    with file.open("wb") as stream:
        sheet.save(stream, "PNG")


def choose(
    good: Sequence[Example], copies: Sequence[duplicates.NearCopy], classes: data.Classes
) -> list[tuple[Example, str]]:
    """The examples to draw, in order, each with the reason to look at it, empty for those of all splits."""
    chosen = {}
    for found in (_losing(good), _copied(copies), _unusual(good, classes)):
        for example, reason in found[:PER_REASON]:
            chosen.setdefault(example.name, (example, reason))
    others = [(example, "") for example in good if example.name not in chosen]
    return [*chosen.values(), *(others[i] for i in pictures.spread(SHOWN - len(chosen), len(others)))]


def _visible(image: np.ndarray, show: Sequence[int]) -> np.ndarray:
    """Up to three channels of an image `[H, W, C]` as uint8; other types are stretched, each channel for itself."""
    chosen = list(show) or list(range(3 if image.shape[-1] >= 3 else 1))
    if image.dtype == np.uint8:
        return image[..., chosen]
    return np.stack([image_hash.to_grey(image[..., [channel]])[0] for channel in chosen], -1)


def _with_reason(picture: Image.Image, reason: str) -> Image.Image:
    """A picture with a line of text below."""
    font = ImageFont.load_default(13)
    canvas = Image.new("RGB", (SIDE, picture.height + 18), "white")
    canvas.paste(picture)
    while font.getlength(reason) > SIDE:
        reason = reason.removesuffix("...")[:-1] + "..."
    ImageDraw.Draw(canvas).text((0, picture.height + 1), reason, pictures.WRONG, font)
    return canvas


def _losing(good: Sequence[Example]) -> list[tuple[Example, str]]:
    losing = [(int(e.objects.lost.sum()), e) for e in good if e.objects.lost.any()]
    losing.sort(key=lambda pair: -pair[0])
    return [(e, f"{lost} of {e.objects.count.sum()} objects lost") for lost, e in losing]


def _copied(copies: Sequence[duplicates.NearCopy]) -> list[tuple[Example, str]]:
    """Each image beside its near copy."""
    return [
        (example, f"near-duplicates, pair {pair}")
        for pair, copy in enumerate(copies, start=1)
        for example in (copy.first, copy.second)
    ]


def _unusual(good: Sequence[Example], classes: data.Classes) -> list[tuple[Example, str]]:
    """Images that are the only one with a class, or that lack one which nearly all have."""
    found = []
    holds = np.array([example.pixels[:-1] > 0 for example in good])
    for k, name in enumerate(classes.names):
        having = holds[:, k].sum()
        if having == 1 and len(good) > 1:
            found.append((good[holds[:, k].argmax()], f"the only one with {name!r}"))
        elif USUAL <= having / len(good) < 1:
            found += [(good[i], f"without {name!r}") for i in np.flatnonzero(~holds[:, k])]
    return found
