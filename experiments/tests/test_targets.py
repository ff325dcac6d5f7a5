"""Whether targets are met, with any knob: the study at small size, and its files and page."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sparseout_experiments.commands import app
from sparseout_experiments.studies import targets
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine import study
from sparseout_experiments.studies.engine.jobs import Progress, StudyStopped
from sparseout_experiments.studies.targets import grid, training
from study_pages import blank
from study_rows import ENVIRONMENT, Inline, write_result
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
SMALL = grid.Task("A small network", ("q", "k"), ("hoyer", "density"), 40, 5, 16, 1e-3, (0, 1, 2))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Cluster", Inline)
    monkeypatch.setitem(grid.TASKS, "autoencoder", SMALL)


def fake_train(task: str, options: dict[str, Any], folder: Path) -> None:
    """Sparsity by a formula of the value; a run to a target ends 0.004 above it times its seed."""
    found = {"hoyer": 0.5, "density": 0.5, "value": options["value"], "course": [], "messages": []}
    if options["measure"] is None:
        found |= {"hoyer": 0.9 - 0.1 * options["value"], "density": 0.1 + 0.2 * options["value"]}
    else:
        found[options["measure"]] = options["target"] + 0.004 * options["seed"]
        found |= {"value": 2.0, "course": [[5 * i, 2.0, options["target"]] for i in range(1, 201)]}
    write_result(folder, found | {"config": options, "environment": ENVIRONMENT, "seconds": 60.0})


def reproduce(root: Path, train: Any = fake_train, **options: Any) -> dict[str, Any]:
    (root / "docs").mkdir(exist_ok=True)
    request = study.Request(("autoencoder",), root / "work")
    study.reproduce(targets.STUDY, request, root / "results", root / "docs/page.md", 1, train=train, **options)
    return targets.STUDY.load_all(root / "results")["autoencoder"]


def test_targets_lie_in_the_range_that_fixed_values_reach(tmp_path: Path) -> None:
    heard: list[Progress] = []
    record = reproduce(tmp_path, on_progress=heard.append)
    assert grid.count("autoencoder") == len(record["rows"]) == 1 * (6 + 6) + 3 * 2 * 2 * 3 == heard[-1].total
    controlled = [row for row in record["rows"] if row["target"] is not None]
    # of q, from 1 to 4: Hoyer from .8 to .5, density from .3 to .9
    found = {(row["measure"], row["part"], row["target"]) for row in controlled if row["knob"] == "q"}
    assert found == {
        ("hoyer", 0.25, 0.575), ("hoyer", 0.5, 0.65), ("hoyer", 0.75, 0.725),
        ("density", 0.25, 0.45), ("density", 0.5, 0.6), ("density", 0.75, 0.75),
    }  # fmt: skip
    assert [len(row["course"]) for row in controlled] == [67 if row["seed"] == 0 else 0 for row in controlled]
    text = " ".join((tmp_path / "docs/page.md").read_text().split())
    assert (
        "- **A small network**: 36 of 36 runs met their targets over the last tenth (largest deviation 0.0000), 36 on"
        in text
    )
    assert (
        "| hoyer | q | 0.500 to 0.800 | 0.575, 0.650, 0.725 | 2, 2, 2 | 9 of 9 | +0.0000 | 9 of 9 | +0.0080 |" in text
    )
    assert "reading missed" not in text
    assert (tmp_path / "docs/images/targets-autoencoder.png").stat().st_size > 10_000


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blank(monkeypatch, made=True)
    first = reproduce(tmp_path)
    assert reproduce(tmp_path) == first
    assert {path.read_text() for path in (tmp_path / "work").rglob("calls")} == {"x"}
    other = next((tmp_path / "work").rglob("q_1_seed=0/result.json"))
    other.write_text(other.read_text().replace('"seed": 0', '"seed": 7'))
    with pytest.raises(
        StudyStopped, match=r"holds a run with seed = 7 where the study wants 0: give the study another"
    ):
        reproduce(tmp_path)


def test_a_target_that_is_missed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blank(monkeypatch, made=True)
    record = reproduce(tmp_path)
    row = next(row for row in record["rows"] if row["measure"] == "density" and row["seed"] == 1)
    row["density"] = row["target"] - 0.011
    files.save(tmp_path / "results/targets-autoencoder.json", record)
    targets.STUDY.render(tmp_path / "results", tmp_path / "docs/page.md")
    text = (tmp_path / "docs/page.md").read_text()
    assert "35 on test data (largest deviation 0.0110)." in " ".join(text.split())
    assert f"| q | density | {row['target']:.3f} | 1 | +0.0000 | -0.0110 |" in text


@pytest.mark.parametrize("given", [["--only", "image"], ["--workers", "0"]])
def test_bad_options_are_one_sentence(given: list[str]) -> None:
    assert CliRunner().invoke(app, ["reproduce", "targets", *given]).exit_code == 2


def test_what_there_is_to_run_is_said_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["reproduce", "targets", "--only", "autoencoder,autoencoder", "--dry-run"])
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines() == [
        "autoencoder: 12 runs, 0 have ended",  # those to targets follow from them
        "48 runs in all: the 12 known now decide the other 36. "
        "How long they take is known when the first has finished.",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("knob", grid.KNOBS)
def test_every_knob_trains_and_is_moved(knob: str) -> None:
    """From where it starts, towards a target on either side; what is read is that of evaluation."""
    towards = {target: training.run("autoencoder", knob, 0, None, "hoyer", target) for target in (0.1, 0.9)}
    start = grid.KNOBS[knob].start
    sparser = knob in ("p", "strength", "threshold")
    values = [towards[target]["value"] for target in ((0.1, 0.9) if sparser else (0.9, 0.1))]
    assert values[0] < start < values[1]
    assert all(0 < found["hoyer"] < 1 and 0 < found["density"] < 1 for found in towards.values())
    assert [point[0] for point in towards[0.1]["course"]] == list(range(5, 45, 5))


def test_the_short_training_is_of_the_autoencoder() -> None:
    plants = [training.digits(name, "q", 2.5, 0, SMALL) for name in ("short", "autoencoder")]
    batches = [next(plant.batches) for plant in plants]
    for name, shape in plants[0].model.state_dict().items():
        assert shape.shape == plants[1].model.state_dict()[name].shape
    assert all(torch.equal(*same) for same in zip(*batches, strict=True))
    assert plants[0].loss is plants[1].loss


def test_the_threshold_by_hand() -> None:
    out = training.Threshold(1.0)(torch.tensor([[3.0, 0.0, 1.0, -4.0], [1.0, 1.0, 1.0, 2.0]]))
    # the rows' rms are 2.55 and 1.32
    assert out.tolist() == [[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]


@pytest.mark.slow
def test_one_target_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's classifier and its controller, with one seed and one target for two knobs."""
    for knob, measure, target in (("strength", "hoyer", 0.6), ("threshold", "density", 0.3)):
        found = training.run("classifier", knob, 0, None, measure, target)
        assert found[measure] == pytest.approx(target, abs=targets.TOLERANCE)


def test_short_trainings_meet_their_targets() -> None:
    task = targets.summary(targets.STUDY.load_all(ROOT / "results")["short"])
    assert task["runs"] == task["met"] == task["met_tested"] == 30
    said = " ".join((ROOT / "docs/how-to/target.md").read_text().split())
    assert "#autoencoder-on-digits-a-short-training) in 400 steps, which are 200 updates" in said
    assert f"to {task['farthest']:.4f} over the last 20 of them" in said
