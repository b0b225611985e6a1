"""The benchmark: the same networks and steps on both sides, its processes, its arithmetic and what it writes."""

import json
import os
import pathlib
import re
import runpy
import statistics
import sys
import types
from typing import ClassVar

import jax
import numpy as np
import pytest
from commands import ROOT
from helpers import one_device, run

FOLDER = ROOT / "scripts" / "benchmark"
sys.path.insert(0, str(FOLDER))

import measure
import with_jax
from measure import WORKS, Settings, Task, Worker

benchmark = types.SimpleNamespace(**runpy.run_path(str(FOLDER / "__main__.py"), run_name="benchmark"))


def _small(name, **changes):
    """A work with three narrow levels, compiled in seconds."""
    work = WORKS[name]
    return work._replace(batch=2, model={**work.model, "features": (4, 6, 8)}, **changes)


CARLA = _small("carla-8", size=(16, 24))
SMALL = [
    CARLA,
    _small("unet-256", size=(24, 16)),
    _small("paper-1", size=(28, 24), margin=20),
    _small("lite0-8", size=(64, 32)),
]


def _copy_weights(net, params):
    """Ours, laid out as PyTorch has them: [out, in, h, w], and turned by half for transposed convolutions."""
    import torch

    if "encoder" in params:
        return _copy_weights_with_encoder(net, params)
    kernels = {}
    for group in ("down", "merge"):
        for level, block in enumerate(getattr(net, group)):
            for i in (0, 1):
                kernels[block[2 * i]] = params[f"{group}_{level}"][f"Conv_{i}"]
    for level, up in enumerate(net.up):
        kernels[up] = params[f"up_{level}"]
    if net.extra is not None:
        kernels[net.extra[0]] = params["extra"]["Conv_0"]
    kernels[net.head] = params["head"]
    with torch.no_grad():
        for layer, weights in kernels.items():
            kernel = np.asarray(weights["kernel"])
            transposed = isinstance(layer, torch.nn.ConvTranspose2d)
            kernel = kernel[::-1, ::-1].transpose(2, 3, 0, 1) if transposed else kernel.transpose(3, 2, 0, 1)
            layer.weight.copy_(torch.from_numpy(kernel.copy()))
            layer.bias.copy_(torch.from_numpy(np.array(weights["bias"])))
    assert len(list(net.parameters())) == 2 * len(kernels)


def _copy_weights_with_encoder(net, params):
    import torch

    layers = {net.stem: params["encoder"]["stem"]}
    for i, block in enumerate(net.blocks):
        ours = params["encoder"][f"block_{i}"]
        layers |= {getattr(block, name): ours[name] for name in ours}
    for i, merge in enumerate(reversed(net.merge)):
        ours = params[f"merge_{i}"]
        layers |= {merge[j]: {"conv": ours[f"Conv_{j}"], "norm": ours[f"BatchNorm_{j}"]} for j in (0, 1)}
    with torch.no_grad():
        pairs = [(net.head.weight, params["head"]["kernel"]), (net.head.bias, params["head"]["bias"])]
        for layer, ours in layers.items():
            pairs += [(layer.conv.weight, ours["conv"]["kernel"])]
            pairs += [(layer.norm.weight, ours["norm"]["scale"]), (layer.norm.bias, ours["norm"]["bias"])]
        for theirs, ours in pairs:
            array = np.array(ours)
            theirs.copy_(torch.from_numpy(array.transpose(3, 2, 0, 1).copy() if array.ndim == 4 else array))
    assert len(list(net.parameters())) == len(pairs)


def _random(params):
    """Biases too: zeros would hide mistakes. Scales are near 1, so that the deepest features reach the logits."""
    rng = np.random.default_rng(1)
    draw = lambda w: rng.normal(0, 0.3, w.shape).astype(np.float32)
    change = lambda path, w: w if w.ndim == 4 else draw(w) + w if path[-1].key == "scale" else draw(w)
    return jax.tree_util.tree_map_with_path(change, params)


def _settings(folder, **changes):
    return Settings(repeats=3, seconds=0.01, platform="cpu", cores=2, folder=folder)._replace(**changes)


def _make_model(work):
    return with_jax.make_networks(work, "float32", one_device())[0].model


@pytest.mark.parametrize(
    "work", [*SMALL[:3], pytest.param(SMALL[3], marks=pytest.mark.slow)], ids=lambda work: work.name
)
def test_the_networks_are_the_same_function(work):
    torch = pytest.importorskip("torch")
    import with_torch

    model = _make_model(work)
    height, width = (n + sum(margins) for n, margins in zip(work.size, model.margins(work.size), strict=True))
    image = np.random.default_rng(0).random((2, height, width, work.channels), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    variables["params"] = params = _random(variables["params"])
    ours = np.asarray(jax.jit(model.apply)(variables, image))

    net = with_torch.make_network(work).eval()
    _copy_weights(net, params)
    with torch.no_grad():
        theirs = net(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape and ours.std() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("work", SMALL[:3], ids=lambda work: work.name)
@pytest.mark.slow
def test_the_steps_are_the_same(work):
    """Images, mirrored borders, loss and Adam: the losses of four steps agree, without dropout."""
    pytest.importorskip("torch")
    import with_torch

    work = work._replace(model={**work.model, "dropout": 0.0})
    model = _make_model(work)
    image = np.zeros((1, *model.smallest_input, work.channels), np.float32)
    net = with_torch.make_network(work)
    _copy_weights(net, jax.jit(model.init)(jax.random.key(0), image)["params"])
    ours, _ = with_jax.make_train_steps(work, "float32", one_device())
    theirs = with_torch.make_run("step", net, work, "float32")
    losses = [(ours(1)["loss"], theirs(1)["loss"]) for _ in range(4)]
    assert len({round(loss, 6) for loss, _ in losses}) == 4  # it learns
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)


@pytest.mark.parametrize(
    "name, expected",
    [("carla-8", 8_640_471), ("paper-1", 31_030_658), ("unet-256", 31_030_658), ("lite0-8", 3_825_451)],
)
def test_parameters(name, expected):
    torch = pytest.importorskip("torch")
    import with_torch

    work = WORKS[name]
    model = _make_model(work)
    size = (1, *model.smallest_input, work.channels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(size, np.float32))["params"]
    assert sum(array.size for array in jax.tree.leaves(shapes)) == expected
    with torch.device("meta"):
        assert sum(weight.numel() for weight in with_torch.make_network(work).parameters()) == expected


def test_ratios_are_those_of_each_round():
    """A machine that is half as fast in some rounds changes the medians, and not the ratio."""
    rows = [
        {"contender": "unet_jax", "times_s": [1.0, 2.0, 2.0]},
        {"contender": "PyTorch eager", "times_s": [0.5, 1.0, 1.0]},
        {"contender": "PyTorch compiled", "times_s": [4.0, 4.0, 4.0]},
    ]
    rows = [row | {"median_s": statistics.median(row["times_s"])} for row in rows]
    rows.append({"contender": "PyTorch compiled", "error": "no compiler"})
    ours, eager, compiled, failed = measure.add_ratios(rows)
    assert ours["ratio"] == 0.5 and ours["ratios"] == [0.5] * 3 and ours["ratio_quartiles"] == [0.5, 0.5]
    assert eager["ratio"] == 1 and compiled["ratio"] == 0.25 and "ratio" not in failed
    assert ours["ratio_to"] == "PyTorch eager"
    assert measure.spread([3.0], "median", "quartiles") == {"median": 3, "quartiles": [3, 3]}
    assert measure.spread([1, 2, 3, 4, 5], "median", "quartiles") == {"median": 3, "quartiles": [2, 4]}


class _Clock:
    """In place of a process: counts steps, and fails if its task says so."""

    log: ClassVar = []

    def __init__(self, task):
        self.task = task

    def answer(self, timeout):
        if self.task.dtype == "broken":
            raise ChildProcessError("not installed: torch")
        return {"parameters": 3}

    def take(self, steps, timeout):
        self.log.append((self.task.contender, steps))
        if self.task.dtype == "dies" and len([name for name, _ in self.log if name == self.task.contender]) > 5:
            raise ChildProcessError("the process ended (SIGKILL, out of memory?)")
        return {"memory_bytes": 7} if steps == 0 else {"seconds": 0.01 * steps}

    def close(self):
        self.log.append((self.task.contender, "closed"))


def test_rounds_are_taken_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "Worker", _Clock)
    monkeypatch.setattr(_Clock, "log", [])
    kinds = {"a": "good", "b": "good", "c": "broken", "d": "dies"}
    settings = _settings(tmp_path, repeats=8, seconds=0.02)
    found = measure.interleave(
        {name: Task("step", CARLA, kind, name, settings) for name, kind in kinds.items()}, settings
    )
    assert found["c"] == {"error": "not installed: torch"} and "SIGKILL" in found["d"]["error"]
    for name in ("a", "b"):
        assert found[name]["steps"] == 2 and found[name]["times_s"] == pytest.approx([0.01] * 8)
        assert found[name]["memory_bytes"] == 7 and found[name]["parameters"] == 3
    turns = [name for name, steps in _Clock.log if steps == 2 and name in "ab"]
    pairs = [turns[i : i + 2] for i in range(0, 16, 2)]
    assert all(sorted(pair) == ["a", "b"] for pair in pairs) and len(set(map(tuple, pairs))) == 2
    assert sorted(name for name, steps in _Clock.log if steps == "closed") == ["a", "b", "c", "d"]


def test_a_killed_process_is_reported(tmp_path):
    worker = Worker(Task("step", CARLA, "float32", "unet_jax", _settings(tmp_path)))
    worker._process.kill()
    with pytest.raises(ChildProcessError, match=r"the process ended \(SIGKILL, out of memory\?\)"):
        worker.answer(60)
    worker.close()


def test_a_process_that_does_not_answer_is_not_waited_for(tmp_path):
    worker = Worker(Task("step", CARLA, "float32", "unet_jax", _settings(tmp_path)))
    with pytest.raises(ChildProcessError, match="no answer in 0 s"):
        worker.answer(0)
    worker.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of tiny works by real processes."""
    settings = _settings(tmp_path_factory.mktemp("benchmark"))
    contenders = ("unet_jax", "PyTorch eager")
    rows = measure.compare("step", CARLA, "float32", settings, contenders)
    rows += measure.compare("predict", SMALL[2], "bfloat16", settings, contenders)
    matmul = measure.Work("matmul-64", {}, 0, 0, (64, 64), 1)
    return rows + measure.compare("matmul", matmul, "float32", settings, contenders[:1])


@pytest.mark.slow
def test_real_processes(measured):
    pytest.importorskip("torch")
    assert [row.get("error") for row in measured] == [None] * 5
    assert len({row["parameters"] for row in measured[:2]}) == 1
    for row in measured:
        assert len(row["times_s"]) == 3 and min(row["times_s"]) > 0
        assert row["median_s"] == statistics.median(row["times_s"]) and row["memory_bytes"] > 0
    ours = measured[0]
    assert ours["images_per_s"] == CARLA.batch / ours["median_s"]
    assert ours["gflop"] > 0 and measured[2]["gflop"] > 0 and ours["compile_s"] > 0
    assert measured[1]["ratio"] == 1 and ours["ratio_to"] == "PyTorch eager"


def _result(rows):
    device = {
        "platform": "cpu",
        "device_kind": "cpu",
        "device_count": 1,
        "cpu": "A CPU",
        "cores": 2,
        "load_before": 1.9,
    }
    settings = {"repeats": 3, "seconds": 0.01, "dtypes": ["float32"]}
    return {"device": device, "versions": {"jax": "1.2.3"}, "settings": settings, "skipped": {}, "rows": rows}


@pytest.mark.slow
def test_table_and_picture_come_from_the_file(measured, tmp_path):
    pytest.importorskip("torch")
    failed = {
        "suite": "step",
        "work": "carla-8",
        "dtype": "float32",
        "contender": "PyTorch compiled",
        "error": "x" * 300,
    }
    scaling = [
        {**measured[0], "suite": "scaling", "direction": "batch", "factor": factor, "size": (32, 48), "batch": 2}
        | {"cost": 1.5 * factor, "cost_quartiles": [1.4 * factor, 1.6 * factor], "work_of_base": factor}
        for factor in (1, 4)
    ]
    result = json.loads(json.dumps(_result([*measured, failed, *scaling]), allow_nan=False))
    table = "\n".join(
        [benchmark.format_head(result)]
        + [benchmark.format_suite(result, suite) for suite in ("step", "predict", "scaling")]
    )
    assert max(map(len, table.splitlines())) <= 120
    for row in measured[:4]:
        assert f"{row['ratio']:.2f}x" in table and benchmark._number(1e3 * row["median_s"]) in table
    assert "WARNING  the machine is busy (load 1.9 of 2" in table
    assert "jax 1.2.3" in table and "A CPU" in table and "xxx" in table and re.search("batch +x 4 ", table)
    assert f"{benchmark._number(measured[0]['memory_bytes'] / 2**30)} GiB" in table
    assert benchmark.draw(result, tmp_path / "a.png").startswith(" and ")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_scaling_is_relative_to_the_base(monkeypatch, tmp_path):
    asked = []

    def interleave(tasks, *_):
        asked.append(tasks)
        return {factor: {"times_s": [factor, 2 * factor], "gflop": 3.0, "steps": 1} for factor in tasks}

    monkeypatch.setattr(measure, "interleave", interleave)
    settings = _settings(tmp_path, platform="gpu")
    groups = list(measure.measure_scaling(WORKS["carla-8"], "float32", settings))
    assert [group[0]["direction"] for group in groups] == ["pixels", "batch", "width", "devices"]
    assert [row["cost"] for row in groups[0]] == [0.25, 1, 4] and [row["cost"] for row in groups[3]] == [1, 2, 4, 8]
    pixels, batch, width, devices = asked
    assert [task.work.size for task in pixels.values()] == [(48, 64), (96, 128), (192, 256)]
    assert [task.work.batch for task in batch.values()] == [2, 8, 32]
    assert width[0.5].work.model["features"] == (16, 32, 64, 128, 256)
    assert [(task.devices, task.settings.platform) for task in devices.values()] == [(n, "cpu") for n in (1, 2, 4, 8)]
    table = benchmark.format_suite(_result([row for group in groups for row in group]), "scaling")
    assert re.search("devices +x 8 .* 8.00x", table)


def test_numbers_for_people():
    shown = [benchmark._number(value) for value in (0.01234, 1.2345, 12.36, 1234.6, 123456.0, 0)]
    assert shown == ["0.012", "1.234", "12.36", "1,235", "123,456", "0"]


BLOCKED = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def _call(*flags, path=""):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    return run(sys.executable, FOLDER, *flags, env=environment, timeout=900)


@pytest.mark.slow
def test_where_libraries_are_missing(tmp_path):
    """The image of an accelerator: no TensorFlow, clu or ml_collections; and here no PyTorch or matplotlib either."""
    blocked = ("tensorflow", "clu", "ml_collections", "orbax", "torch", "matplotlib", "tqdm")
    (tmp_path / "sitecustomize.py").write_text(BLOCKED.format(blocked=blocked))
    flags = ("--suite", "predict", "input", "startup", "--work", "carla-8", "--repeats", 1, "--seconds", 0.01)
    done = _call(*flags, "--output", tmp_path / "out", path=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert result["skipped"]["input"] == "not installed: ml_collections, tensorflow, tqdm"
    assert "clu, ml_collections, orbax" in result["skipped"]["startup"] and "startup is skipped" in done.stdout
    rows = {row["contender"]: row for row in result["rows"] if row["suite"] == "predict"}
    assert rows["unet_jax"]["images_per_s"] > 0 and "ratio" not in rows["unet_jax"]
    assert rows["PyTorch eager"]["error"] == rows["PyTorch compiled"]["error"] == "not installed: torch"
    assert done.stdout.count("not installed: torch") == 2 and "matplotlib is not installed" in done.stdout
    assert pathlib.Path.home().name not in json.dumps(result["device"])


def test_wrong_flags_and_earlier_results(tmp_path):
    (tmp_path / "benchmark.json").write_text("{}")
    for flags, message in [
        (("--work", "carlo"), "Did you mean 'carla'?"),
        (("--suite", "steps"), "--suite = 'steps' is not one of: step,"),
        (("--dtype", "float16"), "--dtype = 'float16'"),
        (("--repeats", "0"), "must be positive"),
        (("--output", str(tmp_path)), "is not overwritten"),
    ]:
        failed = _call(*flags)
        assert failed.returncode == 1 and not failed.stdout
        assert failed.stderr.startswith("error: ") and message in failed.stderr and failed.stderr.count("\n") == 1


@pytest.mark.slow
def test_input(tmp_path):
    pytest.importorskip("tensorflow")
    settings = _settings(tmp_path, repeats=1, seconds=0.05)
    rows = {row["contender"]: row for row in measure.measure_input(CARLA, "float32", settings)}
    assert [row.get("error") for row in rows.values()] == [None] * 5
    assert rows["pipeline from cache"]["of_need"] > 0 and 0 <= rows["training from files"]["waited"] <= 1
    table = benchmark.format_suite(_result(list(rows.values())), "input")
    assert "step alone" in table and "waiting" in table
    assert max(map(len, table.splitlines())) <= 120


@pytest.mark.slow
def test_startup(tmp_path):
    flags = [f"--config={ROOT / 'tests' / 'tiny.py'}", "--config.train.log_every_steps=1"]
    assert 1 < benchmark.seconds_until("step 1/", flags, tmp_path) < 300
    with pytest.raises(ChildProcessError, match="ended before its first step: error: --config=none.py"):
        benchmark.seconds_until("step 1/", ["--config=none.py"], tmp_path)
