"""Each loss term beside an independent implementation, MONAI's or its formula in float64, and on hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from configs import default
from unet_jax import losses
from unet_jax.errors import UserError
from unet_jax.losses.cldice import soft_skeleton

RNG = np.random.default_rng(0)
TASKS = {"multiclass": 3, "binary": 1, "multilabel": 3}  # task -> channels of the logits


def make(task, **settings):
    """A loss of the terms in `settings` alone."""
    weights = dict.fromkeys(losses.TERMS, 0.0)
    return losses.make({**default.get_config().loss, **weights, **settings}, task, max(TASKS[task], 2))


def example(task, size=(3, 12, 10)):
    """Logits `[B, H, W, K]`, labels as our losses take them, and one-hot as those of MONAI."""
    logits = 2 * RNG.normal(size=(*size, TASKS[task])).astype(np.float32)
    if task == "multiclass":
        label = RNG.integers(0, 3, size)
        label[0][label[0] == 2] = 1  # an image without the last class
        return logits, label, np.eye(3)[label]
    hot = RNG.integers(0, 2, (*size, TASKS[task]))
    return logits, hot[..., 0] if task == "binary" else hot, hot


def value(loss, logits, label):
    label = jnp.asarray(label)
    return float(loss.combine(loss.terms(logits, label, jnp.ones(label.shape, bool))))


def of_monai(name, logits, hot, task, **settings):
    """The loss of that name in float64."""
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.losses")
    activation = {"use_softmax": task == "multiclass"} if name == "FocalLoss" else {}
    if name != "FocalLoss":
        activation = {"softmax": task == "multiclass", "sigmoid": task != "multiclass"}
    tensors = (torch.tensor(np.moveaxis(x, -1, 1), dtype=torch.float64) for x in (logits, hot))
    return getattr(monai, name)(**settings, **activation)(*tensors)


ONE = {"smooth_nr": 1.0, "smooth_dr": 1.0}
AREAS = {
    "dice": ({"dice": 1.0}, "DiceLoss", ONE),
    "batch_dice": ({"batch_dice": 1.0}, "DiceLoss", {**ONE, "batch": True}),
    "generalized_dice": ({"generalized_dice": 1.0}, "GeneralizedDiceLoss", {"smooth_nr": 0, "smooth_dr": 0}),
    "tversky": ({"tversky": 1.0, "tversky_alpha": 0.2}, "TverskyLoss", {"alpha": 0.2, "beta": 0.7, **ONE}),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", AREAS)
def test_losses_of_areas_equal_those_of_monai(name, task):
    ours, theirs, settings = AREAS[name]
    logits, label, hot = example(task)
    expected = of_monai(theirs, logits, hot, task, **settings)
    assert value(make(task, **ours), logits, label) == pytest.approx(expected.item(), rel=1e-5)  # float32 sums


@pytest.mark.parametrize("task", TASKS)
def test_the_focal_loss_equals_that_of_monai(task):
    logits, label, hot = example(task)
    pixels = of_monai("FocalLoss", logits, hot, task, gamma=1.5, reduction="none")
    # MONAI's mean over classes divides by their number; in a softmax all but that of the label are zero.
    expected = pixels.sum(1).mean() if task == "multiclass" else pixels.mean()
    assert value(make(task, focal=1.0, focal_gamma=1.5), logits, label) == pytest.approx(expected.item(), rel=1e-5)


def test_the_focal_tversky_loss_is_a_power_of_each_class():
    logits, label, _ = example("binary", (1, 12, 10))
    plain, focal = (make("binary", tversky=1.0, tversky_gamma=gamma) for gamma in (1.0, 0.75))
    assert value(focal, logits, label) == pytest.approx(value(plain, logits, label) ** 0.75, rel=1e-5)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_label_smoothing_is_cross_entropy_to_smoothed_targets(task):
    logits, label, hot = example(task)
    x = logits.astype(np.float64)
    if task == "multiclass":
        target = 0.9 * hot + 0.1 / 3
        expected = -(target * (x - np.log(np.exp(x).sum(-1, keepdims=True)))).sum(-1).mean()
    else:
        target = 0.9 * hot + 0.1 / 2
        expected = (np.log1p(np.exp(-x)) * target + np.log1p(np.exp(x)) * (1 - target)).mean()
    loss = make(task, cross_entropy=1.0, cross_entropy_smoothing=0.1)
    assert value(loss, logits, label) == pytest.approx(expected, rel=1e-5)


def lovasz_extension(errors, target):
    """The integral of the Jaccard loss of the pixels whose error exceeds t, over t, which is the definition."""
    levels = np.unique(np.concatenate([[0.0], errors]))
    jaccard = []
    for low in levels[:-1]:
        wrong = errors > low
        missed, added = (wrong & target).sum(), (wrong & ~target).sum()
        jaccard.append(1 - (target.sum() - missed) / (target.sum() + added) if target.sum() + added else 0)
    return (np.diff(levels) * jaccard).sum()


@pytest.mark.parametrize("task", TASKS)
def test_the_lovasz_loss_is_the_extension_of_the_intersection_over_union(task):
    logits, label, hot = example(task)
    x, hot = logits.astype(np.float64), hot.astype(bool)
    if task == "multiclass":
        errors = np.abs(hot - np.exp(x) / np.exp(x).sum(-1, keepdims=True))
    else:
        errors = np.maximum(1 - x * (2 * hot - 1), 0)
    images = []
    for error, target in zip(errors, hot, strict=True):
        present = [k for k in range(hot.shape[-1]) if task != "multiclass" or target[..., k].any()]
        images.append(np.mean([lovasz_extension(error[..., k].ravel(), target[..., k].ravel()) for k in present]))
    assert value(make(task, lovasz=1.0), logits, label) == pytest.approx(np.mean(images), rel=1e-5)


def test_the_lovasz_softmax_of_a_certain_prediction_is_one_minus_its_mean_intersection_over_union():
    label, predicted = RNG.integers(0, 3, (1, 9, 9)), RNG.integers(0, 3, (1, 9, 9))
    logits = jnp.asarray(100 * np.eye(3)[predicted], jnp.float32)
    union = lambda k: ((label == k) | (predicted == k)).sum()
    miou = np.mean([((label == k) & (predicted == k)).sum() / union(k) for k in range(3)])
    assert value(make("multiclass", lovasz=1.0), logits, label) == pytest.approx(1 - miou, rel=1e-5)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_the_centreline_dice_of_each_mask_equals_that_of_monai(task):
    logits, label, hot = example(task, (2, 24, 20))
    logits, hot = (ndimage.uniform_filter(x.astype(np.float32), (0, 5, 5, 0)) for x in (20 * logits, hot))
    hot = (hot > 0.5).astype(int)
    # MONAI adds up all masks of the batch.
    each = [
        of_monai("SoftclDiceLoss", logits[b : b + 1, ..., k : k + 1], hot[b : b + 1, ..., k : k + 1], task, iter_=4,
                 smooth=1e-12).item()
        for b in range(len(hot)) for k in range(hot.shape[-1])
    ]  # fmt: skip
    label = hot[..., 0] if task == "binary" else hot
    loss = make(task, cldice=1.0, cldice_iterations=4)
    assert value(loss, logits, label) == pytest.approx(np.mean(each), rel=1e-5)


def test_the_soft_skeleton_of_a_bar_is_its_centreline():
    bar = np.zeros((1, 15, 30, 1), np.float32)
    bar[0, 5:10, 3:27] = 1
    skeleton = np.asarray(soft_skeleton(jnp.asarray(bar), 3))[0, ..., 0]
    assert (skeleton[7, 6:24] == 1).all() and skeleton[:, 8:22].sum() == 14


def test_centreline_dice_sees_a_gap_that_dice_does_not():
    label = np.zeros((1, 32, 64), int)
    label[0, 12:21] = 1
    broken, thinner = label.copy(), label.copy()
    broken[0, :, 30:34] = 0  # 36 pixels
    thinner[0, 12, :36] = 0  # 36 pixels
    for task, expected in (("dice", False), ("cldice", True)):
        loss = make("binary", **{task: 1.0})
        gap, thin = (value(loss, 40.0 * jnp.asarray(x)[..., None] - 20, label) for x in (broken, thinner))
        assert (gap > 1.2 * thin) == expected, (gap, thin)


PAIRS = [(name, task) for name, term in losses.TERMS.items() for task in term.tasks]


def value_and_gradient(loss):
    """The loss, and its gradient in the logits, as a function of logits, label and mask."""
    function = jax.jit(jax.value_and_grad(lambda *batch: loss.combine(loss.terms(*batch))))

    def compute(logits, label, mask):
        assert "scatter" not in str(jax.make_jaxpr(function)(logits, label, mask))  # which GPUs add up in any order
        found, gradient = function(logits, label, mask)
        return float(found), np.asarray(gradient)

    return compute


@pytest.mark.parametrize("name, task", PAIRS)
def test_loss_and_gradient_are_finite_for_any_logits_and_empty_full_and_ignored_masks(name, task):
    compute = value_and_gradient(make(task, **{name: 1.0, "tversky_gamma": 0.75}))
    logits, label, _ = example(task, (2, 8, 10))
    mask = RNG.random(label.shape) < 0.7
    for scale in (0.0, 1.0, 200.0, -200.0):
        for labels in (label, 0 * label, 0 * label + 1):
            found, gradient = compute(scale * logits, np.where(mask, labels, 255), mask)
            assert found >= 0 and np.isfinite(found) and np.isfinite(gradient).all()
            assert gradient.any() or scale in (200.0, -200.0)
        found, gradient = compute(scale * logits, 0 * label + 255, np.zeros_like(mask))
        assert found == pytest.approx(0) and not gradient.any()


@pytest.mark.parametrize("name, task", PAIRS)
def test_ignored_pixels_and_images_without_others_do_not_count(name, task):
    compute = value_and_gradient(make(task, **{name: 1.0}))
    logits, label, _ = example(task, (2, 8, 10))
    ignored = np.zeros(logits.shape[:3], bool)
    ignored[0, 2:5, 3:] = ignored[1] = True
    mask = ~np.broadcast_to(ignored[..., None] if task == "multilabel" else ignored, label.shape)
    masked = np.where(mask, label, 255)
    found, gradient = compute(logits, masked, mask)
    assert not gradient[ignored].any() and gradient[~ignored].any()
    changed = np.where(ignored[..., None], 3 - logits, logits)
    assert compute(changed, masked, mask)[0] == pytest.approx(found, rel=1e-6)
    assert compute(logits[:1], masked[:1], mask[:1])[0] == pytest.approx(found, rel=1e-6)


def test_a_loss_that_cannot_do_the_task_says_what_can():
    with pytest.raises(UserError, match=r"cldice = 1.0 is for the tasks binary and multilabel, not for multiclass"):
        make("multiclass", cldice=1.0)
