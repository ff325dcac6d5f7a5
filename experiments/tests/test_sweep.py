"""Sweeps: the plan, the folders, what is left after a stop, and the command."""

import json
import math
import os

import pytest
from sparseout_experiments import cli, config
from sparseout_experiments.commands import common
from sparseout_experiments.studies.engine import frame, sweep
from sparseout_experiments.studies.engine.jobs import Progress, StudyStopped
from study_rows import Inline, trained

OPTIONS = {"method": ["sparseout", "dropout"], "q": [1.0, 1.5, 2.0], "epochs": [2], "units": [8]}


def status(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(sweep, "Cluster", Inline)


def failing(task, options, folder):
    if options["q"] == 1.5:
        folder.mkdir(parents=True, exist_ok=True)
        found = config.resolve(task, options)
        record = {"status": "failed", "reason": "the loss is NaN at step 7", "config": config.record(found)}
        (folder / "failure.json").write_text(json.dumps(record))
        (folder / "config.toml").write_text(config.write(found))
    else:
        trained(task, options, folder)


def test_a_method_is_not_repeated_for_options_it_has_no_use_for(tmp_path):
    jobs = sweep.grid("autoencoder", OPTIONS, 2, tmp_path)
    assert list(jobs) == [
        *(f"method=sparseout q={q} seed={seed}" for q in (1.0, 1.5, 2.0) for seed in (0, 1)),
        *(f"method=dropout seed={seed}" for seed in (0, 1)),
    ]
    assert "q" not in jobs["method=dropout seed=0"].options
    assert len({job.folder for job in jobs.values()}) == len(jobs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"q": [1.0], "method": ["dropout"]}, r"expected `q` to be left out, as the method is dropout, but got 1\.0"),
        ({"q": [-1.0]}, "expected `q` to be a finite number >= 0"),
        ({"colour": ["red"]}, "expected `colour` to be an option of autoencoder"),
        ({"q": [float(q) for q in range(50_001)]}, "expected `the sweep` to be at most 100000 runs, but got 100002"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        sweep.grid("autoencoder", options, 2, tmp_path)


def test_folders_of_hostile_names_are_plain_and_differ(tmp_path):
    values = ["a/../../b", "a_.._.._b", "<script>", "x" * 300, "x" * 301, "naïve", "a b", "a_b"]
    jobs = sweep.grid("autoencoder", {"data": values}, 1, tmp_path)
    names = [job.folder.name for job in jobs.values()]
    assert len(set(names)) == len(values)
    assert all(name.isascii() and len(name) <= 100 and "/" not in name for name in names)
    assert {job.folder.parent for job in jobs.values()} == {tmp_path}


@pytest.mark.usefixtures("inline")
def test_a_failed_run_is_a_result_and_what_has_ended_is_not_repeated(tmp_path):
    jobs = sweep.grid("autoencoder", {"q": [1.0, 1.5], "epochs": [2]}, 2, tmp_path)
    heard = []
    ended = sweep.perform(jobs, tmp_path, 2, None, "sparseout sweep", heard.append, failing)
    assert ended.results.keys() == {name for name in jobs if "q=1.0" in name}
    assert ended.failures == {name: "the loss is NaN at step 7" for name in jobs if "q=1.5" in name}
    assert [(one.done, one.failed) for one in heard] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]
    assert [one.running for one in heard] == [2, 2, 2, 1, 0]
    assert heard[0].total == 4
    sweep.perform(jobs, tmp_path, 2, None, "again", train=failing)
    assert {len((jobs[name].folder / "calls").read_text()) for name in jobs if "q=1.0" in name} == {1}
    planned, command = sweep.plan_of([tmp_path])
    assert command == "again"
    results = frame.read([tmp_path], planned, command)
    assert dict(results.frame["status"].value_counts()) == {"finished": 2, "failed": 2}
    assert results.swept == {"q": [1.0, 1.5]}
    settings = results.settings().set_index("q")
    assert list(settings["seeds"]) == [2, 0]
    assert list(settings["failed"]) == [0, 2]


@pytest.mark.usefixtures("inline")
def test_runs_of_other_options_are_not_taken_for_ones_own(tmp_path):
    jobs = sweep.grid("autoencoder", {"q": [1.0, 2.0], "epochs": [2]}, 1, tmp_path)
    sweep.perform(jobs, tmp_path, 2, None, "", train=trained)
    others = sweep.grid("autoencoder", {"q": [1.0, 2.0], "epochs": [3]}, 1, tmp_path)
    with pytest.raises(StudyStopped, match="holds a run with epochs = 2 where the study wants 3"):
        sweep.perform(others, tmp_path, 2, None, "", train=trained)


def test_the_plan_is_shown_and_nothing_is_written(tmp_path, capsys):
    arguments = ["sweep", "autoencoder", "--q", "1,2", "--p", ".2", "--seeds", "2", "--dry-run"]
    assert status(*arguments, "--out", str(tmp_path / "new")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "q=1.0 seed=0",
        "q=1.0 seed=1",
        "q=2.0 seed=0",
        "q=2.0 seed=1",
        "4 runs: 2 settings with 2 seeds each; 0 have ended. How long they take is known when the first has finished.",
    ]
    assert not (tmp_path / "new").exists()


def test_the_plan_estimates_what_is_left_from_what_has_finished(tmp_path, capsys):
    options = {"q": [1.0, 2.0], "epochs": [2]}
    for job in list(sweep.grid("autoencoder", options, 2, tmp_path).values())[:3]:
        trained(*job)  # in 4.2 seconds
    arguments = ["sweep", "autoencoder", "--q", "1,2", "--epochs", "2", "--out", str(tmp_path), "--dry-run"]
    assert status(*arguments, "--seeds", "7", "--workers", "3") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "14 runs: 2 settings with 7 seeds each; 3 have ended. "
        "About 0:00:15 (hours, minutes, seconds) are left with 3 at a time."  # 11 * 4.2 / 3
    )


def test_the_line_of_progress_counts_and_estimates(monkeypatch, capsys):
    monkeypatch.setattr(common, "_EVERY", 0.0)
    with common.counting_runs() as show:
        show(Progress(0, 0, 2, 40, math.nan, ""))
        show(Progress(3, 1, 2, 40, 3723.4, "q=1.0 seed=2 finished"))
    first, second = capsys.readouterr().err.splitlines()
    assert " ".join(first.split()).endswith(" run 0/40 2 running")
    assert " ".join(second.split()).endswith(" run 3/40 2 running, 1 failed, 1:02:03 left, q=1.0 seed=2 finished")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep", "autoencoder", "--q", "1,two"], "expected `--q` to be a finite number >= 0, but got 'two'"),
        (["sweep", "autoencoder", "--method", "dropout", "--q", "1,2"], "expected `--q` to be left out"),
        (["sweep"], "The commands are autoencoder, image, language"),
        (["report", "nowhere"], "expected `FOLDER` to be a folder of runs, but got 'nowhere'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    captured = capsys.readouterr()
    assert sentence in " ".join((captured.err + captured.out).split())
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("inline")
def test_the_command_ends_in_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep.perform, "__defaults__", (*sweep.perform.__defaults__[:-1], trained))
    out = tmp_path / "sweep"
    assert status("sweep", "autoencoder", "--q", "1,2", "--seeds", "2", "--epochs", "2", "--out", str(out)) == 0
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        *("report.html", "sweep.csv", "table.tex", "sweep.json", "report.json")
    }
    page = (out / "report.html").read_text()
    assert "4 runs: 4 finished" in page
    assert len((out / "sweep.csv").read_text().splitlines()) == 5
    assert status("report", str(out / "q=1.0_seed=0"), "--out", str(tmp_path / "one")) == 0
    page = (tmp_path / "one/report.html").read_text()
    assert "1 run: 1 finished" in page
    (tmp_path / "one/report.html").unlink()
    assert status("report", str(tmp_path / "one/report.json")) == 0
    assert "1 run: 1 finished" in (tmp_path / "one/report.html").read_text()
    assert status("report", str(tmp_path / "one/sweep.csv")) == 2
