"""What stops a run, and what is said of a result."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import arguments, differences, options, outcome, run
from sparseout_experiments import cli, tasks
from sparseout_experiments.training import health, run_folder
from sparseout_experiments.training import loop as train
from sparseout_experiments.training.run_folder import RunFailed
from torch import Tensor


def test_a_loss_that_is_no_number_is_named_by_its_step() -> None:
    losses = health.LossCheck()
    assert losses.update([1.0, 2.0, 3.0], 1) is None
    assert losses.update([1.0, math.nan, math.inf], 4) == "the loss of step 5 is nan"
    assert health.LossCheck().update([-math.inf], 9) == "the loss of step 9 is -inf"


def test_divergence_is_a_window_beyond_ten_times_the_best() -> None:
    window = health.WINDOW
    losses = health.LossCheck()
    assert losses.update([2.0] * window, 1) is None
    assert losses.update([1.0] * window, window + 1) is None
    assert losses.update([5.0] * window, 2 * window + 1) is None
    assert losses.update([10.0] * window, 3 * window + 1) is None  # the bound itself
    assert losses.update([1e6] * (window - 1), 4 * window + 1) is None  # not before the window is full
    told = losses.update([1e6], 5 * window)
    assert told is not None
    assert told.startswith(f"training diverged: the mean loss of the {window} steps up to step {5 * window} is 1e+06, ")
    assert "1000000 times" in told
    assert health.LossCheck(best=1.0).update([10.0001] * window, 1) is not None


def test_a_loss_check_goes_on_from_its_state() -> None:
    first, second = health.LossCheck(), health.LossCheck()
    values = [1.0] * health.WINDOW + [30.0] * health.WINDOW
    told = [first.update([value], step) for step, value in enumerate(values, 1)]
    for step, value in enumerate(values, 1):
        second = health.LossCheck(**json.loads(json.dumps(second.state())))
        assert second.update([value], step) == told[step - 1]
    assert told[-1] is not None
    assert told[:-1] == [None] * (len(values) - 1)


def place(dead: int = 0, undefined: int = 0) -> dict[str, float]:
    return {"dead_units": dead, "units": 1000, "undefined_rows": undefined, "rows": 1000}


@pytest.mark.parametrize(
    ("sparsity", "test", "says"),
    [
        ({"code": place()}, {"mse": 0.1}, []),
        ({"code": place(dead=500)}, {}, []),
        (
            {"code": place(dead=501), "other": place()},
            {},
            ["50% of the units of code are dead over 1,000 rows: much of its sparsity"],
        ),
        ({"code": place(undefined=10)}, {}, []),
        ({"a": place(), "b": place(undefined=11)}, {}, ["1.1% of the rows of b are all zero and have no measure: its"]),
        ({}, {"error": 0.0, "error_as_trained": 0.02}, []),
        (
            {},
            {"error": 0.25, "error_as_trained": 0.2701},
            ["the statistics of batch norm as trained, with noise, chan"],
        ),
        (
            {},
            {"error": 0.25, "error_as_trained": 0.2299},
            ["the statistics of batch norm as trained, with noise, chan"],
        ),
        ({"a": place(1000, 1000)}, {}, ["100% of the units of a are dead", "100.0% of the rows of a are all zero"]),
    ],
)
def test_warnings_at_their_bounds(sparsity: Any, test: dict[str, float], says: list[str]) -> None:
    found = health.warnings(sparsity, test)
    assert len(found) == len(says)
    assert all(one.startswith(start) for one, start in zip(found, says, strict=True))


def test_the_warning_of_batch_norm_gives_points_and_direction() -> None:
    (told,) = health.warnings({}, {"error": 0.25, "error_as_trained": 0.3})
    assert "by +5.0 points" in told
    (told,) = health.warnings({}, {"error": 0.25, "error_as_trained": 0.2})
    assert "by -5.0 points" in told


def test_a_result_holds_its_warnings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # noise of a hundred times the activations drives the units below zero
    args = arguments("autoencoder", q=0.25, p=0.9, lr=0.1, epochs=4)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "--out", str(tmp_path)])
    assert stopped.value.code == 0
    found = run_folder.read_json(tmp_path / run_folder.RESULT)
    assert found["mean"]["dead"] > 0.5
    assert found["mean"]["undefined"] > 0.01
    assert [warning[warning.index("% of the") :].split(" are")[0] for warning in found["warnings"]] == [
        "% of the units of code",
        "% of the rows of code",
    ]
    out = capfd.readouterr().out
    assert all(f"Note: {warning}." in out for warning in found["warnings"])


def test_a_gap_of_batch_norm_stands_in_the_result(tmp_path: Path) -> None:
    found = run(tmp_path, "image", epochs=1)
    assert abs(found["test"]["error_as_trained"] - found["test"]["error"]) > health.NORM_GAP
    assert any("batch norm" in warning for warning in found["warnings"])


def breaking(monkeypatch: pytest.MonkeyPatch, kind: str, step: int, spoil: Callable[[Tensor], Tensor]) -> None:
    """Spoil the loss from a step on."""
    task = type(tasks.build(options(kind), train.Rng(0), tasks.DistributedContext(torch.device("cpu"))))
    loss = task.loss
    steps = iter(range(1, 10_000))
    monkeypatch.setattr(
        task,
        "loss",
        lambda self, objective, batch: (spoil if next(steps) >= step else lambda value: value)(
            loss(self, objective, batch)
        ),
    )


@pytest.mark.parametrize("kind", ["autoencoder", "awd"])
def test_a_loss_that_is_no_number_stops_the_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole", kind)
    folder = tmp_path / "broken"
    args = [*arguments(kind, checkpoint_minutes=0), "--out", str(folder)]
    with monkeypatch.context() as patch:
        breaking(patch, kind, 43, lambda loss: loss * math.nan)
        with pytest.raises(SystemExit) as stopped:
            cli.main(args)
    reason = "the loss of step 43 is nan"
    out, err = capfd.readouterr()
    assert (stopped.value.code, out) == (1, "")
    checkpoint = folder / run_folder.CHECKPOINT
    assert err == f"sparseout: the run failed: {reason}; {checkpoint} is the last good checkpoint\n"
    assert not (folder / run_folder.RESULT).exists()
    failure = run_folder.read_json(folder / run_folder.FAILURE)
    assert (failure["status"], failure["reason"]) == ("failed", reason)
    assert 43 <= failure["step"] < 53
    assert failure["config"] == run_folder.read_json(tmp_path / "whole" / run_folder.RESULT)["config"] | {
        "checkpoint_minutes": 0.0
    }
    state = torch.load(checkpoint, weights_only=True)
    assert 33 <= state["steps"] < 43
    assert all(weight.isfinite().all() for weight in state["model"].values())
    # what it keeps is good: without the fault the run goes on to its end
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "--resume"])
    assert stopped.value.code == 0
    assert differences(outcome(tmp_path / "whole"), outcome(folder)) == []
    assert not (folder / run_folder.FAILURE).exists()


def test_a_run_that_fails_at_once_names_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, "autoencoder", 1, lambda loss: loss / 0)
    with pytest.raises(RunFailed, match=r"^the run failed: the loss of step 1 is inf$"):
        run(tmp_path, "autoencoder")
    assert run_folder.load(tmp_path) == (None, "")
    assert not (tmp_path / run_folder.METRICS).read_text()


def test_divergence_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, "autoencoder", 51, lambda loss: loss * 1000)
    with pytest.raises(RunFailed, match=r"the run failed: training diverged: .* up to step 100 is .* checkpoint$"):
        run(tmp_path, "autoencoder", epochs=6)
    assert run_folder.read_json(tmp_path / run_folder.FAILURE)["step"] == 100
    assert not (tmp_path / run_folder.RESULT).exists()
    assert torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)["epoch"] == 3


def test_a_validation_metric_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = train._Run._evaluate
    calls = iter(range(10))

    def broken(self: Any, part: str) -> tasks.Evaluation:
        found = evaluate(self, part)
        return tasks.Evaluation({**found.metrics, "mse": math.nan}, found.sparsity) if next(calls) else found

    monkeypatch.setattr(train._Run, "_evaluate", broken)
    with pytest.raises(RunFailed, match=r"the validation mse after epoch 2 \(step 50\) is nan; .* checkpoint$"):
        run(tmp_path, "autoencoder")
    assert torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)["epoch"] == 1
    assert len(run_folder.metrics(tmp_path)) == 1
