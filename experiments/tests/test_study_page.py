import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sparseout_experiments.studies import control as study
from sparseout_experiments.studies.control import brief, collect, figures, grid, limits, page, words
from sparseout_experiments.studies.control.grid import GRIDS, SEEDS, TASKS, Setting, Task
from sparseout_experiments.studies.control.runner import Ledger
from study_rows import ledger_of, result_of

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not painted, which would take most of the time, where a test is not about them."""
    if "figures" not in request.node.name:
        monkeypatch.setattr(figures, "png", lambda *_: b"")


def save(results: Path, *tasks: Task, effect: float = 1.0, seeds: int = 5, budget: str = "small") -> None:
    for task in tasks:
        collect.save(results, budget, task, ledger_of(task, budget, effect, seeds))


def render(tmp_path: Path) -> str:
    study.render(tmp_path / "results", tmp_path / "docs" / "results.md")
    return (tmp_path / "docs" / "results.md").read_text()


def raw(tmp_path: Path, task: Task) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((tmp_path / "results" / f"control-small-{task}.json").read_text())["rows"]
    return rows


def tables(text: str, heading: str) -> list[list[str]]:
    part = text.split(f"### {heading}\n")[1].split("\n### ")[0].split("\n\n")
    lines = next(block.strip() for block in part if block.strip().startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(values: list[float], digits: int, times: float = 1.0, sign: str = "") -> str:
    """A mean with its interval, made with scipy alone."""
    scaled = times * np.array(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=scaled.mean(), scale=stats.sem(scaled))
    return f"{scaled.mean():{sign}.{digits}f} ± {(high - low) / 2:.{digits}f}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A page of the whole study."""
    folder = tmp_path_factory.mktemp("study")
    save(folder / "results", *TASKS)
    return folder, render(folder)


@pytest.mark.parametrize("task", TASKS)
def test_every_row_of_a_table_is_in_the_results(whole: tuple[Path, str], task: Task) -> None:
    folder, text = whole
    titles = {"autoencoder": "Autoencoder on MNIST", "image": "Wide-ResNet on CIFAR-10"}
    title = titles.get(task, "LSTM language model on WikiText-2")
    rows = raw(folder, task)
    metric, digits = GRIDS[task].metric, {"autoencoder": 5, "image": 4, "language": 2}[task]
    seen = 0
    for name, value, n, test, valid, hoyer, live, dead, empty, best in tables(text, f"{title}: every setting"):
        mine = [
            row
            for row in rows
            if row["role"] != "tuning"
            and Setting(row["method"], row["q"], row["scale"], row["gradient"]).name == name
            and value == ("" if row["option"] is None else f"{row['option'].replace('_', ' ')} = {row['value']:g}")
        ]
        seen += len(mine)
        assert n == str(len(mine))
        if len(mine) > 1:
            assert test == shown([row["test"][metric] for row in mine], digits)
            assert valid == shown([row["valid"][metric] for row in mine], digits)
            assert hoyer == shown([row["mean"]["hoyer"] for row in mine], 3)
            assert live == shown([row["mean"]["hoyer_live"] for row in mine], 3)
        assert (empty, best) == ("0.0%", "7")
        assert dead == f"{100 * np.mean([row['mean']['dead'] for row in mine]):.1f}%"
    assert seen == sum(row["role"] != "tuning" for row in rows)


def test_every_number_of_the_contrasts_is_scipys(whole: tuple[Path, str]) -> None:
    folder, text = whole
    for _, task, said, slope, ends, span, margin, n, word in tables(text, "Every contrast"):
        metric = GRIDS[task].metric  # type: ignore[index]
        mean = "last" if "at the last epoch" in said else "mean"
        what, scale, *rest = re.sub(r"^\*.+\*: |, without collapsed q's|, at the last.+", "", said).split(", ")
        if what == "Hoyer":
            what, scale, *rest = f"hoyer{'_live' if scale.startswith('live') else ''}", rest[0], *rest[1:]
        p = None if "own" in rest[-1] or "common" in rest[-1] else float(rest[-1].split("= ")[1])
        gradient = "exact" if "exact" in rest else "detached"
        wanted = "matched" if scale.startswith("matched") else "paper"
        role = ("tuned", "common") if "common" in rest[-1] else ("tuned", "grid")
        lines = np.array(
            [
                [
                    next(
                        row["test"][metric] if what == metric else row[mean][what]
                        for row in raw(folder, task)  # type: ignore[arg-type]
                        if (row["q"], row["seed"]) == (q, seed)
                        and row["role"] in role
                        and (q == 2 or (row["scale"], row["gradient"]) == (wanted, gradient))
                        and p in (None, row["value"])
                    )
                    for q in GRIDS[task].q  # type: ignore[index]
                ]
                for seed in SEEDS
            ]
        )
        digits = {"error": 4, "perplexity": 2}.get(what, 4)
        assert slope == shown([stats.linregress(GRIDS[task].q, line).slope for line in lines], digits, 1, "+")  # type: ignore[index]
        difference = lines[:, -1] - lines[:, 0]
        if what == "perplexity":
            half = shown(list(difference / lines[:, 0]), 2, 100, "+").split(" ± ")
            assert ends == f"{half[0]}% ± {half[1]}%"
            assert span == f"{100 * np.ptp(lines.mean(0)) / lines.mean(0)[0]:.2f}%"
            assert margin == "0.5%"
        else:
            assert ends == shown(list(difference), digits, 1, "+")
            assert span == f"{np.ptp(lines.mean(0)):.{digits}f}"
            assert margin == ("0.003" if what == "error" else "0.01")
        assert (n, word) == ("5", "supported")


def test_no_number_of_the_page_was_typed() -> None:
    names = r"CIFAR-10|WikiText-2|C[1-4]|q = 2|95%|^\.\d|\{"
    for module in (page, words, brief, limits):
        tree = ast.parse(Path(module.__file__).read_text())
        skipped = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.FormattedValue) and node.format_spec
            for part in ast.walk(node.format_spec)
        }
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                skipped.add(id(body[0].value))  # a docstring
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped
        ]
        assert len(texts) > 15
        assert not [text for text in texts if re.search(r"\d", re.sub(names, "", text))]


def test_the_verdicts_stand_at_the_top_and_in_their_table(whole: tuple[Path, str]) -> None:
    _, text = whole
    found = {row[0][:2]: row[1] for row in tables(text, "Verdicts")}
    assert found == dict.fromkeys(("C1", "C2", "C3", "C4"), "**supported**")
    assert "379 of 379 runs finished, 0 failed" in " ".join(text.split("### ")[0].split())
    assert "12 of 12 pairs of runs agree to the last bit" in text
    assert "No run failed." in text
    places = [text.index(part) for part in ("### Verdicts", "It cannot settle C2", "### In short", "![", "### Limits")]
    assert places == sorted(places)


def test_opposite_results_give_opposite_verdicts(tmp_path: Path) -> None:
    save(tmp_path / "results", *TASKS, effect=-1.0)
    found = {row[0][:2]: row[1] for row in tables(render(tmp_path), "Verdicts")}
    assert found == dict.fromkeys(("C1", "C2", "C3"), "**contradicted**") | {"C4": "**supported**"}


def test_figures_are_there_and_are_the_same_for_the_same_results(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = whole
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [Path(picture).stem.removeprefix("control-small-") for picture in pictures] == [
        "autoencoder-dial",
        "autoencoder-price",
        "autoencoder-dead",
        "image-overview",
        "language-overview",
    ]
    save(tmp_path / "results", *TASKS)
    assert render(tmp_path) == text
    for picture in pictures:
        content = (folder / "docs" / picture).read_bytes()
        assert content.startswith(PNG)
        assert content == (tmp_path / "docs" / picture).read_bytes()


def test_a_figure_shows_the_numbers(tmp_path: Path) -> None:
    record = collect.load(collect.save(tmp_path, "small", "language", ledger_of("language")))
    drawn = figures.overview(record)
    dial, price, plane = drawn.axes[:3]
    rows = [row for row in record.rows if row.run.role == "tuned"]

    def of(scale: str, name: str) -> list[float]:
        return [
            float(np.mean([getattr(row, name) for row in rows if row.run.setting[1:3] in ((q, scale), (q, None))]))
            for q in GRIDS["language"].q
        ]

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


def test_a_part_of_the_study_makes_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    trials = {run: result for run, result in ledger_of("image").results.items() if run.role == "tuning"}
    collect.save(tmp_path / "results", "small", "image", Ledger(trials))
    text = render(tmp_path)
    assert "**image: 41 of 57 runs are not there yet.**" in text
    assert "no runs yet" in text
    assert "![" not in text
    save(tmp_path / "results", "autoencoder", seeds=3)
    text = render(tmp_path)
    assert "3 of 5 seeds have a value at every q" in text
    assert {row[1] for row in tables(text, "Verdicts") if row[0][:2] in ("C1", "C2", "C3")} == {"**undecided**"}
    assert text.count("![") == 3


def test_budgets_have_sections_of_their_own_the_largest_first(tmp_path: Path) -> None:
    save(tmp_path / "results", "image")
    save(tmp_path / "results", "image", effect=-1.0, budget="gpu")
    text = render(tmp_path)
    large, small = text.split("## Budget `small`")
    assert "## Budget `gpu`" in large
    assert tables(large, "Verdicts")[1][1] == "**contradicted**"
    assert tables(small, "Verdicts")[1][1] == "**supported**"
    assert "WRN-16-4" in large
    assert "WRN-16-2" in small


def test_cautions_are_said_where_they_hold_and_only_there(tmp_path: Path) -> None:
    def cautions(ledger: Ledger) -> str:
        records = [collect.load(collect.save(tmp_path, "small", "image", ledger))]
        return " ".join([*brief.notes(records), *words.cautions(records)])

    ledger = ledger_of("image")
    said = cautions(ledger)
    assert "without any noise the error on validation data is better" in said
    assert "7 of 7 settings chose the smaller p" in said
    assert "no active unit" not in said
    assert "warn" not in said
    for run, result in ledger.results.items():
        if run.setting.method == "none":
            result["valid"]["error"] += 0.2
        if run.seed == 1:
            result["mean"]["undefined"] = 0.25
            result["warnings"] = [f"the norms differ by 0.{100 + round(10 * (run.setting.q or 0))}"]
    said = cautions(ledger)
    assert "without any noise" not in said
    assert "in 8 runs more than 1% of the test samples have no active unit" in said
    assert "at most 25.0%" in said
    assert "image: 8 runs warn: the norms differ by 0.100 to 0.130" in said


def test_what_is_undecided_says_how_much_is_missing(tmp_path: Path) -> None:
    ledger = ledger_of("image", effect=0.0)
    for place, (run, result) in enumerate(ledger.results.items()):
        if run.role == "tuned":
            result["test"]["error"] += 0.01 * math.sin(7.3 * place)
    record = collect.load(collect.save(tmp_path, "small", "image", ledger))
    (said,) = words.undecided([record])
    rows = [[row.metric for row in record.rows if row.run.setting == setting and row.run.role == "tuned"]
            for setting in (Setting("sparseout", q, "matched", "detached") for q in (1.5, 3.0))]  # fmt: skip
    half = float(shown(list(np.subtract(rows[1], rows[0])), 9).split(" ± ")[1])
    assert half > 0.003
    assert f"known to ± {half:.2g}, the margin is 0.003" in said
    assert f"about {(half / 0.003) ** 2:.0f} times as many seeds" in said


def test_a_missing_measure_is_a_dash(tmp_path: Path) -> None:
    ledger = ledger_of("autoencoder")
    for run in ledger.results:
        if run.setting.q == 0.5:
            result = result_of("autoencoder", grid.options(run, "small", {}, {}))
            result["mean"]["hoyer"] = math.nan
            ledger.results[run] = result
    (tmp_path / "results").mkdir()
    collect.save(tmp_path / "results", "small", "autoencoder", ledger)
    text = render(tmp_path)
    row = next(row for row in tables(text, "Autoencoder on MNIST: every setting") if row[0].startswith("q=0.5"))
    assert row[5] == "-"
    assert "without q = 0.5 (measure undefined)" in text
    assert tables(text, "Verdicts")[0][1] == "**supported**"
