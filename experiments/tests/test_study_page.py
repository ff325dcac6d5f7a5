"""The page of the control study: its numbers are those of the files of results, and its sentences hold for them."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sparseout_experiments.studies import control as study
from sparseout_experiments.studies.control import collect, figures
from sparseout_experiments.studies.control.dial import Dial
from sparseout_experiments.studies.control.grid import GRIDS, SEEDS, Setting, Task
from sparseout_experiments.studies.engine import style
from study_pages import TASKS, blank, raw, render, save, shown, tables
from study_rows import ledger_of

PNG = b"\x89PNG\r\n\x1a\n"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A page of the whole study."""
    folder = tmp_path_factory.mktemp("study")
    for task in TASKS:
        save(folder, ledger_of(task), task)
    return folder, render(folder)


def test_no_number_of_the_template_is_a_result() -> None:
    source = files(study).joinpath("results.md.j2").read_text()
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|CIFAR-10|WikiText-2|C[1-4]\b|WRN", "", source, flags=re.DOTALL)
    planned = {f"{value:g}" for one in GRIDS.values() for value in (*one.q, *one.p)} | {"95"}  # of the intervals
    assert set(re.findall(r"\d+(?:\.\d+)?", text)) <= planned


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
    found = {task: raw(folder, task) for task in TASKS}
    for _, task, said, slope, ends, effect, span, margin, n, word in tables(text, "Every contrast"):
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
                        for row in found[task]  # type: ignore[index]
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
        relative = difference / (lines[:, 0] if what == "perplexity" else 1)
        assert effect == f"{relative.mean() / relative.std(ddof=1):+.1f}"
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


def test_the_verdicts_stand_at_the_top_and_in_their_table(whole: tuple[Path, str]) -> None:
    _, text = whole
    found = {row[0][:2]: row[1] for row in tables(text, "Verdicts")}
    assert found == dict.fromkeys(("C1", "C2", "C3", "C4"), "**supported**")
    assert "379 of 379 runs finished, 0 failed" in " ".join(text.split("### ")[0].split())
    assert "12 of 12 pairs of runs agree to the last bit" in text
    assert "No run failed." in text
    places = [
        text.index(part)
        for part in ("### Verdicts", "It cannot settle C2", "### Sparsity and its price", "![", "### Limits")
    ]
    assert places == sorted(places)


def test_figures_are_there_and_are_the_same_for_the_same_results(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = whole
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [Path(picture).stem.removeprefix("control-small-") for picture in pictures] == [
        "autoencoder-dial",
        "autoencoder-price",
        "autoencoder-dead",
        "image-overview",
        "language-overview",
    ]
    assert all((folder / "docs" / picture).read_bytes().startswith(PNG) for picture in pictures)
    autoencoder, image, _ = (save(tmp_path, ledger_of(task), task).complete for task in TASKS)
    with style.style():  # one of each kind
        again = {"image-overview": style.png(figures.overview(image))}
        again["autoencoder-dead"] = style.png(figures.panels(autoencoder, "dead"))
    for name, content in again.items():
        assert content == (folder / "docs/images" / f"control-small-{name}.png").read_bytes()
    blank(monkeypatch)
    assert render(tmp_path) == text


def test_the_tables_in_the_text_have_the_means_of_the_runs(whole: tuple[Path, str]) -> None:
    folder, text = whole
    records = {task: collect.load(folder / "results" / f"control-small-{task}.json") for task in TASKS}
    names = {"Hoyer, all units": ("hoyer", 3), "Hoyer, live units": ("hoyer_live", 3), "error (MSE)": ("metric", 4)}
    names |= {"Hoyer": ("hoyer", 3), "error": ("metric", 3), "perplexity": ("metric", 1)}

    def means(task: Task, p: Any, measure: str, digits: int) -> list[str]:
        rows = Dial(records[task], "matched", "detached", p).rows
        return [f"{value:.{digits}f}" for value in rows.groupby("q")[measure].mean()]

    table = tables(text, "Sparsity and its price")
    assert [row[0] for row in table] == ["0.5"] * 3 + ["0.2"] * 3
    for p, what, _, *found in table:
        assert found == means("autoencoder", float(p), *names[what])
    table = tables(text, "Images and words")
    assert len(table) == 6
    for network, p, what, _, *found, _, _ in table:
        task: Task = "language" if network == "LSTM" else "image"
        assert found == means(task, p, *names[what])


def test_limits_and_alternative_texts_have_numbers_of_the_runs(whole: tuple[Path, str]) -> None:
    _, text = whole
    limits = " ".join(text.split("### Limits")[1].split("### ")[0].split())
    for part in (
        "over 10,000 test images",
        "first 500 images of the test set",
        "first 20,000 words",
        "up to 5,000 training",
    ):
        assert part in limits
    alternatives = re.findall(r"!\[([^\]]+)\]\(", text)
    assert len(alternatives) == 5
    assert all(re.search(r"goes from(?: an error of)? \d[\d.]*%? at q = \d", one) for one in alternatives)


def test_every_share_of_dead_units_stands_beside_the_number_of_samples(whole: tuple[Path, str]) -> None:
    folder, text = whole
    record = collect.load(folder / "results" / "control-small-autoencoder.json")
    rows = Dial(record, "matched", "detached", 0.5).of(2.0)
    few, many = (100 * rows[name].mean() for name in ("last_dead", "dead"))
    said = f"p = 0.5 it is {many:.0f}%, and over 1,000 validation images, after the last epoch, {few:.0f}%"
    assert said in " ".join(text.split())
    assert "dead units, over 10,000 test images |" in text
    (panel, *_) = figures.panels(record, "dead").axes
    assert panel.get_ylabel() == "% of units dead\nover 10,000 test images"
