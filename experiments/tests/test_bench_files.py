"""The file of rows of a benchmark survives a kill, and rows of other environments are not mixed in."""

import os

import pytest
import torch
from bench_rows import HERE, fake
from small import status_of
from sparseout_experiments.bench import cases, store
from sparseout_experiments.training import environment

N = 4096
PLANNED = [cases.Operation(64, "fp32", 1), cases.Operation(N, "fp32", 1), cases.Model("some", "eager", 1)]


@pytest.fixture
def measured(monkeypatch):
    """Cases as they are measured; one is named to be killed at."""
    log, kill = [], []

    def stand_in(case, device, budget, heard):
        if case.key in kill:
            raise KeyboardInterrupt
        log.append(case.key)
        return [fake(case, run=len(log))]

    monkeypatch.setattr(store, "measure", stand_in)
    return log, kill


def go(folder, here=HERE, todo=PLANNED):
    record = store.resume(folder, here, todo, PLANNED)
    store.run(record, todo, folder, lambda *_: None)
    return record


def test_a_killed_run_goes_on_and_a_finished_one_starts_anew(tmp_path, measured):
    log, kill = measured
    kill.append(PLANNED[2].key)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert os.listdir(tmp_path) == ["some-cpu-r-2-cores.json"]
    assert store.load(tmp_path / "some-cpu-r-2-cores.json").missing == {PLANNED[2].key}
    kill.clear()
    assert not go(tmp_path).missing
    assert log == [case.key for case in PLANNED]
    assert [row["run"] for row in go(tmp_path).rows] == [4, 5, 6]


@pytest.mark.parametrize("change", [{"versions": {"torch": "10"}}, {"source": "abd"}, {"backend": {"name": "cpu"}}])
def test_rows_of_another_environment_are_not_mixed_in(change, tmp_path, measured):
    log, kill = measured
    kill.append(PLANNED[1].key)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    kill.clear()
    record = go(tmp_path, HERE | change)
    assert log == [PLANNED[0].key, *(case.key for case in PLANNED)]
    assert record.environment == HERE | change
    assert [row["run"] for row in record.rows] == [2, 3, 4]


@pytest.mark.parametrize("here", [HERE, HERE | {"source": "new"}])
def test_a_file_stays_whole_until_as_much_is_measured_anew(here, tmp_path, measured):
    _, kill = measured
    go(tmp_path)
    whole, partial = (tmp_path / f"some-cpu-r-2-cores.{ending}" for ending in ("json", "partial"))
    before = whole.read_text()
    kill.append(PLANNED[2].key)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, here)
    assert whole.read_text() == before
    assert store.load(partial).missing == {PLANNED[2].key}
    kill.clear()
    go(tmp_path, here)
    assert [row["run"] for row in store.load(whole).rows] == [4, 5, 6]
    assert store.load(whole).environment == here
    assert not partial.exists()


def test_fewer_cases_on_another_machine_have_a_file_of_their_own(tmp_path, measured):
    go(tmp_path)
    go(tmp_path, HERE | {"source": "new"}, PLANNED[2:])
    assert [row["run"] for row in store.load(tmp_path / "some-cpu-r-2-cores.json").rows] == [1, 2, 3]
    assert [row["run"] for row in store.load(tmp_path / "some-cpu-r-2-cores.partial").rows] == [4]


def test_one_half_measured_anew_keeps_the_other(tmp_path, measured):
    go(tmp_path)
    assert {row["case"]: row["run"] for row in go(tmp_path, todo=PLANNED[2:]).rows} == {
        PLANNED[0].key: 1,
        PLANNED[1].key: 2,
        PLANNED[2].key: 4,
    }


def test_a_case_that_is_no_longer_in_the_plan_goes(tmp_path, measured):
    go(tmp_path, todo=[*PLANNED, cases.Model("gone", "eager", 1)])
    assert {row["case"] for row in go(tmp_path).rows} == {case.key for case in PLANNED}


def test_a_quick_run_has_a_file_of_its_own(tmp_path, measured):
    go(tmp_path)
    go(tmp_path, HERE | {"quick": True})
    assert sorted(os.listdir(tmp_path)) == ["some-cpu-r-2-cores-quick.json", "some-cpu-r-2-cores.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "sparseout bench"}', '{"kind": "other", "environment": {}}']
)
def test_a_file_that_is_not_ours_is_named_and_left_alone(text, tmp_path, capfd, monkeypatch):
    path = tmp_path / "some-cpu-r-2-cores.json"
    path.write_text(text)
    monkeypatch.setattr(store, "environment", lambda *_: HERE)
    for args in ([], ["--render"]):
        assert status_of("bench", "--out", str(tmp_path), *args) == 1
        assert capfd.readouterr().err == f"sparseout: {path} does not hold rows of sparseout bench\n"
    assert path.read_text() == text


def test_the_environment_is_this_one(monkeypatch):
    here = store.environment("cpu", True)
    assert here["versions"]["torch"] == torch.__version__
    assert here["device"]["name"].endswith("core" + "s" * (cases.cores() > 1))
    assert here["quick"] is True
    assert len(here["source"]) == 10
    monkeypatch.setattr("sparseout.backend", lambda device: ("fast", f"of {device}"), raising=False)
    assert store.environment("cpu", True)["backend"] == {"name": "fast", "reason": "of cpu"}


@pytest.mark.parametrize("text", [None, "", "flags : fpu\n"])
def test_a_processor_without_a_name_has_that_of_its_kind(text, tmp_path, monkeypatch):
    def read(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(environment.Path, "read_text", read)
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")
    assert environment.processor() == "riscv64"
