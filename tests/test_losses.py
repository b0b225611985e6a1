import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unet_jax import losses
from unet_jax.errors import UserError

RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 3, (2, 4, 5))
MASK = RNG.random((2, 4, 5)) < 0.7
LOGITS = RNG.normal(size=(2, 4, 5, 3)).astype(np.float32)


def _sum(terms):
    return terms["cross_entropy"][0].sum()


def _value(terms, name):
    return float(losses.combine(terms, {name: 1.0}))


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)])
def test_softmax_cross_entropy_by_hand(weights):
    terms = losses.terms(LOGITS, jnp.asarray(np.where(MASK, LABEL, 255)), MASK, "multiclass", weights)
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    pixel_weights = MASK * np.array(weights or (1, 1, 1))[LABEL]
    nll = -np.log(np.take_along_axis(probability, LABEL[..., None], -1)[..., 0])
    assert _value(terms, "cross_entropy") == pytest.approx((nll * pixel_weights).sum() / pixel_weights.sum(), 1e-5)


def test_softmax_cross_entropy_and_its_gradient_equal_those_of_optax_without_a_scatter():
    label, logits = jnp.asarray(LABEL), 30 * LOGITS
    ours = lambda x: _sum(losses.terms(x, label, jnp.ones(label.shape, bool), "multiclass"))
    plain = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, label).sum()
    found, expected = (jax.value_and_grad(f)(logits) for f in (ours, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)  # sums in another order
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    scatters = ["scatter" in str(jax.make_jaxpr(jax.grad(f))(logits)) for f in (ours, plain)]
    assert scatters == [False, True]


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_sigmoid_cross_entropy_by_hand(task):
    shape = (2, 4, 5) if task == "binary" else (2, 4, 5, 3)
    label, mask = RNG.integers(0, 2, shape), RNG.random(shape) < 0.7
    logits = LOGITS[..., :1] if task == "binary" else LOGITS
    probability = 1 / (1 + np.exp(-logits.reshape(shape)))
    nll = -np.where(label, np.log(probability), np.log(1 - probability))
    terms = losses.terms(logits, jnp.asarray(label), mask, task)
    assert _value(terms, "cross_entropy") == pytest.approx(nll[mask].mean(), 1e-5)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_dice_by_hand(task):
    if task == "multiclass":
        probability, truth = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True), np.eye(3)[LABEL]
        label, mask = LABEL, MASK
    else:
        probability, truth = 1 / (1 + np.exp(-LOGITS)), np.eye(3)[LABEL]
        label, mask = truth.astype(int), np.repeat(MASK[..., None], 3, -1)
    terms = losses.terms(LOGITS, jnp.asarray(label), mask, task)
    per_class = []
    for b in range(2):
        for k in range(3):
            p, t = probability[b, ..., k][MASK[b]], truth[b, ..., k][MASK[b]]
            per_class.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    assert _value(terms, "dice") == pytest.approx(np.mean(per_class), 1e-5)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_masked_pixels_and_examples_count_nowhere(task):
    shape = {"multiclass": (3, 4, 4), "binary": (3, 4, 4), "multilabel": (3, 4, 4, 2)}[task]
    channels = 1 if task == "binary" else 2
    logits = jnp.asarray(RNG.normal(size=(3, 4, 4, channels)), jnp.float32)
    label = RNG.integers(0, 2, shape)
    mask = np.ones(shape, bool)
    mask[2] = False  # a whole example, as padding is
    mask[0, :2] = False
    value = lambda logits, label: losses.combine(
        losses.terms(logits, jnp.asarray(label), mask, task), {"cross_entropy": 1.0, "dice": 1.0}
    )
    gradient = jax.grad(value)(logits, label)
    assert not gradient[2].any() and not gradient[0, :2].any() and gradient[1].any()
    assert value(logits, np.where(mask, label, 255)) == value(logits, label)
    alone = losses.terms(logits[:2], jnp.asarray(label[:2]), mask[:2], task)
    assert value(logits, label) == losses.combine(alone, {"cross_entropy": 1.0, "dice": 1.0})


def test_everything_masked_is_zero_not_nan():
    terms = losses.terms(LOGITS, jnp.asarray(LABEL), np.zeros_like(MASK), "multiclass")
    assert losses.combine(terms, {"cross_entropy": 1.0, "dice": 1.0}) == 0


def test_bad_weights_are_named():
    with pytest.raises(UserError, match=r"config\.loss"):
        losses.check({"cross_entropy": 0.0, "dice": 0.0}, (), 3)
    with pytest.raises(UserError, match="must be empty or hold 3"):
        losses.check({"cross_entropy": 1.0}, (1.0, 2.0), 3)


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_pixel_weights_multiply_and_divide_once(task):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 3, 4, 2 if task == "multiclass" else 1)), jnp.float32)
    label, weights = jnp.asarray(rng.integers(0, 2, (2, 3, 4))), jnp.asarray(rng.uniform(0, 5, (2, 3, 4)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 3, 4)) < 0.7)
    found = _value(losses.terms(logits, label, mask, task, (1.0, 3.0), weights), "cross_entropy")
    if task == "multiclass":
        pixels = -np.take_along_axis(np.log(jax.nn.softmax(logits)), label[..., None], -1)[..., 0]
    else:
        p = jax.nn.sigmoid(logits[..., 0])
        pixels = -np.where(label == 1, np.log(p), np.log(1 - p))
    by_hand = np.asarray(weights * mask * np.where(label == 1, 3.0, 1.0))
    assert found == pytest.approx((pixels * by_hand).sum() / by_hand.sum(), rel=1e-6)
