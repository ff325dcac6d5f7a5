"""The budget `medium` of the control study: three networks side by side, seed by seed; its page may be partial."""

from pathlib import Path
from typing import Any

import pytest
from sparseout_experiments.studies import control
from sparseout_experiments.studies.control import collect, figures
from sparseout_experiments.studies.control.collect import Ledger, Record
from sparseout_experiments.studies.control.dial import Dial
from sparseout_experiments.studies.control.grid import BUDGETS, Task
from sparseout_experiments.studies.control.verdicts import contrasts, evaluate, post_hoc
from study_pages import blank
from study_rows import ledger_of

TASKS = tuple(BUDGETS["medium"])


@pytest.fixture(autouse=True)
def _blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    blank(monkeypatch, made="figures" in request.node.name or "interrupted" in request.node.name)


def ledger(task: Task, seeds: int = 5, effect: float = 1.0) -> Ledger:
    """Runs of the first seeds, whose validation loss turns up after the second epoch."""
    found = ledger_of(task, "medium", seeds=seeds, effect=effect)
    for run, result in found.results.items():
        epochs = range(result["config"]["epochs"])
        result["curve"] = [[2.0 - 0.1 * at + run.seed, 1.5 + 0.05 * (at - 1) ** 2 + run.seed] for at in epochs]
    return found


def save(folder: Path, task: Task, found: Ledger) -> Record:
    return collect.load(collect.save(folder / "results", "medium", task, found))


def page(folder: Path) -> str:
    control.STUDY.render(folder / "results", folder / "page.md")
    return " ".join((folder / "page.md").read_text().split())


def test_its_primary_contrasts_are_the_protocols() -> None:
    primary = [(one.claim, one.task, one.measure, one.p) for one in contrasts("medium") if one.primary]
    assert primary == [
        *(("C1", task, measure, "common") for task in TASKS for measure in ("hoyer", "hoyer_live")),
        ("C2", "image", "metric", "own"),
        ("C3", "language", "metric", "own"),
        ("C3", "transformer", "metric", "own"),
    ]
    assert {(one.scale, one.gradient) for one in contrasts("medium")} == {("matched", "detached")}
    assert not post_hoc("medium")


@pytest.mark.parametrize(("effect", "word"), [(1.0, "supported"), (-1.0, "contradicted")])
def test_made_up_results_get_the_words_they_were_made_for(tmp_path: Path, effect: float, word: str) -> None:
    records = {task: save(tmp_path, task, ledger(task, effect=effect)) for task in TASKS}
    assert {evaluate(one, records[one.task]).verdict for one in contrasts("medium")} == {word}


def test_networks_that_disagree_leave_a_claim_undecided_and_are_all_shown(tmp_path: Path) -> None:
    for task, effect in (("image", 1.0), ("language", 1.0), ("transformer", -1.0)):
        save(tmp_path, task, ledger(task, effect=effect))  # type: ignore[arg-type]
    said = page(tmp_path)
    assert (
        "| C1 Sparsity falls as q rises | **undecided** | slope of Hoyer per unit of q: Wide-ResNet, 5 of 5 seeds:"
        in said
    )
    third = said.split("| C3 Language modelling prefers sparser activations | ")[1]
    assert third.startswith("**undecided** | slope of perplexity per unit of q: LSTM, 5 of 5 seeds: supported, +")
    assert "; transformer, 5 of 5 seeds: contradicted, -" in third.split(" | ")[1]
    assert "not finished" not in said


def test_a_seed_counts_in_means_when_all_its_runs_have_ended(tmp_path: Path) -> None:
    found = ledger("image", seeds=3)
    lost = next(run for run in found.results if run.seed == 2 and run.setting.q == 3)
    del found.results[lost]
    record = save(tmp_path, "image", found)
    assert set(record.complete.frame["seed"]) == {100, 0, 1}
    assert set(record.frame["seed"]) == {100, 0, 1, 2}
    found.failures[lost] = "the loss is NaN"
    failed = save(tmp_path, "image", found)
    assert set(failed.complete.finished["seed"]) == {100, 0, 1, 2}


def test_an_interrupted_study_says_what_is_there_and_how_to_go_on(tmp_path: Path) -> None:
    save(tmp_path, "image", ledger("image", seeds=3))
    save(tmp_path, "language", ledger("language", seeds=0))  # tuning alone
    said = page(tmp_path)
    assert "**image: 8 of 29 runs are still missing.** All runs of 3 of 5 seeds have ended." in said
    assert "**language: 21 of 29 runs are still missing.** No seed has all its runs." in said
    assert "`sparseout reproduce control --budget medium --extend` continues from here" in said
    assert "slope of error -" in said
    assert "3 of 5 seeds have a value at every q" in said
    assert "; transformer, 0 of 5 seeds |" in said
    assert said.count("![") == 2
    assert "nan" not in said.lower()


def test_budgets_stand_beside_each_other_where_there_are_several(tmp_path: Path) -> None:
    save(tmp_path, "image", ledger("image", effect=-1.0))
    assert "| claim | `" not in page(tmp_path)
    collect.save(tmp_path / "results", "small", "image", ledger_of("image"))
    said = page(tmp_path)
    assert "| claim | `medium` | `small` |" in said
    assert "| C2 Image classification prefers denser activations | contradicted | supported |" in said


@pytest.mark.slow
def test_the_figures_show_the_numbers(tmp_path: Path) -> None:
    records = [save(tmp_path, task, ledger(task, seeds=2)) for task in TASKS]
    drawn: Any = figures.networks(records)
    for at, record in enumerate(records):
        dial, plane = drawn.axes[at], drawn.axes[at + len(records)]
        rows = Dial(record, "matched", "detached", "own").rows
        hoyer, metric = (list(rows.groupby("q")[name].mean()) for name in ("hoyer", "metric"))
        (across,) = (one.lines[0] for one in dial.containers)  # one series: there is no paper's scale
        assert across.get_ydata() == pytest.approx(hoyer)
        line = plane.containers[0].lines[0]
        assert line.get_xdata() == pytest.approx(hoyer)
        assert line.get_ydata() == pytest.approx(metric)
    of_losses: Any = figures.curves(records)
    valid, train, *_ = of_losses.axes[0].lines
    assert valid.get_ydata() == pytest.approx([1.5 + 0.05 * (at - 1) ** 2 + 0.5 for at in range(4)])
    assert train.get_ydata() == pytest.approx([2.0 - 0.1 * at + 0.5 for at in range(4)])
    said = page(tmp_path)
    assert "Without noise: Wide-ResNet, lowest validation loss after epoch 2 (2.00), after the last 2.20" in said
