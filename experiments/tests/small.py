"""Runs that take a second or less, and what makes two runs the same."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate.optimizer
import pytest
import torch
from sparseout_experiments import cli, config
from sparseout_experiments.training import loop as train
from sparseout_experiments.training import run_folder

# Which looks for a package on every path, at each step of an optimizer: a tenth of the time of a run.
accelerate.optimizer.is_lomo_available = cache(accelerate.optimizer.is_lomo_available)

# More than two looks (of 10 steps) an epoch, so that runs can be stopped within one.
OPTIONS: dict[str, dict[str, Any]] = {
    "autoencoder": {"units": 16, "epochs": 3, "batch": 16, "train_size": 400, "valid_size": 100},
    "image": {
        "depth": 10, "width": 1, "epochs": 3, "batch": 8, "train_size": 200, "valid_size": 50, "test_size": 50,
    },
    "language": {
        "units": 12, "embedding": 8, "epochs": 3, "batch": 4, "bptt": 10, "words": 100,
        "train_size": 1000, "valid_size": 300, "test_size": 300,
    },
}  # fmt: skip
OPTIONS["awd"] = OPTIONS["language"] | {"model": "awd", "layers": 2, "lr": 1.0}
OPTIONS["transformer"] = OPTIONS["language"] | {"model": "transformer", "units": 24, "heads": 2}
LANGUAGE = ("language", "awd", "transformer")
STEPS = 25  # an epoch, of all but "awd", whose windows vary


def options(kind: str, **changed: Any) -> config.Config:
    """The options of a small run: of a task, or of the language task with another model."""
    task = "language" if kind in LANGUAGE else kind
    return config.resolve(task, OPTIONS[kind] | {"device": "cpu"} | changed)


def arguments(kind: str, **changed: Any) -> list[str]:
    """The same for the command line."""
    task = "language" if kind in LANGUAGE else kind
    given = OPTIONS[kind] | {"device": "cpu"} | changed
    return [
        "run",
        task,
        *(text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", f"{value}")),
    ]


def run(folder: Path, kind: str, **changed: Any) -> dict[str, Any]:
    return train.perform(options(kind, **changed), folder)


def unexpected(err: str) -> list[str]:
    """The lines of standard error that are neither progress nor about mirrored pictures."""
    usual = r"sparseout: \d+:\d\d:\d\d  |training pictures are "
    return [line for line in err.splitlines() if line and not re.match(usual, line)]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run found and left behind, but for the time it took and where."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run_folder.metrics(folder)]
    result = json.loads((folder / run_folder.RESULT).read_text())
    result = {k: v for k, v in result.items() if k not in ("seconds", "environment", "config")}
    state = torch.load(folder / run_folder.CHECKPOINT, weights_only=True)
    state = {k: v for k, v in state.items() if k not in ("seconds", "options")}
    return {"metrics": lines, "result": result, "state": state}


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nests of numbers, texts and tensors differ in any bit."""
    if type(one) is not type(other):
        return [at]
    if isinstance(one, torch.Tensor):
        same = one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        return [] if same else [at]
    if isinstance(one, dict):
        unlike = [f"{at}/{key}" for key in one.keys() ^ other.keys()]
        return unlike + [
            found for key in one.keys() & other.keys() for found in differences(one[key], other[key], f"{at}/{key}")
        ]
    if isinstance(one, (list, tuple)):
        pairs = enumerate(zip(one, other, strict=False))
        unlike = [found for place, pair in pairs for found in differences(*pair, f"{at}/{place}")]
        return unlike if len(one) == len(other) else [*unlike, f"{at}: lengths"]
    return [] if repr(one) == repr(other) else [at]


def half_done(folder: Path, **changed: Any) -> None:
    """A run of the autoencoder, stopped after two of its three epochs."""
    shutil.copytree(_half_done(**changed).name, folder, dirs_exist_ok=True)


@cache
def _half_done(**changed: Any) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()

    def watch(progress: train.Progress) -> None:
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.perform(options("autoencoder", **changed), Path(folder.name), watch)
    return folder


def status_of(*args: str) -> int:
    """The exit status of a command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code
