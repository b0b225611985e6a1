"""Optimizers and schedules of optax, by `config.optimizer`."""

from collections.abc import Collection, Mapping, Sequence

import jax
import optax

from unet_jax.errors import UserError, check_choice, did_you_mean

ENCODER = "encoder/"  # what the names of the weights of an encoder begin with
LIMITS = {"clip_norm": float("inf"), "weight_decay": float("inf"), "momentum": 1, "ema": 1}  # from 0 to below


def make_schedule(settings: Mapping, steps_per_epoch: float, ends: Sequence[int]) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then one of three curves, to the first of the steps in `ends`.

    `constant`; `step`, times 0.1 at each epoch of `decay_epochs`; `cosine`, to zero. A run that is extended goes on to
    the next of `ends`, by `extension`: `restart`, with warm-up and curve from their beginning (Loshchilov and Hutter
    2017), or `constant`, at the rate of the last step, for `cosine` at a tenth of `learning_rate`.

    Raises:
      UserError: an unknown name, or an invalid value.
    """
    name = check_choice("config.optimizer.schedule", settings["schedule"], ("constant", "step", "cosine"))
    extension = check_choice("config.optimizer.extension", settings["extension"], ("restart", "constant"))
    peak, decay = settings["learning_rate"], settings["decay_epochs"]
    if not 0 < peak < float("inf"):
        raise UserError(f"config.optimizer.learning_rate = {peak} must be positive")
    if not all(isinstance(epoch, int | float) and epoch > 0 for epoch in decay) or len(set(decay)) < len(decay):
        raise UserError(f"config.optimizer.decay_epochs = {decay} must be positive numbers, each once")
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    shortest = min(lengths if extension == "restart" else lengths[:1])
    if not 0 <= settings["warmup_epochs"] * steps_per_epoch < shortest:
        raise UserError(
            f"config.optimizer.warmup_epochs = {settings['warmup_epochs']} is not within the training "
            f"({shortest / steps_per_epoch:g} epochs{', which are added' * (shortest != lengths[0])})"
        )
    warmup = round(settings["warmup_epochs"] * steps_per_epoch)

    def curve(length):
        if name == "cosine":
            main = optax.cosine_decay_schedule(peak, length - warmup)
        elif name == "step":
            boundaries = {round(epoch * steps_per_epoch) - warmup: 0.1 for epoch in decay}
            main = optax.piecewise_constant_schedule(peak, boundaries)
        else:
            main = optax.constant_schedule(peak)
        if not warmup:
            return main
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])

    if len(ends) == 1:
        return curve(ends[0])
    if extension == "restart":
        return optax.join_schedules([curve(length) for length in lengths], list(ends[:-1]))
    first = curve(ends[0])
    tail = 0.1 * peak if name == "cosine" else float(first(ends[0] - 1))
    return optax.join_schedules([first, optax.constant_schedule(tail)], [ends[0]])


def make_optimizer(settings: Mapping, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The gradient transformation: clipping by the global norm, then `adam`, `adamw` or `sgd`.

    `decayed = "kernels"` keeps adamw's decay to arrays of two or more dimensions: biases, and the scales and offsets of
    normalisation, have one. Weights whose names have a prefix in `frozen` stay fixed, and their gradients do not count
    in the norm. The updates of the weights of an encoder, with their decay, are multiplied by `encoder_learning_rate`.

    Raises:
      UserError: an unknown name, or a value out of range.
    """
    name = check_choice("config.optimizer.name", settings["name"], ("adam", "adamw", "sgd"))
    decayed = check_choice("config.optimizer.decayed", settings["decayed"], ("all", "kernels"))
    for field, limit in LIMITS.items():
        if not 0 <= settings[field] < limit:
            raise UserError(f"config.optimizer.{field} = {settings[field]} is not in [0, {limit})")
    if settings["weight_decay"] and name != "adamw":
        raise UserError(f"config.optimizer.weight_decay is for 'adamw', not for {name!r}: set it to 0")
    if settings["ema_statistics"] and not settings["ema"]:
        raise UserError("config.optimizer.ema_statistics needs EMA weights: set config.optimizer.ema, such as to 0.99")
    encoder_factor = settings["encoder_learning_rate"]
    if not 0 < encoder_factor < float("inf"):
        raise UserError(
            f"config.optimizer.encoder_learning_rate = {encoder_factor} must be positive; "
            "config.optimizer.frozen=('encoder',) keeps the encoder as it is"
        )
    kernels = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    mask = kernels if decayed == "kernels" else None
    rule = {
        "adam": optax.adam(schedule),
        "adamw": optax.adamw(schedule, weight_decay=settings["weight_decay"], mask=mask),
        "sgd": optax.sgd(schedule, momentum=settings["momentum"]),
    }[name]
    if settings["clip_norm"]:
        rule = optax.chain(optax.clip_by_global_norm(settings["clip_norm"]), rule)
    # What is at its default adds nothing to the optimizer's state, so that older work directories can be resumed.
    if settings["frozen"]:
        label = lambda params: jax.tree.map(
            lambda frozen: "frozen" if frozen else "trained", _below(settings["frozen"], params)
        )
        rule = optax.partition({"trained": rule, "frozen": optax.set_to_zero()}, label)
    if encoder_factor != 1:
        rule = optax.chain(rule, optax.masked(optax.scale(encoder_factor), lambda params: _below((ENCODER,), params)))
    return rule


def _below(prefixes: Sequence[str], params):
    """For each weight whether its name has one of the prefixes."""
    has_prefix = lambda path, _: "/".join(key.key for key in path).startswith(tuple(prefixes))
    return jax.tree_util.tree_map_with_path(has_prefix, params)


def check_names(settings: Mapping, names: Collection[str]) -> None:
    """Checks that the prefixes of `config.optimizer` are those of weights.

    The names are those of all weights, such as `down_0/Conv_0/kernel`.

    Raises:
      UserError: one of `frozen` is a prefix of none of the `names`, or they leave nothing to train; a factor for the
        learning rate of an encoder, and the network has none.
    """
    factor = settings["encoder_learning_rate"]
    if factor != 1 and not any(name.startswith(ENCODER) for name in names):
        raise UserError(
            f"config.optimizer.encoder_learning_rate = {factor} is for networks with an encoder of their own, such as "
            "config.model.name='encoder_unet': set it to 1"
        )
    frozen = tuple(settings["frozen"])
    check_prefixes("config.optimizer.frozen", frozen, names)
    if all(name.startswith(frozen) for name in names):
        raise UserError(f"config.optimizer.frozen = {frozen} leaves nothing to train")


def check_prefixes(field: str, prefixes: Sequence[str], names: Collection[str]) -> None:
    """Raises a `UserError` that lists the blocks if one of the `prefixes` in a `field` begins none of the `names`."""
    blocks = sorted({name.split("/")[0] for name in names})
    for prefix in prefixes:
        if not prefix or not any(name.startswith(prefix) for name in names):
            raise UserError(
                f"{field}: {prefix!r} is a prefix of no weight. The blocks are {', '.join(blocks)}."
                + did_you_mean(prefix, blocks)
            )
