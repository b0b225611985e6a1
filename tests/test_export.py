"""Exported files in processes that know neither flax nor unet_jax, against the network, on real images."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import unet_jax
from unet_jax import data, export, train, trained
from unet_jax.errors import UserError
from unet_jax.models import unet

# Every setting of `config.model` that changes the graph, and every task.
VARIANTS = {
    "paper": dict(padding="valid"),
    "carla": dict(upsample="transposed_3x3", extra_conv=True),
    "keras": dict(upsample="nearest"),
    "bilinear": dict(upsample="bilinear", norm="group"),
    "valid bilinear": dict(padding="valid", upsample="bilinear", norm="group", extra_conv=True),
    "valid nearest": dict(padding="valid", upsample="nearest", norm="batch"),
    "valid transposed_3x3": dict(padding="valid", upsample="transposed_3x3", features=(4, 6, 6, 8)),
    "binary": dict(norm="batch", task="binary"),
    "multilabel": dict(padding="valid", extra_conv=True, norm="batch", task="multilabel"),
    "two levels": dict(features=(3, 5), task="binary"),
}
SIZES = [(2, 37, 53), (1, 120, 160), (3, 1, 9), (1, 64, 48), (1, 2, 1)]  # batch, height, width
VARIANT_SIZES = [(2, 37, 53), (1, 3, 40)]  # fewer: each is compiled anew

# Runs every artefact on every batch of images, and nothing of this project.
PROGRAM = """
import json, pathlib, sys
class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("flax", "unet_jax", "tensorflow", "torch", "jax2onnx"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked)
import numpy as np
kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
if kind == "stablehlo":
    from jax import export
    load = lambda path: export.deserialize(path.read_bytes()).call
else:
    import onnxruntime
    def load(path):
        session = onnxruntime.InferenceSession(path)
        return lambda image: session.run(["label", "probability"], {"image": image})
for path in folder.glob("*." + kind):
    network = load(path)
    for i, size in enumerate(json.loads((folder / f"{path.stem}.sizes").read_text())):
        b, h, w = size
        images = np.load(folder / "images.npy")[:b, 100:100 + h, 200:200 + w]
        label, probability = map(np.asarray, network(images))
        np.savez(folder / f"{path.name}.{i}.npz", label=label, probability=probability)
assert not {"flax", "unet_jax"} & sys.modules.keys()
"""


def _network(task="multiclass", **settings):
    """A network of random weights, normalisation statistics and biases included."""
    config = __import__("conftest").config.__wrapped__()
    config.model.update({"dropout": 0.0, "norm": "none", **settings})
    names = ("road", "sky") if task == "binary" else ("road", "sky", "pole", "wall")
    classes = data.Classes(task, names, tuple((60 * i, 0, 255) for i in range(len(names))))
    model = unet.create(classes.num_outputs, **config.model, one_cpu=True)
    random = np.random.default_rng(1)
    near = lambda shape: (shape.size > 0) * random.uniform(0.1, 0.3, shape.shape)
    variables = {"batch_stats": {}, **model.init(jax.random.key(0), np.zeros((1, *model.smallest_input, 3), np.float32))}
    variables = jax.tree.map(lambda x: x + near(x).astype(x.dtype) * (x.ndim == 1), variables)
    return trained.Trained(config, classes, model, variables, 7)


@pytest.fixture(scope="module")
def images():
    """Four real street scenes, uint8 [4, 480, 640, 3]."""
    folder = __import__("conftest").real_data.__wrapped__() / "carla" / "CameraRGB"
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))[:4]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory after a few steps on generated shapes."""
    config = __import__("conftest").config.__wrapped__()
    config.train.epochs = 0.5
    path = tmp_path_factory.mktemp("export") / "run"
    train.train(config, path)
    return path


@pytest.fixture(scope="module")
def street(images, tmp_path_factory):
    """A network trained for a few steps on real street scenes, read from its work directory."""
    config = __import__("conftest").config.__wrapped__()
    config.data.update(name="carla", variant="carla23", size=(48, 64))
    config.data.root = str(__import__("conftest").real_data.__wrapped__() / "carla")
    config.train.epochs = 8.0
    path = tmp_path_factory.mktemp("export") / "street"
    train.train(config, path)
    return unet_jax.load(path)


@pytest.fixture(scope="module")
def networks(street):
    return {"trained": street, **{name: _network(**settings) for name, settings in VARIANTS.items()}}


@pytest.fixture(scope="module")
def folder(images, networks, tmp_path_factory):
    """The images, and for each network which parts of them it is run on."""
    folder = tmp_path_factory.mktemp("artefacts")
    np.save(folder / "images.npy", images)
    for name in networks:
        (folder / f"{name}.sizes").write_text(json.dumps(SIZES if name == "trained" else VARIANT_SIZES))
    return folder


def _run_elsewhere(kind, folder):
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, kind, str(folder)], check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def stablehlo(networks, folder):
    for name, network in networks.items():
        (folder / f"{name}.stablehlo").write_bytes(export.to_stablehlo(network))
    return _run_elsewhere("stablehlo", folder)


@pytest.fixture(scope="module")
def onnx_files(networks, folder):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for name, network in networks.items():
        proto = export.to_onnx(network)
        onnx.checker.check_model(proto, full_check=True)
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    return _run_elsewhere("onnx", folder)


def _compare(network, images, folder, name, kind):
    for i, (b, h, w) in enumerate(json.loads((folder / f"{name}.sizes").read_text())):
        found = np.load(folder / f"{name}.{kind}.{i}.npz")
        expected = np.asarray(network.predict(images[:b, 100 : 100 + h, 200 : 200 + w]))
        assert found["probability"].shape == expected.shape and found["probability"].dtype == np.float32
        # float32 sums in another order; normalisation over groups divides by small variances.
        np.testing.assert_allclose(found["probability"], expected, atol=1e-5)
        if network.classes.task == "multiclass":
            label, second = expected.argmax(-1), np.sort(expected, -1)[..., -2]
            decided = expected.max(-1) - second > 2e-5
        else:
            label, decided = expected > 0.5, np.abs(expected - 0.5) > 1e-5
        if network.classes.task == "binary":
            label, decided = label[..., 0], decided[..., 0]
        assert found["label"].shape == label.shape and found["label"].dtype == np.uint8
        assert (found["label"] == label)[decided].all() and decided.mean() > 0.99
        if h > 30:  # not trivial: no class is nearly everything
            assert max(np.bincount(found["label"].ravel()) / label.size) < 0.98, np.bincount(found["label"].ravel())


@pytest.mark.parametrize("name", ["trained", *VARIANTS])
def test_stablehlo_agrees_without_flax_on_real_images_of_any_size(networks, images, stablehlo, name):
    _compare(networks[name], images, stablehlo, name, "stablehlo")


@pytest.mark.parametrize("name", ["trained", *VARIANTS])
def test_onnx_agrees_without_flax_on_real_images_of_any_size(networks, images, onnx_files, name):
    _compare(networks[name], images, onnx_files, name, "onnx")
