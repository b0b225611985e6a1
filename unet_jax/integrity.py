"""Which checkpoints of a work directory are whole: Orbax restores a flipped bit, or an empty folder, without a word.

Every step carries SHA-256 sums of the files of its items, written before it is committed.
"""

import hashlib
import json
import math
import os

from etils import epath

from unet_jax import mesh
from unet_jax.errors import UserError

ITEMS = ("variables", "training", "meta", "metrics")
CHECKSUMS = "checksums.json"
UNFINISHED = ".orbax-checkpoint-tmp"


def folder(workdir: epath.PathLike) -> epath.Path:
    """Where the checkpoints of a work directory are."""
    path = epath.Path(workdir)
    if "://" not in os.fspath(path):  # of a bucket it would make a local path
        path = path.resolve()  # Orbax wants it absolute
    return path / "checkpoints"


def seal(step: epath.Path) -> None:
    """Adds the checksums to the folder of a step that is about to be committed."""
    items = [step / item for item in ITEMS if (step / item).exists()]
    files = [place / file for item in items for place, _, found in item.walk() for file in found]
    sums = {str(file.relative_to(step)): _digest(file) for file in sorted(files)}
    (step / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def steps(workdir: epath.PathLike) -> list[int]:
    """All steps on disk, good or damaged, in order."""
    path = folder(workdir)
    return sorted(int(step.name) for step in path.iterdir() if step.name.isdigit()) if path.exists() else []


def fault(workdir: epath.PathLike, step: int) -> str | None:
    """What is wrong with the files of a step; None if they are those that were written."""
    place = folder(workdir) / str(step)
    try:
        expected = dict(json.loads((place / CHECKSUMS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        if not (place / CHECKSUMS).exists():
            return (
                f"{CHECKSUMS} is missing: it was never finished, files were deleted, or a version without it wrote it"
            )
        return f"{CHECKSUMS} cannot be read ({error})"
    for name, digest in expected.items():
        if not (place / name).exists():
            return f"{name} is missing"
        try:
            if _digest(place / name) != digest:
                return f"{name} is not what was written, its checksum differs"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def newest_good_step(workdir: epath.PathLike) -> int | None:
    """The step to go on from, with the damaged ones moved to `damaged/` in the work directory; None if it has none.

    Names each step that is damaged or was not finished. The main process looks, the others are told.

    Raises:
      UserError: there are steps, but no good one; nothing is moved then.
    """
    return mesh.from_main(_newest_good_step, workdir)


def _newest_good_step(workdir: epath.PathLike) -> int | None:
    path = folder(workdir)
    _put_back(path)
    found = steps(workdir)
    faults = {step: reason for step in found if (reason := fault(workdir, step))}
    good = [step for step in found if step not in faults]
    unfinished = sorted(place.name for place in path.glob(f"*{UNFINISHED}*")) if path.exists() else []
    for name in unfinished:
        mesh.say(f"{path / name.partition('.')[0]} was not finished when the run ended, and is left out")
    if not good:
        if not faults:
            return None
        listed = "".join(f"\n  {path / str(step)}: {reason}" for step, reason in faults.items())
        raise UserError(
            f"{workdir} has no step that is whole:{listed}\nPut these files back, or begin anew in another --workdir"
        )
    for step, reason in faults.items():
        aside = path.parent / "damaged" / str(step)
        while aside.exists():
            aside = aside.parent / f"{aside.name}_again"
        aside.parent.mkdir(exist_ok=True)
        (path / str(step)).rename(aside)
        mesh.say(f"{path / str(step)} is damaged: {reason}. It is now {aside}; the newest good step is {good[-1]}")
    return good[-1]


def best_step(workdir: epath.PathLike) -> int:
    """The step with the highest score that is whole, or else the newest that is; names those that are damaged.

    Raises:
      UserError: there is none.
    """
    return mesh.from_main(_best_step, workdir)


def _best_step(workdir: epath.PathLike) -> int:
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir} has no checkpoint: the training was stopped before the first one")
    order = sorted(found, key=lambda step: (_read_score(workdir, step), step))
    faults = []
    for step in reversed(order):
        reason = fault(workdir, step)
        if reason and not (folder(workdir) / str(step)).exists():
            continue  # a training that goes on has deleted it meanwhile
        if reason is None:
            for text in faults:
                mesh.say(f"{text}; step {step} is taken instead")
            return step
        faults.append(f"{folder(workdir) / str(step)} is damaged: {reason}")
    raise UserError("\n".join([*faults, f"{workdir} has no step that is whole"]))


def aside(path: epath.Path) -> epath.Path:
    """Where steps wait that are to be saved again."""
    return path.parent / "replaced"


def _put_back(path: epath.Path) -> None:
    """Restores steps that were to be saved again, if that was not finished."""
    for step in aside(path).iterdir() if aside(path).exists() else ():
        if (path / step.name).exists() and fault(path.parent, int(step.name)) is None:
            step.rmtree()
        elif not (path / step.name).exists():
            step.rename(path / step.name)


def _digest(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:  # in pieces: what opens a file of a bucket is no file to hashlib
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _read_score(workdir: epath.PathLike, step: int) -> float:
    """The score of a step; less than any where it has none, or where the file is damaged."""
    file = folder(workdir) / str(step) / "metrics" / "metrics"  # Orbax would want all processes to read it together
    try:
        return finite_score(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf if fault(workdir, step) is None else math.inf  # a damaged one is to be named


def finite_score(metrics: dict[str, float]) -> float:
    """The score by which the best step is chosen: a NaN must not become it."""
    score = metrics["score"]
    return score if math.isfinite(score) else -math.inf
