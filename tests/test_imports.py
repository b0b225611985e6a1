"""The map of the house, held by `ast`, and what must run where TensorFlow is not installed."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "unet_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Module -> what it may import of the package; a folder stands for its files.
ALLOWED = {
    "errors": set(),
    "models": {"errors", "models"},
    "data": {"errors", "data", "user_cache"},
    **{leaf: {"errors"} for leaf in ("losses", "metrics", "optimizer", "mesh", "processes", "signals")},
    **{leaf: set() for leaf in ("resample", "em", "program", "user_cache")},
    "checkpoint": {"errors", "integrity", "mesh", "processes"},
    "integrity": {"errors", "mesh"},
    "make": {"augment", "data", "errors", "losses", "mesh", "models", "optimizer", "trained"},
    "workdir": {"errors", "processes"},
    "state": {"mesh"},
    "step": {"augment", "data", "losses", "mesh", "predict", "state"},
    "augment": {"errors", "resample"},
    "predict": {"data", "errors", "mesh", "resample"},
    "draw": {"data", "errors", "mesh"},
    "page": {"data", "draw"},
    "report": {"data", "errors", "mesh", "metrics", "page", "predict", "trained", "workdir"},
    "trained": {"checkpoint", "data", "errors", "mesh", "models", "predict", "processes", "state", "workdir"},
    "weights": {"errors"},
    "layouts": {"errors", "weights"},
    "convert": {"checkpoint", "data", "errors", "layouts", "models", "state", "trained", "weights", "workdir"},
    "export": {"errors", "metrics", "models", "predict", "trained"},
    "log": {"em", "evaluate", "mesh", "workdir"},
    "plan": {"data", "errors", "evaluate", "log", "mesh", "program", "state", "step", "make"},
    "check": {"data", "draw", "errors", "mesh", "models"},
    "predict_files": {"data", "draw", "errors", "mesh", "predict", "trained", "workdir"},
    "main": {
        *("errors", "train", "check", "evaluate", "plan", "predict_files", "processes", "mesh", "report", "signals"),
        "user_cache",
    },
}


def _imports(path, top_level_only=False):
    """Names of imported modules, with what is imported from the package itself resolved."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_rules(path):
    imports = _imports(path)
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    roots = {name.split(".")[0] for name in imports}
    assert not roots & {"scripts", "configs", "tests", "torch", "keras"}
    own = {name.split(".")[1] for name in imports if name.startswith("unet_jax.")}
    if module in ALLOWED:
        assert own <= ALLOWED[module], f"{module} imports {own - ALLOWED[module]}"
    if module == "data":
        assert not roots & {"jax", "flax"}
    else:
        assert not roots & {"tensorflow", "tensorflow_datasets"}
    assert "tensorflow" not in {name.split(".")[0] for name in _imports(path, top_level_only=True)}
    assert ("orbax" in roots) == (module == "checkpoint")
    assert len(path.read_text().splitlines()) <= 330, "too long for one sitting"


def test_step_evaluation_and_checkpoints_run_without_tensorflow(tmp_path):
    program = f"""
import sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "tqdm", "matplotlib"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from configs import shapes
from unet_jax import data
from unet_jax.evaluation import evaluate
from unet_jax.parallel import sharding
from unet_jax.training import optimizer, state, step
from unet_jax.workdir import checkpoints
from unet_jax.models import unet

config = shapes.get_config()
config.data.size, config.model.features, config.train.batch_size = (48, 48), (4, 8), 2
source = data.load(config.data, "train")
devices = sharding.create_mesh(0, 1)
model = unet.create(source.classes.num_outputs, **config.model)
tx = optimizer.make_optimizer(config.optimizer, optimizer.make_schedule(config.optimizer, 2, 10))
made = state.create(0, model, (1, 48, 48, 1), tx, False, devices)
images, labels = zip(*(source.read(i) for i in range(2)))
batch = sharding.put_batch(devices, dict(image=np.stack(images), label=np.stack(labels), mask=np.ones(2, bool)))
layout = state.shardings(made, devices, False)
train_step = step.make_train_step(model, tx, config, source.classes, devices, layout)
made, values = train_step(made, batch, sharding.per_device(devices, 0))
counts, *_ = evaluate.make_eval_step(model, source.classes, config, devices)(made.eval_variables, batch)
assert counts.sum() == 2 * 48 * 48
writer = checkpoints.CheckpointWriter({str(tmp_path)!r})
writer.save(1, made, {{}}, 0.5)
writer.close()
assert np.isfinite(float(values["loss"]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
