"""What sparsity is worth: a training at small size, and the study's files and page."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sparseout_experiments.studies import payoff
from sparseout_experiments.studies.engine import study
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.payoff import STEERED, TARGETS, training, transformer
from study_rows import ENVIRONMENT, Inline, write_result

SMALL = training.Task("Digits", 64, 2, 64, None, 450)


@pytest.mark.parametrize(("method", "target"), [("none", None), ("sparseout", 0.3), ("penalty", 0.1), ("topk", 0.1)])
def test_a_training_at_small_size(monkeypatch: pytest.MonkeyPatch, method: str, target: float | None) -> None:
    monkeypatch.setitem(training.TASKS, "digits", SMALL)
    monkeypatch.setattr(training, "timed", lambda networks, test: {name: {"1": 1.0, "64": 1.0} for name in networks})
    found = training.run("digits", "digits", method, target, 0)
    assert 0 < found["density"] < 1
    assert found["parameters"] == 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    assert found["macs_dense"] == 64 * 64 * 2 + 64 * 10
    assert found["macs_effective"] < found["macs_dense"]
    assert found["macs_compact_dense"] <= found["macs_dense"]
    assert found["parameters_compact"] <= found["parameters"]
    assert abs(found["error_compact"] - found["error"]) < 0.02
    assert abs(found["error_sparse"] - found["error"]) < 0.02
    assert (found["knob"] is None) == (target is None)
    if method == "topk":
        assert found["parameters_compact"] == found["parameters"]  # the threshold is of the whole row


def test_times_are_of_calls_at_each_number_of_rows() -> None:
    layer = torch.nn.Linear(8, 8)
    found = training.timed({"a": layer, "b": layer}, torch.rand(512, 8), seconds=0.01)
    assert set(found) == {"a", "b"}
    assert all(0 < time < 1e6 for times in found.values() for time in times.values())
    assert set(found["a"]) == {"1", "64"}


def test_sentences_are_enough_and_the_same() -> None:
    found = transformer.sentences()
    assert len(found) == len(set(found)) == 2 * transformer.SENTENCES
    assert found == transformer.sentences()


def numbers(options: dict[str, Any]) -> dict[str, Any]:
    """Denser networks are slower; Sparseout misses its targets by half."""
    target = options["target"] or 0.5
    density = target * (1.5 if options["method"] == "sparseout" else 1.0)
    us = {
        "dense": {"1": 100.0, "64": 10.0},
        "compact": {"1": 90.0, "64": 9.0},
        "sparse": {"1": 100 * density, "64": 9.0},
    }
    return {
        "knob": None, "told": [], "error": 0.01 + 0.001 * options["seed"], "density": density, "parameters": 1000,
        "parameters_compact": 900, "error_compact": 0.01, "macs_dense": 900.0, "macs_effective": 900 * density,
        "macs_compact_dense": 800.0, "macs_compact_effective": 800 * density, "sparse_layers": ["3"],
        "error_sparse": 0.01 + 0.001 * options["seed"], "us": us,
    }  # fmt: skip


def fake_train(task: str, options: dict[str, Any], folder: Path) -> None:
    found = {"config": options, "environment": ENVIRONMENT}
    if task == "minilm":
        rows = [{"density": 0.5, "reached": 0.49, "cosine": 0.95, "cosine_least": 0.9, "sparse_layers": 6,
                 "us_dense": 5000.0, "us_sparse": 6000.0}]  # fmt: skip
        found |= {"rows": rows, "shape": [384, 1536, 6], "sentences": 100, "tokens": 30.0, "texts": 4}
    else:
        found |= numbers(options)
    write_result(folder, found | {"seconds": 1.0, "load": 7.4})


def test_the_page_says_what_came_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Cluster", Inline)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/payoff.md"
    request = Request(("digits", "minilm"), tmp_path / "work")
    study.reproduce(payoff.STUDY, request, tmp_path / "results", page, 1, train=fake_train)
    text = " ".join(page.read_text().split())
    assert "| Sparseout | 0.1 | no | 0.150" in text
    assert "| L1 penalty | 0.1 | yes | 0.100" in text
    assert "| L1 penalty | 0.1 | 100 | 90 | 10 | 10.0 |" in text
    assert "| 0.50 | 0.490 | 0.950 | 0.900 | 5.00 | 6.00 |" in text
    assert "7 processes waiting for its cores" in text
    assert (tmp_path / "docs/images/payoff-digits.png").stat().st_size > 5000
    assert (tmp_path / "docs/images/payoff-minilm.png").stat().st_size > 5000
    seeds = len(training.SEEDS)
    assert len(payoff.STUDY.plan(request, payoff.STUDY.ledger())) == seeds * (2 + len(STEERED) * len(TARGETS)) + 1
    with pytest.raises(ValueError, match="made from"):
        payoff.STUDY.check(Request(("minilm",), tmp_path / "work"), tmp_path / "none", page)


def test_runs_are_told_apart() -> None:
    request = Request(("digits",), Path("work"), sources={"digits": "folder"})
    plan = payoff.STUDY.plan(request, payoff.STUDY.ledger())
    jobs = list(plan.values())
    assert len({job.folder for job in jobs}) == len(jobs)
    assert jobs[0].options["data"] == "folder"
    assert plan["digits: penalty to 0.1, seed 1"].options == {
        "data": "folder", "method": "penalty", "target": 0.1, "seed": 1,
    }  # fmt: skip
