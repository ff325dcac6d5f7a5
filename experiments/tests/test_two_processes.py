"""Two processes on a CPU train as one with the doubled batch does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small import OPTIONS, arguments, differences, outcome, run, unexpected
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.rng import Rng
from sparseout_experiments.training.run_folder import RunError
from test_kill import changed

# The mean of two halves' gradients is the whole's but for rounding, 2^-24 of the largest term of sums of up to some
# thousand terms: 1e-6 or so of a gradient, and so of every step, and of the loss.
ROUNDING = 2e-6


def started(kind: str, folder: Path, *more: str, **changed: Any) -> subprocess.Popen[str]:
    """Both processes, by torch's launcher, which finds a free port by itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = ["-m", "sparseout_experiments.cli", *arguments(kind, **changed), "--out", str(folder), *more]
    return subprocess.Popen(
        launcher + args,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(kind: str, folder: Path, *more: str, **changed: Any) -> str:
    process = started(kind, folder, *more, **changed)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, unexpected(err)) == (0, []), err
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("autoencoder", {}),
        ("image", {"norm": "group"}),
        ("language", {}),
        ("awd", {"weight_drop": 0, "embedding_drop": 0}),
    ],
)
def test_two_processes_are_one_with_the_doubled_batch(kind: str, changed: dict[str, Any], tmp_path: Path) -> None:
    # without noise, which each process draws for itself
    batch = OPTIONS[kind]["batch"]
    out = pair(kind, tmp_path / "pair", method="none", **changed)
    assert out.count("Wrote ") == 1
    run(tmp_path / "one", kind, method="none", batch=2 * batch, **changed)
    two, one = (outcome(tmp_path / name) for name in ("pair", "one"))
    assert (two["result"]["processes"], one["result"]["processes"]) == (2, 1)
    assert two["result"]["steps"] == one["result"]["steps"]
    metric = "loss" if kind == "image" else one["result"]["metric"]  # of 50 images one more may be misclassified
    for name in ("one", "pair"):
        losses = [line["train_loss"] for line in run_folder.metrics(tmp_path / name)]
        assert len(set(losses)) == 3
    for mine, other in zip(two["metrics"], one["metrics"], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=ROUNDING)
        assert mine["valid"][metric] == pytest.approx(other["valid"][metric], rel=ROUNDING)
    # the same order and augmentation, drawn as often
    for name in ("order", "augment"):
        states = [state["streams"][name] for state in two["state"]["processes"] + one["state"]["processes"]]
        assert differences(states[1:], states[:-1]) == []


def test_processes_share_all_but_the_noise() -> None:
    drawn = []
    for process in (0, 1, 0):
        streams = Rng(3, process)
        drawn.append([torch.rand(4, generator=g) for g in (streams.init, streams.shuffle, streams.augment)])
        drawn[-1].append(torch.rand(4))
    assert differences(drawn[0], drawn[2]) == []
    assert differences(drawn[0], drawn[1]) == ["/3"]
    assert len({tuple(values.tolist()) for values in drawn[0]}) == 4


def kill(process: subprocess.Popen[str]) -> None:
    """The launcher first, which would end the others gently, then both processes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_a_killed_pair_goes_on(tmp_path: Path) -> None:
    options = {"epochs": 30, "checkpoint_minutes": 0}
    pair("language", tmp_path / "whole", **options)
    whole = outcome(tmp_path / "whole")
    first, second = (state["streams"]["noise"][0] for state in whole["state"]["processes"])
    assert not torch.equal(first, second)
    folder = tmp_path / "killed"
    saved = changed(folder / run_folder.CHECKPOINT)
    process = started("language", folder, **options)
    while process.poll() is None and not saved():
        time.sleep(0.001)
    time.sleep(0.2)
    kill(process)
    state, told = run_folder.load(folder)
    assert state is not None
    assert told == ""
    assert 0 < state["steps"] < whole["result"]["steps"]
    with pytest.raises(RunError, match=r"was started with 2 processes, not 1: resume it with as many$"):
        run(folder, "language", **options)
    pair("language", folder, "--resume", **options)
    assert differences(whole, outcome(folder)) == []
