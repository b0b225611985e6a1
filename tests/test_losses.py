import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from unet_jax import data, losses
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.parallel import sharding

RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 3, (2, 4, 5))
MASK = RNG.random((2, 4, 5)) < 0.7
LOGITS = RNG.normal(size=(2, 4, 5, 3)).astype(np.float32)


def _make(task, num_classes=3, class_weights=(), class_counts=None, **settings):
    """A loss of the terms in `settings` alone."""
    weights = {**default.get_config().loss, **dict.fromkeys(losses.TERMS, 0.0)}
    return losses.make({**weights, "class_weights": class_weights, **settings}, task, num_classes, class_counts)


def _value(loss, *batch):
    return float(loss.combine(loss.terms(*batch)))


def _shapes(task):
    """Logits and labels for a task, and the probability of each label, in float64."""
    if task == "multiclass":
        exponentials = np.exp(LOGITS.astype(np.float64))
        probability = exponentials / exponentials.sum(-1, keepdims=True)
        return LOGITS, LABEL, MASK, np.take_along_axis(probability, LABEL[..., None], -1)[..., 0]
    shape = (2, 4, 5) if task == "binary" else (2, 4, 5, 3)
    label, mask = RNG.integers(0, 2, shape), RNG.random(shape) < 0.7
    logits = LOGITS[..., :1] if task == "binary" else LOGITS
    positive = 1 / (1 + np.exp(-logits.astype(np.float64).reshape(shape)))
    return logits, label, mask, np.where(label == 1, positive, 1 - positive)


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)])
def test_softmax_cross_entropy_by_hand(weights):
    logits, label, mask, probability = _shapes("multiclass")
    loss = _make("multiclass", cross_entropy=1.0, class_weights=weights)
    pixel_weights = mask * np.array(weights or (1, 1, 1))[label]
    expected = -(np.log(probability) * pixel_weights).sum() / pixel_weights.sum()
    assert _value(loss, logits, jnp.asarray(np.where(mask, label, 255)), mask) == pytest.approx(expected, 1e-5)


def test_softmax_cross_entropy_and_its_gradient_equal_those_of_optax_without_a_scatter():
    label, logits, loss = jnp.asarray(LABEL), 30 * LOGITS, _make("multiclass", cross_entropy=1.0)
    ours = lambda x: loss.terms(x, label, jnp.ones(label.shape, bool))["cross_entropy"][0].sum()
    plain = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, label).sum()
    found, expected = (jax.value_and_grad(f)(logits) for f in (ours, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)  # sums in another order
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    scatters = ["scatter" in str(jax.make_jaxpr(jax.grad(f))(logits)) for f in (ours, plain)]
    assert scatters == [False, True]


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_sigmoid_cross_entropy_by_hand(task):
    logits, label, mask, probability = _shapes(task)
    loss = _make(task, cross_entropy=1.0)
    assert _value(loss, logits, jnp.asarray(label), mask) == pytest.approx(-np.log(probability)[mask].mean(), 1e-5)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_dice_by_hand(task):
    if task == "multiclass":
        probability, target = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True), np.eye(3)[LABEL]
        label, mask = LABEL, MASK
    else:
        probability, target = 1 / (1 + np.exp(-LOGITS)), np.eye(3)[LABEL]
        label, mask = target.astype(int), np.repeat(MASK[..., None], 3, -1)
    per_class = []
    for b in range(2):
        for k in range(3):
            p, t = probability[b, ..., k][MASK[b]], target[b, ..., k][MASK[b]]
            per_class.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    value = _value(_make(task, dice=1.0), LOGITS, jnp.asarray(label), mask)
    assert value == pytest.approx(np.mean(per_class), 1e-5)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_masked_pixels_and_examples_do_not_count(task):
    shape = {"multiclass": (3, 4, 4), "binary": (3, 4, 4), "multilabel": (3, 4, 4, 2)}[task]
    channels = 1 if task == "binary" else 2
    logits = jnp.asarray(RNG.normal(size=(3, 4, 4, channels)), jnp.float32)
    label = RNG.integers(0, 2, shape)
    mask = np.ones(shape, bool)
    mask[2] = False  # a whole example, as padding is
    mask[0, :2] = False
    loss = _make(task, num_classes=2, cross_entropy=1.0, dice=1.0)
    value = lambda logits, label: loss.combine(loss.terms(logits, jnp.asarray(label), mask))
    gradient = jax.grad(value)(logits, label)
    assert not gradient[2].any() and not gradient[0, :2].any() and gradient[1].any()
    assert value(logits, np.where(mask, label, 255)) == value(logits, label)
    alone = loss.terms(logits[:2], jnp.asarray(label[:2]), mask[:2])
    assert value(logits, label) == loss.combine(alone)


def test_a_fully_masked_batch_is_zero_not_nan():
    loss = _make("multiclass", cross_entropy=1.0, dice=1.0)
    assert _value(loss, LOGITS, jnp.asarray(LABEL), np.zeros_like(MASK)) == 0


def test_an_invalid_weight_is_an_error_that_names_its_field():
    with pytest.raises(UserError, match=r"config\.loss"):
        _make("multiclass", cross_entropy=0.0, dice=0.0)
    with pytest.raises(UserError, match="must be empty, or hold 3"):
        _make("multiclass", cross_entropy=1.0, class_weights=(1.0, 2.0))


def test_class_weights_from_counts_by_hand():
    make = lambda name, counts: _make("multiclass", class_weights=(name,), class_counts=counts, cross_entropy=1.0)
    assert make("balanced", [60, 30, 10]).class_weights == pytest.approx((100 / 180, 100 / 90, 100 / 30))
    assert make("sqrt", (60, 30, 10)).class_weights == pytest.approx(np.sqrt([100 / 180, 100 / 90, 100 / 30]))
    assert make("balanced", [90, 0, 10]).class_weights == pytest.approx((100 / 270, 0, 100 / 30))  # one is absent
    assert make("sqrt", None).class_weights == (1, 1, 1)  # without images, as a plan has it
    # Every class weighs the same in a batch with the counts of the whole.
    label = jnp.asarray(np.repeat([0, 1, 2], [60, 30, 10]).reshape(1, 10, 10))
    logits = jnp.asarray(np.tile([3.0, 1.0, -2.0], (1, 10, 10, 1)), jnp.float32)
    expected = -jax.nn.log_softmax(jnp.array([3.0, 1.0, -2.0])).mean()
    loss = make("balanced", [60, 30, 10])
    assert _value(loss, logits, label, jnp.ones(label.shape, bool)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "weights, counts, message",
    [
        (("balancd",), None, "'balancd' is not one of: balanced, sqrt. Did you mean 'balanced'"),
        (("balanced", "sqrt"), None, "must be empty, or hold 3 weights"),
        (("sqrt",), [0, 0, 0], "every pixel of the training is ignored"),
    ],
)
def test_class_weights_that_cannot_be_are_named(weights, counts, message):
    with pytest.raises(UserError, match=message):
        _make("multiclass", class_weights=weights, class_counts=counts, cross_entropy=1.0)


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_pixel_weights_multiply_class_weights_and_the_mean_divides_once(task):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 3, 4, 2 if task == "multiclass" else 1)), jnp.float32)
    label, weights = jnp.asarray(rng.integers(0, 2, (2, 3, 4))), jnp.asarray(rng.uniform(0, 5, (2, 3, 4)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 3, 4)) < 0.7)
    loss = _make(task, num_classes=2, cross_entropy=1.0, class_weights=(1.0, 3.0))
    if task == "multiclass":
        pixels = -np.take_along_axis(np.log(jax.nn.softmax(logits)), label[..., None], -1)[..., 0]
    else:
        p = jax.nn.sigmoid(logits[..., 0])
        pixels = -np.where(label == 1, np.log(p), np.log(1 - p))
    by_hand = np.asarray(weights * mask * np.where(label == 1, 3.0, 1.0))
    expected = (pixels * by_hand).sum() / by_hand.sum()
    assert _value(loss, logits, label, mask, weights) == pytest.approx(expected, rel=1e-6)


# A new term: one function, its line in `losses.TERMS`, and its fields in `config.loss`.


def power(pixels, exponent):
    """|1 - p|^exponent of the probability p of the label; with 2, the Brier score of two classes halved."""
    if pixels.softmax:
        p = jnp.take_along_axis(jax.nn.softmax(pixels.logits), pixels.label[..., None], -1)[..., 0]
    else:
        p = jax.nn.sigmoid(jnp.where(pixels.label > 0, pixels.logits, -pixels.logits))
    loss = (1 - p) ** exponent
    axes = tuple(range(1, loss.ndim))
    return (loss * pixels.weight).sum(axes), pixels.weight.sum(axes)


@pytest.fixture
def with_power(monkeypatch):
    monkeypatch.setitem(losses.TERMS, "power", losses.Term(power, parameters={"exponent": (0.5, 5.0)}))


@pytest.mark.usefixtures("with_power")
@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_a_new_term_needs_only_its_function_and_its_fields(task):
    logits, label, mask, probability = _shapes(task)
    loss = _make(task, cross_entropy=0.5, power=2.0, power_exponent=3.0)
    cross_entropy = -np.log(probability)[mask].mean()
    expected = 0.5 * cross_entropy + 2 * ((1 - probability) ** 3)[mask].mean()
    assert _value(loss, logits, jnp.asarray(label), mask) == pytest.approx(expected, rel=1e-5)
    totals = loss.totals(jnp.asarray(label), mask, logits.shape[-1])
    assert {name: float(total) for name, total in totals.items()} == dict.fromkeys(
        ("cross_entropy", "power"), mask.sum()
    )


@pytest.mark.usefixtures("with_power")
@pytest.mark.parametrize("exponent", [-1.0, 5.5, float("nan")])
def test_the_parameters_of_a_new_term_are_checked(exponent):
    with pytest.raises(UserError, match=rf"config\.loss\.power_exponent = {exponent} is not in 0\.5\.\.5\.0"):
        _make("multiclass", power=1.0, power_exponent=exponent)


@pytest.mark.slow
@pytest.mark.usefixtures("with_power")
def test_a_new_term_trains_in_microbatches_and_is_evaluated(config):
    with config.unlocked():
        config.loss.cross_entropy, config.loss.power, config.loss.power_exponent = 0.0, 1.0, 2.0
    config.train.accumulate, config.train.batch_size = 2, 4
    state, history = helpers.run_steps(config, helpers.one_device(), steps=2)
    assert np.isfinite([step["loss"] for step in history]).all() and history[0]["grad_norm"] > 0

    built, _ = helpers.build(config, helpers.one_device())
    source = data.load(config.data, "validation")
    images = pipeline.Pipeline(source, config.data.size, config.data.resize, cache_gib=0.0)
    step = evaluate.make_eval_step(built.network, built.loss)
    batches = images.eval_batches(4, sharding.process_rows(built.network.mesh, 4))
    result = evaluate.evaluate(step, state.eval_variables, batches, built.loss, built.network)
    examples = [images.read(i) for i in range(len(source))]
    image, label = (np.stack([example[name] for example in examples]) for name in ("image", "label"))
    probability = np.asarray(built.network.probability(state.eval_variables, image), np.float64)
    p = np.take_along_axis(probability, label[..., None].astype(int), -1)
    assert result.loss == pytest.approx(((1 - p) ** 2).mean(), rel=1e-5)
