"""`report.html` of a work directory: what a training came to, measured anew, on one page that needs no network.

`page.py` sets the page; here is what it tells.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from unet_jax import data, mesh, metrics, page, predict, trained, workdir
from unet_jax.data import pipeline
from unet_jax.errors import UserError

SHOWN = {"worst": 6, "median": 3, "best": 3}  # validation images, at most, in this order


class Measured(NamedTuple):
    """What the validation split scored.

    Attributes:
      origin: where the scores come from, in words.
      scores: `metrics.scores`, as far as they are known.
      confusion: the counts behind them; None where they are not known.
      pictures: the images to show, by rank.
    """

    origin: str
    scores: dict[str, Any]
    confusion: np.ndarray | None
    pictures: dict[str, list[page.Picture]]


def write(
    path: epath.PathLike,
    step: int | None = None,
    data_dir: str | None = None,
    images: pipeline.Pipeline | None = None,
    devices: jax.sharding.Mesh | None = None,
) -> epath.Path:
    """Writes the report of a work directory.

    Where the images can no longer be read, it tells what the work directory knows, and says so.

    Args:
      path: the work directory.
      step: which checkpoint; None is the best.
      data_dir: where the images are, if not in `config.data.root`.
      images: of the validation split, where they are at hand; None opens them.
      devices: see `trained.load`.

    Returns:
      the file written, `report.html`.

    Raises:
      UserError: no work directory or checkpoint, or the report cannot be written.
    """
    path = epath.Path(path)
    network = trained.load(path, step, devices)
    if data_dir is not None:
        network.config.data.root = data_dir
    missing = None
    try:
        opened = _open_images(network, path) if images is None else images
        measured = _measure(network, opened)
    except UserError as error:
        missing = str(error)
        mesh.say(f"The report shows no images, for they cannot be read: {missing}")
        measured = _recall(path, network)
    file = path / "report.html"
    if mesh.is_main_process():
        content = page.render(
            name=path.name or str(path),
            config=network.config,
            classes=network.classes,
            step=network.step,
            rows=workdir.read_metrics(path),
            runs=workdir.read_environment(path),
            missing=missing,
            **measured._asdict(),
        )
        partial = path / "report.html.partial"
        try:
            partial.write_text(content)
            partial.replace(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error}") from error
    return file


def choose(scores: Sequence[float | None], ids: Sequence[str]) -> dict[str, list[int]]:
    """Which images to show: the worst first, then those about the median, then the best; none twice.

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


def _open_images(network: trained.Trained, path: epath.Path) -> pipeline.Pipeline:
    config = network.config
    source = data.load(config.data, "validation")
    trained.check_source(path, network.classes, source)
    return pipeline.Pipeline(source, config.data.size, config.data.resize, config.data.cache_gib, say=mesh.say)


def _measure(network: trained.Trained, images: pipeline.Pipeline) -> Measured:
    """Scores every image of the split by itself, and predicts those to show once more, to hold no others.

    Raises:
      UserError: an image cannot be read.
    """
    config, classes, devices, source = network.config, network.classes, network.devices, images.source
    ways = devices.shape["data"]
    batch_size = -(-config.train.batch_size // ways) * ways  # as `--mode=eval`, so that every logit rounds alike
    rows = mesh.process_rows(devices, batch_size)
    step = _make_step(network)

    def run(batch):
        return jax.device_get(step(network.variables, mesh.put_batch(devices, batch)))

    counts = [
        run({name: batch[name] for name in ("image", "label")})[1] for batch in images.eval_batches(batch_size, rows)
    ]
    counts = np.concatenate(counts)[: len(source)].astype(np.int64)  # the last batch is filled up
    scores = [metrics.scores(count, classes.names) for count in counts]
    chosen = choose([score["miou"] for score in scores], source.ids)

    pictures: dict[str, list[page.Picture]] = {rank: [] for rank in chosen}
    places = [(rank, index) for rank, indices in chosen.items() for index in indices]
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        read = [images.read(index) for _, index in part]
        filled = read + [read[0]] * (batch_size - len(read))
        batch = {name: np.stack([example[name] for example in filled]) for name in ("image", "label")}
        predictions, _ = run({name: values[rows] for name, values in batch.items()})
        for (rank, index), example, prediction in zip(part, read, predictions, strict=False):
            shown = page.Picture(source.ids[index], scores[index], example["image"], example["label"], prediction)
            pictures[rank].append(shown)
    total = counts.sum(0)
    height, width = config.data.size
    origin = f"{len(source)} validation image{'s' if len(source) != 1 else ''} of {height}x{width}"
    if config.eval.tta != "none":
        origin += f", averaged over test-time augmentation ({config.eval.tta})"
    return Measured(origin, metrics.scores(total, classes.names), total, pictures)


def _make_step(network: trained.Trained) -> Callable:
    """A jitted function of variables and a batch: predicted labels, and the confusion counts of each example."""
    model, classes, devices, tta = network.model, network.classes, network.devices, network.config.eval.tta

    def step(variables, batch):
        label = batch["label"]
        window = predict.surround_image(model, batch["image"], tta)
        window = mesh.split_height(devices, window)
        logits = predict.logits(model, variables, window, label.shape[1:3], classes.task, tta)
        # Of logits, as `--mode=eval`: probabilities close to 1 can be equal where logits are not.
        prediction = metrics.predict_label(logits, classes.task)

        def count(*example):
            one = (values[None] for values in example)
            return metrics.confusion(*one, classes.task, len(classes.names))

        return prediction, jax.vmap(count)(prediction, label, label != classes.ignore_label)

    return mesh.jit_replicated(devices, step)


def _recall(path: epath.Path, network: trained.Trained) -> Measured:
    """The scores that the work directory holds: of `eval.json` if it is of this step, else of the training's log."""
    names, step = network.classes.names, network.step
    if (path / "eval.json").exists():
        held = workdir.read_json(path / "eval.json")
        if held["step"] == step and held["split"] == "validation" and held["data_root"] == network.config.data.root:
            confusion = np.array(held["confusion"], np.int64)
            origin = f"eval.json, {held['images']} validation images, test-time augmentation {held['tta']}"
            return Measured(origin, metrics.scores(confusion, names), confusion, {})
    for row in workdir.read_metrics(path):
        if row["step"] == step and "val/miou" in row:
            scores = {name: row.get(f"val/{name}") for name in ("accuracy", "miou", "mdice")}
            scores |= {kind: {name: row.get(f"val/{kind}/{name}") for name in names} for kind in ("iou", "dice")}
            return Measured("the validation split, as scored while it trained", scores, None, {})
    return Measured("", {}, None, {})
