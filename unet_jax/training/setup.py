"""Opens or resumes a run: everything that `loop.train` needs, checked before anything is written."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from unet_jax import data, losses, metrics, paths
from unet_jax.data import cache, pipeline
from unet_jax.errors import UserError
from unet_jax.evaluation import curves, evaluate, pictures, recipe, report
from unet_jax.inference import forward, normalization
from unet_jax.parallel import processes, sharding
from unet_jax.training import augment, components, length, log, plan, pretrained, summary
from unet_jax.training import state as train_state
from unet_jax.workdir import checkpoints, extension, files, integrity, lock, metrics_log, record

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run."""

    path: epath.Path  # the work directory
    lock: lock.Lock  # of the work directory, taken
    config: "ConfigDict"  # with the settings that were inferred from the files
    components: components.Components  # network, loss, optimizer, sizes
    steps: components.Steps  # when to evaluate, to save and to end
    images: Mapping[str, pipeline.Pipeline]  # the splits `train` and `validation`
    example_digests: Mapping[str, Mapping[str, str]]  # of the ids and the files of each split; a checkpoint holds them
    record: Mapping[str, Any]  # of `record.make`, for the checkpoints; empty on other processes than the main one
    first_step: int  # steps taken before this run
    evaluated: bool  # whether the evaluation due after `first_step`, if any, was completed
    state: train_state.TrainState  # after `first_step`; the first step donates it
    batches: Iterator[pipeline.Batch]  # from `first_step` on, as the devices hold them
    train_step: Callable  # (state, batch, signals) -> (state, metrics)
    scorer: evaluate.Scorer  # of the validation images
    writer: checkpoints.CheckpointWriter
    log: log.TrainingLog
    panels: pictures.Panels


def open_run(config: "ConfigDict", path: epath.Path, held: lock.Lock) -> Run | None:
    """Opens a new run, or resumes the one in the work directory `path`, once `held` is; None if that is finished.

    Raises:
      UserError: anything that the user can put right. Only images that cannot be read are found after `config.json`
        and `classes.json` were written.
    """
    started = time.monotonic()
    paths.check_workdir(path)
    config = config.copy_and_resolve_references()
    if config.deterministic:
        sharding.use_deterministic_kernels()
    earlier = files.read_config(path) if (path / "config.json").exists() else None
    root_before = (earlier or config).data.root
    chosen = _complete(config, earlier)
    is_extended = earlier is not None and extension.carry_over(config, earlier)
    if processes.is_main():
        files.check(path, config)
    held.take()
    files.check_shared(path)

    # Images, and what the configuration describes.
    with processes.main_first("data"):
        sources = {split: data.load(config.data, split) for split in ("train", "validation")}
    classes, batch_size = sources["train"].classes, config.train.batch_size
    steps_per_epoch = components.examples_per_epoch(config, sources["train"]) / batch_size
    steps = components.count_steps(config.train, steps_per_epoch)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.space)
    built = components.build(config, classes, mesh, steps)

    # Resume, or initialise. Nothing is written before all of it has been checked.
    digests = {
        "examples": {name: source.ids_digest() for name, source in sources.items()},
        "file_sizes": {name: cache.sizes_digest(source.files) for name, source in sources.items()},
    }
    resumed, meta, initial = integrity.newest_good_step(path), {"evaluated": True}, None
    if resumed is not None:
        meta |= _read_meta(path, resumed, digests, config.data.root, root_before)
        facts = files.read_classes(path)
        normalized = forward.Normalization.from_json(facts.get("normalization"))
    else:
        _check_no_checkpoint(path, min(steps.save_every, steps.eval_every))
        initial = pretrained.load_pretrained(config, built.network)
        facts = components.describe_images(config, sources["train"])
        normalized = normalization.make(config.data, classes, facts.get("values"), initial.normalization)
    built = built._replace(
        network=dataclasses.replace(built.network, normalization=normalized),
        loss=losses.make(config.loss, classes.task, len(classes.names), facts.get("class_counts")),
    )
    if earlier is None and config.train.minutes:
        config.train.epochs = length.measure(config, built, steps, sources, started)
        if any("optimizer.warmup_epochs" in choice.values for choice in chosen):
            config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, config.train.epochs / 10)
        steps = components.count_steps(config.train, steps_per_epoch)
        new = components.build(config, classes, mesh, steps)
        built = built._replace(schedule=new.schedule, optimizer=new.optimizer)
    recorded: dict[str, Any] = {}
    if processes.is_main():
        described = {**classes.to_json(), "image_sizes": facts.get("image_sizes") or sources["train"].size_range()}
        described["normalization"] = normalized.to_json()
        described |= {name: facts[name] for name in ("class_counts", "values") if name in facts}
        recorded = record.make(config, described)
        if resumed is not None:
            record.check(path, resumed, meta, recorded)
        files.claim(path, config, described)
        if config.auto and not (path / "recipe.py").exists():
            files.write_text(path / "recipe.py", recipe.to_file(config, chosen))
    if meta.get("config", {}).get("train.extends", []) != [*config.train.extends]:
        meta["since_best"] = 0  # extended since then: a restart comes down before it goes up
    is_out_of_patience = steps.evaluates(resumed or 0) and 0 < config.train.patience <= meta.get("since_best", 0)
    if (resumed == steps.total or is_out_of_patience) and meta["evaluated"]:
        _finish_again(path, config, classes, resumed)
        return None
    if is_extended:
        summary.print_extension(config, built, steps)

    # Images, decoded here if they are not cached, and state.
    images = {name: evaluate.open_images(source, config, classes) for name, source in sources.items()}
    state = components.create_state(config, built)
    writer = checkpoints.CheckpointWriter(path)
    first_step = resumed or 0
    if resumed is not None:
        state, _ = writer.restore(resumed, state)
        processes.print_on_main(f"Resuming from step {resumed} of {path}")
    elif initial is not None:
        state = pretrained.with_pretrained(state, initial)
        if initial.summary:
            processes.print_on_main(initial.summary)
    if processes.is_main():
        metrics_log.rewind(path, first_step, meta["evaluated"])
        files.record_environment(path, first_step, f"{jax.device_count()} x {jax.devices()[0].device_kind}")

    # Batches and compiled steps.
    rows = sharding.process_rows(mesh, batch_size)
    batches = images["train"].train_batches(batch_size, config.seed, first_step, rows, built.windows)
    summary.print_summary(config, built, steps, images, state)
    train_step, batches = _compile(config, built, state, batches)
    return Run(
        path=path,
        lock=held,
        config=config,
        components=built,
        steps=steps,
        images=images,
        example_digests=digests,
        record=recorded,
        first_step=first_step,
        evaluated=meta["evaluated"],
        state=state,
        batches=batches,
        train_step=train_step,
        scorer=components.make_scorer(config, built, images["validation"]),
        writer=writer,
        log=log.TrainingLog(
            path,
            schedule=built.schedule,
            steps_per_epoch=steps.per_epoch,
            ends=steps.ends,
            batch_size=batch_size,
            every=config.train.log_every_steps,
            skips_nonfinite=config.train.nonfinite == "skip",
            first_step=first_step,
            resume_state=meta,
        ),
        panels=pictures.Panels(
            images["validation"],
            config.train.panels,
            path / "panels",
            lambda image: normalized.picture(image, config.data.show),
        ),
    )


def _complete(config: "ConfigDict", earlier: "ConfigDict | None") -> list[recipe.Choice]:
    """Sets what is read off the images, or takes it over from an `earlier` run; returns what a recipe has set."""
    chosen: list[recipe.Choice] = []
    if earlier is not None and earlier.data.name == config.data.name:
        data.reuse_settings(config.data, earlier.data)
    else:
        data.infer_settings(config.data, processes.print_on_main)
    classes = data.classes(config.data)
    if config.auto and earlier is not None:
        recipe.reuse(config, earlier)
    elif config.auto:
        with processes.main_first("recipe"):
            source = data.load(config.data, "train")
        chosen = recipe.apply(config, source, processes.print_on_main)
        if any("train.batch_size" in choice.values for choice in chosen):
            plan.shrink_batch(config, classes)
    augment.apply_strength(config.augment, classes.channels, config.keep)
    return chosen


def _read_meta(path: epath.Path, step: int, digests: Mapping[str, Any], root: str, root_before: str) -> dict[str, Any]:
    """What was saved beside the state after `step` steps of a training on the same examples, maybe in another place."""
    if step == 0:
        raise UserError(
            f"{path} holds imported weights. Start from them by --config.init_from={path}, in another --workdir"
        )
    meta = checkpoints.read_meta(path, step)
    if meta["examples"] != digests["examples"]:
        raise UserError(
            f"{path} was trained on other examples than config.data.root = {root!r} holds now: images were added, "
            "removed or renamed. Restore them, or choose another --workdir"
        )
    if os.path.abspath(root) != os.path.abspath(root_before):
        if meta.get("file_sizes") != digests["file_sizes"] or "" in digests["file_sizes"].values():
            raise UserError(
                f"{path} was trained on the images in config.data.root = {root_before!r}. Those in {root!r} have the "
                "same names, but are not known to be the same: the sizes of their files differ, or were not recorded. "
                "Put the images back there, or choose another --workdir"
            )
        processes.print_on_main(
            f"note: the images have moved from {root_before} to {root}, with the same names and sizes"
        )
    return meta


def _check_no_checkpoint(path: epath.Path, save_every: int) -> None:
    """Checks that a work directory without a checkpoint never had one, and prints that it starts from scratch.

    A save starts when the one before has ended, so after two periods there was one.
    """
    reached = max((row["step"] for row in metrics_log.read(path)), default=0)
    if reached > 2 * save_every:
        raise UserError(
            f"{path} has no checkpoint, though its metrics.jsonl reaches step {reached}: put its checkpoints back, or "
            "choose another --workdir"
        )
    if reached:
        processes.print_on_main(f"{path} was stopped before its first checkpoint: starting from scratch")


def draw_history(path: epath.Path, config: "ConfigDict", classes: data.Classes) -> None:
    """Writes `history.png`, on the main process."""
    if processes.is_main():
        records = metrics.describe(classes.names, classes.task, config.eval.em_scores)
        curves.draw_history(metrics_log.read(path), records, path / "history.png")


def _finish_again(path: epath.Path, config: "ConfigDict", classes: data.Classes, step: int) -> None:
    """Draws what is missing (a crash may have come between saving and drawing); prints that the run is finished."""
    draw_history(path, config, classes)
    page, saved = path / "report.html", path / "checkpoints" / str(step)
    if not page.exists() or page.stat().mtime < saved.stat().mtime:  # of before it was extended
        report.write(path)
    measured = ", with --config.train.minutes=0" * bool(config.train.minutes)
    processes.print_on_main(
        f"{path} is finished: {step} steps. Look at {page}, or score it with --mode=eval. To extend it, set "
        f"--config.train.epochs to more than {config.train.epochs:g}{measured}"
    )


def _compile(config, built, state, batches):
    """The compiled training step, and the batches, of which it needed the first."""
    mesh, first = built.network.mesh, next(batches)
    step = components.make_train_step(config, built, jax.tree.map(lambda array: array.sharding, state))
    started = time.monotonic()
    compiled = step.lower(state, sharding.put_batch(mesh, first), sharding.per_device(mesh, 0)).compile()
    seconds = time.monotonic() - started
    processes.print_on_main(f"memory   {summary.memory_summary(compiled)}; compiled in {seconds:.1f} s")
    return compiled, itertools.chain([first], batches)
