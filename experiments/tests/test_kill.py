"""kill -9 at any moment, then --resume: the same run as one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import arguments, differences, outcome, unexpected
from sparseout_experiments.training import run_folder

MOMENTS = ("training", "saving", "anywhere")
LONGER: dict[str, dict[str, Any]] = {
    "autoencoder": {"epochs": 100},
    "image": {"epochs": 15},
    "awd": {"epochs": 40},
}  # a few seconds


def command(kind: str, folder: Path, *more: str) -> list[str]:
    args = arguments(kind, checkpoint_minutes=0, **LONGER[kind])  # saved at every look
    return [sys.executable, "-m", "sparseout_experiments.cli", *args, "--out", str(folder), *more]


def started(kind: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(kind, folder, *more),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(kind: str, folder: Path, *more: str) -> float:
    """Run to the end; the seconds it took."""
    begun = time.monotonic()
    process = started(kind, folder, *more)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, unexpected(err)) == (0, [])
    return time.monotonic() - begun


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.0005)


def changed(path: Path) -> Callable[[], bool]:
    """Whether a file is another one than now."""

    def identity() -> tuple[int, int] | None:
        try:
            return path.stat().st_ino, path.stat().st_mtime_ns
        except OSError:
            return None

    before = identity()
    return lambda: identity() not in (None, before)


def kill(kind: str, folder: Path, moment: str, life: float, chance: random.Random) -> str:
    """Start or resume the run and kill it; "killed", or "killed while saving" if it left half a checkpoint."""
    process = started(kind, folder, *(["--resume"] if (folder / run_folder.CONFIG).exists() else []))
    saved = changed(folder / run_folder.CHECKPOINT)
    if moment == "anywhere":
        time.sleep(chance.uniform(0, life))
    else:
        wait_for(process, saved)
        time.sleep(chance.uniform(0, 0.2))
    if moment == "saving":
        temporary = folder / f".{run_folder.CHECKPOINT}-{process.pid}"
        wait_for(process, temporary.exists)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, unexpected(err)) == (-signal.SIGKILL, []), err
    return "killed while saving" if any(folder.glob(f".{run_folder.CHECKPOINT}-*")) else "killed"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("autoencoder", 8), ("image", 2), ("awd", 2)])
def test_killed_again_and_again(kind: str, kills: int, tmp_path: Path) -> None:
    took = finished(kind, tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    life = took - run_folder.read_json(tmp_path / "whole" / run_folder.RESULT)["seconds"] + 0.3  # to the first steps
    chance = random.Random(0)
    folder = tmp_path / "killed"
    done, how = [], []
    for count in range(kills):
        how.append(kill(kind, folder, MOMENTS[count % len(MOMENTS)], life, chance))
        state, told = run_folder.load(folder) if folder.exists() else (None, "")
        done.append(state["steps"] if state else 0)
        assert told == ""  # whatever it was doing, what it left is whole
    finished(kind, folder, "--resume")
    assert differences(whole, outcome(folder)) == []
    assert done == sorted(done)
    assert 0 < done[-1] < whole["result"]["steps"]
    if kills > 3:
        assert len(set(done)) > 4  # it was at many places
        assert "killed while saving" in how
