"""Which checkpoints of a work directory are intact: Orbax restores a flipped bit, or an empty folder, silently.

Every step carries SHA-256 sums of the files of its items, written before it is committed. A step is intact if these are
the files that it has, and their sums are the same.
"""

import hashlib
import json
import math
import os
import re

from etils import epath

from unet_jax import paths
from unet_jax.errors import UserError
from unet_jax.parallel import processes
from unet_jax.workdir import files, schema

ITEMS = ("variables", "training", "meta")  # of every step
CHECKSUMS = "checksums.json"
ORBAX_METADATA = "_CHECKPOINT_METADATA"  # beside the items: dates and types, which Orbax can do without
UNFINISHED = ".orbax-checkpoint-tmp"


def checkpoints_dir(workdir: epath.PathLike) -> epath.Path:
    """The folder with the checkpoints of a work directory."""
    path = paths.LiteralPath(workdir)  # Orbax looks for files by patterns
    if schema.is_local(path):  # of a bucket it would make a local path
        path = path.resolve()  # Orbax wants it absolute
    return path / "checkpoints"


def write_checksums(step: epath.Path) -> None:
    """Adds checksums to the folder of a step that is about to be committed."""
    sums = {name: _digest(step / name) for name in _files(step)}
    (step / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def _files(step: epath.Path) -> list[str]:
    """The files in the items of a step, in order, as paths below it.

    Left out are those that file systems and file managers hide there, such as `.nfs0001` and `.DS_Store`, and those
    beside the items, which are written later.
    """
    found = [place / file for place, _, names in step.walk() for file in names if not file.startswith(".")]
    return sorted(name for file in found if "/" in (name := file.relative_to(step).as_posix()))


def steps(workdir: epath.PathLike) -> list[int]:
    """All steps on disk, intact or damaged, in order."""
    path = checkpoints_dir(workdir)
    if schema.occupied(path) and not path.is_dir():
        raise UserError(f"{path} is not the folder of the checkpoints, but a file: put the folder back")
    return numbers(path)


def numbers(path: epath.Path) -> list[int]:
    """The numbers that stand in a folder as names, in order; none if there is no such folder."""
    names = [place.name for place in path.iterdir()] if path.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def find_damage(workdir: epath.PathLike, step: int) -> str | None:
    """What is wrong with the files of a step, in one sentence; None if they are as they were written."""
    place = checkpoints_dir(workdir) / str(step)
    if not schema.occupied(place / CHECKSUMS):
        return f"{CHECKSUMS} is missing: it was never finished, files were deleted, or it is older than checksums"
    try:
        expected = schema.read_object(place / CHECKSUMS)
        found = _files(place)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"its files cannot be listed ({error})"
    if fault := schema.find_fault_in_sums(expected):
        return f"{CHECKSUMS} {fault}"
    for item in ITEMS:
        if not any(name.startswith(f"{item}/") for name in expected):
            return f"{CHECKSUMS} lists no file of {item}"
    for name in sorted(expected.keys() - set(found)):
        return f"{name} is missing"
    for name in sorted(set(found) - expected.keys()):
        return f"{name} is not listed in {CHECKSUMS}"
    for name, digest in expected.items():
        if schema.is_local(place) and (os.path.islink(place / name) or not os.path.isfile(place / name)):
            return f"{name} is not a file but a link, a pipe or a device"
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
        files.make_folder(target.parent)
        (path / str(step)).rename(target)
        processes.print_on_main(
            f"{path / str(step)} is damaged: {reason}. Moved to {target}; the newest intact step is {good[-1]}"
        )
    for step in good:
        _set_aside_damaged_metadata(path / str(step) / ORBAX_METADATA)
    return good[-1] if good else None


def _set_aside_damaged_metadata(file: epath.Path) -> None:
    try:
        schema.read_object(file)
    except UserError as error:
        if schema.occupied(file):
            files.set_aside(file, str(error))


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
    for step in numbers(replaced_dir(path)):
        place, replaced = path / str(step), replaced_dir(path) / str(step)
        if place.exists() and find_damage(path.parent, step) is None:
            replaced.rmtree()
        elif not place.exists():
            replaced.rename(place)


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
        return finite_score(schema.read_object(file))
    except (UserError, KeyError, TypeError, OverflowError):
        return -math.inf if find_damage(workdir, step) is None else math.inf


def finite_score(metrics: dict[str, float]) -> float:
    """The score that picks the best step: a NaN must never win."""
    score = metrics["score"]
    return score if math.isfinite(score) else -math.inf
