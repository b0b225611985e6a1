"""How long the run of a work directory is, and longer: a finished or stopped run is extended by more epochs.

The configuration keeps the epochs at which it ended before, `config.train.extends`: so the learning rate stays a
function of the step alone, and a new run with the same configuration takes the same steps.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unet_jax import defaults

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FIELDS = ("train.epochs", "train.extends", "train.minutes")  # which an extension changes


def carry_over(config: "ConfigDict", earlier: "ConfigDict") -> bool:
    """Gives a `config` the length of the run with the configuration `earlier`, or extends that run.

    What it cannot extend is left as it is, for `files.check` to refuse.

    Returns:
      whether the run is extended: by a larger `config.train.epochs`.
    """
    now, before = config.train, earlier.train
    if now.extends:
        return False
    if now.minutes and before.minutes:  # the epochs were measured
        now.epochs, now.extends = before.epochs, before.extends
    elif now.epochs <= before.epochs:
        now.extends = before.extends
    elif now.epochs > before.epochs and not now.minutes:
        now.extends = (*before.extends, before.epochs)
        return True
    return False


def is_extension(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a run that extends another one, maybe several times.

    Args:
      before, now: dotted names -> values, as JSON has them; those at their default may be left out.
    """
    value = lambda values, name: values.get(name, defaults.fields()[name])
    then, length = ([*value(of, "train.extends"), value(of, "train.epochs")] for of in (before, now))
    return not value(now, "train.minutes") and len(length) > len(then) and length[: len(then)] == then


def may_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields in which `now` may differ from `before` because it extends that run; see `is_extension`."""
    if not is_extension(before, now):
        return ()
    return FIELDS if before.get("train.extends") else (*FIELDS, "optimizer.extension")
