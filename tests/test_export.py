"""Exported files, run on real images without flax and unet_jax, compared with the network."""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn
from flax import traverse_util
from helpers import ROOT, edited_json, read_image, run, save_untrained
from PIL import Image

import unet_jax
from configs import default
from unet_jax import data, models
from unet_jax.data import images as images_of_data
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.inference import forward, predict, resize, trained
from unet_jax.interop import export
from unet_jax.models import encoders
from unet_jax.models.encoder_unet import EncoderUNet
from unet_jax.models.encoders import efficientnet_lite, layers, resnet
from unet_jax.parallel import sharding

# Every setting of `config.model` that changes the graph, and every task.
VARIANTS = {
    "paper": dict(padding="valid"),
    "carla": dict(upsample="transposed_3x3", extra_conv=True),
    "keras": dict(upsample="nearest"),
    "bilinear": dict(upsample="bilinear", norm="group"),
    "valid bilinear": dict(padding="valid", upsample="bilinear", norm="group", extra_conv=True, block="residual"),
    "valid nearest": dict(padding="valid", upsample="nearest", norm="batch"),
    "valid transposed_3x3": dict(padding="valid", upsample="transposed_3x3", features=(4, 6, 6, 8)),
    "binary": dict(norm="batch", task="binary", block="residual"),
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


def _network(images, task="multiclass", normalization=None, channels=3, **settings):
    """A network with random weights and statistics that predicts each class about equally often."""
    config = tiny.get_config()
    config.model.update({"dropout": 0.0, "norm": "none", "features": (4, 6, 8), **settings})
    names = ("road", "sky") if task == "binary" else ("road", "sky", "pole", "wall")
    classes = data.Classes(task, names, tuple((60 * i, 0, 255) for i in range(len(names))), channels)
    mesh = sharding.create_mesh(0, 1)
    network = forward.create_network(config.model, classes, mesh, normalization)
    random = np.random.default_rng(1)

    def draw(x):  # He-normal kernels; positive biases and statistics
        if len(x.shape) == 1:
            return np.float32(random.uniform(0.1, 0.3, x.shape))
        return np.float32(random.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape))

    variables = jax.tree.map(draw, models.abstract_variables(network.model, channels))
    # Logits with mean 0 and standard deviation 1, so that every class is predicted.
    logits = jax.jit(network.logits)(variables, images[:2, 240:277, 200:253, :channels])
    mean, deviation, head = logits.mean((0, 1, 2)), logits.std((0, 1, 2)), variables["params"]["head"]
    head.update(kernel=head["kernel"] / deviation, bias=(head["bias"] - mean) / deviation)
    not_resized = (tuple(config.data.size),) * 2
    return trained.Trained(config, classes, network, variables, 7, not_resized)


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


def _agree(network, label, probability, expected, tolerance):
    """Asserts probabilities within the tolerance, and equal labels where that decides them; returns their share."""
    assert probability.shape == expected.shape and probability.dtype == np.float32
    np.testing.assert_allclose(probability, expected, rtol=0, atol=tolerance)
    if network.classes.task == "multiclass":
        decided = expected.max(-1) - np.sort(expected, -1)[..., -2] > 2 * tolerance
    else:
        decided = np.abs(expected - 0.5) > tolerance
    decided = decided[..., 0] if network.classes.task == "binary" else decided
    expected_label = forward.to_label(expected, network.classes.task)
    assert label.shape == expected_label.shape and label.dtype == np.uint8
    assert (label == expected_label)[decided].all()
    return decided.mean()


def _compare(network, images, folder, name, kind):
    for i, (b, h, w) in enumerate(json.loads((folder / f"{name}.sizes").read_text())):
        found = np.load(folder / f"{name}.{kind}.{i}.npz")
        expected = np.asarray(network.predict(images[:b, 240 : 240 + h, 200 : 200 + w, : network.classes.channels]))
        # float32 sums in another order. With group norm, the network is 4e-5 from float64, the ONNX graph 2e-5.
        tolerance = 1e-4 if network.model.norm == "group" else 1e-5
        assert _agree(network, found["label"], found["probability"], expected, tolerance) > 0.99
        if h > 30:  # not trivial: no class covers nearly everything
            assert max(np.bincount(found["label"].ravel()) / found["label"].size) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", *VARIANTS])
def test_stablehlo_agrees_without_flax_on_real_images_of_any_size(networks, images, stablehlo, name):
    _compare(networks[name], images, stablehlo, name, "stablehlo")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", *VARIANTS])
def test_onnx_agrees_without_flax_on_real_images_of_any_size(networks, images, onnx_files, name):
    _compare(networks[name], images, onnx_files, name, "onnx")


# Tiny encoders in the place of the published ones, with every kind of block that those have.
TINY_ENCODERS = {
    "efficientnet_lite0": partial(efficientnet_lite.EfficientNetLite, (4, 4, 6, 6, 8, 8, 8), (1,) * 7),
    "resnet18": partial(resnet.ResNet, (1,) * 4, False),
    "resnet50": partial(resnet.ResNet, (1,) * 4, True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder, settings",
    [
        ("efficientnet_lite0", dict(features=(4, 6, 6, 8), upsample="nearest", norm="batch", channels=1)),
        ("resnet18", dict(features=(4, 4, 6, 6, 8), upsample="transposed_3x3", encoder_norm="frozen", task="binary")),
        ("resnet50", dict(features=(4, 6, 6), upsample="bilinear", norm="group", task="multilabel")),
    ],
)
def test_graphs_of_networks_with_an_encoder(images, monkeypatch, encoder, settings):
    found = encoders.find(encoder)
    make = lambda **settings: TINY_ENCODERS[encoder](layers.Settings(**settings))
    module = sys.modules[f"unet_jax.models.encoders.{encoders.NAMES[encoder]}"]
    monkeypatch.setitem(module.ENCODERS, encoder, found._replace(make=make))
    normalization = forward.Normalization(found.mean, (16.0,))  # brighter than it expects, so that ReLU6 caps
    network = _network(images, name="encoder_unet", encoder=encoder, normalization=normalization, **settings)
    if encoder == "resnet50":
        graphs, sizes = [_onnx(network)], [(37, 53), (32, 70)]
    else:
        graphs, sizes = _graphs(network), [(37, 53)]
    for h, w in sizes:
        batch = images[:2, 240 : 240 + h, 200 : 200 + w, : network.classes.channels]
        logits = jax.jit(network.network.logits)(network.variables, batch)
        expected = np.asarray(forward.to_probability(logits, network.classes.task))
        for graph in graphs:
            label, probability = map(np.asarray, graph(batch))
            assert _agree(network, label, probability, expected, 1e-5) > 0.99


def test_margins_in_closed_form_equal_those_of_the_network(networks):
    for model in (EncoderUNet(2), *(network.model for network in networks.values())):
        for axis, (before, smallest, covered) in enumerate(export.geometry(model)):
            for length in range(1, 70):
                padded = smallest + (length - covered + model.stride - 1) // model.stride * model.stride
                assert model.margins((length, length))[axis] == (before, padded - length - before)
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 1, 3), np.uint8)  # margins longer than the image
    model = networks["paper"].model
    np.testing.assert_array_equal(export.reflect_pad(model, image), forward.reflect_pad(image, model.margins((3, 1))))


def test_onnx_is_refused_for_other_networks(networks):
    class Other(nn.Module):
        pass

    network = dataclasses.replace(networks["paper"].network, model=Other())
    with pytest.raises(UserError, match=r"only for config.model.name = 'unet' and 'encoder_unet', not for Other"):
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
    assert json.loads(found["classes"])["names"] == ["road", "sky"] and found == export.graph_metadata(
        networks["binary"]
    )
    assert "at their own size" in found["input"]


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, networks):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"onnx is needed, but not installed: run scripts/install.sh export"):
        export.to_onnx(networks["binary"])


# One way in and another: photographs, resized in training, at three sizes.

PHOTOS = ("British_Shorthair_102", "great_pyrenees_175", "Maine_Coon_204")  # 333x500, 375x500, 500x389


@pytest.fixture(scope="module")
def resized(real_data, tmp_path_factory):
    """The work directory of a network for cats and dogs that are resized; `PHOTOS` are held out."""
    root = tmp_path_factory.mktemp("pets")
    config = default.get_config()
    config.data.update({"name": "folder", "root": str(root), "size": (70, 102), "channels": 3})
    config.data.update({"lists": ("train.txt", "validation.txt"), "value_range": (0, 65535)})
    config.data.labels = ("1 -> 0 pet", "2 -> 1 background", "3 -> 2 border")
    config.model.update({"features": (4, 6, 8), "padding": "valid", "kernel_init": "paper"})
    names = ("Bengal_185", "Bombay_182", "Maine_Coon_203", "British_Shorthair_104")  # 303x455 to 475x700, and upright
    for folder, files, suffix in (("images", "images", "jpg"), ("masks", "annotations/trimaps", "png")):
        (root / folder).mkdir()
        for name in names + PHOTOS:
            shutil.copy(real_data / "pets" / files / f"{name}.{suffix}", root / folder)
    (root / "train.txt").write_text("\n".join(names))
    (root / "validation.txt").write_text("\n".join(PHOTOS))
    sharper = lambda params: {**params, "head": jax.tree.map(lambda x: 5 * x, params["head"])}  # decides most pixels
    path = save_untrained(root / "run", config, sharper)
    with edited_json(path / "classes.json") as classes:
        classes["image_sizes"] = data.load(config.data, "train").size_range()
    return path


# A few pixels of a resized image are a grey level off where Pillow rounds otherwise, see test_resize.py.
GREY_LEVEL = 2e-3


def _graphs(network, **settings):
    """What the exported graphs make of a batch: label and probability."""
    exported = jax.export.deserialize(export.to_stablehlo(network, **settings))
    return [_onnx(network, **settings), exported.call]


def _onnx(network, **settings):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(export.to_onnx(network, **settings).SerializeToString())
    return lambda image: session.run(["label", "probability"], {"image": image})


@pytest.mark.slow
def test_all_ways_in_agree_on_every_pixel_of_unseen_photographs_of_three_sizes(resized, tmp_path):
    network = unet_jax.load(resized)
    assert network.source_sizes == ((303, 327), (500, 700))
    graphs = _graphs(network)
    files = {name: resized.parent / "images" / f"{name}.jpg" for name in PHOTOS}
    for file in files.values():
        shutil.copy(file, tmp_path)
    predict.predict_files(resized, str(tmp_path / "*.jpg"), tmp_path / "out", probabilities="npy")
    split = evaluate.open_split(network, resized, "validation", "none")
    labels = jax.jit(network.network.labels)
    shown = set()
    for index, (name, file) in enumerate(files.items()):
        image, label = read_image(file), read_image(tmp_path / f"out/{name}.png")
        expected = np.load(tmp_path / f"out/{name}_probability.npy")
        assert expected.shape == (*image.shape[:2], 3)
        np.testing.assert_array_equal(label, forward.to_label(expected, "multiclass"))
        shown |= set(np.unique(label).tolist())

        for given in (file, image):
            np.testing.assert_array_equal(network.predict_image(given), expected)

        # What is scored, at the size of the training, is what is resized to the size of the photograph.
        assert split.images.source.ids[index] == name
        scored = split.images.read(index)["image"][None]
        small = np.asarray(network.predict(scored))
        _agree(network, np.asarray(labels(network.variables, scored)), small, small, 1e-5)
        bands = resize.resize_bands([(slice(0, 70), small[0])], (70, 102), image.shape[:2], "bilinear")
        np.testing.assert_allclose(np.concatenate([band for _, band in bands]), expected, atol=1e-6)

        for call in graphs:
            found = (np.asarray(value)[0] for value in call(image[None]))
            assert _agree(network, *found, expected, GREY_LEVEL) > 0.9
    assert len(shown) > 1


@pytest.mark.parametrize("name, method", [("binary", "nearest"), ("multilabel", "bilinear")])
def test_graphs_of_every_task_resize_in_and_back(networks, images, name, method):
    config = networks[name].config.copy_and_resolve_references()
    config.data.resize = method
    network = dataclasses.replace(networks[name], config=config, source_sizes=None)
    image = images[0, 240:381, 200:310]
    for call in _graphs(network):
        found = (np.asarray(value)[0] for value in call(image[None]))
        tolerance = GREY_LEVEL if method == "bilinear" else 1e-5
        assert _agree(network, *found, network.predict_image(image), tolerance) > 0.9


def test_a_graph_fits_what_is_predicted_in_tiles_and_says_so(resized):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = unet_jax.load(resized)
    image = np.asarray(Image.open(resized.parent / "images" / f"{PHOTOS[0]}.jpg").resize((1500, 900)))
    proto = export.to_onnx(network)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    fitted = network.predict_image(image, scale="fit")
    _agree(network, *(found[0] for found in session.run(None, {"image": image[None]})), fitted, GREY_LEVEL)
    assert network.predicted_size(image.shape[:2], "train") == (126, 219)
    assert np.abs(network.predict_image(image) - fitted).max() > 0.1
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert "of any size: resized to 70x102" in said["input"] and "303x327 to 500x700" in said["input"]
    assert "prefer --mode=predict" in said["input"] and json.loads(said["image_sizes"]) == [[303, 327], [500, 700]]
    with pytest.raises(UserError, match=r"900x1500 pixels.*resized to 70x102: use predict_image"):
        network.predict(image[None])


def _script(*flags, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return run(sys.executable, ROOT / "scripts" / "export.py", *flags, cwd=cwd, env=environment)


def _run_printed_lines(printed, folder):
    """Runs the lines that the command printed, without this project; returns `label` and `probability`."""
    lines = printed.partition("is installed:\n")[2]
    program = PROGRAM.split("import numpy as np\n")[0] + lines + "\nimport numpy as np"
    program += '\nnp.savez("result.npz", label=np.asarray(label), probability=np.asarray(probability))'
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=folder)
    result = np.load(folder / "result.npz")
    return [result[name][0] for name in ("label", "probability")]


@pytest.mark.parametrize("kind", [pytest.param("stablehlo", marks=pytest.mark.slow), "onnx", "safetensors"])
def test_the_command_writes_checks_and_prints_how_to_read_it(resized, tmp_path, kind):
    for package in {"onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}.get(kind, ()):
        pytest.importorskip(package)
    flags = f"--workdir={resized}", f"--format={kind}", "--output=file"
    result = _script(*flags, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "of the labels equal the network's" in result.stdout and "'file'" in result.stdout
    assert (tmp_path / "file.json").exists() == (kind == "stablehlo")
    if kind != "safetensors":
        assert "of any size: resized to 70x102" in result.stdout
        photo = shutil.copy(resized.parent / "images" / f"{PHOTOS[0]}.jpg", tmp_path / "photo.jpg")
        network = unet_jax.load(resized)
        _agree(network, *_run_printed_lines(result.stdout, tmp_path), network.predict_image(photo), GREY_LEVEL)
    again = _script(*flags, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.startswith("error: file exists and is not overwritten")


def test_lines_of_a_graph_that_does_not_resize_do_it(resized, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    script = runpy.run_path(str(ROOT / "scripts" / "export.py"))
    script["_export"](resized, "onnx", tmp_path / "file", None, resize=False)
    printed = capsys.readouterr().out
    assert "must be resized to 70x102" in printed
    photo = shutil.copy(resized.parent / "images" / f"{PHOTOS[0]}.jpg", tmp_path / "photo.jpg")
    network = unet_jax.load(resized)
    small = images_of_data.resize_image(read_image(photo), (70, 102), "bilinear")
    _agree(network, *_run_printed_lines(printed, tmp_path), np.asarray(network.predict(small[None]))[0], GREY_LEVEL)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format=onxx"], "Did you mean 'onnx'?"),
        (["--format=safetensors", "--no-resize"], "--no-resize is for stablehlo and onnx"),
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
