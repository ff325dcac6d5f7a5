"""Runs with a target for their sparsity."""

from pathlib import Path

import pytest
from rich.console import Console
from small import differences, outcome, run
from sparseout_experiments.commands.run import show
from sparseout_experiments.config import resolve
from sparseout_experiments.methods import KNOBS
from sparseout_experiments.training import loop as train
from sparseout_experiments.training import run_folder

from sparseout import SparsityController

DIGITS = {"units": 128, "train_size": None, "valid_size": None, "batch": 32}


@pytest.mark.slow
def test_the_target_is_met_and_all_of_it_recorded(tmp_path: Path) -> None:
    found = run(tmp_path, "autoencoder", target_sparsity=0.6, epochs=40, **DIGITS)
    control = found["control"]
    assert control["target"] == 0.6
    assert control["hoyer"] == pytest.approx(0.6, abs=0.02)
    assert 1.0 < control["q"] < 2.5
    # what is measured are the weights of the last epoch, in evaluation
    assert (found["best_epoch"], found["mean"]["hoyer"]) == (40, pytest.approx(0.6, abs=0.04))
    # the noise has had the power of Dropout's, but for chance: an interval sees 10 batches of 32
    assert 0.9 < control["noise_least"] < 1 < control["noise_most"] < 1.1
    intervals = [entry for line in run_folder.metrics(tmp_path) for entry in line["control"]]
    assert [entry["step"] for entry in intervals] == list(range(10, found["steps"] + 1, 10))
    assert control["intervals"] == len(intervals)
    last = intervals[-(len(intervals) // 10) :]
    for name in ("hoyer", "q"):
        assert control[name] == pytest.approx(sum(entry[name] for entry in last) / len(last))


@pytest.mark.slow
def test_few_steps_are_enough(tmp_path: Path) -> None:
    """A Wide-ResNet in 333 steps, an update every third of them, with a rate that falls to 0."""
    options = {"data": "digits", "depth": 10, "width": 1, "batch": 32, "epochs": 9, "device": "cpu"}
    found = train.perform(resolve("image", options | {"target_sparsity": 0.6}), tmp_path)
    assert (found["steps"], found["control"]["intervals"]) == (333, 111)
    assert found["mean"]["hoyer"] == pytest.approx(0.6, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "knob"), [("penalty", "strength"), ("kwinners", "k"), ("dropout", "p")])
def test_every_method_with_a_knob_meets_a_target(method: str, knob: str, tmp_path: Path) -> None:
    target = 0.45 if method == "dropout" else 0.7
    found = run(tmp_path, "autoencoder", method=method, target_sparsity=target, epochs=20, **DIGITS)
    assert found["mean"]["hoyer"] == pytest.approx(target, abs=0.02)
    assert found["control"]["hoyer"] == pytest.approx(target, abs=0.02)
    assert found["control"][knob] > 0
    assert found["control"]["noise_most"] == 1 or method == "dropout"


def test_without_matched_noise_the_record_shows_it(tmp_path: Path) -> None:
    found = run(tmp_path, "autoencoder", target_sparsity=0.6, scale="paper")
    assert found["control"]["noise_least"] < 0.8


@pytest.mark.slow
def test_out_of_reach_is_a_warning_of_the_result(tmp_path: Path) -> None:
    found = run(tmp_path, "autoencoder", target_sparsity=0.95, q_min=2.4, epochs=20)
    told = [warning for warning in found["warnings"] if "out of reach" in warning]
    assert len(told) == 1
    assert "q has been at its lower bound, 2.4, for 50 updates" in told[0]


@pytest.mark.parametrize("kind", ["autoencoder", pytest.param("image", marks=pytest.mark.slow), "language"])
def test_a_run_that_stops_goes_on_with_the_same_q(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"target_sparsity": 0.6, "checkpoint_minutes": 0.0}
    run(tmp_path / "whole", kind, **options)
    step, count = SparsityController.step, 0

    def interrupted(self: SparsityController) -> None:
        nonlocal count
        count += 1
        if count == 34:  # four steps after an update and a save, in the second epoch
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(SparsityController, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", kind, **options)
    run(tmp_path / "stopped", kind, **options)
    whole, stopped = (outcome(tmp_path / name) for name in ("whole", "stopped"))
    moved = {entry["q"] for line in whole["metrics"] for entry in line["control"]}
    assert len(moved) > 3
    assert differences(whole, stopped) == []


def test_runs_without_a_target_have_no_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TargetControl", None)
    found = run(tmp_path, "autoencoder", epochs=1)
    assert "control" not in found


@pytest.mark.parametrize("method", ["dropout", "penalty", "kwinners"])
def test_a_result_says_where_any_knob_ended(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, "autoencoder", epochs=1, method=method, target_sparsity=0.5)
    assert run(tmp_path, "autoencoder", epochs=1, method=method, target_sparsity=0.5) == first  # from the file
    show(Console(width=200), first, tmp_path)
    knob = KNOBS[method][0]
    shown = capsys.readouterr().out
    assert f"at {knob} = {first['control'][knob]:.3g}; means over the last tenth" in shown
    assert ("power of the noise" in shown) == (method == "dropout")


def test_the_command_says_when_a_target_was_missed(capsys: pytest.CaptureFixture[str]) -> None:
    control = {"target": 0.6, "hoyer": 0.57, "q": 2.3, "noise_least": 1.0, "noise_most": 1.0}
    result = {
        "task": "autoencoder", "sparsity": {}, "test": {"mse": 0.01}, "valid": {"mse": 0.01}, "best_epoch": 1,
        "epochs": 1, "steps": 9, "seconds": 1.0, "stopped_by": "epochs", "warnings": [], "control": control,
    }  # fmt: skip
    for hoyer, warnings, said in ((0.57, [], 1), (0.59, [], 0), (None, [], 1), (0.57, ["it is out of reach"], 0)):
        show(Console(width=200), result | {"control": control | {"hoyer": hoyer}, "warnings": warnings}, Path("folder"))
        assert capsys.readouterr().out.count("Note: the target is missed by") == said
