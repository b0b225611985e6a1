"""The encoders against their PyTorch definitions, feature by feature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from unet_jax.errors import UserError
from unet_jax.models import encoders
from unet_jax.models.encoders.layers import ConvNorm, Settings
from unet_jax.weights import encoder_weights

torch = pytest.importorskip("torch")
RESNETS = [name for name in encoders.NAMES if name.startswith("resnet")]
LITES = [name for name in encoders.NAMES if name not in RESNETS]


class TorchBlock(torch.nn.Module):
    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        conv = lambda i, o, k, s: torch.nn.Conv2d(i, o, k, s, k // 2, bias=False)
        shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.count, outputs = len(shapes), shapes[-1][1]
        for i, shape in enumerate(shapes, 1):
            setattr(self, f"conv{i}", conv(*shape))
            setattr(self, f"bn{i}", torch.nn.BatchNorm2d(shape[1]))
        if stride > 1 or inputs != outputs:
            norm = torch.nn.BatchNorm2d(outputs)
            self.downsample = torch.nn.Sequential(conv(inputs, outputs, 1, stride), norm)

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.count else y
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class TorchResNet(torch.nn.Module):
    """The names and the order of torchvision's and timm's."""

    def __init__(self, name):
        super().__init__()
        depths, bottleneck = {
            "resnet18": ((2, 2, 2, 2), False),
            "resnet34": ((3, 4, 6, 3), False),
            "resnet50": ((3, 4, 6, 3), True),
        }[name]
        self.conv1 = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        inputs = 64
        for stage, depth in enumerate(depths, 1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(TorchBlock(inputs, 32 * 2**stage, stride, bottleneck))
                inputs = 32 * 2**stage * (4 if bottleneck else 1)
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(inputs, 1000)

    def features(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        features = [x]
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            features.append(x)
        return features


def draw_statistics(model):
    """Weights and averages as after a training: none of them neutral."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))


def lite_features(name):
    """The features of `efficientnet_lite_pytorch`, whose paddings are made for one image size; here they fit any."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import utils

    model = package.EfficientNet.from_name(name.replace("_", "-")).eval()
    for module in model.modules():
        if isinstance(module, utils.Conv2dStaticSamePadding):
            module.forward = utils.Conv2dDynamicSamePadding.forward.__get__(module)

    def features(x):
        found, x = [], model._swish(model._bn0(model._conv_stem(x)))
        for block in model._blocks:
            y = block(x)
            if y.shape[2:] != x.shape[2:]:
                found.append(x)
            x = y
        return [*found, x]

    return model, features


def check_features(name, weights, features, size):
    encoder = encoders.find(name).make()
    image = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    once = {"xla_backend_optimization_level": "1"}  # compiles faster
    ours = jax.jit(lambda image: encoder.apply(variables, image, False), compiler_options=once)(image)
    with torch.no_grad():
        theirs = features(torch.from_numpy(image).permute(0, 3, 1, 2))
    assert len(ours) == len(theirs) == 5
    for level, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        b = b.permute(0, 2, 3, 1).numpy()
        assert a.shape[1:3] == tuple(-(-n // 2**level) for n in size)
        # Two libraries add in other orders; a wrong padding or epsilon shows as 1e-2 and more.
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("name", "size"), [(LITES[0], (75, 101)), (LITES[2], (45, 64))])
def test_features_of_the_published_weights_equal_those_of_pytorch(name, size):
    model, features = lite_features(name)
    weights = encoder_weights.load(name, "imagenet", 3)
    place = encoder_weights.find_file(name, "imagenet")
    model.load_state_dict(torch.load(place, weights_only=True))
    check_features(name, weights, features, size)


@pytest.mark.parametrize(("name", "size"), [("resnet18", (64, 96)), ("resnet50", (45, 67))])
def test_features_of_a_resnet_equal_those_of_pytorch(name, size, tmp_path):
    torch.manual_seed(0)
    model = TorchResNet(name).eval()
    draw_statistics(model)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    check_features(name, encoder_weights.load(name, str(tmp_path / "weights.pth"), 3), model.features, size)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("efficientnet_lite0", 2_958_848),
        ("efficientnet_lite1", 3_723_520),
        ("efficientnet_lite2", 4_357_952),
        ("resnet18", 11_176_512),  # those of the published classifiers without their last layer
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
    ],
)
def test_parameters(name, count):
    module = encoders.find(name).make()
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


def test_every_variable_has_its_own_name_in_pytorch():
    for name in encoders.NAMES:
        encoder = encoders.find(name)
        module = encoder.make()
        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
        paths = traverse_util.flatten_dict(variables, sep="/")
        assert len({encoder.torch_name(path) for path in paths}) == len(paths)


def test_frozen_normalisation_never_moves():
    frozen, module = (ConvNorm(4, 3, Settings(frozen=frozen), epsilon=1e-3) for frozen in (True, False))
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(0), image, False)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, frozen.init(jax.random.key(0), image, False))
    draw = lambda leaf: jax.random.uniform(jax.random.key(leaf.size), leaf.shape, minval=0.5, maxval=1.5)
    variables = {**variables, "batch_stats": jax.tree.map(draw, variables["batch_stats"])}

    def loss(params):
        values = {"params": params, "batch_stats": variables["batch_stats"]}
        y, updates = frozen.apply(values, image, True, mutable=["batch_stats"])
        return (y**2).sum(), (y, updates)

    gradients, (y, updates) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    moved = {path[-1] for path, leaf in traverse_util.flatten_dict(gradients).items() if jnp.any(leaf != 0)}
    assert moved == {"kernel"}
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    # The layer in training is the one that is evaluated.
    np.testing.assert_allclose(y, module.apply(variables, image, False), rtol=1e-5, atol=1e-5)


def test_an_unknown_encoder_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"config.model.encoder.*resnet34"):
        encoders.find("resnet35")
