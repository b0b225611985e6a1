"""The import order of the package, and what must run where TensorFlow is not installed."""

import ast
import sys

import pytest
from helpers import ROOT, run

PACKAGE = ROOT / "unet_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a room (a package or a module) imports only from itself and from the floors below its own.
FLOORS = (
    ("errors", "user_cache", "defaults"),
    ("paths",),
    ("models", "data", "losses", "metrics", "parallel"),  # these do not know each other
    ("workdir", "weights"),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("interop",),
    ("main",),
    ("__init__",),  # imports nothing before it is used
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path, top_level_only=False):
    """Full names of everything that a file imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _packages(path, top_level_only=False):
    return {name.split(".")[0] for name in _imports(path, top_level_only)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_room_and_from_the_floors_below(path):
    room = _room(path)
    assert room in FLOOR, f"{room} has no floor: add it to FLOORS"
    imported = {(name.split(".") + ["__init__"])[1] for name in _imports(path) if name.split(".")[0] == "unet_jax"}
    above = {other for other in imported - {room} if FLOOR.get(other, len(FLOORS)) >= FLOOR[room]}
    assert not above, f"{room} is not above {', '.join(above)}"
    if room == "__init__":
        assert not _imports(path, top_level_only=True)


def test_every_room_exists():
    assert {_room(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_packages_are_imported_only_where_they_belong(path):
    packages = _packages(path)
    assert not packages & {"scripts", "configs", "tests", "torch", "keras"}
    if _room(path) == "data":
        assert not packages & {"jax", "flax"}
    else:
        assert not packages & {"tensorflow", "tensorflow_datasets"}
    assert "tensorflow" not in _packages(path, top_level_only=True)
    assert ("orbax" in packages) == (path == PACKAGE / "workdir" / "checkpoints.py")


def test_every_file_can_be_read_at_one_sitting():
    lines = {str(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > 300}


def test_step_evaluation_inference_and_checkpoints_run_without_tensorflow(tmp_path):
    program = f"""
import sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):
    missing = {{"tensorflow", "tensorflow_datasets", "clu", "tensorboard", "tqdm", "matplotlib"}}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
sys.path.insert(0, {str(ROOT)!r})
import jax, numpy as np
import unet_jax
from configs import shapes
from etils import epath
from unet_jax import data, metrics
from unet_jax.evaluation import evaluate
from unet_jax.inference import tiles
from unet_jax.parallel import sharding
from unet_jax.training import components, state
from unet_jax.workdir import checkpoints, files

config = shapes.get_config()
config.data.size, config.model.features, config.train.batch_size = (48, 48), (4, 8), 2
source = data.load(config.data, "train")
mesh = sharding.create_mesh(0, 1)
built = components.build(config, source.classes, mesh, components.count_steps(config.train, 2))
made = state.create(0, built.network.model, (1, 48, 48, 1), built.optimizer, False, mesh)
images, labels = zip(*(source.read(i) for i in range(2)))
batch = dict(image=np.stack(images), label=np.stack(labels), mask=np.ones(2, bool))
train_step = components.make_train_step(config, built, state.shardings(made, mesh, False))
made, values = train_step(made, sharding.put_batch(mesh, batch), sharding.per_device(mesh, 0))
assert np.isfinite(float(values["loss"]))
eval_step = evaluate.make_eval_step(built.network, built.loss)
result = evaluate.evaluate(eval_step, made.eval_variables, [batch], built.loss, built.network)
assert result.confusion.sum() == 2 * 48 * 48 and 0 <= metrics.flatten(result.records)["miou"] <= 1

path = epath.Path({str(tmp_path)!r})
files.claim(path, config, source.classes.to_json())
writer = checkpoints.CheckpointWriter(path)
writer.save(1, made, {{}}, 0.5)
writer.close()
trained = unet_jax.load(path)
probability = trained.predict(batch["image"])
expected = built.network.probability(made.eval_variables, batch["image"])
np.testing.assert_allclose(probability, expected, atol=1e-5)

WithoutTensorFlow.missing.remove("tqdm")
large = tiles.Predictor(trained.network, trained.variables, (48, 48)).probability(np.zeros((60, 100, 1), np.uint8))
assert large.shape == (60, 100, 7)
"""
    result = run(sys.executable, "-c", program, cwd=ROOT)
    assert result.returncode == 0, result.stderr
