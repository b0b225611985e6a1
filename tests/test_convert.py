import json
import os
import pickle
import sys
import zipfile

import helpers
import jax
import numpy as np
import pytest

import unet_jax
from configs import default
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.interop import convert
from unet_jax.training import loop
from unet_jax.weights import files as weight_files
from unet_jax.weights import keras_files
from unet_jax.workdir import files

h5py = pytest.importorskip("h5py")
save_safetensors = pytest.importorskip("safetensors.numpy").save_file
torch = pytest.importorskip("torch")
import torch.nn as nn
import torch.nn.functional as F

SIZE = (48, 64)
KERAS_WARNING = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"


def _conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class TorchUNet(nn.Module):
    """The U-Net with the names e11 ... outconv, with any widths."""

    def __init__(self, channels, widths, outputs):
        super().__init__()
        self.levels = len(widths)
        for n, width in enumerate(widths, 1):
            setattr(self, f"e{n}1", _conv(widths[n - 2] if n > 1 else channels, width))
            setattr(self, f"e{n}2", _conv(width, width))
        for n, width in enumerate(reversed(widths[:-1]), 1):
            below = widths[-n]
            setattr(self, f"upconv{n}", nn.ConvTranspose2d(below, width, 2, stride=2))
            setattr(self, f"d{n}1", _conv(2 * width, width))
            setattr(self, f"d{n}2", _conv(width, width))
        self.outconv = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, x):
        skips = []
        for n in range(1, self.levels + 1):
            x = F.max_pool2d(x, 2) if n > 1 else x
            x = F.relu(getattr(self, f"e{n}2")(F.relu(getattr(self, f"e{n}1")(x))))
            skips.append(x)
        for n in range(1, self.levels):
            x = torch.cat([getattr(self, f"upconv{n}")(x), skips[-1 - n]], dim=1)
            x = F.relu(getattr(self, f"d{n}2")(F.relu(getattr(self, f"d{n}1")(x))))
        return self.outconv(x)


class DoubleConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        layers = []
        for n in (inputs, outputs):
            layers += [nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, inputs, outputs, bilinear):
        super().__init__()
        self.up = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            if bilinear
            else nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        )
        self.conv = DoubleConv(inputs + outputs if bilinear else 2 * outputs, outputs)

    def forward(self, x, skip):
        return self.conv(torch.cat([skip, self.up(x)], dim=1))


class OutConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv(x)


class Milesial(nn.Module):
    """The network of milesial/Pytorch-UNet, with any widths."""

    def __init__(self, channels, widths, outputs, bilinear=False):
        super().__init__()
        self.levels = len(widths)
        self.inc = DoubleConv(channels, widths[0])
        for n in range(1, self.levels):
            setattr(self, f"down{n}", Down(widths[n - 1], widths[n]))
            setattr(self, f"up{n}", Up(widths[-n], widths[-n - 1], bilinear))
        self.outc = OutConv(widths[0], outputs)

    def forward(self, x):
        skips = [self.inc(x)]
        for n in range(1, self.levels):
            skips.append(getattr(self, f"down{n}")(skips[-1]))
        x = skips.pop()
        for n in range(1, self.levels):
            x = getattr(self, f"up{n}")(x, skips.pop())
        return self.outc(x)


def _randomize(model, seed=0):
    """Randomises all arrays: the zeros and ones of fresh biases and running statistics would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator)
    for name, value in model.state_dict().items():
        if value.ndim == 4:
            value.copy_(draw(value.shape) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(draw(value.shape).abs() + 0.5)
        elif value.ndim == 1:
            value.copy_(draw(value.shape) * 0.3)
    return model.eval()


def _images(channels):
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, channels), np.uint8)


def _torch_logits(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images / np.float32(255)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def _check_logits(workdir, images, expected):
    """Compares the logits of a work directory with those of the source, which must not be trivial."""
    trained = unet_jax.load(workdir)
    logits = np.asarray(jax.jit(trained.model.apply)(trained.variables, images / np.float32(255)))
    assert expected.std() > 0.1 and expected.std((0, 1, 2)).min() > 0.01
    difference = np.abs(logits - expected).max()
    print(f"largest difference of the logits {difference:.1e}, of a standard deviation of {expected.std():.2f}")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    probability = np.asarray(jax.jit(trained.network.probability)(trained.variables, images))
    if trained.classes.task == "multiclass":
        exponential = np.exp(expected - expected.max(-1, keepdims=True))
        np.testing.assert_allclose(probability, exponential / exponential.sum(-1, keepdims=True), rtol=0, atol=1e-4)
    else:
        np.testing.assert_allclose(probability, 1 / (1 + np.exp(-expected)), rtol=0, atol=1e-4)
    return trained


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_pytorch_unet(tmp_path, kind):
    model = _randomize(TorchUNet(3, (4, 6, 8, 6, 10), 6))  # five levels
    file, images = tmp_path / f"unet.{kind}", _images(3)
    if kind == "pth":
        torch.save(model.state_dict(), file)
    else:
        save_safetensors({name: value.numpy() for name, value in model.state_dict().items()}, file)
    network, classes = convert.convert(file, tmp_path / "run", default.get_config(), task="multilabel")
    assert network.settings["features"] == (4, 6, 8, 6, 10) and network.channels == 3
    assert classes.task == "multilabel" and len(set(classes.palette)) == 6
    trained = _check_logits(tmp_path / "run", images, _torch_logits(model, images))
    assert trained.step == 0 and trained.config.optimizer.ema == 0 and trained.config.model.norm == "none"


def test_milesial_with_its_mask_values(tmp_path):
    model = _randomize(Milesial(1, (4, 6, 10), 2))
    torch.save(model.state_dict() | {"mask_values": [0, 255]}, tmp_path / "unet.pth")
    network, classes = convert.convert(tmp_path / "unet.pth", tmp_path / "run", default.get_config(), ["cell", "gap"])
    assert classes.names == ("cell", "gap") and classes.task == "multiclass" and classes.channels == 1
    trained = _check_logits(tmp_path / "run", _images(1), _torch_logits(model, _images(1)))
    assert trained.config.model.norm == "batch" and tuple(trained.config.model.features) == (4, 6, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_checkpoints_with_other_dtypes_and_strides(tmp_path, dtype):
    model = _randomize(TorchUNet(3, (4, 6), 1)).to(dtype)
    values = model.state_dict()
    values["e12.weight"] = values["e12.weight"].to(memory_format=torch.channels_last)
    values["outconv.bias"] = torch.cat([torch.zeros(3, dtype=dtype), values["outconv.bias"]])[3:]  # with an offset
    values["d11.bias"] = nn.Parameter(values["d11.bias"])
    wrapped = {"epoch": 3, "model_state_dict": {f"module.{name}": value for name, value in values.items()}}
    torch.save(wrapped, tmp_path / "unet.pt")
    network, classes = convert.convert(tmp_path / "unet.pt", tmp_path / "run", default.get_config())
    assert classes.task == "binary" and classes.names == ("background", "foreground")
    _check_logits(tmp_path / "run", _images(3), _torch_logits(model.float(), _images(3)))


def _keras_isbi(keras, widths, outputs, join):
    """A Keras U-Net for ISBI 2012, with up-sampling and dropout after the skips are taken."""
    layers = keras.layers
    conv = lambda width: layers.Conv2D(width, 3, activation="relu", padding="same")
    x = inputs = keras.Input((*SIZE, 1))
    skips = []
    for level, width in enumerate(widths):
        x = layers.MaxPooling2D((2, 2), padding="same")(x) if level else x
        x = conv(width)(conv(width)(x))
        skips.append(x)
        x = layers.Dropout(0.5)(x) if level >= len(widths) - 2 else x
    for level in reversed(range(len(widths) - 1)):
        x = conv(widths[level])(layers.UpSampling2D((2, 2))(x))
        x = conv(widths[level])(conv(widths[level])(join(x, skips[level])))
    return keras.Model(inputs, layers.Conv2D(outputs, 1, activation="sigmoid", padding="same")(x))


def _keras_carla(keras, widths, outputs, join):
    """A Keras U-Net for CARLA, with 3x3 transposed convolutions and dropout before the skips are taken."""
    layers = keras.layers
    conv = lambda width: layers.Conv2D(width, 3, activation="relu", padding="same")
    x = inputs = keras.Input((*SIZE, 3))
    skips = []
    for level, width in enumerate(widths):
        x = layers.MaxPooling2D((2, 2))(x) if level else x
        x = conv(width)(conv(width)(x))
        x = layers.Dropout(0.3)(x) if level >= len(widths) - 2 else x
        skips.append(x)
    for level in reversed(range(len(widths) - 1)):
        up = layers.Conv2DTranspose(widths[level], 3, strides=(2, 2), padding="same")(x)
        x = conv(widths[level])(conv(widths[level])(join(up, skips[level])))
    return keras.Model(inputs, layers.Conv2D(outputs, 1, padding="same")(conv(widths[0])(x)))


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("tensorflow").keras


def _random_keras(build, keras, widths, outputs, swapped=False):
    """A model with random weights, and a function from images to its logits."""
    join = lambda up, skip: keras.layers.Concatenate(axis=3)([skip, up] if swapped else [up, skip])
    model = build(keras, widths, outputs, join)
    random = np.random.default_rng(1)
    drawn = [
        random.normal(size=w.shape) * ((2 / np.prod(w.shape[:3])) ** 0.5 if w.ndim == 4 else 0.3)
        for w in model.get_weights()
    ]
    model.set_weights([w.astype(np.float32) for w in drawn])
    model.compile("adam", "mse")  # so that the file also holds the optimizer's arrays

    def logits(images):
        values = np.asarray(model(images / np.float32(255), training=False))
        if model.layers[-1].activation.__name__ == "sigmoid":
            values = values.astype(np.float64)
            values = (np.log(values) - np.log1p(-values)).astype(np.float32)
        return values

    return model, logits


@pytest.mark.filterwarnings(KERAS_WARNING)
@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_keras_isbi(tmp_path, keras, kind):
    model, logits = _random_keras(_keras_isbi, keras, (8, 10, 12, 14), 1)
    file, images = tmp_path / f"unet.{kind}", _images(1)
    model.save(file)
    convert.convert(file, tmp_path / "run", default.get_config())
    trained = _check_logits(tmp_path / "run", images, logits(images))
    assert trained.classes.task == "binary" and trained.classes.channels == 1
    settings = trained.config.model
    assert settings.upsample == "nearest" and settings.dropout == 0.5
    assert not settings.dropout_on_skip and not settings.extra_conv


@pytest.mark.filterwarnings(KERAS_WARNING)
@pytest.mark.parametrize("kind, swapped", [("keras", False), ("h5", True)])
def test_keras_carla(tmp_path, keras, kind, swapped):
    model, logits = _random_keras(_keras_carla, keras, (4, 6, 8, 10), 5, swapped)
    file, images = tmp_path / f"unet.{kind}", _images(3)
    model.save(file)
    names = ["road", "car", "sky", "wall", "pole"]
    convert.convert(file, tmp_path / "run", default.get_config(), names)
    trained = _check_logits(tmp_path / "run", images, logits(images))
    assert trained.classes.task == "multiclass" and trained.classes.names == tuple(names)
    settings = trained.config.model
    assert settings.upsample == "transposed_3x3" and settings.dropout == 0.3
    assert settings.dropout_on_skip and settings.extra_conv


@pytest.mark.filterwarnings(KERAS_WARNING)
def test_keras_file_of_tensorflow_2_1(tmp_path, keras):
    """With `tf.concat`, older inbound nodes, and array names that end in `:0`."""
    model, logits = _random_keras(_keras_isbi, keras, (4, 6), 2)
    file = tmp_path / "unet.h5"
    model.save(file)
    with h5py.File(file, "a") as opened:
        config = json.loads(opened.attrs["model_config"])
        for layer in config["config"]["layers"]:
            inputs = keras_files.input_names(layer["inbound_nodes"])
            layer["inbound_nodes"] = [[[name, 0, 0, {}] for name in inputs]] if inputs else []
            for newer in ("groups", "output_padding"):
                layer["config"].pop(newer, None)
            if layer["class_name"] == "Concatenate":
                node = {"name": "concat", "op": "ConcatV2", "input": ["a", "b", "concat/axis"]}
                layer["class_name"] = "TensorFlowOpLayer"
                layer["config"] = {"name": "concat", "node_def": node, "constants": {"2": 3}}  # not the layer's name
        opened.attrs["model_config"] = json.dumps(config).encode()
        for group in opened["model_weights"].values():
            for inner in list(group.values()):
                for name in list(inner):
                    inner.move(name, f"{name}:0")
    convert.convert(file, tmp_path / "run", default.get_config())
    trained = _check_logits(tmp_path / "run", _images(1), logits(_images(1)))
    assert trained.classes.task == "multilabel"  # two sigmoids


@pytest.mark.filterwarnings(KERAS_WARNING)
def test_other_keras_networks_are_refused(tmp_path, keras):
    layers = keras.layers
    image = keras.Input((*SIZE, 1))
    conv = lambda x, width=4: layers.Conv2D(width, 3, activation="relu", padding="same")(x)
    first = conv(image)
    high = conv(first)
    low = conv(conv(layers.MaxPooling2D()(high)))
    up = layers.Conv2DTranspose(4, 2, strides=2, padding="same")(low)
    merged = lambda skip: conv(conv(layers.Concatenate()([up, skip])))
    head = layers.Conv2D(1, 1)
    cases = {
        "not a supported U-Net": head(high),
        "BatchNormalization": head(layers.BatchNormalization()(merged(high))),
        "Conv2D with these settings": head(layers.Conv2D(4, 3, activation="relu")(merged(high))),
        "unsupported inputs": head(merged(first)),
    }
    for message, outputs in cases.items():
        keras.Model(image, outputs).save(tmp_path / "unet.keras")
        with pytest.raises(UserError, match=message):
            convert.read_network(tmp_path / "unet.keras")
    keras.Model(image, head(merged(high))).save_weights(tmp_path / "only.weights.h5")
    with pytest.raises(UserError, match="without the model"):
        convert.read_network(tmp_path / "only.weights.h5")


class Foreign:
    """Creates a marker file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_foreign_objects_are_refused_and_not_run(tmp_path, kind):
    file, marker = tmp_path / "unet.pth", tmp_path / "marker"
    values = TorchUNet(3, (4, 6), 1).state_dict() | {"extra": Foreign(marker)}
    if kind != "plain":
        torch.save(values, file, _use_new_zipfile_serialization=kind == "zip")
        refused = "system, which is not a tensor"
    else:
        file.write_bytes(pickle.dumps(values["extra"]))
        refused = "was not written by torch.save"
    with pytest.raises(UserError, match=refused):
        convert.convert(file, tmp_path / "run", default.get_config())
    assert not marker.exists() and not (tmp_path / "run").exists()


def _rewrite(file, change):
    """Changes the content of the entries of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_damaged_files_are_named(tmp_path):
    model = TorchUNet(3, (4, 6), 1)
    file = tmp_path / "unet.pth"
    torch.save(model.state_dict(), file)
    whole = file.read_bytes()

    def refuses(message, name="unet.pth"):
        with pytest.raises(UserError, match=message) as raised:
            convert.read_network(tmp_path / name)
        assert name in str(raised.value)

    for share in (0.3, 0.7, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        refuses("damaged or truncated")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # in the bytes of a tensor
    file.write_bytes(flipped)
    refuses("damaged")
    file.write_bytes(whole)
    _rewrite(file, lambda name, content: content[:-4] if "/data/" in name else content)
    refuses("reaches beyond its storage")
    torch.save({"accuracy": 0.9}, file)
    refuses("holds no state dict")
    torch.save({"e11.weight": torch.zeros(1).expand(10**6, 10**6)}, file)  # small in the file, 4 TB when copied
    refuses("reaches beyond its storage")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("unet/data.pkl", bytes(10**6))
    refuses("compressed")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("unet/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")  # a memo of 2^31 entries
    refuses("a memo of 2147483647 entries")

    save_safetensors({"e11.weight": np.zeros((4, 3, 3, 3), np.float32)}, tmp_path / "unet.safetensors")
    content = (tmp_path / "unet.safetensors").read_bytes()
    (tmp_path / "unet.safetensors").write_bytes(content[:-8])
    refuses("damaged or truncated", "unet.safetensors")

    for name in ("unet.keras", "unet.h5"):
        (tmp_path / name).write_bytes(whole[:100])
        refuses("damaged or truncated", name)
    with h5py.File(tmp_path / "unet.h5", "w") as opened:
        opened.create_dataset("model_weights/a/a/kernel", (10**5, 10**5), compression="gzip")
    refuses("declares more data than it holds", "unet.h5")
    with h5py.File(tmp_path / "unet.h5", "w") as opened:
        opened.create_dataset("model_weights/a/a/kernel", (4,), external=[("/etc/hostname", 0, 16)])
    refuses("weights in other files", "unet.h5")
    refuses("no such file", "none.pth")
    refuses("end in .pth", "unet.onnx")


def test_other_networks_are_refused(tmp_path):
    file = tmp_path / "unet.pth"

    def refuses(message, values):
        torch.save(values, file)
        with pytest.raises(UserError, match=message):
            convert.convert(file, tmp_path / "run", default.get_config())
        assert not (tmp_path / "run").exists()

    refuses("unknown format: it holds conv1.weight", {"conv1.weight": torch.zeros(1)})
    refuses("bilinear variant", Milesial(3, (4, 8), 2, bilinear=True).state_dict())
    unet = TorchUNet(3, (4, 6), 2).state_dict()
    refuses("lacks d12.bias", {name: value for name, value in unet.items() if name != "d12.bias"})
    refuses("also has more.weight", unet | {"more.weight": torch.zeros(1)})
    refuses(r"d11.weight, \(5, 8, 3, 3\), does not fit", unet | {"d11.weight": torch.zeros(5, 8, 3, 3)})
    refuses("e11.weight has the shape", unet | {"e11.weight": torch.zeros(3)})
    refuses("e11.bias is not finite", unet | {"e11.bias": torch.full((4,), torch.nan)})


def test_classes_and_work_directory_must_fit(tmp_path):
    file = tmp_path / "unet.pth"
    torch.save(TorchUNet(3, (4, 6), 3).state_dict(), file)
    run = tmp_path / "run"
    for names, task, message in [
        (["a", "b"], "", "has 3 classes"),
        (["a", "b", "b"], "", "has 3 classes"),
        ([], "binary", "too many"),
        ([], "tertiary", "is not one of"),
    ]:
        with pytest.raises(UserError, match=message):
            convert.convert(file, run, default.get_config(), names, task)
    assert not run.exists()
    run.mkdir()
    convert.convert(file, run, default.get_config())
    with pytest.raises(UserError, match="not empty"):
        convert.convert(file, run, default.get_config())


def _count_parameters(monkeypatch, shapes, layers=None):
    """The number of parameters of the network that is read from a file with arrays of these shapes."""
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    monkeypatch.setattr(weight_files, "read", lambda file: weight_files.Weights(arrays, layers))
    return sum(array.size for array in jax.tree.leaves(convert.read_network("unet").variables["params"]))


@pytest.mark.parametrize("build, outputs, count", [(TorchUNet, 6, 31_032_070), (Milesial, 2, 31_037_698)])
def test_parameter_counts_of_full_size_pytorch_networks(monkeypatch, build, outputs, count):
    with torch.device("meta"):  # shapes only
        model = build(3, (64, 128, 256, 512, 1024), outputs)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert _count_parameters(monkeypatch, shapes) == count


@pytest.mark.parametrize(
    "build, top, outputs, count", [(_keras_isbi, 64, 1, 34_512_193), (_keras_carla, 32, 23, 8_640_471)]
)
def test_parameter_counts_of_full_size_keras_networks(monkeypatch, keras, build, top, outputs, count):
    widths = [top * 2**level for level in range(5)]
    model = build(keras, widths, outputs, lambda up, skip: keras.layers.Concatenate(axis=3)([up, skip]))
    names = ("kernel", "bias")
    shapes = {f"{a.name}/{name}": w.shape for a in model.layers for name, w in zip(names, a.weights, strict=False)}
    layers = keras_files.keras_layers(json.loads(model.to_json()))
    assert _count_parameters(monkeypatch, shapes, layers) == count


@pytest.mark.slow
def test_imported_weights_can_be_evaluated_and_fine_tuned_but_not_resumed(tmp_path, config, capsys):
    torch.save(_randomize(TorchUNet(1, (4, 6), 7)).state_dict(), tmp_path / "unet.pth")
    run = tmp_path / "run"
    convert.convert(tmp_path / "unet.pth", run, config)
    result = evaluate.evaluate_workdir(run, None, None, "validation")
    assert np.isfinite(result.loss) and result.confusion.sum() == 10 * 48 * 48
    imported = files.read_config(run)
    with pytest.raises(UserError, match="holds imported weights.*--config.init_from="):
        loop.train(imported, run)
    assert unet_jax.load(run).classes.names[0] == "class 0"  # the work directory was not changed
    config.model, config.init_from, config.train.epochs = imported.model, str(run), 0.4
    loop.train(config, tmp_path / "finetuned")
    assert f"Starting from the weights of {run}, step 0" in capsys.readouterr().out


@pytest.mark.slow
def test_command(tmp_path):
    file, run = tmp_path / "unet.pth", tmp_path / "run"
    torch.save(Milesial(3, (4, 6), 7).state_dict(), file)
    call = lambda *flags: helpers.run(sys.executable, "scripts/import_weights.py", *flags, cwd=helpers.ROOT)
    done = call(file, f"--workdir={run}", "--config=configs/shapes.py")
    assert done.returncode == 0, done.stderr
    for part in ("milesial/Pytorch-UNet", "widths    4, 6", "7 (multiclass)", "--mode=eval", "init_from"):
        assert part in done.stdout
    assert unet_jax.load(run).predict_image(_images(3)[0]).shape == (*SIZE, 7)
    torch.save(Foreign(tmp_path / "marker"), tmp_path / "foreign.pth")
    for flags, message in [
        ((file, f"--workdir={run}"), "not empty"),
        ((tmp_path / "foreign.pth", f"--workdir={tmp_path / 'new'}"), "system, which is not a tensor"),
        ((file, f"--workdir={tmp_path / 'new'}", "--config=configs/none.py"), "no such file"),
    ]:
        failed = call(*flags)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ") and message in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "marker").exists() and not (tmp_path / "new").exists()


def _zip_pickle(path, program, storage=b"\0" * 16):
    """Writes a file in the format of torch.save with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", storage)


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"  # a persistent id of four floats
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def test_a_view_of_a_view_cannot_expose_other_memory(tmp_path):
    inner = TENSOR + b"(" + STORAGE + b"I3\n(I4\nt(I0\ntI00\nNtR"
    outer = b"(dVe11.weight\n" + TENSOR + b"(" + inner + b"I0\n(I4\nt(I1\ntI00\nNtRs."
    _zip_pickle(tmp_path / "a.pth", outer)
    with pytest.raises(UserError, match="a tensor that is not a view of a storage"):
        weight_files.read(tmp_path / "a.pth")
    _zip_pickle(tmp_path / "b.pth", b"(dVe11.weight\n" + inner + b"s.")
    assert weight_files.read(tmp_path / "b.pth").arrays["e11.weight"].tolist() == [0, 0, 0, 0]


def test_endless_copies_are_refused(tmp_path):
    _zip_pickle(tmp_path / "a.pth", b"ccollections\nOrderedDict\n((dtR.")
    with pytest.raises(UserError, match="cannot be read"):
        weight_files.read(tmp_path / "a.pth")


def test_arrays_in_other_files_are_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.arange(4.0)
    virtual = h5py.VirtualLayout((4,), float)
    virtual[:] = h5py.VirtualSource(tmp_path / "other.h5", "secret", (4,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("model_weights/conv/conv/kernel:0", virtual)
    with pytest.raises(UserError, match="it refers to weights in other files"):
        weight_files.read(tmp_path / "a.h5")
