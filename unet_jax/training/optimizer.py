"""Optimizers and schedules of optax, by `config.optimizer`."""

from collections.abc import Collection, Mapping, Sequence

import jax
import optax

from unet_jax.errors import UserError, check_choice, did_you_mean

LIMITS = {"clip_norm": float("inf"), "weight_decay": float("inf"), "momentum": 1, "ema": 1}  # from 0 to below


def make_schedule(settings: Mapping, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then one of three curves.

    `constant`; `step`, times 0.1 at each epoch of `decay_epochs`; `cosine`, to zero at `total_steps`.

    Raises:
      UserError: an unknown name, or an invalid value.
    """
    name = check_choice("config.optimizer.schedule", settings["schedule"], ("constant", "step", "cosine"))
    peak, decay = settings["learning_rate"], settings["decay_epochs"]
    if not 0 < peak < float("inf"):
        raise UserError(f"config.optimizer.learning_rate = {peak} must be positive")
    if not all(isinstance(epoch, int | float) and epoch > 0 for epoch in decay) or len(set(decay)) < len(decay):
        raise UserError(f"config.optimizer.decay_epochs = {decay} must be positive numbers, each once")
    if not 0 <= settings["warmup_epochs"] * steps_per_epoch < total_steps:
        raise UserError(
            f"config.optimizer.warmup_epochs = {settings['warmup_epochs']} is not within the training "
            f"({total_steps / steps_per_epoch:g} epochs)"
        )
    warmup = round(settings["warmup_epochs"] * steps_per_epoch)
    if name == "cosine":
        main = optax.cosine_decay_schedule(peak, total_steps - warmup)
    elif name == "step":
        boundaries = {round(epoch * steps_per_epoch) - warmup: 0.1 for epoch in decay}
        main = optax.piecewise_constant_schedule(peak, boundaries)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def make_optimizer(settings: Mapping, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The gradient transformation: clipping by the global norm, then `adam`, `adamw` or `sgd`.

    Weights whose names have a prefix in `frozen` stay fixed, and their gradients do not count in the norm.

    Raises:
      UserError: an unknown name, or a value out of range.
    """
    name = check_choice("config.optimizer.name", settings["name"], ("adam", "adamw", "sgd"))
    for field, limit in LIMITS.items():
        if not 0 <= settings[field] < limit:
            raise UserError(f"config.optimizer.{field} = {settings[field]} is not in [0, {limit})")
    if settings["weight_decay"] and name != "adamw":
        raise UserError(f"config.optimizer.weight_decay is for 'adamw', not for {name!r}: set it to 0")
    rule = {
        "adam": optax.adam(schedule),
        "adamw": optax.adamw(schedule, weight_decay=settings["weight_decay"]),
        "sgd": optax.sgd(schedule, momentum=settings["momentum"]),
    }[name]
    if settings["clip_norm"]:
        rule = optax.chain(optax.clip_by_global_norm(settings["clip_norm"]), rule)
    frozen = tuple(settings["frozen"])
    if not frozen:
        return rule

    def label(path, _):
        return "frozen" if "/".join(key.key for key in path).startswith(frozen) else "trained"

    transforms = {"trained": rule, "frozen": optax.set_to_zero()}
    return optax.partition(transforms, lambda params: jax.tree_util.tree_map_with_path(label, params))


def check_frozen(frozen: Sequence[str], names: Collection[str]) -> None:
    """Raises a `UserError` if one of `config.optimizer.frozen` is a prefix of none of the `names`, or nothing is left.

    The names are those of all weights, such as `down_0/Conv_0/kernel`.
    """
    blocks = sorted({name.split("/")[0] for name in names})
    for prefix in frozen:
        if not prefix or not any(name.startswith(prefix) for name in names):
            raise UserError(
                f"config.optimizer.frozen: {prefix!r} is a prefix of no weight. The blocks are {', '.join(blocks)}."
                + did_you_mean(prefix, blocks)
            )
    if all(name.startswith(tuple(frozen)) for name in names):
        raise UserError(f"config.optimizer.frozen = {tuple(frozen)} leaves nothing to train")
