"""The command bench: whole, interrupted, and what it refuses."""

import json
import os

import pytest
import torch
from small import status_of, unexpected
from sparseout_experiments.bench import cases, measure, page, store
from sparseout_experiments.bench.timing import Budget

N = 4096


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


@pytest.mark.slow
def test_the_whole_command(tiny, tmp_path, capfd):
    folder = tmp_path / "made" / "here"
    assert status_of("bench", "--quick", "--device", "cpu", "--out", str(folder)) == 0
    (path,) = folder.glob("*-quick.json")
    found = json.loads(path.read_text())
    assert sorted(os.listdir(folder)) == sorted(["bench.md", path.name, path.with_suffix(".png").name])
    rows = {(row["case"], row["implementation"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 3 * 12 + 9 + (2 * 3 + 2) + (9 + 5 + 2 * 3) + 9
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


@pytest.mark.slow
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
    assert capfd.readouterr().err.endswith("interrupted: 2 of 4 cases were finished; the same command goes on\n")
    assert not (tmp_path / "bench.md").exists()
    assert status_of(*args) == 0
    assert len(calls) == 3 + 2
    calls[:] = calls[:2]
    assert (
        status_of("bench", "--quick", "--device", "cpu", "--only", "operation", "--out", str(tmp_path / "new")) == 130
    )
    assert "0 of 7 cases were finished" in capfd.readouterr().err
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
