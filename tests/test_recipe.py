"""A recipe read off the images: what is measured of them, what each rule makes of it, and that it is only read once."""

import json
import runpy

import helpers
import numpy as np
import pytest

from configs import auto, default
from unet_jax import data, defaults
from unet_jax.data.source import Source
from unet_jax.errors import UserError
from unet_jax.evaluation import recipe, survey
from unet_jax.training import loop, plan
from unet_jax.workdir import files

RNG = np.random.default_rng(0)
BINARY = data.Classes("binary", ("background", "thing"), ((0, 0, 0), (255, 0, 0)))
STREET = ("sky", "building", "pole", "road", "car")
SHARES = (0.2, 0.3, 0.01, 0.4, 0.09)


def _source(labels, classes, size=None):
    read = lambda i: (np.zeros((*labels[i].shape[:2], classes.channels), np.uint8), labels[i])
    return Source(classes, [str(i) for i in range(len(labels))], read, factors=lambda i: size or (1.0, 1.0))


def test_a_survey_measures_shares_widths_and_regions():
    stripes = np.zeros((60, 100), np.uint8)
    stripes[:, 10:14] = stripes[:, 50:54] = 1  # two stripes of 4 px, which reach the border of the image
    square = np.zeros((60, 100), np.uint8)
    square[20:40, 20:40] = 1
    found = survey.conduct(_source([stripes, square], BINARY))
    assert (found.images, found.size, found.sizes) == (2, (60, 100), ((60, 100), (60, 100)))
    np.testing.assert_allclose(found.shares[1], (8 * 60 + 400) / 12000)
    np.testing.assert_allclose(found.widths[1], 2 * (480 + 400) / (4 * 60 + 76))  # stripes 4, square 10.5: 5.6
    assert found.regions == (2, 1.5)
    halved = survey.conduct(_source([stripes], BINARY, size=(0.5, 0.5)))
    assert halved.size == (30, 50) and halved.widths[1] == 2


def test_a_survey_knows_overlapping_masks_and_ignores_ignored_pixels():
    classes = data.Classes("multilabel", ("a", "b"), ((0, 0, 0), (255, 0, 0)))
    label = np.zeros((20, 20, 2), np.uint8)
    label[5:15, 5:15] = 1
    assert survey.conduct(_source([label], classes)).widths == (2 * 100 / 36,) * 2
    ignored = np.full((20, 20), BINARY.ignore_label, np.uint8)
    ignored[:, :10] = 0
    assert survey.conduct(_source([ignored], BINARY)).shares == (1.0, 0.0)


def _survey(size, widths, shares, regions=None, images=40, channels=3):
    regions = regions or (1.0,) * len(widths)
    return survey.Survey(images, size, (size,) * min(images, 100), channels, "uint8", shares, widths, regions)


def _apply(monkeypatch, found, classes, **settings):
    """What rules set for a survey, and why: dotted name -> value, and the lines."""
    monkeypatch.setattr(survey, "conduct", lambda source: found)
    config, lines = auto.get_config(), []
    config.update_from_flattened_dict(settings)
    chosen = recipe.apply(config, _source([np.zeros((8, 8), np.uint8)], classes), lines.append)
    return {name: value for choice in chosen for name, value in choice.values.items()}, "\n".join(lines)


def test_vessels_are_seen_in_windows_at_full_resolution(monkeypatch):
    found, lines = _apply(monkeypatch, _survey((584, 565), (22.0, 3.9), (0.87, 0.13)), BINARY)
    assert found["data.size"] == () and found["augment.crop"] == (256, 256)
    assert found["model.features"] == (16, 32, 64, 128) and "model.name" not in found
    assert "augment.rotate" not in found and found["loss.dice"] == 0.5
    assert "in images resized to 256x256 the finest class, 'thing', would be 1.7 px wide instead of 3.9" in lines


def test_large_things_are_seen_in_whole_images_by_a_pretrained_network(monkeypatch):
    found, lines = _apply(monkeypatch, _survey((1280, 1918), (1168.0, 323.0), (0.78, 0.22)), BINARY)
    assert found["data.size"] == (224, 320) and "augment.crop" not in found
    assert (found["model.name"], found["model.features"]) == ("encoder_unet", (32, 64, 96, 192))
    assert found["augment.rotate"] == 15 and "augment.flip_vertical" not in found
    assert "whose median is 1918x1280: the finest class, 'thing', stays 53 px wide" in lines
    small, _ = _apply(monkeypatch, _survey((100, 150), (90.0, 30.0), (0.8, 0.2)), BINARY)
    assert small["data.size"] == (100, 150)  # nothing is enlarged


def test_rare_classes_count_more_and_very_rare_ones_do_not_decide_the_size(monkeypatch):
    street = data.Classes("multiclass", STREET, ((0, 0, 0),) * 5)
    widths = (25.0, 45.0, 3.0, 110.0, 35.0)
    found, lines = _apply(monkeypatch, _survey((360, 480), widths, SHARES), street)
    assert found["augment.crop"] == (256, 256) and found["model.features"] == (64, 96, 192)
    assert found["loss.class_weights"] == ("sqrt",) and "'pole' has 1.00% of the pixels" in lines
    found, _ = _apply(monkeypatch, _survey((360, 480), widths, (0.2, 0.3, 1e-4, 0.4, 0.0999)), street)
    assert found["data.size"] == (224, 288)


def test_gaps_between_many_things_count_more_and_microscopes_know_no_up_and_down(monkeypatch):
    stack = _survey((512, 512), (7.6, 26.0), (0.23, 0.77), (3.0, 120.0), images=18, channels=1)
    found, lines = _apply(monkeypatch, stack, BINARY)
    assert found["loss.border_weight"] == 10 and "loss.dice" not in found and found["augment.elastic"] == 10
    assert found["augment.flip_vertical"] and found["augment.turns"]
    assert "an image has 120 regions on average" in lines
    # A window that is no square cannot be turned.
    found, _ = _apply(monkeypatch, stack, BINARY, **{"augment.crop": (128, 256)})
    assert found["data.size"] == () and "augment.turns" not in found and found["augment.flip_vertical"]


def test_batches_fit_devices_and_images_and_the_length_the_time(monkeypatch):
    few = _survey((1280, 1918), (1168.0, 323.0), (0.78, 0.22), images=3)
    found, _ = _apply(monkeypatch, few, BINARY)
    assert found["train.batch_size"] == 8  # 3, rounded up to the 8 virtual devices
    assert found["train.epochs"] == 400.0 and found["train.eval_every_epochs"] == 0.0
    found, _ = _apply(monkeypatch, few._replace(images=100_000), BINARY)
    assert found["train.epochs"] == 10.0 and found["optimizer.warmup_epochs"] == 0.004
    found, _ = _apply(monkeypatch, few, BINARY, **{"train.minutes": 20.0})
    assert "train.epochs" not in found


def test_fields_that_are_set_or_excepted_stay_and_later_rules_follow_them(monkeypatch):
    vessels = _survey((584, 565), (22.0, 3.9), (0.87, 0.13))
    settings = {"data.size": (1168, 1130), "keep": ("train.batch_size", "optimizer.name")}
    found, _ = _apply(monkeypatch, vessels, BINARY, **settings)
    assert not found.keys() & {"data.size", "augment.crop", "train.batch_size", "optimizer.name"}
    found, lines = _apply(monkeypatch, vessels, BINARY, **{"data.size": (2336, 2260)})
    assert found["model.name"] == "encoder_unet" and "most classes are 16 px wide" in lines
    with pytest.raises(UserError, match=r"there is no field 'train.batchsize'. Did you mean 'train.batch_size'"):
        _apply(monkeypatch, vessels, BINARY, keep=("train.batchsize",))


def test_a_network_that_is_chosen_gets_what_suits_it(monkeypatch):
    thin = _survey((584, 565), (22.0, 3.9), (0.87, 0.13))
    found, _ = _apply(monkeypatch, thin, BINARY, **{"model.name": "encoder_unet"})
    assert found["model.features"] == (32, 64, 96, 192) and "optimizer.learning_rate" not in found
    wide = _survey((1280, 1918), (1168.0, 323.0), (0.78, 0.22))
    found, _ = _apply(monkeypatch, wide, BINARY, keep=("model.name",))
    assert found["model.features"] == (16, 32, 64, 128) and not found.keys() & {"model.name", "model.upsample"}


def test_images_at_their_own_size_on_demand_are_seen_in_windows(monkeypatch):
    wide = _survey((1280, 1918), (1168.0, 323.0), (0.78, 0.22), channels=1)
    for settings in ({"data.size": ()}, {"data.size": (), "data.pixel_size": 0.5}):
        found, _ = _apply(monkeypatch, wide, BINARY, **settings)
        assert found["augment.crop"] == (256, 256) and "data.size" not in found
    with pytest.raises(UserError, match=r"config.augment.crop = \(\) must be the \(height, width\) of the windows"):
        _apply(monkeypatch, wide, BINARY, **{"data.size": (), "keep": ("augment.crop",)})
    found, lines = _apply(monkeypatch, _survey((64, 64), (float("inf"),) * 2, (0.5, 0.5)), BINARY)
    assert found["data.size"] == (64, 64) and "inf" not in lines


def test_every_field_that_a_rule_sets_is_among_those_that_a_resumed_run_takes_over(monkeypatch):
    seen = set()
    for channels in (1, 3):
        for widths in ((7.6, 26.0), (500.0, 300.0)):
            found, _ = _apply(
                monkeypatch, _survey((512, 512), widths, (0.2, 0.8), (9.0, 90.0), channels=channels), BINARY
            )
            seen |= found.keys()
    with monkeypatch.context() as patch:
        patch.setattr(recipe.jax, "default_backend", lambda: "gpu")
        found, _ = _apply(monkeypatch, _survey((512, 512), (500.0, 300.0), (0.2, 0.8)), BINARY)
        assert found["model.dtype"] == "bfloat16" and found["data.size"] == (512, 512)
        seen |= found.keys()
    street = data.Classes("multiclass", STREET, ((0, 0, 0),) * 5)
    seen |= _apply(monkeypatch, _survey((360, 480), (25.0, 45.0, 3.0, 110.0, 35.0), SHARES), street)[0].keys()
    assert seen == {*recipe.FIELDS} and {*recipe.FIELDS} < defaults.fields().keys()


def test_a_batch_suits_devices_and_microbatches(monkeypatch):
    wide = _survey((1280, 1918), (1168.0, 323.0), (0.78, 0.22))
    found, _ = _apply(monkeypatch, wide, BINARY, **{"train.accumulate": 3})
    assert found["train.batch_size"] == 24
    found, _ = _apply(monkeypatch, wide, BINARY, **{"mesh.space": 4, "train.accumulate": 3})
    assert found["train.batch_size"] == 12  # two devices share a batch


def test_a_recipe_for_windows_is_a_file_that_can_be_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(survey, "conduct", lambda source: _survey((3000, 2000), (22.0, 3.9), (0.87, 0.13), images=500))
    config = auto.get_config()
    config.train.minutes = 30.0
    chosen = recipe.apply(config, _source([np.zeros((8, 8), np.uint8)], BINARY), print)
    (tmp_path / "recipe.py").write_text(recipe.to_file(config, chosen))
    written = runpy.run_path(str(tmp_path / "recipe.py"))["get_config"]()
    assert written.optimizer.warmup_epochs == config.optimizer.warmup_epochs < 0.1 and written.train.minutes == 0


def test_a_batch_is_halved_until_it_fits(config, monkeypatch, capsys):
    config.train.batch_size = 64
    monkeypatch.setattr(plan.sharding, "memory_limit", lambda mesh: 1000)
    monkeypatch.setattr(
        plan, "compile_step", lambda config, *_: plan.Plan(None, None, (), 50 * config.train.batch_size)
    )
    plan.shrink_batch(config, BINARY)
    assert (
        config.train.batch_size == 16
        and "auto     train.batch_size=32: the one before does not fit" in capsys.readouterr().out
    )


@pytest.fixture
def things(tmp_path):
    """Eight grey images of dark blobs, with their masks."""
    for k in range(8):
        mask = np.zeros((64, 80), np.uint8)
        row, column = RNG.integers(0, 40, 2)
        mask[row : row + 24, column : column + 30] = 255
        image = np.where(mask, RNG.integers(0, 100, mask.shape), RNG.integers(100, 256, mask.shape)).astype(np.uint8)
        helpers.save_image(image, tmp_path / f"things/images/{k}.png")
        helpers.save_image(mask, tmp_path / f"things/masks/{k}.png")
    config = auto.get_config()
    config.data.update(root=str(tmp_path / "things"), variant="binary", validation=0.3)
    config.model.name, config.model.features, config.train.epochs = "unet", (2, 4), 2.0
    config.keep = ("model.name",)
    return config


def test_a_training_reads_it_once_and_leaves_a_file_to_edit(things, tmp_path, capsys, monkeypatch):
    path = tmp_path / "run"
    loop.train(things.copy_and_resolve_references(), path)
    out = capsys.readouterr().out
    assert (
        "auto     data.size=(64, 80): the network sees whole images, whose median is 80x64" in out
        and "Finished: 2 steps" in out
    )
    recorded = files.read_config(path)
    held = (recorded.data.size, recorded.train.batch_size, recorded.model.features)
    assert [*map(list, held[::2])] == [[64, 80], [2, 4]] and held[1] == 8
    written = runpy.run_path(str(path / "recipe.py"))["get_config"]()
    expected = defaults.differing(defaults.flatten(json.loads(recorded.to_json())))
    found = defaults.differing(defaults.flatten(json.loads(written.to_json())))
    assert found == {name: value for name, value in expected.items() if name not in ("auto", "keep")}
    assert "    # the network sees whole images" in (path / "recipe.py").read_text()
    monkeypatch.setattr(survey, "conduct", None)  # not called again
    loop.train(things.copy_and_resolve_references(), path)
    assert "is finished: 2 steps" in capsys.readouterr().out
    things.train.batch_size = 24
    with pytest.raises(UserError, match="config.train.batch_size: 8 there, 24 now"):
        loop.train(things, path)


def test_check_shows_it_and_flags_stay_even_at_their_default(things, tmp_path):
    flags = ["--config=configs/auto.py", f"--config.data.root={things.data.root}", "--mode=check", "--json"]
    flags += ["--config.train.batch_size=16", f"--workdir={tmp_path / 'run'}"]
    facts = json.loads(helpers.run_main(*flags).stdout)
    fields = {name: value for rule in facts["recipe"] for name, value in rule["fields"].items()}
    assert fields["data.size"] == [64, 80] and "train.batch_size" not in fields
    assert (facts["training"]["height"], facts["training"]["width"]) == (64, 80)
    assert default.get_config().train.batch_size == 16
