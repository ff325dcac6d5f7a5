"""Pages are those of the results, and no page and no file of results is replaced by an emptier one."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from small import status_of
from sparseout_experiments.studies import control, targets
from sparseout_experiments.studies.control import collect
from sparseout_experiments.studies.control.collect import Ledger
from sparseout_experiments.studies.engine import study, style
from sparseout_experiments.studies.engine.jobs import StudyStopped
from study_rows import Inline, ledger_of

ROOT = Path(__file__).parents[2]
PAGES = {"control": "results.md", "targets": "targets.md", "alternatives": "comparison.md", "theory": "theory.md"}
PAGES |= {"revival": "revival.md", "payoff": "payoff.md"}


def some_of(folder: Path, runs: int) -> Path:
    """Results of so many runs of the image task."""
    ledger = Ledger(dict(list(ledger_of("image").results.items())[:runs]))
    collect.save(folder, "small", "image", ledger)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if name != "theory"])
def test_a_page_is_that_of_the_results(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "png", lambda *_: b"")  # figures are made and not painted, which takes most of the time
    page, committed = tmp_path / "page.md", (ROOT / "docs" / PAGES[name]).read_text()
    if name == "alternatives":  # whose page is written by hand but for its parts
        page.write_text(committed)
    import_module(f"sparseout_experiments.studies.{name}").STUDY.render(ROOT / "results", page)
    assert page.read_text() == committed


@pytest.mark.parametrize("study", PAGES)
@pytest.mark.parametrize("there", [True, False])
def test_a_page_is_not_rendered_from_nothing(
    study: str, there: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    page = tmp_path / "page.md"
    if there:
        page.write_text((ROOT / "docs" / PAGES[study]).read_text())
    before = page.read_text() if there else None
    command = [study] if study == "theory" else ["reproduce", study]
    for results in ("results", "nowhere"):
        assert status_of(*command, "--render", "--results", str(tmp_path / results), "--page", str(page)) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        if study != "theory":
            assert f"expected `--results` to be a folder with results of `sparseout reproduce {study}`" in error
    assert (page.read_text() if page.exists() else None) == before
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "images").exists()


FILES = {"control": "control-small-image", "alternatives": "alternatives-small-digits", "theory": "theory"}
FILES |= {"targets": "targets-short", "revival": "revival-autoencoder", "payoff": "payoff-digits"}


@pytest.mark.parametrize("study", PAGES)
@pytest.mark.parametrize(
    "damage", [{"rows": [3]}, {"rows": None}, {"environments": [3], "environment": 3}, {"task": [], "path": []}, "deep"]
)
def test_a_page_is_not_rendered_from_damaged_results(
    study: str, damage: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "png", lambda *_: b"")
    results = json.loads((ROOT / "results" / f"{FILES[study]}.json").read_text())
    if study == "theory" and "rows" in damage:
        damage = {"checks": damage["rows"]}
    if study == "alternatives" and "task" in damage:
        damage = {"data": []}
    text = 100_000 * "[" if damage == "deep" else json.dumps(results | damage)
    (tmp_path / f"{FILES[study]}.json").write_text(text)
    page = tmp_path / "page.md"
    before = (ROOT / "docs" / PAGES[study]).read_text() if study in ("alternatives", "theory") else None
    if before is not None:
        page.write_text(before)
    command = [study] if study == "theory" else ["reproduce", study]
    assert status_of(*command, "--render", "--results", str(tmp_path), "--page", str(page)) == 2
    error = capfd.readouterr().err
    assert (error.count("\n"), f"{tmp_path}" in error, " does not hold " in error) == (1, True, True), error
    assert (page.read_text() if page.exists() else None) == before


@pytest.mark.parametrize("study", [control.STUDY, targets.STUDY])
def test_a_page_of_others_is_left_alone(study, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    with pytest.raises(ValueError, match="expected `--page` to be a new file, or one that begins with '# "):
        study.render(ROOT / "results", page)
    assert page.read_text() == "# Mine\n"


def test_a_page_is_not_made_from_fewer_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    control.STUDY.render(some_of(tmp_path / "more", 9), page)
    before = page.read_text()
    assert before.endswith("<!-- made from 9 runs -->\n")
    with pytest.raises(ValueError, match=r"of 8 runs, but got .*page.md', which was made from 9"):
        control.STUDY.render(some_of(tmp_path / "fewer", 8), page)
    assert page.read_text() == before
    control.STUDY.render(some_of(tmp_path / "as many", 9), page)


def stop(task: str, options: object, folder: Path) -> None:
    raise RuntimeError("no disk")


@pytest.mark.slow
def test_an_interrupted_study_leaves_fuller_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Cluster", Inline)
    results, page = some_of(tmp_path / "results", 40), tmp_path / "page.md"
    control.STUDY.render(results, page)
    before = {path: path.read_bytes() for path in (page, *results.iterdir())}
    with pytest.raises(StudyStopped, match="no disk"):
        study.reproduce(control.STUDY, study.Request(("image",), tmp_path / "work"), results, page, 1, train=stop)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("study", ["control", "targets"])
def test_a_part_of_a_study_is_not_begun_for_a_page_of_all(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / PAGES[study]).read_text())
    monkeypatch.chdir(tmp_path)
    assert status_of("reproduce", study, "--only", "autoencoder", "--results", "new", "--page", str(page)) == 2
    assert "which was made from" in capfd.readouterr().err
