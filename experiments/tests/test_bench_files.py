"""The file of rows survives a kill, the page says what the rows say, and the command does it all."""

import json
import os

import pytest
import torch
from small import unexpected
from sparseout_experiments import cli
from sparseout_experiments.bench import cases, measure, page, plot, store
from sparseout_experiments.bench.timing import Budget
from sparseout_experiments.training import environment

N = 4096
HERE = {
    "device": {"type": "cpu", "name": "Some CPU (R), 2 cores"},
    "versions": {"torch": "9.8.7"},
    "source": "abc",
    "backend": {"name": "torch", "reason": "no kernel"},
    "quick": False,
}
PLANNED = [cases.Operation(64, "fp32", 1), cases.Operation(N, "fp32", 1), cases.Model("some", "eager", 1)]


def status_of(*args):
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    return stopped.value.code


def fake(case, implementation="F.dropout", ratio=1.0, phases=("forward", "backward", "both"), **more):
    def around(value):
        return {phase: {"median": value, "low": 0.9 * value, "high": 1.1 * value} for phase in phases}

    return {
        "section": case.section,
        "case": case.key,
        **vars(case),
        "implementation": implementation,
        "date": "2031-02-03",
        "rounds": 9,
        "seconds": around(ratio * 0.002),
        "ratio": around(ratio),
        **more,
    }


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


def record(device="cpu", name="Some CPU", ratio=1.237):
    threads = 2 if device == "cpu" else None
    clock = "wall" if device == "cpu" else "events"
    small, large = (
        cases.Operation(64, "fp32", threads, clock="wall"),
        cases.Operation(2**20, "fp32", threads, clock=clock),
    )
    channels = cases.Operation(2**20, "fp32", threads, "channel mask, NCHW", clock)
    step = cases.Model("WRN-16-2, batch 16", "compiled", threads)
    sizes = {"input_bytes": 4 * 2**20, "copy_bytes_per_second": 34e9, "peak_bytes": 12 * 2**20, "kept_bytes": 2**20}
    sizes |= {"of_copy_bandwidth": {"forward": 0.123, "backward": 0.456, "both": 0.789}, "kept_input_bytes": 0}
    rows = [
        fake(small),
        fake(small, "Sparseout q=1.5", 33.33),
        fake(large, **sizes),
        fake(large, "Sparseout q=1.5", ratio, **(sizes | {"kept_input_bytes": 4})),
        {k: v for k, v in fake(large, "compiled", failed="no compiler").items() if k not in ("seconds", "ratio")},
        fake(channels, "F.dropout2d"),
        fake(channels, "Sparseout2d q=1.5", 7.654),
        fake(step, "nn.Dropout", 1.0, ("step",), peak_bytes=7_000_000),
        fake(step, "no dropout", 0.456, ("step",), peak_bytes=None),
    ]
    here = HERE | {"device": {"type": device, "name": name}}
    return store.Record(here, [row["case"] for row in rows], rows)


def test_the_page_says_what_the_rows_say():
    text = page.page([record()], "there")
    lines = text.splitlines()
    assert "## Some CPU" in lines
    assert "Measured 2031-02-03 with torch 9.8.7. Sparseout's code abc, backend torch (no kernel)." in text
    assert "|  | 64, 2 threads | 1M, 2 threads |" in lines
    assert "| Sparseout q=1.5 | **33.3** (66.7 ms) | **1.24** (2.47 ms) |" in lines
    assert "| compiled |  | failed |" in lines
    assert "- compiled failed in 1M fp32, vector, 2 threads: no compiler" in lines
    detail = next(line for line in lines if line.startswith("| Sparseout q=1.5 | **1.24** [1.11-1.36]"))
    assert detail.endswith("| 12% 46% 79% | 12 | 1 + input |")
    assert "The input has 4 bytes an element; copying it ran at 34 GB/s." in lines
    assert any(line.startswith("| Sparseout2d q=1.5, channel mask, NCHW | **7.65** [6.89-8.42]") for line in lines)
    assert "| nn.Dropout | **1.00** [0.90-1.10] (2.00 ms) 7 MB |" in lines
    assert "| no dropout | **0.46** [0.41-0.50] (912 µs) |".replace("912 µs", "0.912 ms") in lines
    assert "Interrupted" not in text


def test_missing_gpu_rows_are_said_with_the_command_that_makes_them():
    without, with_one = page.page([record()], "there"), page.page([record(), record("cuda", "A GPU", 1.01)], "there")
    assert "**Rows from a GPU are missing**" in without
    assert "`sparseout bench --device cuda --out there`" in without
    assert "missing" not in with_one
    gpu = with_one[with_one.index("## A GPU") :]
    assert "|  | 64, host | 1M |" in gpu
    assert "**1.01**" in gpu
    assert "by CUDA events" in gpu
    assert "by CUDA events" not in with_one[: with_one.index("## A GPU")]


def test_an_unfinished_file_says_so():
    one = record()
    one.planned.append("a case that was not reached")
    assert "Interrupted: 1 case of 10 not measured yet." in page.page([one], "x")


def test_devices_live_side_by_side(tmp_path):
    for one in (record(), record("cuda", "A GPU")):
        store.save(one, tmp_path)
    assert [path.name for path in page.write(tmp_path)] == ["bench.md", "a-gpu.png", "some-cpu.png"]
    text = (tmp_path / "bench.md").read_text()
    assert text.count("\n## ") == 2
    assert all(f"]({name}.png)" in text for name in ("a-gpu", "some-cpu"))
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("a-gpu", "some-cpu"))


def test_the_plot_shows_every_ratio_but_the_yardsticks(monkeypatch):
    drawn = []
    whole = plot.Axes.errorbar

    def errorbar(self, x, y, xerr, **options):
        drawn.extend(zip(x, *xerr, strict=True))
        return whole(self, x, y, xerr=xerr, **options)

    monkeypatch.setattr(plot.Axes, "errorbar", errorbar)
    plot.picture(record())
    assert sorted(drawn) == [pytest.approx((r, 0.1 * r, 0.1 * r)) for r in (0.456, 1.237, 33.33)]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1.5e-6, "1.50 µs"),
        (9.996e-5, "100 µs"),
        (1e-4, "0.100 ms"),
        (0.01234, "12.3 ms"),
        (0.09996, "100 ms"),
        (2, "2000 ms"),
    ],
)
def test_durations(seconds, shown):
    assert page.duration(seconds) == shown


@pytest.mark.parametrize(("ratio", "shown"), [(0.256, "0.26"), (9.994, "9.99"), (9.996, "10.0"), (123.4, "123")])
def test_ratios(ratio, shown):
    assert page.number(ratio) == shown


@pytest.fixture
def tiny(monkeypatch):
    """A plan of seconds in which nothing can be compiled."""

    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler here\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(cases, "cores", lambda: 1)
    monkeypatch.setitem(cases.MODELS, "WRN-10-1, batch 2", cases.Images(10, 1, 2))
    monkeypatch.setitem(cases.MODELS, "LSTM 2 x 8, batch 2 x 3 steps", cases.Text(2, 8, 8, 2, 3, 20))
    models = dict.fromkeys(("WRN-10-1, batch 2", "LSTM 2 x 8, batch 2 x 3 steps"), ("eager", "compiled"))
    plan = cases.Plan(Budget(0, 3, 3), (64, N), ("fp32", "bf16"), N, models, (8,), (N,))
    monkeypatch.setitem(cases.PLANS, ("cpu", True), plan)
    monkeypatch.setitem(measure.LATENCY_CALLS, "wall", 2)


def test_what_would_fail_at_the_end_fails_at_the_start(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(store, "run", lambda *_: pytest.fail("measured all the same"))
    assert status_of("bench", "--quick", "--device", "cpu", "--out", "") == 2
    assert "expected `--out` to be the name of a folder, but got ''" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("SPARSEOUT_BACKEND", "foo")
        assert status_of("bench", "--quick", "--device", "cpu", "--out", str(tmp_path)) == 2
    assert (
        "expected `SPARSEOUT_BACKEND` to be 'auto', 'torch', 'triton' or 'native', but got 'foo'"
        in capfd.readouterr().err
    )
    (tmp_path / "results.json").write_text('{"experiment": "demo"}')
    assert status_of("bench", "--quick", "--device", "cpu", "--out", str(tmp_path)) == 1
    assert "does not hold rows of sparseout bench" in capfd.readouterr().err


def test_the_whole_command(tiny, tmp_path, capfd):
    folder = tmp_path / "made" / "here"
    assert status_of("bench", "--quick", "--device", "cpu", "--out", str(folder)) == 0
    (path,) = folder.glob("*-quick.json")
    found = json.loads(path.read_text())
    assert sorted(os.listdir(folder)) == sorted(["bench.md", path.name, path.with_suffix(".png").name])
    rows = {(row["case"], row["implementation"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 3 * 12 + 9 + (2 * 3 + 2) + (9 + 5 + 2 * 3) + 9
    assert set(found["planned"]) == {case for case, _ in rows}
    failed = {implementation for (_, implementation), row in rows.items() if "failed" in row}
    assert failed == {"plain formula, compiled", "nn.Dropout", "no dropout", "Sparseout q=1.5"}
    assert {row["failed"] for row in rows.values() if "failed" in row} == {"no C++ compiler here"}
    dropout, ours = (
        rows[f"{N} fp32, vector, 1 thread", implementation] for implementation in ("F.dropout", "Sparseout q=1.5")
    )
    assert dropout["ratio"]["both"] == {"median": 1, "low": 1, "high": 1}
    assert ours["rounds"] == 3
    assert all(ours["of_copy_bandwidth"][phase] > 0 for phase in ("forward", "backward", "both"))
    assert ours["kept_bytes"] == dropout["kept_bytes"] == ours["input_bytes"] == 4 * N
    exact = rows[f"{N} fp32, vector, 1 thread", "Sparseout q=1.5 exact"]
    assert exact["kept_bytes"] in (0, 8)  # a seed, unless it is kept as a number
    assert exact["kept_input_bytes"] == 4 * N
    assert ours["peak_bytes"] >= 8 * N
    out, err = capfd.readouterr()
    assert max(map(len, out[: out.index("Wrote")].splitlines())) <= 80
    assert page.number(ours["ratio"]["both"]["median"]) in out
    assert unexpected(err) == []
    text = (folder / "bench.md").read_text()
    assert "plain formula, compiled failed in" in text
    heading, *lines = text.split("### The alternatives, beside one linear layer\n\n")[1].splitlines()
    assert heading == "|  | 8 x 8 |"
    shown = rows["Linear 8 x 8, batch 64", "Bridgeout, per example"]
    (line,) = (line for line in lines if line.startswith("| Bridgeout, per example |"))
    assert f"**{page.number(shown['ratio']['step']['median'])}**" in line
    assert shown["peak_bytes"] > 2 * 64 * 4 * 8 * 8
    assert "A linear layer: time over that with nn.Dropout" in " ".join(out.split())
    before = text, path.read_text()
    (folder / "bench.md").unlink()
    assert status_of("bench", "--render", "--out", str(folder)) == 0
    assert ((folder / "bench.md").read_text(), path.read_text()) == before


def test_one_half_and_an_interrupt(tiny, tmp_path, capfd, monkeypatch):
    whole, calls = store.measure, []

    def interrupted(*args):
        calls.append(args[0].key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(store, "measure", interrupted)
    args = ["bench", "--quick", "--device", "cpu", "--only", "model", "--out", str(tmp_path)]
    assert status_of(*args) == 130
    assert capfd.readouterr().err.endswith(
        "interrupted: 2 of 4 cases were finished; the same command goes on from there\n"
    )
    assert "Interrupted: 2 cases of 4 not measured yet." in (tmp_path / "bench.md").read_text()
    assert status_of(*args) == 0
    assert len(calls) == 3 + 2
    calls[:] = calls[:2]
    assert (
        status_of("bench", "--quick", "--device", "cpu", "--only", "operation", "--out", str(tmp_path / "new")) == 130
    )
    assert "0 of 7 cases were finished, and nothing was written" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--device", "tpu"], "expected `--device` to be cpu or cuda, but got 'tpu'"),
        (["--device", "cuda"], "expected `--device` to be cpu, since torch finds no CUDA device, but got 'cuda'"),
        (["--only", "half"], "expected `--only` to be operation, model or alternatives, but got 'half'"),
        (["--render"], "expected `--out` to be a folder with rows of sparseout bench, but got"),
        (["--fast"], "No such option: --fast"),
    ],
)
def test_a_bad_option_is_answered_with_one_sentence(args, sentence, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert status_of("bench", "--out", str(tmp_path / "new"), *args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"sparseout: {sentence}")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "measure", None)
    (tmp_path / "file").touch()
    assert status_of("bench", "--device", "cpu", "--out", str(tmp_path / "file")) == 2
    assert "expected `--out` to be a folder that can be written, but got" in capfd.readouterr().err
