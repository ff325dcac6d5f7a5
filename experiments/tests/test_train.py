"""What a run does from its options to its result."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import STEPS, arguments, differences, options, outcome, run
from sparseout_experiments import cli, config, tasks
from sparseout_experiments.commands import app
from sparseout_experiments.training import loop as train
from sparseout_experiments.training import run_folder
from torch import Tensor
from typer.testing import CliRunner

from conftest import needs_compiler

KINDS = ("autoencoder", "image", "language", "awd", "transformer")
# 11 steps an epoch: enough for two looks, where what is asked is not how far a run gets.
FEWER = {kind: {"train_size": size} for kind, size in zip(KINDS, (176, 88, 440, 440, 440), strict=True)}
# Metrics of valid and test, their headline first, and the places that are measured.
FOUND = {
    "autoencoder": (("mse",), ("code",)),
    "image": (("error", "loss", "error_as_trained"), ("block1", "block2", "block3")),
    "language": (("perplexity", "loss"), ("layer1", "layer2")),
}
MEASURED = {
    "hoyer", "hoyer_live", "gini", "treves_rolls", "density", "sparsity", "kurtosis", "rows", "undefined_rows",
    "units", "dead_units", "always_on_units",
}  # fmt: skip


@pytest.mark.parametrize("task", FOUND)
def test_a_run_from_the_command_line(task: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, [*arguments(task, q=2.5), "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / run_folder.RESULT).read_text())
    metrics, places = FOUND[task]
    told = {name: found[name] for name in ("status", "task", "metric", "epochs", "steps", "stopped_by", "processes")}
    assert told == {
        "status": "finished", "task": task, "metric": metrics[0], "epochs": 3, "steps": 3 * STEPS,
        "stopped_by": "epochs", "processes": 1,
    }  # fmt: skip
    assert found["config"]["q"] == 2.5
    assert found["config"].keys() - {"task"} == config.options_of(task).keys()
    assert found["seconds"] > 0
    assert found["parameters"] == sum(
        tensor.numel() for tensor in tasks.build(options(task), train.Rng(0), place()).model.parameters()
    )
    for part in ("valid", "test"):  # batch norm as trained is looked at on test data alone
        assert found[part].keys() == set(metrics) - ({"error_as_trained"} if part == "valid" else set())
        assert all(math.isfinite(value) for value in found[part].values())
    assert tuple(found["sparsity"]) == places
    assert all(measured.keys() == MEASURED for measured in found["sparsity"].values())
    hoyers = [measured["hoyer"] for measured in found["sparsity"].values()]
    assert found["mean"].keys() == {"hoyer", "hoyer_live", "dead", "undefined"}
    assert found["mean"]["hoyer"] == pytest.approx(sum(hoyers) / len(hoyers), rel=1e-12)
    assert found["environment"]["torch"] == torch.__version__
    assert isinstance(found["warnings"], list)
    lines = run_folder.metrics(tmp_path)
    assert [(line["epoch"], line["steps"]) for line in lines] == [(1, STEPS), (2, 2 * STEPS), (3, 3 * STEPS)]
    assert found["train_loss"] == lines[-1]["train_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [
            run_folder.CONFIG,
            run_folder.ENVIRONMENT,
            run_folder.METRICS,
            run_folder.RESULT,
            run_folder.CHECKPOINT,
            run_folder.PREVIOUS,
        ]
    )
    words = " ".join(shown.stdout.split())
    for place_, measured in found["sparsity"].items():
        assert f"{place_} {measured['hoyer']:.3f} {measured['hoyer_live']:.3f} {measured['gini']:.3f}" in words
    kind = tasks.shown_as(task)
    assert f"{metrics[0]} {kind[1] * found['test'][metrics[0]]:.4g}{kind[2]} on test data" in words
    assert words.endswith(f"Wrote {tmp_path}/result.json")
    assert "…" not in shown.stdout  # nothing cut off in 80 columns


def place() -> tasks.DistributedContext:
    return tasks.DistributedContext(torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_sparseout_at_2_is_dropout_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run(tmp_path / "dropout", kind, method="dropout", **FEWER[kind])
    run(tmp_path / "two", kind, method="sparseout", q=2, **FEWER[kind])
    run(tmp_path / "three", kind, method="sparseout", q=3, **FEWER[kind])
    dropout, two, three = (outcome(tmp_path / name) for name in ("dropout", "two", "three"))
    assert differences(dropout, two) == []
    assert "/metrics/0/train_loss" in differences(dropout, three)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_runs_at_different_q_share_first_weights_and_batches(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(**changed: Any) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        weights: dict[str, Tensor] = {}
        batches: list[list[Tensor]] = []

        def build(*args: Any) -> tasks.Task:
            task = tasks.build(*args)
            weights.update({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
            task.objective.register_forward_pre_hook(  # the first two: not the state, which the noise has changed
                lambda module, inputs: batches.append([tensor.clone() for tensor in inputs[:2]])
            )
            return task

        monkeypatch.setattr(train, "build", build)
        run(tmp_path / str(changed), kind, epochs=2, **FEWER[kind], **changed)
        return weights, batches

    first = seen(q=1.5)
    assert len(first[1]) == 2 * 11 or kind == "awd"  # whose windows vary
    assert len(first[1]) > 2 * 5
    for changed in ({"q": 3.0, "p": 0.1}, {"method": "none"}):
        assert differences(first, seen(**changed)) == []
    weights, batches = seen(seed=1)
    assert len(differences(first[0], weights)) > 1
    # a plain LSTM and a transformer read their text from beginning to end, whatever the seed
    assert (differences(first[1], batches) == []) == (kind in ("language", "transformer"))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_not_come_from_the_noise(kind: str) -> None:
    with torch.random.fork_rng():
        first, second, third = (
            tasks.build(options(kind), train.Rng(*of), place()).model.state_dict() for of in ((0, 0), (0, 1), (1, 0))
        )
    assert differences(first, second) == []  # processes differ in their noise alone
    assert len(differences(first, third)) > 1


def test_augmentation_has_a_stream_of_its_own(tmp_path: Path) -> None:
    run(tmp_path / "with", "image", method="none", **FEWER["image"])
    run(tmp_path / "without", "image", method="none", augment=False, **FEWER["image"])
    with_, without = (outcome(tmp_path / name) for name in ("with", "without"))
    assert "/metrics/0/train_loss" in differences(with_, without)
    assert differences(with_["state"]["order"], without["state"]["order"]) == []


@pytest.mark.parametrize("kind", ["autoencoder", "image", "language"])
def test_without_noise_nothing_is_drawn(kind: str, tmp_path: Path) -> None:
    found = run(tmp_path, kind, method="none", **FEWER[kind])
    assert [found["config"][name] for name in ("method", "p", "q", "scale", "gradient")] == ["none", *[None] * 4]
    noise = torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)["processes"][0]["streams"]["noise"]
    with torch.random.fork_rng():
        tasks.build(options(kind, method="none", **FEWER[kind]), train.Rng(0), place())
        assert torch.equal(noise[0], torch.get_rng_state())


_PEAKS = """
import random, resource, sys
from pathlib import Path
from small import run

def peak(steps):
    chance, text = random.Random(0), Path(sys.argv[1]) / f"{steps}.txt"
    text.write_text(" ".join(f"w{chance.randrange(2000)}" for _ in range(int(steps * 20 * 35 / 0.8))))
    changed = {"data": str(text), "words": 2000, "train_size": None, "units": 8, "batch": 20, "bptt": 35}
    run(text.with_suffix(""), "language", epochs=1, method="dropout", **changed)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

tenth = peak(10)
print(peak(100) - tenth)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps_of_an_epoch(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PEAKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths})
    assert float(done.stdout) < 200, done.stderr  # MB; the scores of every step kept, and it is over 500


def test_a_run_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path, "autoencoder", epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_budget_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    shown_at = train._Run._check

    def look(self: Any, steps: int) -> None:
        rates.append(self.optimizer.param_groups[0]["lr"])
        shown_at(self, steps)

    clock = count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock) / 40))  # a fortieth a look
    monkeypatch.setattr(train._Run, "_check", look)
    args = arguments("language", epochs=200, budget_minutes=0.01)
    shown = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / run_folder.RESULT).read_text())
    assert found["stopped_by"] == "budget"
    assert found["epochs"] < 200
    assert found["seconds"] >= 0.6
    assert "ended by its budget" in " ".join(shown.stdout.split())
    assert rates == sorted(rates, reverse=True)  # the cosine follows the clock
    assert rates[-1] < 0.1 * 2e-3
    assert run_folder.metrics(tmp_path)[-1]["epoch"] == found["epochs"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_epoch_is_chosen_on_validation_and_tested_with_its_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # averages of the weights from the third epoch on
    monkeypatch.setattr("sparseout_experiments.tasks.language.triggered", lambda losses: len(losses) >= 2)
    evaluate = train._Run._evaluate
    pretended = iter([5.0, 3.0, 4.0, 2.0, 6.0, 2.0])  # the first of the best counts
    really: list[tuple[dict[str, float], dict[str, float]]] = []

    def pretend(self: Any, part: str) -> tasks.Evaluation:
        found = evaluate(self, part)
        if part == "valid" and (value := next(pretended, None)) is not None:
            really.append((found.metrics, evaluate(self, "test").metrics))
            return tasks.Evaluation(found.metrics | {self.task.metric: value}, found.sparsity)
        return found

    monkeypatch.setattr(train._Run, "_evaluate", pretend)
    found = run(tmp_path, kind, epochs=6, **FEWER[kind])
    assert found["best_epoch"] == 4
    assert (found["valid"], found["test"]) == really[3]
    assert [really.count(one) for one in really] == [1] * 6  # or the weights of another epoch would do as well


# Batch norm and ReLU amplify rounding: within 25 steps weights of an image run that differ by 3e-6 may part, by 1% of
# the loss; within 5 a difference of 1e-5 is still one of 1e-5.
WELL_POSED: dict[str, dict[str, Any]] = {"image": {"train_size": 40}}


@pytest.mark.parametrize("kind", ["image", "awd", "transformer"])
def test_bf16(kind: str, tmp_path: Path) -> None:
    same: dict[str, Any] = {"method": "none", "epochs": 1, **WELL_POSED.get(kind, {})}
    plain = run(tmp_path / "plain", kind, **same)
    found = run(tmp_path / "half", kind, precision="bf16", **same)
    assert found["train_loss"] != plain["train_loss"]
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)  # bf16 has 8 bits, a step of 2^-8


@pytest.mark.slow
@needs_compiler
# the compiler's own, where it enters again behind the LSTM, which it leaves out
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["autoencoder", "image", "awd", "transformer"])
def test_compiled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "autoencoder":  # the others are traced whole, for which a compiler that takes a minute is not needed
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # dropped words are drawn elsewhere in compiled code
    without_words = {"embedding_drop": 0.0} if kind == "awd" else {}
    same: dict[str, Any] = {"method": "none", "epochs": 1, **without_words, **WELL_POSED.get(kind, {})}
    plain = run(tmp_path / "plain", kind, **same)
    found = run(tmp_path / "compiled", kind, **same, compile=True)
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    if kind == "autoencoder":
        noisy = run(tmp_path / "noisy", kind, q=1.5, epochs=1, compile=True)
        assert noisy["train_loss"] > found["train_loss"]


@pytest.mark.parametrize("kind", ["autoencoder", "awd"])
def test_a_tracker_is_told(kind: str, tmp_path: Path) -> None:
    found = run(tmp_path, kind, track="tensorboard", epochs=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path / "sparseout"))
    written.Reload()
    valid = f"valid/{found['metric']}"
    values = [event.value for event in written.Scalars(valid)]
    assert values == pytest.approx([line["valid"][found["metric"]] for line in run_folder.metrics(tmp_path)])
    assert [event.step for event in written.Scalars(valid)][-1] == found["steps"]
    assert written.Scalars(f"test/{found['metric']}")[0].value == pytest.approx(found["test"][found["metric"]])


def test_a_finished_run_just_gives_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, "autoencoder")
    monkeypatch.setattr(train, "build", None)
    assert run(tmp_path, "autoencoder") == found
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--out", str(tmp_path)])
    assert stopped.value.code == 1
