"""`report.html` of a work directory: the scores and images of a training on one page that needs no network.

Here are the values; `page.py` and its template make the page.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from unet_jax import metrics
from unet_jax.data import pipeline, pixel_sizes
from unet_jax.errors import UserError, escape_line
from unet_jax.evaluation import evaluate, page, scores
from unet_jax.inference import trained
from unet_jax.parallel import processes
from unet_jax.workdir import files, metrics_log

SHOWN = {"worst": 6, "median": 3, "best": 3}  # images, at most, in this order


def write(
    path: epath.PathLike,
    step: int | None = None,
    data_dir: str | None = None,
    split: str | None = None,
    images: pipeline.Pipeline | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> epath.Path:
    """Writes `report.html` of a work directory; returns the path of that file.

    If the images can no longer be read, it shows the scores found in the work directory, and the reason.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      data_dir: other images than those it was trained on, for the same data set; None keeps `config.data.root`.
      split: `train`, `validation`, `test` or `all`; None is `validation`, or all images of `data_dir`.
      images: those of the split, if they are open already.
      mesh: see `trained.load`.

    Raises:
      UserError: no work directory or checkpoint, or the report cannot be written.
    """
    path = epath.Path(path)
    network = trained.load(path, step, mesh)
    trained_root = network.config.data.root
    split = split or evaluate.default_split(data_dir)
    tta = network.resolve_tta()
    missing = None
    try:
        results = _measure(
            network, split, evaluate.open_split(network, path, split, tta, data_dir, images), tta, data_dir
        )
    except UserError as error:
        missing = str(error)
        processes.print_on_main(f"The report shows no images, because they cannot be read: {missing}")
        results = _recall(network, path, split, tta, trained_root)
    file = path / "report.html"
    if processes.is_main():
        rows, runs = metrics_log.read(path), files.read_environment(path)
        name = path.name or str(path)
        content = page.render(name, network.config, network.classes, network.step, rows, runs, results, missing)
        files.write_text(file, content)
    return file


def choose(scores: Sequence[float | None], ids: Sequence[str]) -> dict[str, list[int]]:
    """Which images to show: the worst, then those around the median, then the best; none twice.

    Args:
      scores: of each image; one without a score is not shown.
      ids: of each image; they decide between equal scores.

    Returns:
      the indices of each rank of `SHOWN`, from the lower score to the higher.
    """
    order = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: (scores[i], ids[i]))
    count = len(order)
    side = min(SHOWN["best"], (count + 1) // 4)  # of a small split mostly the worst
    worst = min(SHOWN["worst"], count - 2 * side)
    middle = min(max((count - side) // 2, worst), count - 2 * side)
    return {"worst": order[:worst], "median": order[middle : middle + side], "best": order[count - side :]}


def _measure(
    network: trained.Trained, name: str, split: evaluate.Split, tta: str, data_dir: str | None = None
) -> page.Results:
    """Scores the split, ranks its images by their mean IoU, and predicts those to show once more, to hold no others."""
    source = split.images.source
    result = split.scorer.score(network.variables)
    records = result.image_records()
    chosen = choose([metrics.value_of("miou", of_image) for of_image in records], source.ids)

    pictures, all_chosen = {}, [index for indices in chosen.values() for index in indices]
    for i, prediction in zip(all_chosen, split.scorer.labels(network.variables, all_chosen), strict=True):
        example = split.images.read(i)
        pictures[i] = page.Picture(
            source.ids[i], records[i], network.picture(example["image"]), example["label"], prediction
        )
    shown = {rank: [pictures[index] for index in indices] for rank, indices in chosen.items()}

    count, size = len(source), network.config.data.size
    kind = "all {} image{}" if name == "all" else f"{{}} {name} image{{}}"
    origin = f"{kind.format(count, 's' if count != 1 else '')} "
    origin += f"of {size[0]}x{size[1]}" if size else pixel_sizes.describe(network.config.data)
    if data_dir is not None:
        origin += f" in {escape_line(data_dir)}"
    if tta != "none":
        origin += f", averaged over test-time augmentation ({tta})"
    return page.Results(origin, result.loss, result.records, result.confusion.sum(0), shown)


def _recall(network: trained.Trained, path: epath.Path, split: str, tta: str, trained_root: str) -> page.Results:
    """The scores found in the work directory: those of --mode=eval if they are of this step, else the training's."""
    settings = network.config.data
    described = metrics.describe(network.classes.names, network.classes.task, network.config.eval.em_scores)
    name = scores.data_name(settings.root, trained_root, settings.name)
    for file in (f"eval/{scores.file_stem(name, split, network.step, tta)}.json", "eval.json"):
        if not (path / file).exists():
            continue
        per_class = {record.key: record.per_class for record in described}
        held = files.read_scores(path / file, network.classes.names, per_class)
        if held and {"step": network.step, "split": split, "data_root": settings.root}.items() <= held.items():
            kind = "" if split == "all" else f"{split} "
            origin = f"{file}, {held['images']} {kind}images, test-time augmentation {held['tta']}"
            records = [
                dataclasses.replace(r, value={**r.value, **held.get(r.key, {})} if r.per_class else held.get(r.key))
                for r in described
            ]
            return page.Results(origin, held.get("loss"), records, np.array(held["confusion"]))
    if split == "validation" and settings.root == trained_root:
        logged = scores.read_logged(path, network.step, described)
        if logged is not None:
            return page.Results("the validation split, as scored during training", *logged)
    return page.Results("", None, [])
