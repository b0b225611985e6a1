"""Loss terms as sums and weights per example, so that a mean over a batch or a whole split divides once, exactly.

To add a term: a function like those of `terms.py`, its line in `TERMS`, and its weight and parameters in `config.loss`.
The weight of the term `focal` is `config.loss.focal`, its parameter `gamma` is `config.loss.focal_gamma`. Pixels
outside the mask count nowhere.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unet_jax.errors import UserError, check_choice
from unet_jax.losses import terms
from unet_jax.losses.cldice import cldice
from unet_jax.losses.lovasz import lovasz
from unet_jax.losses.terms import Pixels, Sums


class Term(NamedTuple):
    """A line of `TERMS`. The weights that its function returns must not depend on the logits."""

    function: Callable[..., Sums]  # of `Pixels` and the parameters
    parameters: Mapping[str, tuple[float, float]] = {}  # name -> (lowest, highest) value of `config.loss.<term>_<name>`
    tasks: tuple[str, ...] = ("multiclass", "binary", "multilabel")
    # What the two arrays `[B, ...]` of all examples make together, if not the mean; JAX and NumPy arrays alike.
    combine: Callable | None = None


FROM_COUNTS = ("balanced", "sqrt")  # class weights from the pixels of each class, see `balanced_weights`
_SHARE = (0.0, 1.0)
TERMS = {
    "cross_entropy": Term(terms.cross_entropy, {"smoothing": (0.0, 0.5)}),
    "focal": Term(terms.focal, {"gamma": (0.0, 10.0)}),
    "dice": Term(terms.dice),
    "generalized_dice": Term(terms.generalized_dice),
    "batch_dice": Term(terms.batch_dice, combine=terms.dice_of_batch),
    "tversky": Term(terms.tversky, {"alpha": _SHARE, "beta": _SHARE, "gamma": (0.1, 3.0)}),
    "lovasz": Term(lovasz),
    "cldice": Term(cldice, {"iterations": (1, 100)}, tasks=("binary", "multilabel")),
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A weighted sum of terms, see `make`."""

    task: str  # `multiclass`, `binary` or `multilabel`
    weights: Mapping[str, float]  # of the terms, those above 0
    parameters: Mapping[str, Mapping[str, float]]  # of each of these terms
    class_weights: tuple[float, ...] = ()  # one per class, or none

    def terms(
        self, logits: jax.Array, label: jax.Array, mask: jax.Array, pixel_weights: jax.Array | None = None
    ) -> dict[str, Sums]:
        """The terms of a batch.

        Args:
          logits: float32 `[B, H, W, K]`; K = 1 for a binary task.
          label: integer `[B, H, W]`, or `[B, H, W, K]` for a multilabel task.
          mask: bool, the shape of `label`: which pixels count.
          pixel_weights: float `[B, H, W]`, which multiply the class weights; None is 1 everywhere.
        """
        label = jnp.where(mask, label, 0).astype(jnp.int32)  # any legal class: masked pixels weigh nothing
        if self.task == "binary":
            label, mask = label[..., None], mask[..., None]
        weight = mask.astype(jnp.float32)
        if self.class_weights:
            of_class = jnp.asarray(self.class_weights, jnp.float32)
            weight = weight * (of_class if self.task == "multilabel" else of_class[label])
        if pixel_weights is not None:
            weight = weight * (pixel_weights if self.task == "multiclass" else pixel_weights[..., None])
        pixels = Pixels(logits, label, mask, weight, softmax=self.task == "multiclass")
        return {name: TERMS[name].function(pixels, **self.parameters[name]) for name in self.weights}

    def totals(
        self, label: jax.Array, mask: jax.Array, num_outputs: int, pixel_weights: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What the terms of a whole batch divide by; the microbatches of a step share it.

        Only for a loss whose terms are all means, see `of_whole_batch`.
        """
        logits = jnp.zeros((*label.shape[:3], num_outputs))  # the weights do not depend on them
        return {name: weight.sum() for name, (_, weight) in self.terms(logits, label, mask, pixel_weights).items()}

    def of_whole_batch(self) -> list[str]:
        """The terms that are no mean over examples, so that microbatches cannot add them up."""
        return [name for name in self.weights if TERMS[name].combine]

    def combine(self, terms: Mapping[str, Sums], totals: Mapping[str, jax.Array] | None = None):
        """The weighted sum of the means of the terms; JAX and NumPy arrays alike.

        Terms of a microbatch are divided by the `totals` of the batch, others by their own weights.
        """
        total = 0.0
        for name, weight in self.weights.items():
            sums, counts = terms[name]
            if TERMS[name].combine:
                value = TERMS[name].combine(sums, counts)
            else:
                value = sums.sum() / (counts.sum() if totals is None else totals[name]).clip(1e-12)
            total = total + weight * value
        return total


def needs_class_counts(settings: Mapping) -> bool:
    """Whether the class weights of `config.loss` depend on the training labels."""
    return bool(settings["class_weights"]) and settings["class_weights"][0] in FROM_COUNTS


def balanced_weights(name: str, class_counts: Sequence[int]) -> tuple[float, ...]:
    """Class weights N / (K n_c), or for `sqrt` their square roots; 0 for a class without pixels.

    n_c are the pixels of class c, N their sum over the K classes. With `balanced` all classes weigh the same in the
    whole, each N / K (King and Zeng 2001, doi:10.1093/oxfordjournals.pan.a004868). For overlapping masks n_c are the
    pixels where mask c is set; its weight is that of the whole mask, set or not.
    """
    mean = sum(class_counts) / len(class_counts)
    weights = [mean / count if count else 0.0 for count in class_counts]
    return tuple(weight**0.5 for weight in weights) if name == "sqrt" else tuple(weights)


def make(settings: Mapping, task: str, num_classes: int, class_counts: Sequence[int] | None = None) -> Loss:
    """The loss of `config.loss`.

    Args:
      settings: `config.loss`.
      task: `multiclass`, `binary` or `multilabel`.
      num_classes: of the labels.
      class_counts: pixels of each class in the training labels, for the class weights that need them. Without, these
        are all 1: which they are does not change what a step costs.

    Raises:
      UserError: no term has weight, a term is not for the task, a weight or parameter is out of range, or the number of
        class weights is wrong.
    """
    weights = {name: settings[name] for name in TERMS}
    class_weights = tuple(settings["class_weights"])
    if len(class_weights) == 1 and isinstance(class_weights[0], str):
        name = check_choice("config.loss.class_weights", class_weights[0], FROM_COUNTS)
        if class_counts is not None and not any(class_counts):
            raise UserError(f"config.loss.class_weights = {class_weights}: every pixel of the training is ignored")
        class_weights = balanced_weights(name, [1] * num_classes if class_counts is None else class_counts)
    if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise UserError(f"config.loss needs weights >= 0, at least one of them > 0: {weights}")
    parameters: dict[str, dict[str, float]] = {}
    for name, term in TERMS.items():
        if weights[name] and task not in term.tasks:
            raise UserError(
                f"config.loss.{name} = {weights[name]} is for the tasks {' and '.join(term.tasks)}, not for {task}; "
                "for two classes, config.data.variant = 'binary'"
            )
        parameters[name] = {parameter: settings[f"{name}_{parameter}"] for parameter in term.parameters}
        for parameter, value in parameters[name].items():
            lowest, highest = term.parameters[parameter]
            if not lowest <= value <= highest:
                raise UserError(f"config.loss.{name}_{parameter} = {value} is not in {lowest}..{highest}")
    valid = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in class_weights)
    if class_weights and not (valid and len(class_weights) == num_classes and any(class_weights)):
        raise UserError(
            f"config.loss.class_weights = {class_weights} must be empty, or hold {num_classes} weights >= 0, one a "
            f"class, or one of: {', '.join(FROM_COUNTS)}"
        )
    used = {name: weight for name, weight in weights.items() if weight}
    return Loss(task, used, {name: parameters[name] for name in used}, class_weights)
