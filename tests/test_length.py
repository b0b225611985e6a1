"""How long a training is: by minutes, until it gets no better, and extended."""

import os
import shutil

import helpers
import numpy as np
import pytest
import tiny

from unet_jax.errors import UserError
from unet_jax.training import components, length, loop, optimizer
from unet_jax.training.length import Costs
from unet_jax.workdir import extension, files, integrity, metrics_log


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training of 10 steps, 4 epochs."""
    path = tmp_path_factory.mktemp("finished") / "run"
    loop.train(tiny.get_config(), path)
    return path


@pytest.mark.parametrize(
    "settings, steps, rates",
    [
        (dict(schedule="cosine"), (0, 50, 99.9999, 100, 120, 139.9999), (1, 0.5, 0, 1, 0.5, 0)),
        (dict(schedule="cosine", warmup_epochs=1), (5, 10, 99.9999, 100, 105, 110), (0.5, 1, 0, 0, 0.5, 1)),
        (dict(schedule="cosine", extension="constant"), (50, 99.9999, 100, 139), (0.5, 0, 0.1, 0.1)),
        (dict(schedule="constant", extension="constant", warmup_epochs=5), (25, 50, 100, 139), (0.5, 1, 1, 1)),
        (dict(schedule="step", decay_epochs=(3,)), (29, 31, 99, 100, 129, 131), (1, 0.1, 0.1, 1, 1, 0.1)),
        (dict(schedule="step", decay_epochs=(3,), extension="constant"), (29, 31, 100, 139), (1, 0.1, 0.1, 0.1)),
    ],
)
def test_the_learning_rate_of_an_extended_run(config, settings, steps, rates):
    config.optimizer.update(learning_rate=1.0, **settings)
    schedule = optimizer.make_schedule(config.optimizer, steps_per_epoch=10, ends=[100, 140])
    np.testing.assert_allclose([schedule(step) for step in steps], rates, atol=2e-6)


def test_a_warm_up_must_fit_into_what_is_added(config):
    config.optimizer.update(schedule="cosine", warmup_epochs=5.0)
    with pytest.raises(UserError, match=r"warmup_epochs = 5.0 is not within .* \(4 epochs, which are added\)"):
        optimizer.make_schedule(config.optimizer, steps_per_epoch=10, ends=[100, 140])


def test_an_extended_run_is_bit_equal_to_one_with_the_same_configuration(finished, config, tmp_path, capsys):
    path, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(finished, path)
    config.train.epochs = 6.0
    loop.train(config.copy_and_resolve_references(), path)
    out = capsys.readouterr().out
    assert "Extended from 4 to 6 epochs, 10 to 15 steps: the learning rate starts again " in out
    assert "Finished: 15 steps" in out
    config.train.extends = (4.0,)
    loop.train(config, whole)
    helpers.assert_same_run(path, whole)
    rates = [row["train/learning_rate"] for row in metrics_log.read(path) if "train/learning_rate" in row]
    assert rates[-1] == pytest.approx(1e-3 * 0.5 * (1 + np.cos(0.8 * np.pi)))  # of the last of 5 steps
    again = tiny.get_config()
    again.train.epochs = 6.0  # as the command that extended it
    loop.train(again, path)
    assert f"{path} is finished: 15 steps" in capsys.readouterr().out


def test_an_extension_changes_nothing_else_and_no_run_gets_shorter(finished, config):
    config.train.epochs, config.optimizer.learning_rate = 6.0, 0.5
    with pytest.raises(
        UserError, match=r"other configuration.*:\n  config.optimizer.learning_rate: 0.001 there, 0.5 now$"
    ):
        loop.train(config, finished)
    config.train.epochs, config.optimizer.learning_rate = 3.0, 1e-3
    with pytest.raises(UserError, match=r":\n  config.train.epochs: 4.0 there, 3.0 now$"):
        loop.train(config, finished)
    config.train.epochs, config.train.extends = 6.0, (5.0,)
    with pytest.raises(UserError, match=r"config.train.epochs: 4.0 there, 6.0 now\n  config.train.extends"):
        loop.train(config, finished)


@pytest.mark.parametrize("extends", [(4.0, 4.0), (5.0,), (3.9,), (-1.0,), (float("nan"),), (float("inf"),), ("a",)])
def test_lengths_that_do_not_rise_are_refused(config, extends):
    config.train.extends = extends
    with pytest.raises(
        UserError, match=r"config.train.epochs = 4.0, .* where it ended before, config.train.extends = "
    ):
        components.count_steps(config.train, 2.5)
    config.train.update(extends=(), epochs=1e300)
    with pytest.raises(UserError, match=r"config.train.epochs = 1e\+300 is 2.5e\+300 steps"):
        components.count_steps(config.train, 2.5)


@pytest.mark.parametrize("total", [1, 5, 10, 14, 15, 19, 25, 44, 1000])
def test_about_ten_evaluations(config, total):
    config.train.update(epochs=float(total), eval_every_epochs=0.0, checkpoint_every_epochs=0.0)
    steps = components.count_steps(config.train, 1.0)
    assert min(total, 5) <= sum(map(steps.evaluates, range(1, total + 1))) <= 10


def test_which_configurations_extend_which():
    values = lambda epochs, extends=(), **more: {"train.epochs": epochs, "train.extends": [*extends], **more}
    assert extension.is_extension(values(4), values(6, [4]))
    assert extension.is_extension(values(4), values(9, [4, 6])) and extension.is_extension(
        values(6, [4]), values(9, [4, 6])
    )
    assert extension.is_extension(values(4.5, **{"train.minutes": 10}), values(6, [4.5]))
    assert not extension.is_extension(values(4), values(4)) and not extension.is_extension(values(4), values(6))
    assert not extension.is_extension(values(4), values(6, [5])) and not extension.is_extension(
        values(6, [4]), values(4)
    )
    assert "optimizer.extension" in extension.may_differ(values(4), values(6, [4]))
    assert "optimizer.extension" not in extension.may_differ(values(6, [4]), values(9, [4, 6]))


def test_a_run_ends_when_it_gets_no_better(config, tmp_path, capsys):
    config.optimizer.learning_rate, config.optimizer.ema = 1e-12, 0.0  # each evaluation finds the same
    config.model.norm, config.train.eval_every_epochs = "none", 0.8  # 2 steps
    config.train.patience = 2
    path = tmp_path / "run"
    loop.train(config.copy_and_resolve_references(), path)
    out = capsys.readouterr().out
    assert "No better miou in 2 evaluation(s) (config.train.patience): ended after step 6 of 10" in out
    assert "Finished: 6 steps" in out and (path / "report.html").exists() and (path / "panels/6").exists()
    loop.train(config.copy_and_resolve_references(), path)
    assert f"{path} is finished: 6 steps" in capsys.readouterr().out
    # Extended, it has new patience, and a report of its own even if the one of before is still there.
    config.train.epochs, config.train.patience = 6.0, 3
    loop.train(config.copy_and_resolve_references(), path)
    assert "ended after step 12 of 15" in capsys.readouterr().out
    os.utime(path / "report.html", (0, 0))
    loop.train(config.copy_and_resolve_references(), path)
    assert f"{path} is finished: 12 steps" in capsys.readouterr().out and (path / "report.html").stat().st_mtime > 0
    config.train.patience = 0
    loop.train(config, path)
    assert integrity.steps(path)[-1] == 15 and "Finished: 15 steps" in capsys.readouterr().out


def test_patience_below_zero_is_refused(config, tmp_path):
    config.train.patience = -1
    with pytest.raises(UserError, match="config.train.panels and config.train.patience 0 or more"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "costs", [Costs(20, 0.5, 3, 7), Costs(1, 2, 30, 5), Costs(5, 0.0137, 0.11, 3), Costs(10, 1, 90, 20)]
)
def test_as_many_steps_as_fit(costs):
    def seconds(steps, every=7):
        return costs.start + steps * costs.step + -(-steps // every) * costs.evaluation + costs.finish

    assert length.count_steps(60e7, costs, None) == min(
        2**31 - 1, int((60e7 - costs.start - costs.finish - 10 * costs.evaluation) / costs.step)
    )
    for budget in (60, 333, 4000):
        count = length.count_steps(budget, costs, 7)
        assert count == max((n for n in range(1, 500_000) if seconds(n) <= budget), default=0)


def test_minutes_are_measured_once_and_kept(config, tmp_path, monkeypatch, capsys):
    config.train.minutes = 0.2
    with monkeypatch.context() as patch:
        # Leaves 8 s: 12 steps and 3 evaluations.
        patch.setattr(length, "_measure_costs", lambda *_: Costs(2.0, 0.4, 1.0, 2.0))
        loop.train(config.copy_and_resolve_references(), tmp_path / "whole")
        assert (
            integrity.steps(tmp_path / "whole")[-1] == 12 and "12 steps, which is 4.8 epochs" in capsys.readouterr().out
        )
        rates = [row["train/learning_rate"] for row in helpers.metric_rows(tmp_path / "whole") if "train/loss" in row]
        assert rates[-1] < 0.1 * rates[0]  # the schedule is complete
    # Stopped, and resumed where all is much slower.
    save = loop.evaluate_and_save
    with monkeypatch.context() as patch:
        patch.setattr(length, "_measure_costs", lambda *_: Costs(2.0, 0.4, 1.0, 2.0))

        def save_and_crash(run, train_state, step, *more):
            save(run, train_state, step, *more)
            run.writer.close()
            raise KeyboardInterrupt

        patch.setattr(loop, "evaluate_and_save", save_and_crash)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config.copy_and_resolve_references(), tmp_path / "run")
    monkeypatch.setattr(length, "_measure_costs", lambda *_: Costs(0.0, 100.0, 100.0, 0.0))
    loop.train(config.copy_and_resolve_references(), tmp_path / "run")
    helpers.assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert files.read_config(tmp_path / "run").train.epochs == 4.8
    config.train.minutes = 0.3
    with pytest.raises(UserError, match=r":\n  config.train.minutes: 0.2 there, 0.3 now$"):
        loop.train(config, tmp_path / "run")


def test_too_short_a_time_is_an_error_that_says_how_much_is_needed(config, tmp_path):
    config.train.minutes = 1e-3
    with pytest.raises(
        UserError, match=r"minutes = 0.001 is too short: .* a step 0.\d\d s, .* It needs \d+.\d at least"
    ):
        loop.train(config, tmp_path / "run")
    config.train.minutes = float("nan")
    with pytest.raises(UserError, match="config.train.minutes = nan must be positive"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()
