"""The page of a sweep: what it says, in files and in a real browser, also of hostile names and of a part."""

import json
from pathlib import Path

import pandas as pd
import pytest
from browser import CHROMIUM, browser
from small import status_of
from sparseout_experiments import config
from sparseout_experiments.studies.engine import frame, report, sweep
from study_rows import trained

HOSTILE = ['<script>alert("x")</script>', "</script><img src=x onerror=alert(1)>", 'a"b&c' * 60, "naïve 数据", "a,b\nc"]
WIDER = """[...document.querySelectorAll("main *")].filter(part => !part.parentElement.closest(".scroll, pre, .plot")
  && part.getBoundingClientRect().right > {} + 1).map(part => part.outerHTML.slice(0, 200))"""
PLOTS = """[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.main-svg').length
  && plot.querySelector('.main-svg').getBoundingClientRect().width)"""


def made(folder, options, seeds=3, missing=0, failed=0):
    """The results of a sweep of which the last runs are missing, and some before them have failed."""
    jobs = list(sweep.grid("autoencoder", {"epochs": [2], **options}, seeds, folder).values())
    planned = [{**config.record(config.resolve(job.task, job.options)), "run": str(job.folder)} for job in jobs]
    for index, job in enumerate(jobs[: len(jobs) - missing]):
        trained(*job)
        if index < failed:
            (job.folder / "result.json").unlink()
            (job.folder / "failure.json").write_text(json.dumps({"reason": "the loss is NaN <at> step 7"}))
    return frame.read([folder], planned, "sparseout sweep autoencoder --q 1,2")


def test_the_pareto_front_by_hand():
    settings = pd.DataFrame({"metric": [1.0, 2.0, 2.0, 3.0, None, 1.0], "hoyer": [0.3, 0.5, 0.4, 0.6, 0.9, 0.3]})
    assert list(report.pareto(settings)) == [True, True, False, True, False, True]


def test_the_files_say_what_the_runs_found(tmp_path):
    results = made(tmp_path / "runs", {"q": [1.0, 2.0], "method": ["sparseout", "dropout"]})
    paths = {path.name: path for path in report.write(results, tmp_path / "out")}
    table = pd.read_csv(paths["sweep.csv"])
    assert len(table) == 9
    settings = results.settings()
    assert list(settings["seeds"]) == [3, 3, 3]
    mean = table[(table["method"] == "sparseout") & (table["q"] == 1.0)]["metric"].mean()
    assert f"${mean:.4g} \\pm" in paths["table.tex"].read_text()


def test_the_small_file_gives_the_page_again(tmp_path):
    results = made(tmp_path / "runs", {"q": [1.0, 2.0], "method": ["sparseout", "dropout"]}, missing=1, failed=1)
    report.write(results, tmp_path / "out")
    loaded = frame.load(tmp_path / "out/report.json")
    assert vars(loaded).keys() == vars(results).keys()
    kept = ("task", "metric", "swept", "common", "environments", "command")
    assert [getattr(loaded, name) for name in kept] == [getattr(results, name) for name in kept]
    again, page = (report.page(some).partition("<script>")[0] for some in (loaded, results))
    assert again == page.replace(f"{tmp_path}/runs/", "")
    for run, curve in results.curves.items():
        for line, kept in zip(curve, loaded.curves[run.removeprefix(f"{tmp_path}/runs/")], strict=True):
            assert kept == pytest.approx(line, rel=1e-5)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold results of sparseout report"):
        frame.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "changed",
    [
        *({"runs": runs} for runs in ([], {}, [{}], [3])),
        *({"metric": metric} for metric in ("mse", [])),
        *({name: []} for name in ("swept", "common", "layers", "curves", "fixed")),
        {"layers": {"another": {}}},
        {"curves": {"seed=0": [{"a": 1}]}},
        {"environments": [3]},
        {"environments": None},
        {"fixed": {"hoyer": "high"}},
        {"runs": [{"run": "seed=0", "status": "odd", "reason": ""}]},
        {"more": 1},
    ],
)
def test_a_small_file_that_is_something_else(changed, whole_file, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(whole_file | changed))
    with pytest.raises(ValueError, match="is not a complete file of sparseout report"):
        frame.load(tmp_path / "report.json")


def test_the_file_that_the_site_shows_is_read():
    results = frame.load(Path(__file__).parents[2] / "results/sweep-digits.json")
    assert "undefined" not in results.frame  # it is older than that number
    assert report.page(results).count("<html") == 1


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    frame.save(made(folder, {"q": [1.0]}, seeds=1), folder / "report.json")
    frame.load(folder / "report.json")
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", ["report.html", "table.tex", "sweep.csv", "report.json", "demo.png"])
def test_files_of_others_are_left_alone(name, tmp_path, capfd, monkeypatch):
    made(tmp_path / "runs", {"q": [1.0]}, seeds=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / name).write_text("mine")
    monkeypatch.setattr("sparseout_experiments.studies.engine.jobs.train", None)
    monkeypatch.setattr("sparseout_experiments.studies.engine.sweep.Cluster", None)
    commands = [
        ["demo"],
        *([["report", str(tmp_path / "runs")], ["sweep", "autoencoder"]] if name != "demo.png" else []),
    ]
    for command in commands:
        assert status_of(*command, "--out", str(tmp_path / "thesis")) == 2
        wanted = f"'{tmp_path / 'thesis'}', whose {name} is not of a report"
        sentence = f"sparseout: expected `--out` to be a folder without it, or that of a report, but got {wanted}\n"
        assert capfd.readouterr().err == sentence
    assert [(path.name, path.read_text()) for path in (tmp_path / "thesis").iterdir()] == [(name, "mine")]


def test_files_of_a_report_are_made_again(whole_file, tmp_path):
    (tmp_path / "table.tex").write_text("")
    (tmp_path / "report.json").write_text(json.dumps(whole_file))
    report.check(tmp_path)
    for name in ("sweep.json", "config.toml"):  # whatever lies in the folder of a sweep or of a run
        (tmp_path / "report.json").write_text("")
        (tmp_path / name).touch()
        report.check(tmp_path)
        (tmp_path / name).unlink()


def test_an_unfinished_sweep_with_failures_says_so(tmp_path):
    text = report.page(made(tmp_path, {"q": [1.0, 2.0]}, missing=2, failed=1))
    assert "6 runs: 3 finished, 1 failed, 2 not begun." in " ".join(text.split())
    assert "This page is not complete" in text
    assert "the loss is NaN &lt;at&gt; step 7" in text
    nothing = report.page(made(tmp_path / "none", {"q": [1.0, 2.0]}, missing=6))
    assert "6 runs: 0 finished, 6 not begun." in " ".join(nothing.split())


def test_latex_takes_every_character(tmp_path):
    results = made(tmp_path, {"data": ["a_b&c%$#{}~^\\", "plain"]}, seeds=1)
    text = report.latex(results, results.settings())
    assert r"a\_b\&c\%\$\#\{\}\textasciitilde \textasciicircum \textbackslash " in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: the page was not looked at in a browser")
def test_the_page_in_a_browser(tmp_path):
    swept = {"q": [1.0, 1.5, 2.0], "method": ["sparseout", "dropout"], "data": HOSTILE}
    paths = report.write(made(tmp_path / "runs", swept, seeds=2, missing=1, failed=1), tmp_path / "out")
    with browser(tmp_path) as tab:
        for width, scheme in ((360, "light"), (1280, "dark"), (1280, "light")):
            tab.open(paths[0].as_uri(), width, scheme=scheme)
            assert tab.evaluate(WIDER.format(width)) == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert min(tab.evaluate(PLOTS)) > 200
            assert [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))] == []
            assert tab.complaints == []
        column = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[{}].dataset.value)"
        heads = tab.evaluate("[...document.querySelectorAll('#runs th')].map(head => head.textContent)")
        at = heads.index("hoyer")
        for order in (1, -1):
            tab.evaluate(f"document.querySelectorAll('#runs th button')[{at}].click()")
            values = tab.evaluate(column.format(at))
            known = [float(value) for value in values if value]
            assert known == sorted(known, reverse=order < 0)
            assert values[len(known) :] == [""] * (len(values) - len(known))  # what is missing goes last
        shown = "[...document.querySelectorAll('#runs tbody tr')].filter(row => !row.hidden).length"
        typed = (
            "(value => {const box = document.getElementById('filter'); box.value = value;"
            "box.dispatchEvent(new Event('input'))})"
        )
        total = tab.evaluate(shown)
        tab.evaluate(f"{typed}('dropout')")
        assert 0 < tab.evaluate(shown) < total
        assert tab.evaluate("document.querySelectorAll('#runs img, #runs script, dl img').length") == 0
        assert tab.evaluate("document.getElementById('csv').href").startswith("blob:")
