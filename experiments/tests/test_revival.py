"""Whether reviving units helps: a training at small size, and the study's files and page."""

import json
from pathlib import Path
from typing import Any

import pytest
from sparseout_experiments.studies import revival
from sparseout_experiments.studies.engine import study
from sparseout_experiments.studies.engine.jobs import StudyStopped, train_own
from sparseout_experiments.studies.revival import ARMS, training
from sparseout_experiments.training.lock import RunError, locked
from study_rows import ENVIRONMENT, Inline, write_result

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Cluster", Inline)
    monkeypatch.setattr(revival, "SEEDS", (0, 1, 2))


def test_arms_are_one_run_until_units_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ARMS", {"never": (), "once": (1,)})
    monkeypatch.setattr(training, "UNITS", 48)
    never, once, again = (training.run("classifier", arm, 0, epochs=2) for arm in ("never", "once", "once"))
    assert once == again
    assert never["course"][0] == once["course"][0] < 1
    assert once["revived"] == [round((1 - once["course"][0]) * 2 * 48)]
    assert once["course"][1] != never["course"][1]
    assert once["live"] == once["course"][1]


def fake_train(task: str, options: dict[str, Any], folder: Path) -> None:
    """With revival the error is higher by 2 and a bit that depends on the seed, and half as many units are dead."""
    none = options["arm"] == "never"
    live = 0.6 if none else 0.8 + 0.01 * options["seed"]
    found = {"config": options, "environment": ENVIRONMENT}
    found |= {"error": 10.0 + options["seed"] + (0 if none else 2 + 0.1 * options["seed"]), "live": live, "hoyer": 0.5}
    found |= {"seconds": 1.0, "revived": [] if none else [9], "course": [live] * 60} | (
        {"wrong": 0.1} if task == "classifier" else {}
    )
    write_result(folder, found)


def failing(task: str, options: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.json").write_text(json.dumps({"reason": "the loss is nan", "config": options}))


def reproduce(root: Path, train: Any = fake_train) -> str:
    (root / "docs").mkdir(exist_ok=True)
    page = root / "docs/page.md"
    request = study.Request(tuple(revival.TASKS), root / "work")
    study.reproduce(revival.STUDY, request, root / "results", page, 1, train=train)
    return " ".join(page.read_text().split())


def test_the_page_says_what_came_out_either_way(tmp_path: Path) -> None:
    text = reproduce(tmp_path)
    assert "**Autoencoder on digits, once**: live units +21.0% ± 2.5% against never, error +2.10 ± 0.25" in text
    assert "higher error, more live units." in text
    assert "| never | 0 ± 0 | 60.0% ± 0.0% | 0.500 ± 0.000 | 11.00 ± 2.48 | 10.0% ± 0.0% |" in text
    assert (tmp_path / "docs/images/revival.png").stat().st_size > 5_000
    assert reproduce(tmp_path) == text
    assert {path.read_text() for path in (tmp_path / "work").rglob("calls")} == {"x"}  # and nothing ran again


def test_a_failed_run_ends_it_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StudyStopped, match=r"^autoencoder: never, seed 0: the loss is nan$"):
        reproduce(tmp_path, failing)
    assert not (tmp_path / "results").exists()


def test_the_results_are_whole() -> None:
    for record in revival.STUDY.load_all(ROOT / "results").values():
        assert {(row["arm"], row["seed"]) for row in record["rows"]} == {(a, s) for a in ARMS for s in range(5)}


def test_a_run_is_trained_once_by_one_process_at_a_time(tmp_path: Path) -> None:
    calls = []

    def run() -> dict[str, Any]:
        with pytest.raises(RunError, match="is being trained by process"), locked(tmp_path):
            pass
        calls.append(1)
        return {"error": 0}

    train_own(run, {}, tmp_path)
    train_own(run, {}, tmp_path)  # as the process that waited does
    assert calls == [1]
