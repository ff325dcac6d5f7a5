"""Sentences and marks of the control study's page stand where its results are so, and only there."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.collect import Ledger, Record
from sparseout_experiments.studies.control.dial import Dial
from sparseout_experiments.studies.control.figures import overview, panels
from sparseout_experiments.studies.control.grid import GRIDS, Value
from sparseout_experiments.studies.engine.style import COLOURS
from study_pages import ROOT, TASKS, blank, flat, render, save, shown, tables
from study_rows import ledger_of, result_of


@pytest.fixture(autouse=True)
def _blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made where results lack something that they would show."""
    name = request.node.name
    blank(monkeypatch, made=any(word in name for word in ("part_of_the_study", "missing_measure", "tidied_away")))


def test_what_the_sentences_say_is_left_out_where_the_results_say_otherwise(tmp_path: Path) -> None:
    committed = " ".join((ROOT / "docs" / "results.md").read_text().split())
    conditional = (
        "**Price.**",
        "**No gain.**",
        "**Images: no trend.**",
        "**Words: it depends on p.**",
        "In the LSTM too",
    )
    assert all(sentence in committed for sentence in (*conditional, "**C1 rests partly on collapsed networks.**"))
    for task in TASKS:
        save(tmp_path, ledger_of(task, effect=-1.0), task)
    text = render(tmp_path)
    found = {row[0][:2]: row[1] for row in tables(text, "Verdicts")}
    assert found == dict.fromkeys(("C1", "C2", "C3"), "**contradicted**") | {"C4": "**supported**"}
    assert "As q rises, Hoyer over all units rises at p = 0.5" in " ".join(text.split())
    assert not [
        sentence for sentence in (*conditional, "collapsed networks") if sentence in text and "gain" not in sentence
    ]


def test_a_figure_shows_the_numbers(tmp_path: Path) -> None:
    record = save(tmp_path, ledger_of("language"), "language")
    drawn = overview(record)
    dial, price, plane = drawn.axes[:3]
    rows = record.frame[record.frame["role"] == "tuned"]

    def of(scale: str, name: str) -> list[float]:
        return list(rows[(rows["scale"] == scale) | (rows["q"] == 2)].groupby("q")[name].mean())

    for series, scale in enumerate(("matched", "paper")):
        line = dial.containers[series].lines[0]
        assert line.get_ydata() == pytest.approx(of(scale, "hoyer"))
        assert line.get_xdata() == pytest.approx(GRIDS["language"].q, abs=0.02)
        assert price.containers[series].lines[0].get_ydata() == pytest.approx(of(scale, "metric"))
        assert plane.containers[series].lines[0].get_xdata() == pytest.approx(of(scale, "hoyer"))
        assert plane.containers[series].lines[0].get_ydata() == pytest.approx(of(scale, "metric"))
    assert any(
        line.get_ydata() == pytest.approx(of("matched", "hoyer_live"))
        for line in dial.lines
        if len(line.get_ydata()) == 4
    )


@pytest.mark.slow
def test_a_part_of_the_study_makes_a_page_too(tmp_path: Path) -> None:
    trials = {run: result for run, result in ledger_of("image").results.items() if run.role == "tuning"}
    save(tmp_path, Ledger(trials), "image")
    text = render(tmp_path)
    assert "**image: 41 of 57 runs are still missing.**" in text
    assert "no runs yet" in text
    assert "![" not in text
    save(tmp_path, ledger_of("autoencoder", seeds=3))
    save(tmp_path, ledger_of("language", seeds=1), "language")
    text = render(tmp_path)
    assert "3 of 5 seeds have a value at every q" in text
    assert {row[1] for row in tables(text, "Verdicts") if row[0][:2] in ("C1", "C2", "C3")} == {"**undecided**"}
    assert text.count("![") == 4
    assert "nan" not in text.lower()


def test_budgets_have_sections_of_their_own_the_largest_first(tmp_path: Path) -> None:
    save(tmp_path, ledger_of("image"), "image")
    save(tmp_path, ledger_of("image", "gpu", -1.0), "image", "gpu")
    text = render(tmp_path)
    large, small = text.split("## Budget `small`")
    assert "## Budget `gpu`" in large
    assert tables(large, "Verdicts")[1][1] == "**contradicted**"
    assert tables(small, "Verdicts")[1][1] == "**supported**"
    assert "WRN-16-4" in large
    assert "WRN-16-2" in small


def test_cautions_are_said_where_they_hold_and_only_there(tmp_path: Path) -> None:
    ledger = ledger_of("image")
    save(tmp_path, ledger, "image")
    said = flat(tmp_path)
    assert "Without any noise the error on validation data is lower" in said
    assert "7 of 7 settings chose the smaller p" in said
    assert "have no active unit and so no sparsity" not in said
    assert "runs warn" not in said
    assert "No run failed." in said
    for run, result in ledger.results.items():
        if run.setting.method == "none":
            result["valid"]["error"] += 0.2
        if run.seed == 1:
            result["mean"]["undefined"] = 0.25
            result["warnings"] = [f"the norms | differ by 0.{100 + round(10 * (run.setting.q or 0))}"]
    lost = next(run for run in ledger.results if run.seed == 3)
    del ledger.results[lost]
    ledger.failures[lost] = "the loss is <NaN>"
    save(tmp_path / "other", ledger, "image")
    said = flat(tmp_path / "other")
    assert "Without any noise" not in said
    assert (
        "image: in 8 runs more than 1% of the test samples have no active unit and so no sparsity, at most 25.0%"
        in said
    )
    assert "image: 8 runs warn, for example: the norms \\| differ by 0." in said
    assert re.search(r"image, q=2, p = 0.1: 1 run failed: the loss is &lt;NaN>", said)


def test_what_is_undecided_says_how_much_is_missing(tmp_path: Path) -> None:
    ledger = ledger_of("image", effect=0.0)
    for place, (run, result) in enumerate(ledger.results.items()):
        if run.role == "tuned":
            result["test"]["error"] += 0.01 * math.sin(7.3 * place)
    record = save(tmp_path, ledger, "image")
    dial = Dial(record, "matched", "detached", "own")
    assert set(dial.rows["role"]) == {"tuned"}
    ends = [list(dial.of(q)["metric"]) for q in (1.5, 3.0)]
    half = float(shown(list(np.subtract(ends[1], ends[0])), 9).split(" ± ")[1])
    assert half > 0.003
    said = flat(tmp_path)
    assert f"known to ± {half:.3f}, the margin is 0.003" in said
    assert f"about {(half / 0.003) ** 2:.0f} times as many seeds" in said


def test_a_missing_measure_is_a_dash(tmp_path: Path) -> None:
    ledger = ledger_of("autoencoder")
    for run, result in ledger.results.items():
        if run.setting.q == 0.5:
            result["mean"]["hoyer"] = math.nan
    save(tmp_path, ledger)
    text = render(tmp_path)
    row = next(row for row in tables(text, "Autoencoder on MNIST: every setting") if row[0].startswith("q=0.5"))
    assert row[5] == "-"
    assert "without q = 0.5 (measure undefined)" in text
    assert tables(text, "Verdicts")[0][1] == "**supported**"


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
    save(tmp_path, collapsing())
    text = flat(tmp_path)
    verdict = text.split("| C1 Sparsity")[1].split("| C2")[0]
    assert "q = 0.5, 1: collapsed networks, see below" in verdict
    assert "these are q = 0.5, 1: from seed to seed 60 to 64% of the samples have no active unit" in text
    assert "In the emptiest of all runs (q=0.5 matched detached, p = 0.5) 64.0% of the samples" in text
    assert "without these q's: C1 supported; all units: slope" in text
    assert text.count("62.0%, at most 64.0%: **collapsed**") == 2
    assert (
        len([cell for row in tables(render(tmp_path), "Sparsity and its price") for cell in row if "*c*" in cell]) == 6
    )


def test_nothing_is_said_of_collapse_where_there_is_none(tmp_path: Path) -> None:
    save(tmp_path, collapsing(share=0.01))  # at most 5% in the last seed: the limit belongs to the sound
    text = flat(tmp_path)
    assert "collapse" not in text.split("### Every contrast")[0]
    assert "at the last epoch, on validation data: C1 supported" in text
    assert "the best epoch on validation data, here 7." in text


@pytest.mark.parametrize("name", ["dial", "price"])
def test_collapsed_points_are_hollow_and_explained(tmp_path: Path, name: str) -> None:
    def hollow(record: Record) -> list[list[float]]:
        (panel,) = [axes for axes in panels(record, name).axes if axes.get_title() == "p = 0.5, detached gradient"]
        return [
            list(np.atleast_1d(line.get_ydata()))
            for line in panel.lines
            if len(line.get_ydata()) and to_hex(line.get_markerfacecolor()) == COLOURS["card"]
        ]

    def legend(record: Record) -> list[str]:
        return [text.get_text() for text in panels(record, name).legends[0].get_texts()]

    record = save(tmp_path, collapsing())
    dial = Dial(record, "matched", "detached", 0.5)
    measure = "hoyer" if name == "dial" else "metric"
    assert hollow(record) == [pytest.approx([dial.of(q)[measure].mean() for q in (0.5, 1)])]
    assert legend(record)[-1] == "collapsed: over 5% of samples have no active unit"
    sound = save(tmp_path, ledger_of("autoencoder"))
    assert not hollow(sound)
    assert not any("collapsed" in text for text in legend(sound))


def test_where_the_chosen_p_differ_the_common_one_has_a_line_of_its_own(tmp_path: Path) -> None:
    ledger = ledger_of("language")
    trials = {run: result for run, result in ledger.results.items() if run.role == "tuning"}
    other = next(
        run for run in trials if run.setting[1:] == (3.0, "matched", "detached") and run.value == Value("p", 0.2)
    )
    trials[other]["valid"]["perplexity"] = 1.0  # q = 3 now chooses another p than q = 2
    again = Ledger(trials)
    for run in grid.second("small", "language", again.chosen("small", "language")):
        again.results[run] = result_of("language", grid.options(run, "small", {}, {}))
    record = save(tmp_path, again, "language")
    own, common, _ = tables(render(tmp_path), "Images and words")
    assert own[:7] == [*common[:1], "own", *common[2:7]]
    rows = Dial(record, "matched", "detached", "common").of(3.0)
    assert own[7] != common[7] == f"{rows['metric'].mean():.1f}"


@pytest.mark.slow
def test_a_record_is_described_by_what_was_run_and_not_by_the_grid_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grid.BUDGETS["small"], "autoencoder", grid.BUDGETS["small"]["autoencoder"] | {"epochs": 3})
    monkeypatch.setitem(grid.ALWAYS, "autoencoder", grid.ALWAYS["autoencoder"] | {"units": 99, "data": "fashion"})
    record = save(tmp_path, ledger_of("autoencoder"))
    monkeypatch.undo()
    assert (record.config["epochs"], record.data) == (3, "fashion")
    text = flat(tmp_path)
    assert "Autoencoder on fashion: 10,000 / 1,000 / 10,000 images, 3 epochs; 784-99-784, batch 128" in text
    assert "14 epochs" not in text


def test_where_curves_were_tidied_away_nothing_is_said_of_the_last_epoch(tmp_path: Path) -> None:
    ledger = ledger_of("autoencoder")
    for result in ledger.results.values():
        result["last"] = None
    record = save(tmp_path, ledger)
    assert record.frame["last_hoyer"].isna().all()
    assert "at the last epoch, on validation data: C1 undecided; not in these results" in flat(tmp_path)


def test_no_effect_cites_what_decided_it(tmp_path: Path) -> None:
    record = save(tmp_path, ledger_of("image", effect=0.0), "image")
    dial = Dial(record, "matched", "detached", "own")
    lines = np.array([dial.of(q)["metric"] for q in GRIDS["image"].q])
    (cells,) = (row for row in tables(render(tmp_path), "Verdicts") if row[0].startswith("C2"))
    assert cells[1] == "**no effect**"
    assert cells[2] == (
        f"in the Wide-ResNet, largest q minus smallest {shown(list(lines[-1] - lines[0]), 4, 1, '+')}, "
        f"means span {np.ptp(lines.mean(1)):.4f}, margin 0.003"
    )


def test_where_no_unit_is_dead_two_contrasts_are_one(tmp_path: Path) -> None:
    ledger = ledger_of("language")
    save(tmp_path, ledger, "language")
    assert render(tmp_path).count("\n| C1 | language |") == 4
    for result in ledger.results.values():
        result["mean"]["dead"] = 0.0
    record = save(tmp_path, ledger, "language")
    text = render(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| C1 | language |")]
    assert len(lines) == 2
    assert all("Hoyer, all = live units" in line for line in lines)
    assert "| C1, secondary | language | 2 | 0 | 0 | 0 |" in text
    assert "No unit is dead in any run, so live units are all units." in " ".join(text.split())
    labels = [text.get_text() for text in overview(record).legends[0].get_texts()]
    assert not any("live" in label for label in labels)
