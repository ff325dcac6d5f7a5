import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sparseout_experiments.studies import control
from sparseout_experiments.studies.control import collect, grid
from sparseout_experiments.studies.control.collect import Ledger
from sparseout_experiments.studies.control.grid import TUNING_SEED, Run, Setting, Value
from sparseout_experiments.studies.engine import study
from sparseout_experiments.studies.engine.cluster import Job, Outcome
from sparseout_experiments.studies.engine.jobs import Progress, StudyStopped
from study_pages import blank
from study_rows import Inline, fake_train, result_of

HERE = Path(__file__).parent


def reproduce(tmp_path: Path, train: Any = fake_train, tasks: tuple[str, ...] = ("image",), **options: Any) -> Ledger:
    request = study.Request(tasks, tmp_path / "work")
    found = study.reproduce(
        control.STUDY, request, tmp_path / "results", tmp_path / "docs/page.md", train=train, **options
    )
    assert isinstance(found, Ledger)
    return found


@pytest.fixture(autouse=True)
def _blank(monkeypatch: pytest.MonkeyPatch) -> None:
    blank(monkeypatch)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Cluster", Inline)


def calls(work: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in work.rglob("calls")}


def failing(task: Any, options: dict[str, Any], folder: Path) -> None:
    """Diverges at q = 3 on seed 2, and in the trial of q = 3 at the smaller p; its process dies at q = 2.5, seed 4."""
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ  # of Dask's, with which trainings are slow
    q, seed, p = options.get("q"), options["seed"], options.get("p")
    if q == 2.5 and seed == 4 and options["scale"] == "paper" and not (folder / "calls").exists():
        folder.mkdir(parents=True)
        (folder / "calls").write_text("x")
        os._exit(9)
    if q == 3 and options["scale"] == "matched" and (seed == 2 or (seed == TUNING_SEED and p == 0.1)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.json").write_text(
            json.dumps({"status": "failed", "step": 7, "reason": "the loss is NaN at step 7", "config": options})
        )
    else:
        fake_train(task, options, folder)


def refusing(task: Any, options: dict[str, Any], folder: Path) -> None:
    if options["seed"] == 1:
        raise OSError("the disk is full")
    fake_train(task, options, folder)


def empty_handed(task: Any, options: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def slowly(task: Any, options: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"process-{os.getpid()}").touch()
    if (folder.parent / "hang").exists():
        (folder / "hangs").touch()
        time.sleep(100)
    time.sleep(0.1)
    fake_train(task, options, folder)


@pytest.mark.usefixtures("inline")
def test_everything_runs_once_and_nothing_a_second_time(tmp_path: Path) -> None:
    heard: list[Progress] = []
    ledger = reproduce(tmp_path, on_progress=heard.append)
    assert len(ledger.results) == 57
    assert set(calls(tmp_path / "work").values()) == {1}
    assert [one.done for one in heard] == list(range(58))
    assert [one.running for one in heard] == [2] * 15 + [1] + [2] * 40 + [1, 0]  # one, while the last trial decides
    assert {one.total for one in heard} == {57}
    assert math.isnan(heard[0].left)
    assert [one.left for one in heard[1:]] == pytest.approx([4.2 * (57 - done) / 2 for done in range(1, 58)])
    assert all("seed=100" in one.now for one in heard[1:17])  # no seed starts before p is chosen
    heard.clear()
    again = reproduce(tmp_path, on_progress=heard.append)
    assert not heard
    assert again.results.keys() == ledger.results.keys()
    assert set(calls(tmp_path / "work").values()) == {1}
    assert study.outlook(control.STUDY, study.Request(("image",), tmp_path / "work"), 2) == ({"image": (57, 57)}, 57, 0)


@pytest.mark.usefixtures("inline")
def test_tuning_comes_first_and_an_interrupted_study_keeps_what_it_has(tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []

    def interrupt(task: Any, options: dict[str, Any], folder: Path) -> None:
        if len(started) == 20:
            raise KeyboardInterrupt
        started.append(options)
        fake_train(task, options, folder)

    both = ("autoencoder", "image")
    with pytest.raises(KeyboardInterrupt):
        reproduce(tmp_path, interrupt, both)
    assert [options["seed"] for options in started] == [TUNING_SEED] * 16 + [0] * 4
    record = collect.load(tmp_path / "results" / "control-small-image.json")
    assert set(record.frame["role"]) >= {"tuning"}
    assert "runs are still missing" in (tmp_path / "docs" / "page.md").read_text()
    # trials and four runs of 265 and 57 have ended, of 4.2 s each
    tasks, total, left = study.outlook(control.STUDY, study.Request(both, tmp_path / "work"), 3)
    assert (tasks, total) == ({"autoencoder": (265, 4), "image": (57, 16)}, 322)
    assert left == pytest.approx(4.2 * (322 - 20) / 3)


@pytest.mark.usefixtures("inline")
def test_every_network_has_run_on_a_seed_before_the_next_one_begins(tmp_path: Path) -> None:
    started: list[tuple[int, str]] = []

    def train(task: Any, options: dict[str, Any], folder: Path) -> None:
        started.append((options["seed"], folder.parent.name))
        fake_train(folder.parent.name, options, folder)  # type: ignore[arg-type]

    tasks = ("image", "language", "transformer")
    request = study.Request(tasks, tmp_path / "work", "medium")
    study.reproduce(control.STUDY, request, tmp_path / "results", tmp_path / "page.md", train=train)
    assert [seed for seed, _ in started[24:]] == sorted(seed for seed, _ in started[24:])
    assert {task for seed, task in started if seed == 0} == set(tasks)
    assert collect.load(tmp_path / "results" / "control-medium-transformer.json").missing == 0


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_a_study_goes_on_from_its_results_where_the_runs_are_gone(tmp_path: Path) -> None:
    whole, page = collect.path_of(tmp_path / "results", "small", "image"), tmp_path / "docs/page.md"
    reproduce(tmp_path)
    text, content = page.read_text(), json.loads(whole.read_text())
    shutil.rmtree(tmp_path / "work")
    page.unlink()
    gone = [entry for entry in content["rows"] if entry["seed"] == 3]
    whole.write_text(json.dumps(content | {"rows": [entry for entry in content["rows"] if entry["seed"] != 3]}))
    request = study.Request(("image",), tmp_path / "work")
    recorded = control.STUDY.recorded(request, tmp_path / "results")
    assert study.outlook(control.STUDY, request, 2, recorded)[0] == {"image": (57, 57 - len(gone))}
    reproduce(tmp_path, recorded=recorded)
    assert len(calls(tmp_path / "work")) == len(gone) > 0
    assert (page.read_text(), json.loads(whole.read_text())) == (text, content)

    whole.write_text(json.dumps(content | {"config": content["config"] | {"epochs": 5}}))
    with pytest.raises(ValueError, match=r"image.json holds runs with epochs = 5 where the study wants 6$"):
        control.STUDY.recorded(request, tmp_path / "results")
    assert control.STUDY.recorded(request, tmp_path) == {}


@pytest.mark.usefixtures("inline")
def test_the_files_of_results_say_what_the_runs_said(tmp_path: Path) -> None:
    reproduce(tmp_path)
    record = collect.load(tmp_path / "results" / "control-small-image.json")
    assert (record.planned, record.missing, len(record.finished)) == (57, 0, 57)
    for row in record.frame.itertuples():
        result = result_of("image", grid.options(row.run, "small", {}, {}))
        assert row.metric == result["test"]["error"]
        assert (row.hoyer, row.dead) == (result["mean"]["hoyer"], result["mean"]["dead"])
        assert (row.last_hoyer, row.last_hoyer_live, row.last_dead) == tuple(
            result["last"][name] for name in ("hoyer", "hoyer_live", "dead")
        )
        assert (row.device, row.best_epoch) == ("cpu", 7)
    assert record.chosen[Setting("sparseout", 2.0)] == Value("p", 0.1)  # by the formula of the made-up results
    text = (tmp_path / "results" / "control-small-image.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["config"]["depth"] == 16
    assert not {"q", "p", "seed"} & json.loads(text)["config"].keys()  # only what all runs share


@pytest.mark.parametrize("content", ["", "{", '{"epoch": 5, "mean": {}}', '{"epoch": 6}', "[]"])
def test_a_curve_that_does_not_reach_the_last_epoch_says_nothing_of_it(tmp_path: Path, content: str) -> None:
    run = grid.first("small", "image")[0]
    options = grid.options(run, "small", {}, {})
    job = Job("image", options, tmp_path / "run")
    fake_train("image", options, job.folder)
    whole, part = Ledger(), Ledger()
    assert whole.note(run, job)
    (job.folder / "metrics.jsonl").write_text(content)
    assert part.note(run, job)
    assert whole.results[run]["last"]["hoyer"] > 0
    assert part.results[run]["last"] is None
    first, second = (collect.load(collect.save(tmp_path, "small", "image", one)).frame for one in (whole, part))
    assert math.isnan(second["last_hoyer"][0])
    assert first["digest"][0] == second["digest"][0]  # identity is that of the run, not of what was kept of its curve


@pytest.mark.slow
def test_failed_runs_are_recorded_and_those_whose_worker_died_are_run_again(tmp_path: Path) -> None:
    ledger = reproduce(tmp_path, failing)
    assert {(run.setting.q, run.seed) for run in ledger.failures} == {(3.0, 2), (3.0, TUNING_SEED)}
    assert not ledger.lost
    (repeated,) = [name for name, count in calls(tmp_path / "work").items() if count != 1]
    assert "q=2.5" in repeated
    record = collect.load(tmp_path / "results" / "control-small-image.json")
    assert set(record.failed["reason"]) == {"the loss is NaN at step 7"}
    assert record.chosen[Setting("sparseout", 3.0, "matched", "detached")] == Value(
        "p", 0.3
    )  # the trial that failed lost
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "failed: the loss is NaN at step 7" in page
    before = calls(tmp_path / "work")
    assert reproduce(tmp_path, failing).failures.keys() == ledger.failures.keys()
    assert calls(tmp_path / "work") == before


def test_lost_runs_are_recorded_and_repeated_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(Inline):
        def wait(self) -> Outcome:
            lost = (self._jobs[0].options.get("q"), self._jobs[0].options["seed"]) == (2.5, 4)
            return Outcome(self._jobs.pop(0), None, "its worker died again and again") if lost else super().wait()

    monkeypatch.setattr(study, "Cluster", Losing)
    ledger = reproduce(tmp_path)
    assert {run.seed for run in ledger.lost} == {4}
    record = collect.load(tmp_path / "results" / "control-small-image.json")
    assert set(record.failed["reason"]) == {"its worker died again and again"}
    monkeypatch.setattr(study, "Cluster", Inline)
    assert not reproduce(tmp_path).lost
    assert {calls(tmp_path / "work")[run.key] for run in ledger.lost} == {1}


@pytest.mark.usefixtures("inline")
def test_what_every_run_would_meet_stops_the_study_and_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(StudyStopped, match=r"image, .*seed=1: the disk is full"):
        reproduce(tmp_path, refusing)
    record = collect.load(tmp_path / "results" / "control-small-image.json")
    assert len(record.finished) >= 16
    with pytest.raises(StudyStopped, match="ended without a result"):
        reproduce(tmp_path / "other", empty_handed)


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run = grid.first("small", "image")[0]
    folder = tmp_path / "small" / "image" / run.key
    folder.mkdir(parents=True)
    options = grid.options(run, "small", {}, {})
    (folder / "result.json").write_text(json.dumps(result_of("image", options | {"data": "/elsewhere/cifar10"})))
    request = study.Request(("image",), tmp_path, common={"device": "cuda"})
    assert study.outlook(control.STUDY, request, 1)[0] == {
        "image": (16, 1)
    }  # where data lie and it ran is no part of a run
    (folder / "result.json").write_text(json.dumps(result_of("image", options | {"epochs": 3})))
    with pytest.raises(StudyStopped, match="epochs = 3 where the study wants 6"):
        study.outlook(control.STUDY, request, 1)
    for content in ("{", "{}", "[]", '{"config": 3}'):
        (folder / "result.json").write_text(content)
        with pytest.raises(StudyStopped, match="cannot be read: remove"):
            study.outlook(control.STUDY, request, 1)


def test_a_value_that_is_not_finite_is_null_in_the_file_and_nan_again(tmp_path: Path) -> None:
    run = Run("autoencoder", Setting("none"), None, 0, "grid")
    result = result_of("autoencoder", grid.options(run, "small", {}, {}))
    result["mean"]["hoyer"] = result["sparsity"]["code"]["hoyer"] = math.nan
    (row,) = collect.load(collect.save(tmp_path, "small", "autoencoder", Ledger({run: result}))).frame.itertuples()
    assert math.isnan(row.hoyer)
    assert row.hoyer_live == result["mean"]["hoyer_live"]


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ("", "results"),
        ("[]", "results"),
        ('{"kind": "other"}', "results"),
        ('{"kind": "sparseout control study"}', "whole results"),
    ],
)
def test_a_file_that_is_not_ours_is_said_so(tmp_path: Path, content: str, held: str) -> None:
    path = tmp_path / "control-small-image.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"does not hold {held} of sparseout control study"):
        control.STUDY.render(tmp_path, tmp_path / "page.md")


SCRIPT = """
import signal
import sys
from pathlib import Path
from test_study_runner import slowly
from sparseout_experiments.studies import control
from sparseout_experiments.studies.engine import study
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    root = Path(sys.argv[1])
    request = study.Request(("image",), root / "work")
    study.reproduce(control.STUDY, request, root / "results", root / "page.md", train=slowly)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_study_that_was_killed_leaves_no_process_and_goes_on(tmp_path: Path, kill: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    work = tmp_path / "work"
    deadline = time.monotonic() + 180
    _until(lambda: len(list(work.rglob("result.json"))) >= 5, deadline)
    (work / "small" / "image" / "hang").touch()
    _until(lambda: len(list(work.rglob("hangs"))) == 2, deadline)
    if kill == signal.SIGINT:
        os.killpg(process.pid, kill)  # as a terminal does: to every process of the group
    else:
        process.kill()
    _, said = process.communicate(timeout=60)
    done = {path.parent.name for path in work.rglob("result.json")}
    workers = {int(path.name.removeprefix("process-")) for path in work.rglob("process-*")}
    assert len(workers) == 2
    _until(lambda: not any(_alive(worker) for worker in workers), time.monotonic() + 10)
    if kill == signal.SIGINT:
        assert said.decode().rstrip().endswith("KeyboardInterrupt")  # of the first process; no worker adds its own
        assert said.decode().count("Traceback") == 1
        assert len(collect.load(tmp_path / "results" / "control-small-image.json").finished)
    (work / "small" / "image" / "hang").unlink()
    ledger = reproduce(tmp_path)
    assert len(ledger.results) == 57
    assert all(calls(work)[name] == 1 for name in done)


def _until(holds: Callable[[], bool], deadline: float) -> None:
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
