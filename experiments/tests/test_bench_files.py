"""The file of rows of a benchmark survives a kill, and rows of other environments are not mixed in."""

import json
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


FILE = "some-cpu-r-2-cores.json"


def go(folder, here=HERE, todo=PLANNED):
    record = store.begun(folder, here)
    store.run(record, todo, folder, lambda *_: None)
    return record


def test_a_killed_run_goes_on_and_a_finished_one_stays(tmp_path, measured):
    log, kill = measured
    kill.append(PLANNED[2].key)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    assert store.load(tmp_path / FILE).cases == {PLANNED[0].key, PLANNED[1].key}
    kill.clear()
    assert [row["run"] for row in go(tmp_path).rows] == [1, 2, 3]
    assert [row["run"] for row in go(tmp_path).rows] == [1, 2, 3]
    assert log == [case.key for case in PLANNED]


@pytest.mark.parametrize("change", [{"versions": {"torch": "10"}}, {"source": "abd"}, {"backend": {"name": "cpu"}}])
def test_rows_of_another_environment_are_left_alone(change, tmp_path, measured):
    go(tmp_path)
    before = (tmp_path / FILE).read_text()
    with pytest.raises(store.NotRows, match="has rows of another version or backend: move it away"):
        go(tmp_path, HERE | change)
    assert (tmp_path / FILE).read_text() == before


def test_one_half_keeps_the_other(tmp_path, measured):
    go(tmp_path, todo=PLANNED[2:])
    assert [row["case"] for row in go(tmp_path).rows] == [PLANNED[index].key for index in (2, 0, 1)]


def test_a_quick_run_has_a_file_of_its_own(tmp_path, measured):
    go(tmp_path)
    go(tmp_path, HERE | {"quick": True})
    assert sorted(os.listdir(tmp_path)) == ["some-cpu-r-2-cores-quick.json", FILE]


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


@pytest.mark.parametrize(
    "damage",
    [
        {"environment": {}},
        {"environment": None},
        {"environment": {"device": {"name": 3}}},
        {"rows": [{}]},
        {"rows": [3]},
        {"rows": None},
        {"rows": [{"case": "a", "section": "operation"}]},
    ],
)
def test_rows_that_are_not_whole_are_one_sentence(damage, tmp_path, capfd):
    (tmp_path / FILE).write_text(json.dumps({"kind": store.KIND, "environment": HERE, "rows": []} | damage))
    assert status_of("bench", "--render", "--out", str(tmp_path)) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"sparseout: {tmp_path}")
    assert (error.count("\n"), " does not hold " in error) == (1, True)
    assert os.listdir(tmp_path) == [FILE]


def test_a_folder_in_the_place_of_rows_is_named(tmp_path, capfd):
    (tmp_path / FILE).mkdir()
    assert status_of("bench", "--render", "--out", str(tmp_path)) == 1
    assert capfd.readouterr().err == f"sparseout: {tmp_path / FILE} does not hold rows of sparseout bench\n"
