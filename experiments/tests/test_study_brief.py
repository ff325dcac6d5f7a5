"""What stands at the top of the page, and what it says of networks that collapsed and of runs of other sizes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from sparseout_experiments.studies import control as study
from sparseout_experiments.studies.control import brief, collect, figures, grid, words
from sparseout_experiments.studies.control.analysis import CONTRASTS, judge, rows_of
from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.grid import TASKS, Task, Value
from sparseout_experiments.studies.control.runner import Ledger
from sparseout_experiments.studies.engine.style import COLOURS
from study_rows import ledger_of, result_of


@pytest.fixture(autouse=True)
def _blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not painted, which would take most of the time."""
    monkeypatch.setattr(figures, "png", lambda *_: b"")


def record_of(tmp_path: Path, ledger: Ledger, task: Task = "autoencoder", budget: str = "small") -> Record:
    return collect.load(collect.save(tmp_path / "results", budget, task, ledger))


def page(tmp_path: Path) -> str:
    study.render(tmp_path / "results", tmp_path / "docs" / "results.md")
    return " ".join((tmp_path / "docs" / "results.md").read_text().split())


def collapsing(share: float = 0.6) -> Ledger:
    """C1's contrast with q = 0.5 and 1 collapsed: some samples of every seed empty, more in each further seed."""
    ledger = ledger_of("autoencoder")
    for run, result in ledger.results.items():
        if run.setting[1:] in ((0.5, "matched", "detached"), (1.0, "matched", "detached")) and run.value == Value(
            "p", 0.5
        ):
            result["mean"]["undefined"] = share + 0.01 * run.seed
    return ledger


def test_collapsed_settings_are_named_beside_c1_and_in_their_table(tmp_path: Path) -> None:
    record_of(tmp_path, collapsing())
    text = page(tmp_path)
    verdict = text.split("| C1 Sparsity")[1].split("| C2")[0]
    assert "q = 0.5, 1: collapsed networks, see below" in verdict
    assert "at p = 0.5 and q = 0.5 or 1, 60% to 64% of the test samples" in text.split("### In short")[0]
    assert "in the emptiest of all runs (q=0.5 matched detached, p = 0.5) 64.0% of the samples" in text
    assert "C1 over the q's that are not collapsed (q = 1.5, 2, 2.5, 3, 4): supported; all units: slope" in text
    assert "in any seed (at p = 0.2 no q)" in text
    assert text.count("62.0%, at most 64.0%: **collapsed**") == 2
    assert "at q = 0.5 (collapsed) through" in text.split("### In short")[1].split("### ")[0]


def test_nothing_is_said_of_collapse_where_there_is_none(tmp_path: Path) -> None:
    record_of(tmp_path, collapsing(share=0.01))  # at most 5% in the last seed: the limit belongs to the sound
    text = page(tmp_path)
    assert "collapse" not in text.split("### Every contrast")[0]
    assert "C1 at the last epoch, validation data: supported" in text
    assert "the best epoch on validation data, here 7." in text


@pytest.mark.parametrize("name", ["dial", "price"])
def test_collapsed_points_are_hollow_and_explained(tmp_path: Path, name: str) -> None:
    def hollow(record: Record) -> list[list[float]]:
        (panel,) = [
            axes for axes in figures.panels(record, name).axes if axes.get_title() == "p = 0.5, detached gradient"
        ]
        return [
            list(np.atleast_1d(line.get_ydata()))
            for line in panel.lines
            if len(line.get_ydata()) and to_hex(line.get_markerfacecolor()) == COLOURS["card"]
        ]

    def legend(record: Record) -> list[str]:
        return [text.get_text() for text in figures.panels(record, name).legends[0].get_texts()]

    record = record_of(tmp_path, collapsing())
    rows = rows_of(record, "matched", "detached", 0.5)
    measure = "hoyer" if name == "dial" else "metric"
    assert hollow(record) == [pytest.approx([np.mean([getattr(row, measure) for row in rows[q]]) for q in (0.5, 1)])]
    assert legend(record)[-1] == "collapsed: over 5% of samples have no active unit"
    sound = record_of(tmp_path, ledger_of("autoencoder"))
    assert not hollow(sound)
    assert not any("collapsed" in text for text in legend(sound))


def test_the_study_in_short_has_the_numbers_of_the_runs(tmp_path: Path) -> None:
    records = [record_of(tmp_path, ledger_of(task), task) for task in TASKS]
    said = brief.in_short(records)
    assert len(said) == 6
    auto, image, language = records

    def at(measure: str, q: float, p: float = 0.5, scale: str = "matched", gradient: str = "detached") -> float:
        return float(np.mean([getattr(row, measure) for row in rows_of(auto, scale, gradient, p)[q]]))

    for p in (0.5, 0.2):
        assert f"at p = {p:g} Hoyer over all units falls from {at('hoyer', 0.5, p):.3f} at q = 0.5 to" in said[0]
        live = f"over live units from {at('hoyer_live', 0.5, p):.3f} to {at('hoyer_live', 4, p):.3f}"
        assert live in said[0]
        assert f"with {at('metric', 2, p):.4f} at q = 2 (Dropout)" in said[1]
    assert f"{at('metric', 0.5):.4f} at q = 0.5 to {at('metric', 4):.4f} at q = 4, with the lowest" in said[1]
    apart = at("hoyer", 4, scale="paper") - at("hoyer", 4)
    assert f"differs from matched noise by: Hoyer {apart:+.3f} ± " in said[2]
    moved = [
        at("hoyer", 0.5, gradient=gradient) - at("hoyer", 4, gradient=gradient) for gradient in ("exact", "detached")
    ]
    assert f"Hoyer moves by {moved[0]:.2f}, and by {moved[1]:.2f} with the detached one" in said[3]
    for record, digits in ((image, 3), (language, 1)):
        rows = rows_of(record, "matched", "detached", "own")
        first, last = (np.mean([row.metric for row in rows[q]]) for q in (1.5, 3.0))
        assert f"{first:.{digits}f} at q = 1.5 to {last:.{digits}f} at q = 3" in said[5]
        first, last = (np.mean([row.hoyer for row in rows[q]]) for q in (1.5, 3.0))
        assert f"{first:.3f} at q = 1.5 to {last:.3f} at q = 3" in said[4]
    assert said[5].count("(supported)") == 2


def test_where_the_chosen_p_differ_the_common_one_is_told_too(tmp_path: Path) -> None:
    record = record_of(tmp_path, ledger_of("language"), "language")
    assert "at the p of q = 2" not in brief.in_short([record])[1]
    ledger = ledger_of("language")
    trials = {run: result for run, result in ledger.results.items() if run.role == "tuning"}
    other = next(
        run for run in trials if run.setting[1:] == (3.0, "matched", "detached") and run.value == Value("p", 0.2)
    )
    trials[other]["valid"]["perplexity"] = 1.0  # q = 3 now chooses another p than q = 2
    again = Ledger(trials)
    for run in grid.second("language", again.chosen("language")):
        again.results[run] = result_of("language", grid.options(run, "small", {}, {}))
    record = record_of(tmp_path, again, "language")
    rows = rows_of(record, "matched", "detached", "common")
    first, last = (np.mean([row.metric for row in rows[q]]) for q in (1.5, 3.0))
    said = brief.in_short([record])[1]
    assert re.search(
        rf"at the p of q = 2 it rises from {first:.1f} at q = 1.5 to {last:.1f} at q = 3; .* \(secondary: supp", said
    )


def test_a_metric_that_does_not_move_neither_falls_nor_rises(tmp_path: Path) -> None:
    record = record_of(tmp_path, ledger_of("image", effect=0.0), "image")
    assert "the classification error of the Wide-ResNet has no clear trend" in brief.in_short([record])[1]


def test_what_is_said_of_a_part_of_the_study_is_said_without_nan(tmp_path: Path) -> None:
    assert brief.in_short([]) == []
    record = record_of(tmp_path, ledger_of("language", seeds=1), "language")
    assert "nan" not in page(tmp_path).lower()
    assert "goes from" in brief.in_short([record])[0]
    assert brief.in_short([record])[1].count("(undecided)") == 1


def test_a_record_is_described_by_what_was_run_and_not_by_the_grid_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grid.BUDGETS["small"], "autoencoder", grid.BUDGETS["small"]["autoencoder"] | {"epochs": 3})
    monkeypatch.setitem(grid.ALWAYS, "autoencoder", grid.ALWAYS["autoencoder"] | {"units": 99, "data": "fashion"})
    record = record_of(tmp_path, ledger_of("autoencoder"))
    monkeypatch.undo()
    assert (record.config["epochs"], record.data) == (3, "fashion")
    text = page(tmp_path)
    assert "Autoencoder on fashion: 10,000 / 1,000 / 10,000 images, 3 epochs; 784-99-784, batch 128" in text
    assert "14 epochs" not in text


def test_files_of_before_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    record_of(tmp_path, ledger_of("autoencoder"))
    path = tmp_path / "results" / "control-small-autoencoder.json"
    content: dict[str, Any] = json.loads(path.read_text())
    for name in ("config", "data"):
        del content[name]
    for row in content["rows"]:
        for name in ("last", "device", "best_epoch"):
            del row[name]
    path.write_text(json.dumps(content))
    record = collect.load(path)
    assert all(math.isnan(row.last_hoyer) and row.best_epoch is None for row in record.rows)
    text = page(tmp_path)
    assert "Autoencoder on MNIST: 10,000 / 1,000 / 10,000 images, 14 epochs" in text
    assert "C1 at the last epoch, validation data: undecided; not in these results" in text
    assert "10 of 10 pairs" in text


def test_no_effect_cites_what_decided_it() -> None:
    contrast = next(one for one in CONTRASTS if one.primary and one.claim == "C2")
    flat = {q: {seed: 0.55 + 0.0001 * ((seed + place) % 3) for seed in range(5)} for place, q in enumerate((1.5, 2, 3))}
    found = judge(contrast, flat)
    assert found.verdict == "no effect"
    said = words.evidence(found)
    assert said == (
        f"largest q minus smallest {found.ends.mean:+.4f} ± {found.ends.half:.4f}, means span {found.span:.4f}, "
        "margin 0.003"
    )
    assert "slope" not in said


def test_where_no_unit_is_dead_two_contrasts_are_one(tmp_path: Path) -> None:
    ledger = ledger_of("language")
    records = [record_of(tmp_path, ledger, "language")]
    both = [line for line in words.contrast_table(records) if "| C1 | language |" in line]
    assert len(both) == 4
    for result in ledger.results.values():
        result["mean"]["dead"] = 0.0
    records = [record_of(tmp_path, ledger, "language")]
    one = [line for line in words.contrast_table(records) if "| C1 | language |" in line]
    assert len(one) == 2
    assert all("Hoyer, all = live units" in line for line in one)
    assert "- Secondary contrasts of C1, language: 2 supported." in words.secondary(records)
    text = page(tmp_path)
    assert "No unit is dead in any run, so live units are all units." in text
    labels = [text.get_text() for text in figures.overview(records[0]).legends[0].get_texts()]
    assert not any("live" in label for label in labels)


def test_the_limits_name_samples_and_statistics(tmp_path: Path) -> None:
    for task in TASKS:
        record_of(tmp_path, ledger_of(task), task)
    text = page(tmp_path).split("### Limits")[1].split("### ")[0]
    for part in (
        "over 10,000 test images",
        "first 500 images of the test set",
        "units are the channels",
        "first 20,000 words",
        "up to 5,000 training images",
    ):
        assert part in text
    assert "rows of different length" in text


def test_alternative_texts_say_what_is_seen(tmp_path: Path) -> None:
    for task in TASKS:
        record_of(tmp_path, ledger_of(task), task)
    found = re.findall(r"!\[([^\]]+)\]\(", page(tmp_path))
    assert len(found) == 5
    assert all(re.search(r"(falls|rises|goes|units|trend,) from \d", text) for text in found)


def test_every_share_of_dead_units_stands_beside_the_number_of_samples(tmp_path: Path) -> None:
    ledger = ledger_of("autoencoder")
    record = record_of(tmp_path, ledger)
    rows = rows_of(record, "matched", "detached", 0.5)[2.0]
    few, many = (100 * np.mean([getattr(row, name) for row in rows]) for name in ("last_dead", "dead"))
    text = page(tmp_path)
    assert f"p = 0.5, it is {few:.0f}% over 1,000 validation images (after the last epoch) and {many:.0f}% over" in text
    assert "dead units, over 10,000 test images |" in text
    (panel, *_) = figures.panels(record, "dead").axes
    assert panel.get_ylabel() == "% of units dead over 10,000 test images"


def test_c1_says_of_which_network_it_is(tmp_path: Path) -> None:
    records = [record_of(tmp_path, ledger_of(task, effect=float(task != "image")), task) for task in TASKS]
    assert "| **supported** | in the autoencoder, all units" in words.verdicts(records)[2]
    (said,) = (line for line in brief.notes(records) if "C1 is about" in line)
    assert re.search(r"Wide-ResNet: no effect, largest q minus .*; LSTM: supported, slope of Hoyer -0", said)
