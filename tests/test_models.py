"""A network of another kind: one file in `models/` and its name. No other module assumes a U-Net."""

import json
import sys
import types
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers import build, one_device, read_image, save_image

import unet_jax
from unet_jax import models
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate
from unet_jax.inference import predict, tiles
from unet_jax.interop import export
from unet_jax.training import loop, plan, pretrained


class Strided(nn.Module):
    """Two convolutions of stride 2, and the logits of each 4x4 pixels repeated; takes multiples of 4 pixels."""

    num_outputs: int
    width: int = 8
    remat: Sequence[int] = ()
    conv_impl: str = "plain"
    deep_supervision: int = 0

    stride = 4
    smallest_input = (4, 4)
    first_conv = "Conv_0/kernel"
    is_local = True

    @nn.compact
    def __call__(self, image, keys=None):
        for _ in range(2):
            image = nn.relu(nn.Conv(self.width, (2, 2), strides=2)(image))
        logits = nn.Conv(self.num_outputs, (1, 1), name="head")(image)
        return logits.repeat(4, axis=1).repeat(4, axis=2)

    def margins(self, size):
        return tuple((0, -length % 4) for length in size)

    def output_size(self, size):
        if any(length % 4 or not length for length in size):
            raise UserError(f"sizes must be multiples of 4, not {size}")
        return tuple(size)


@pytest.fixture
def strided(config, monkeypatch):
    """A configuration of it: two steps."""
    module = types.ModuleType("unet_jax.models.strided")
    module.create = lambda num_outputs, conv_impl, remat, **_: Strided(num_outputs, remat=remat, conv_impl=conv_impl)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(models, "NAMES", (*models.NAMES, "strided"))
    config.model.name = "strided"
    config.data.shapes_train, config.data.size = 8, (50, 54)
    config.train.epochs, config.train.eval_every_epochs = 2.0, 1.0
    return config


def test_an_unknown_network_is_an_error(config):
    message = r"config\.model\.name = 'unett' is not one of: unet, encoder_unet\. Did you mean 'unet'"
    with pytest.raises(UserError, match=message):
        models.create(num_outputs=2, **(config.model.to_dict() | {"name": "unett"}))


@pytest.mark.slow
def test_another_network_is_trained_evaluated_and_exported(strided, tmp_path, capsys):
    path = tmp_path / "run"
    loop.train(strided, path)
    assert (path / "report.html").exists() and "Finished: 2 steps" in capsys.readouterr().out
    result = evaluate.evaluate_workdir(path, None, None, "validation")
    assert result.confusion.sum() == 10 * 50 * 54
    assert (
        json.loads((path / "eval.json").read_text())["miou"] == next(r for r in result.records if r.key == "miou").value
    )

    trained = unet_jax.load(path)
    assert isinstance(trained.model, Strided)
    image = np.random.default_rng(0).integers(0, 256, (71, 90, 1), np.uint8)
    whole = np.asarray(trained.predict(image[None])[0])
    tiled = tiles.Predictor(trained.network, trained.variables, (32, 20)).probability(image)
    np.testing.assert_allclose(tiled, whole, atol=1e-6)  # it is local, so that tiles have no seams
    averaged = tiles.Predictor(trained.network, trained.variables, (32, 20), tta="flips").probability(image)
    np.testing.assert_allclose(averaged.sum(-1), 1, atol=1e-5)
    save_image(image[..., 0], tmp_path / "a.png")
    predict.predict_files(path, str(tmp_path / "a.png"), tmp_path / "masks")
    assert (read_image(tmp_path / "masks/a.png") == tiled.argmax(-1)).mean() > 0.999

    label, probability = jax.export.deserialize(export.to_stablehlo(trained)).call(image[None])
    np.testing.assert_allclose(probability[0], whole, atol=1e-6)
    assert (label[0] == probability[0].argmax(-1)).all()
    assert export.to_safetensors(trained)
    with pytest.raises(UserError, match="not for Strided"):
        export.to_onnx(trained)

    strided.data.variant = "multilabel"  # its head has another number of outputs
    built, _ = build(strided, one_device())
    strided.init_from = str(path)
    loaded = pretrained.load_pretrained(strided, built.network)
    blocks = {name.split("/")[1] for name in loaded.arrays}
    assert blocks == {"Conv_0", "Conv_1"} and "7 outputs" in loaded.summary


def test_another_network_is_planned(strided, capsys):
    plan.plan(strided, memory_gib=None)
    out = capsys.readouterr().out
    weights = 8 * (4 * 1 + 1) + 8 * (4 * 8 + 1) + 7 * (8 + 1)
    assert f"{weights} weights" in out and "training predicts 50x54 from 52x56" in out
