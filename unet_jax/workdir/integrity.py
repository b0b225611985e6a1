"""Which checkpoints of a work directory are intact: Orbax restores a flipped bit, or an empty folder, silently.

Every step carries SHA-256 sums of the files of its items, written before it is committed.
"""

import hashlib
import json
import math
import os

from etils import epath

from unet_jax.errors import UserError
from unet_jax.parallel import processes

ITEMS = ("variables", "training", "meta", "metrics")
CHECKSUMS = "checksums.json"
UNFINISHED = ".orbax-checkpoint-tmp"


def checkpoints_dir(workdir: epath.PathLike) -> epath.Path:
    """The folder with the checkpoints of a work directory."""
    path = epath.Path(workdir)
    if "://" not in os.fspath(path):  # of a bucket it would make a local path
        path = path.resolve()  # Orbax wants it absolute
    return path / "checkpoints"


def write_checksums(step: epath.Path) -> None:
    """Adds checksums to the folder of a step that is about to be committed."""
    items = [step / item for item in ITEMS if (step / item).exists()]
    files = [place / file for item in items for place, _, found in item.walk() for file in found]
    sums = {str(file.relative_to(step)): _digest(file) for file in sorted(files)}
    (step / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def steps(workdir: epath.PathLike) -> list[int]:
    """All steps on disk, intact or damaged, in order."""
    path = checkpoints_dir(workdir)
    return sorted(int(step.name) for step in path.iterdir() if step.name.isdigit()) if path.exists() else []


def find_damage(workdir: epath.PathLike, step: int) -> str | None:
    """What is wrong with the files of a step; None if they are as they were written."""
    place = checkpoints_dir(workdir) / str(step)
    try:
        expected = dict(json.loads((place / CHECKSUMS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        if not (place / CHECKSUMS).exists():
            return f"{CHECKSUMS} is missing: it was never finished, files were deleted, or it is older than checksums"
        return f"{CHECKSUMS} cannot be read ({error})"
    for name, digest in expected.items():
        if not (place / name).exists():
            return f"{name} is missing"
        try:
            if _digest(place / name) != digest:
                return f"{name} is damaged, its checksum differs"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def newest_good_step(workdir: epath.PathLike) -> int | None:
    """The step to resume from; None if there is none. Damaged steps are moved to `damaged/` in the work directory.

    Prints each step that is damaged or unfinished. The main process looks, and broadcasts the result. If all steps are
    damaged, nothing is moved, and a `UserError` names them.
    """
    return processes.broadcast_from_main(_newest_good_step, workdir)


def _newest_good_step(workdir: epath.PathLike) -> int | None:
    path = checkpoints_dir(workdir)
    _put_back(path)
    found = steps(workdir)
    damage = {step: reason for step in found if (reason := find_damage(workdir, step))}
    good = [step for step in found if step not in damage]
    for place in sorted(path.glob(f"*{UNFINISHED}*")) if path.exists() else ():
        step = place.name.partition(".")[0]
        processes.print_on_main(f"{path / step} was not finished when the run ended, and is ignored")
    if damage and not good:
        listed = "".join(f"\n  {path / str(step)}: {reason}" for step, reason in damage.items())
        raise UserError(
            f"{workdir} has no intact checkpoint:{listed}\nPut these files back, or start from scratch in another "
            "--workdir"
        )
    for step, reason in damage.items():
        target = path.parent / "damaged" / str(step)
        while target.exists():
            target = target.parent / f"{target.name}_again"
        target.parent.mkdir(exist_ok=True)
        (path / str(step)).rename(target)
        processes.print_on_main(
            f"{path / str(step)} is damaged: {reason}. Moved to {target}; the newest intact step is {good[-1]}"
        )
    return good[-1] if good else None


def best_step(workdir: epath.PathLike) -> int:
    """The intact step with the highest score, or else the newest; prints those that are damaged.

    Raises:
      UserError: there is none.
    """
    return processes.broadcast_from_main(_best_step, workdir)


def _best_step(workdir: epath.PathLike) -> int:
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir} has no checkpoint: the training was stopped before its first one")
    order = sorted(found, key=lambda step: (_read_score(workdir, step), step))
    skipped = []
    for step in reversed(order):
        reason = find_damage(workdir, step)
        if reason and not (checkpoints_dir(workdir) / str(step)).exists():
            continue  # a running training has deleted it meanwhile
        if reason is None:
            for text in skipped:
                processes.print_on_main(f"{text}; using step {step} instead")
            return step
        skipped.append(f"{checkpoints_dir(workdir) / str(step)} is damaged: {reason}")
    raise UserError("\n".join([*skipped, f"{workdir} has no intact checkpoint"]))


def replaced_dir(path: epath.Path) -> epath.Path:
    """The folder for steps that are about to be saved again."""
    return path.parent / "replaced"


def _put_back(path: epath.Path) -> None:
    """Restores steps that were about to be saved again, if that was not finished."""
    for step in replaced_dir(path).iterdir() if replaced_dir(path).exists() else ():
        if (path / step.name).exists() and find_damage(path.parent, int(step.name)) is None:
            step.rmtree()
        elif not (path / step.name).exists():
            step.rename(path / step.name)


def _digest(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:  # in pieces: hashlib does not take the files of a bucket
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _read_score(workdir: epath.PathLike, step: int) -> float:
    """The score of a step; -inf without one, +inf if it is damaged, so that it is tried first and reported."""
    file = checkpoints_dir(workdir) / str(step) / "metrics" / "metrics"  # Orbax would need all processes to read it
    try:
        return finite_score(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf if find_damage(workdir, step) is None else math.inf


def finite_score(metrics: dict[str, float]) -> float:
    """The score that picks the best step: a NaN must never win."""
    score = metrics["score"]
    return score if math.isfinite(score) else -math.inf
