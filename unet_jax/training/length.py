"""How many epochs fit into `config.train.minutes`: measured on the first steps of a new training, then fixed."""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax

from unet_jax import data
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.inference import forward
from unet_jax.parallel import processes, sharding
from unet_jax.training import components

if TYPE_CHECKING:
    from ml_collections import ConfigDict

LONGEST = 2**31 - 1  # steps
SAMPLE = 5.0  # seconds of steps that are timed


class Costs(NamedTuple):
    """What a training takes, in seconds."""

    start: float  # from its beginning to the first step
    step: float  # with the wait for its batch
    evaluation: float  # with panels and checkpoint
    finish: float  # from the last evaluation to the end: curves and report


def measure(
    config: "ConfigDict",
    built: components.Components,
    steps: components.Steps,
    sources: Mapping[str, data.Source],
    started: float,
) -> float:
    """The epochs, a whole number of steps, of a training that takes about `config.train.minutes`.

    It takes steps and evaluates once, from initial weights that are then dropped.

    Args:
      config: of the training.
      built: what it describes.
      steps: when to evaluate; the total does not count.
      sources: the splits `train` and `validation`.
      started: when the training began, by `time.monotonic`.

    Raises:
      UserError: the time is not positive, or is too short to take a step and evaluate.
    """
    minutes = config.train.minutes
    if not 0 < minutes < math.inf:
        raise UserError(f"config.train.minutes = {minutes} must be positive, or 0 to count config.train.epochs")
    processes.print_on_main(f"Measuring how many steps fit into {minutes:g} min (config.train.minutes)")
    costs = _measure_costs(config, built, sources, started)
    eval_every = steps.eval_every if config.train.eval_every_epochs else None
    # The same on all processes, whose clocks differ.
    total = processes.broadcast_from_main(lambda: count_steps(60 * minutes, costs, eval_every))
    if not total:
        least = sum(costs) / 60
        raise UserError(
            f"config.train.minutes = {minutes:g} is too short: up to its first step the training takes "
            f"{costs.start:.0f} s, a step {costs.step:.2f} s, and an evaluation {costs.evaluation:.1f} s. It needs "
            f"{math.ceil(10 * least) / 10:g} at least"
        )
    processes.print_on_main(
        f"  a step takes {costs.step:.2f} s, an evaluation {costs.evaluation:.1f} s: {total} steps, which is "
        f"{total / steps.per_epoch:.4g} epochs"
    )
    return total / steps.per_epoch


def count_steps(seconds: float, costs: Costs, eval_every: int | None) -> int:
    """The most steps that fit into some seconds, with an evaluation after each `eval_every` and at the end; 0 if none.

    Args:
      seconds: of the whole training.
      costs: of its parts.
      eval_every: steps between two evaluations; None for ten in all.
    """
    left = seconds - costs.start - costs.finish
    if eval_every is None:
        return min(LONGEST, max(0, math.floor((left - 10 * costs.evaluation) / costs.step)))
    of_period = eval_every * costs.step + costs.evaluation
    periods = max(0, math.floor(left / of_period))
    more = math.floor((left - periods * of_period - costs.evaluation) / costs.step)
    return min(LONGEST, periods * eval_every + min(max(0, more), eval_every - 1))


def _measure_costs(config, built, sources, started) -> Costs:
    """Times the steps and one evaluation, as a training has them."""
    network, mesh, batch_size = built.network, built.network.mesh, config.train.batch_size
    classes = network.classes
    images = {name: evaluate.open_images(source, config, classes) for name, source in sources.items()}
    current = components.create_state(config, built)
    rows = sharding.process_rows(mesh, batch_size)
    batches = images["train"].train_batches(batch_size, config.seed, 0, rows, built.windows)
    batch = sharding.put_batch(mesh, next(batches))
    train_step = components.make_train_step(config, built, jax.tree.map(lambda array: array.sharding, current))
    compiling = time.monotonic()
    signals = sharding.per_device(mesh, 0)
    compiled = train_step.lower(current, batch, signals).compile()
    compiling = time.monotonic() - compiling

    def take(count):
        nonlocal current, batch
        begun = time.monotonic()
        for _ in range(count):
            current, _ = compiled(current, batch, signals)
            batch = sharding.put_batch(mesh, next(batches))
        jax.block_until_ready(current.step)
        return (time.monotonic() - begun) / count

    take(1)
    rough = take(2)
    count = processes.broadcast_from_main(lambda: max(1, math.ceil(SAMPLE / rough)))
    step = take(count)
    scorer = components.make_scorer(config, built, images["validation"])

    def evaluate_once():
        begun = time.monotonic()
        scorer.score(current.eval_variables)
        return time.monotonic() - begun

    scoring = evaluate_once()
    if processes.broadcast_from_main(lambda: int(scoring < 4 * SAMPLE)):  # without the compilation
        scoring = evaluate_once()
    start = time.monotonic() - started + compiling  # once more, as the schedule is compiled into the step
    # As seen on a CPU: panels and checkpoint take about as long as the scores, and the report predicts all views.
    tta = config.eval.tta if config.eval.tta != "auto" else forward.best_tta(config.augment)
    return Costs(start, step, 1 + 2 * scoring, 5 + (1 + len(forward.VIEWS[tta])) * scoring)
