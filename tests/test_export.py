"""Exported files, run on real images without flax and unet_jax, compared with the network."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn
from flax import traverse_util
from helpers import ROOT, run
from PIL import Image

import unet_jax
from unet_jax import data, models
from unet_jax.errors import UserError
from unet_jax.inference import forward, trained
from unet_jax.interop import export
from unet_jax.parallel import sharding

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
    "normalized": dict(
        norm="batch", task="binary", normalization=forward.Normalization((120.0, 110.0, 100.0), (60.0, 55.0, 50.0))
    ),
}
SIZES = [(2, 37, 53), (1, 120, 160), (3, 1, 9), (1, 64, 48)]  # batch, height, width
VARIANT_SIZES = [(2, 37, 53)]  # only one, as each is compiled

# Runs every exported file on every batch of images, without this project.
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
        images = np.load(folder / f"{path.stem}.npy")[:b, 240:240 + h, 200:200 + w]
        label, probability = map(np.asarray, network(images))
        np.savez(folder / f"{path.name}.{i}.npz", label=label, probability=probability)
assert not {"flax", "unet_jax"} & sys.modules.keys()
"""


def _network(images, task="multiclass", normalization=None, **settings):
    """A network with random weights and statistics that predicts each class about equally often."""
    config = tiny.get_config()
    config.model.update({"dropout": 0.0, "norm": "none", "features": (4, 6, 8), **settings})
    names = ("road", "sky") if task == "binary" else ("road", "sky", "pole", "wall")
    classes = data.Classes(task, names, tuple((60 * i, 0, 255) for i in range(len(names))))
    mesh = sharding.create_mesh(0, 1)
    network = forward.create_network(config.model, classes, mesh, normalization)
    random = np.random.default_rng(1)

    def draw(x):  # He-normal kernels; positive biases and statistics
        if len(x.shape) == 1:
            return np.float32(random.uniform(0.1, 0.3, x.shape))
        return np.float32(random.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape))

    variables = jax.tree.map(draw, models.abstract_variables(network.model, 3))
    # Logits with mean 0 and standard deviation 1, so that every class is predicted.
    logits = jax.jit(network.logits)(variables, images[:2, 240:277, 200:253])
    mean, deviation, head = logits.mean((0, 1, 2)), logits.std((0, 1, 2)), variables["params"]["head"]
    head.update(kernel=head["kernel"] / deviation, bias=(head["bias"] - mean) / deviation)
    return trained.Trained(config, classes, network, variables, 7)


@pytest.fixture(scope="module")
def images(real_data):
    """Four real street scenes, uint8 [4, 480, 640, 3]."""
    folder = real_data / "carla" / "CameraRGB"
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))[:4]])


@pytest.fixture(scope="module")
def networks(images, trained):
    return {
        "trained": unet_jax.load(trained),
        **{name: _network(images, **settings) for name, settings in VARIANTS.items()},
    }


@pytest.fixture(scope="module")
def folder(images, networks, tmp_path_factory):
    """The images, and the sizes on which each network is run."""
    folder = tmp_path_factory.mktemp("artefacts")
    for name, network in networks.items():
        np.save(folder / f"{name}.npy", images[..., : network.classes.channels])
        (folder / f"{name}.sizes").write_text(json.dumps(SIZES if name == "trained" else VARIANT_SIZES))
    return folder


def _run_without_project(kind, folder):
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, kind, str(folder)], check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def stablehlo(networks, folder):
    for name, network in networks.items():
        (folder / f"{name}.stablehlo").write_bytes(export.to_stablehlo(network))
    return _run_without_project("stablehlo", folder)


@pytest.fixture(scope="module")
def onnx_files(networks, folder):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for name, network in networks.items():
        proto = export.to_onnx(network)
        onnx.checker.check_model(proto, full_check=True)
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    return _run_without_project("onnx", folder)


def _compare(network, images, folder, name, kind):
    for i, (b, h, w) in enumerate(json.loads((folder / f"{name}.sizes").read_text())):
        found = np.load(folder / f"{name}.{kind}.{i}.npz")
        expected = np.asarray(network.predict(images[:b, 240 : 240 + h, 200 : 200 + w, : network.classes.channels]))
        assert found["probability"].shape == expected.shape and found["probability"].dtype == np.float32
        # float32 sums in another order. With group norm, the network is 4e-5 from float64, the ONNX graph 2e-5.
        tolerance = 1e-4 if network.model.norm == "group" else 1e-5
        np.testing.assert_allclose(found["probability"], expected, atol=tolerance)
        if network.classes.task == "multiclass":
            label, second = expected.argmax(-1), np.sort(expected, -1)[..., -2]
            decided = expected.max(-1) - second > 2 * tolerance
        else:
            label, decided = expected > 0.5, np.abs(expected - 0.5) > tolerance
        if network.classes.task == "binary":
            label, decided = label[..., 0], decided[..., 0]
        assert found["label"].shape == label.shape and found["label"].dtype == np.uint8
        assert (found["label"] == label)[decided].all() and decided.mean() > 0.99
        if h > 30:  # not trivial: no class covers nearly everything
            assert max(np.bincount(found["label"].ravel()) / label.size) < 0.98, np.bincount(found["label"].ravel())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", *VARIANTS])
def test_stablehlo_agrees_without_flax_on_real_images_of_any_size(networks, images, stablehlo, name):
    _compare(networks[name], images, stablehlo, name, "stablehlo")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", *VARIANTS])
def test_onnx_agrees_without_flax_on_real_images_of_any_size(networks, images, onnx_files, name):
    _compare(networks[name], images, onnx_files, name, "onnx")


def test_margins_in_closed_form_equal_those_of_the_network(networks):
    for network in networks.values():
        model = network.model
        for axis, (before, smallest, covered) in enumerate(export.geometry(model)):
            for length in range(1, 60):
                padded = smallest + (length - covered + model.stride - 1) // model.stride * model.stride
                assert model.margins((length, length))[axis] == (before, padded - length - before)
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 1, 3), np.uint8)  # margins longer than the image
    model = networks["paper"].model
    np.testing.assert_array_equal(export.reflect_pad(model, image), forward.reflect_pad(image, model.margins((3, 1))))


def test_onnx_is_refused_for_other_networks(networks):
    class Other(nn.Module):
        pass

    network = dataclasses.replace(networks["paper"].network, model=Other())
    with pytest.raises(UserError, match=r"ONNX is written only for config.model.name = 'unet', not for Other"):
        export.to_onnx(dataclasses.replace(networks["paper"], network=network))


def test_weights_and_metadata_are_read_without_flax(networks, images, tmp_path):
    pytest.importorskip("safetensors")
    network = networks["normalized"]
    (tmp_path / "w.safetensors").write_bytes(export.to_safetensors(network))
    read = """
from safetensors import safe_open
with safe_open("w.safetensors", "numpy") as file:
    np.savez("weights.npz", **{name: file.get_tensor(name) for name in file.keys()})
    open("metadata.json", "w").write(json.dumps(file.metadata()))
"""
    program = PROGRAM.split("kind, folder")[0] + read
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    metadata = {key: json.loads(value) for key, value in json.loads((tmp_path / "metadata.json").read_text()).items()}
    classes = data.Classes.from_json(metadata["classes"])
    assert metadata["step"] == 7 and classes == network.classes
    weights = dict(np.load(tmp_path / "weights.npz"))
    assert {name: x.shape for name, x in weights.items()} == models.shapes(network.variables)
    variables = traverse_util.unflatten_dict(weights, sep="/")
    normalization = forward.Normalization.from_json(metadata["normalization"])
    rebuilt = dataclasses.replace(
        network,
        variables=variables,
        network=forward.create_network(metadata["config"]["model"], classes, network.mesh, normalization),
    )
    np.testing.assert_array_equal(rebuilt.predict(images[:2, :37, :53]), network.predict(images[:2, :37, :53]))


def test_onnx_files_hold_the_metadata(networks):
    pytest.importorskip("onnx")
    found = {entry.key: entry.value for entry in export.to_onnx(networks["binary"]).metadata_props}
    assert json.loads(found["classes"])["names"] == ["road", "sky"] and found == export.metadata(networks["binary"])


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, networks):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"onnx is needed, but not installed: run scripts/install.sh export"):
        export.to_onnx(networks["binary"])


def _script(*flags, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return run(sys.executable, ROOT / "scripts" / "export.py", *flags, cwd=cwd, env=environment)


@pytest.mark.parametrize("kind", ["stablehlo", "onnx", "safetensors"])
def test_the_command_writes_checks_and_prints_how_to_read_it(trained, tmp_path, kind):
    for package in {"onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}.get(kind, ()):
        pytest.importorskip(package)
    flags = f"--workdir={trained}", f"--format={kind}", "--output=file"
    result = _script(*flags, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "100.000% of the labels" in result.stdout and "'file'" in result.stdout
    assert (tmp_path / "file.json").exists() == (kind == "stablehlo")
    again = _script(*flags, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.startswith("error: file exists and is not overwritten")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format=onxx"], "Did you mean 'onnx'?"),
        (["--output=nowhere/file"], "there is no folder nowhere"),
        (["--workdir=nowhere"], "--workdir=nowhere has no config.json"),
        (["--step=99"], "has no step 99; it has"),
        (["--step=last"], "invalid int value: 'last'"),
    ],
    ids=str,
)
def test_bad_input_ends_with_a_message_and_no_traceback(trained, tmp_path, flags, message):
    result = _script(f"--workdir={trained}", "--format=stablehlo", "--output=file", *flags, cwd=tmp_path)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr


def test_a_work_directory_without_a_checkpoint_is_named(trained, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.json", "classes.json"):
        (empty / name).write_text((trained / name).read_text())
    result = _script(f"--workdir={empty}", "--format=onnx", "--output=file", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and str(empty) in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "file").exists()


def test_help_imports_no_jax(tmp_path):
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program, str(ROOT / "scripts" / "export.py")], check=True, cwd=ROOT)
    shown = _script("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--format" in shown.stdout and "scripts/install.sh export" in shown.stdout
