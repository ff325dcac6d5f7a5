"""The report of the demo: what it holds, and what an interrupt or a full disk leaves of it."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import demo_results
import pytest
import torch
from small import status_of
from sparseout_experiments.commands import app
from sparseout_experiments.demo import report, training
from sparseout_experiments.studies.engine import frame
from typer.testing import CliRunner

TINY = ["demo", "--epochs", "1", "--seeds", "2", "--q", "1,3", "--q", "2"]
WRITTEN = ["demo.png", "report.html", "results.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    result = CliRunner().invoke(app, [*TINY, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, result.stdout


class Page(HTMLParser):
    """A page as tags: fails where one is not closed."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_results_hold_every_run(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(os.listdir(folder)) == WRITTEN
    found = json.loads((folder / "results.json").read_text())
    assert len(found["runs"]) == (3 * 2 + 2) * 2
    assert {run["status"] for run in found["runs"]} == {"finished"}
    assert found["swept"]["q"] == [1, 2, 3]  # sorted
    assert found["environments"][0]["torch"] == torch.__version__
    assert found["more"]["demo"]["seconds"] > 0
    assert {run["method"] for run in found["runs"]} == {"sparseout", "dropout", "none"}
    assert found["more"]["demo"]["histograms"].keys() == {run["run"] for run in found["runs"]}


def test_the_terminal_and_the_page_say_the_same(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    found = json.loads((folder / "results.json").read_text())["more"]["demo"]
    page = (folder / "report.html").read_text()
    assert found["verdict"] in " ".join(shown.split())
    assert found["verdict"].replace("'", "&#39;") in page
    means = [line.split()[3] for line in shown.splitlines() if line.strip().startswith("q = ")]
    assert len(means) == 6
    assert all(f"<td>{mean} <small>" in page for mean in means)
    assert max(map(len, shown.splitlines())) <= 80 or "Wrote" in max(shown.splitlines(), key=len)


def test_the_page_stands_alone(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "report.html").read_text()
    page = Page(text)
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset") and value is not None
    ]
    outside = [link for link in links if not link.startswith(("#", "data:"))]
    assert outside == ["https://arxiv.org/abs/1904.08050"]
    assert text.count("http") == 1
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")


def test_every_picture_has_words_and_every_reference_a_target(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "report.html").read_text()
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    for tag, attributes in page.tags:
        assert tag != "svg" or attributes["aria-label"]
        assert tag != "img" or attributes["alt"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, a in page.tags for value in a.values() if value and value.startswith("#")}
    targets |= {part.split(")")[0] for part in text.split("url(#")[1:]}
    assert targets <= set(ids)
    assert not re.search(r"\bnan\b", re.sub('data:[^"]*', "", text), re.IGNORECASE)


def test_the_figures_follow_the_theme(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "report.html").read_text()
    drawings = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--ink)" in drawings
    assert "#000000" not in drawings
    assert "prefers-color-scheme: dark" in text
    used = {part.split(")")[0] for part in drawings.split("var(--")[1:]}
    style = text[: text.index("</style>")]
    assert all(style.count(f"--{name}:") == 2 for name in used)  # a light and a dark value


def interrupt_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(count))
    whole = training.train

    def train(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(training, "train", train)


def test_an_interrupt_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(3, monkeypatch)
    assert status_of(*TINY, "--out", str(tmp_path)) == 130
    assert "interrupted: 3 of 16 runs were finished" in capfd.readouterr().err
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["finished"] * 3 + ["planned"] * 13
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert "Interrupted: 3 of 16 runs were finished" in text
    assert sorted(os.listdir(tmp_path)) == WRITTEN


@pytest.mark.parametrize(
    ("finished", "planned", "stays"), [(16, 16, True), (4, 4, True), (5, 16, True), (2, 16, False)]
)
def test_an_interrupt_leaves_a_report_of_more_runs(
    finished: int, planned: int, stays: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    statuses = ["finished"] * finished + ["planned"] * (planned - finished)
    some = demo_results.results([demo_results.row("none", n, 0.5, status=status) for n, status in enumerate(statuses)])
    some.more["demo"] = {}
    frame.save(some, tmp_path / "results.json")
    old = (tmp_path / "results.json").read_text()
    interrupt_at(3, monkeypatch)
    assert status_of(*TINY, "--out", str(tmp_path)) == 130
    assert ((tmp_path / "results.json").read_text() == old) is stays
    assert (tmp_path / "report.html").exists() is not stays
    assert (f"the report in {tmp_path}, of {finished} runs, stays" in capfd.readouterr().err) is stays


@pytest.mark.parametrize("text", ["[1]", '{"kind": "sparseout report"}', None])
def test_the_results_of_others_are_left_alone(
    text: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if text:
        (tmp_path / "results.json").write_text(text)
    else:
        frame.save(demo_results.results([demo_results.row("none", 0, 0.5)]), tmp_path / "results.json")  # of a sweep
    assert status_of(*TINY, "--out", str(tmp_path)) == 2
    assert "a new folder, or one of an earlier sparseout demo" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["results.json"]


def test_an_interrupt_before_the_first_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(0, monkeypatch)
    assert status_of(*TINY, "--out", str(tmp_path)) == 130
    assert "interrupted: 0 of 16 runs were finished, and nothing was written" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_interrupt_during_the_report_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write", interrupted)
    assert status_of("demo", "--epochs", "1", "--seeds", "1", "--q", "2", "--out", str(tmp_path)) == 130
    assert capfd.readouterr().err.strip() == "sparseout: interrupted while the report was being written"


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    assert status_of("demo", "--epochs", "1", "--seeds", "1", "--q", "2", "--out", str(tmp_path)) == 1
    assert capfd.readouterr().err.strip().endswith("(No space left on device)")


def test_extremes_are_reported_and_not_fatal(tmp_path: Path) -> None:
    args = ["--q", "0,300", "--seeds", "1", "--epochs", "2", "--scale", "paper", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["demo", *args])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "Runs that diverged, which are left out of the means: q = 300" in shown
    assert "nothing to compare" in shown
    assert "NaN" not in (tmp_path / "results.json").read_text()
    Page((tmp_path / "report.html").read_text())
