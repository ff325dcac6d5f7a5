"""The folder of a run: its options, where it ran, its metrics, its last two checkpoints, and how it ended.

A file is whole or not there. `metrics.jsonl` alone grows line by line; a run that goes on from a checkpoint first cuts
off the lines that were written after it.
"""

import io
import json
import math
import os
import shutil
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, model_validator

from sparseout_experiments.config import FILE, write
from sparseout_experiments.message import expected
from sparseout_experiments.options import TASKS, Config
from sparseout_experiments.training import atomic_files
from sparseout_experiments.training.environment import environment
from sparseout_experiments.training.lock import LOCK
from sparseout_experiments.training.lock import RunError as RunError  # one of the errors of a folder

CONFIG = FILE
ENVIRONMENT, METRICS, RESULT, FAILURE = "environment.json", "metrics.jsonl", "result.json", "failure.json"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
_OURS = (CONFIG, ENVIRONMENT, METRICS, RESULT, FAILURE, CHECKPOINT)
_IN_CHECKPOINT = {"epoch", "lines", "losses", "guard", "model", "optimizer", "task", "data", "processes"}  # and more
# Options that may differ when a run goes on: they say where and how long it may work, not what it computes.
_FREE = ("device", "checkpoint_minutes", "track", "data")


class RunFailed(Exception):
    """A run that ended without a result; its text is one sentence."""


class _NotCheckpoint(Exception):
    """Why a file is no checkpoint of a run."""


def begin(folder: Path, config: Config, resume: bool) -> bool:
    """Put the options into a folder that is empty, or check that it holds this very run; return whether it was empty.

    Raises RunError.
    """
    with disk(folder):
        for name in _OURS:  # what a killed process was writing
            for left in folder.glob(f".{name}-[0-9]*"):
                left.unlink(missing_ok=True)
        if not (folder / CONFIG).exists():
            names = {path.name for path in folder.iterdir() if not path.name.startswith(LOCK)}
            if names - {ENVIRONMENT}:  # what is there is not ours to write over
                got = f"{str(folder)!r}, which holds other things and no {CONFIG}"
                raise RunError(expected("out", "a new or empty folder, or that of a run", got))
            # first, so that a folder with a configuration has it
            write_json(folder / ENVIRONMENT, environment("accelerate", "datasets"))
            atomic_files.write(folder / CONFIG, write(config))
            return True
        if not resume:
            raise RunError(expected("out", "a new folder, or with --resume that of a run", f"{str(folder)!r}"))
        _check_same(folder, config)
        (folder / FAILURE).unlink(missing_ok=True)
        try:
            read_json(folder / ENVIRONMENT)
        except RunError:  # the end of the run would be the first to miss it
            write_json(folder / ENVIRONMENT, environment("accelerate", "datasets"))
    return False


def _check_same(folder: Path, config: Config) -> None:
    try:
        before = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{folder / CONFIG} cannot be read ({error}): start another folder") from None
    for name, was, now in _differing(before, config):
        raise RunError(
            f"the run in {folder} has {name} = {was!r}, not {now!r}: "
            "resume it with the options it was started with, or start another folder"
        )


def check_options(path: Path, before: dict[str, Any] | None, config: Config) -> None:
    """Raise RunError where a file was written by a run with other options; older checkpoints do not say."""
    for name, was, now in _differing(before, config) if before else ():
        what = f"{path} is of a run with {name} = {was!r}, not {now!r}"
        raise RunError(f"{what}: put this run's own in its place, or start another folder")


def deciding(config: Config) -> dict[str, Any]:
    """The options that decide about a run's numbers, as a file has them."""
    return {name: value for name, value in tomllib.loads(write(config)).items() if name not in _FREE}


def _differing(before: dict[str, Any], config: Config) -> Iterator[tuple[str, Any, Any]]:
    now = deciding(config)
    for name in now | before:
        if name not in _FREE and before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)


def withdraw(folder: Path) -> None:
    """Empty the folder of a run again, unless there is a checkpoint in it. A new one goes with its lock."""
    if not (folder / CHECKPOINT).exists() and not (folder / PREVIOUS).exists():
        with disk(folder):
            for path in folder.iterdir():
                if not path.name.startswith(LOCK):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def log(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line of metrics, on the disk before this returns."""
    with disk(folder), open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(plain(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics up to the first that cannot be read: the last one may have been cut short."""
    path, records = folder / METRICS, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint and keep the one before it."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with disk(folder, "; the checkpoint before it is still there" if (folder / CHECKPOINT).exists() else ""):
        new = folder / f".{CHECKPOINT}-{os.getpid()}"
        try:
            atomic_files.write_synced(new, buffer.getvalue())
            if (folder / CHECKPOINT).exists():
                os.replace(folder / CHECKPOINT, folder / PREVIOUS)
            os.replace(new, folder / CHECKPOINT)
        finally:
            new.unlink(missing_ok=True)


def load(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The newest checkpoint that can be read, or None; and a message where another had to be passed over."""
    reasons: list[str] = []
    for name in (CHECKPOINT, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            state = _read_checkpoint(folder / name)
            return state, reasons[0] + ", so the run goes on from the one before it" if reasons else ""
        except Exception as error:  # torch and zipfile raise half a dozen kinds for a damaged file
            reason = str(error) if isinstance(error, _NotCheckpoint) else type(error).__name__
            reasons.append(f"{folder / name} cannot be read ({reason})")
    return None, " and ".join(reasons) + ", so the run starts over" if reasons else ""


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint whose checksums hold: torch writes one for every entry of its archive, and does not check them."""
    if path.is_dir():
        raise _NotCheckpoint("it is a folder, and is set aside")
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as archive:
        if archive.testzip() is not None:
            raise _NotCheckpoint("its checksum does not hold")
    data.seek(0)
    state = torch.load(data, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= _IN_CHECKPOINT:
        raise _NotCheckpoint("it is another program's")
    return state


def discard_newest(folder: Path) -> None:
    """Remove a newest checkpoint that cannot be read: the next one must not put it in the place of the good one.

    A folder of that name, and of that of the one before, is renamed.
    """
    with disk(folder):
        for path in (folder / CHECKPOINT, folder / PREVIOUS):
            if path.is_dir():
                path.rename(path.with_name(f"{path.name}-folder"))
        (folder / CHECKPOINT).unlink(missing_ok=True)


def cut(folder: Path, lines: int) -> str:
    """Keep so many lines of the metrics: the rest was written after the checkpoint that the run goes on from.

    Returns a message where there are fewer.
    """
    with disk(folder):
        kept = metrics(folder)[:lines]
        atomic_files.write(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
    if len(kept) == lines:
        return ""
    return f"{folder / METRICS} is damaged: of {lines} epochs {len(kept)} could be kept, and the run goes on"


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """A whole file of JSON or none; what is not finite becomes null."""
    with disk(path.parent):
        atomic_files.write(path, json.dumps(plain(record), indent=1) + "\n")


def read_json(path: Path, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """A file of JSON that holds an object, of a pydantic model. Raises RunError where it cannot be read."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if model is not None:
            model.model_validate(record)
        elif not isinstance(record, dict):
            raise TypeError
    except UNREADABLE as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}): remove it to start over") from None
    return record


# What reading a file of JSON or TOML raises for one that is something else: errors of these and of pydantic are
# ValueErrors, and nesting that is too deep is a RecursionError.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
MEASURES = ("hoyer", "hoyer_live", "gini", "treves_rolls", "density", "kurtosis")  # of a module
_COUNTS = ("dead_units", "undefined_rows")


class Result(BaseModel):
    """What a page reads of a result; older ones have it too."""

    status: Literal["finished"]
    task: str
    config: dict[str, Any]
    environment: dict[str, Any] = {}
    metric: str
    epochs: int
    steps: int
    best_epoch: int
    stopped_by: str
    seconds: float
    valid: dict[str, float | None]
    test: dict[str, float | None]
    mean: dict[str, float | None]
    sparsity: dict[str, dict[str, float | None]]  # of each module
    warnings: list[str]

    @model_validator(mode="after")
    def _of_task(self) -> Self:
        from sparseout_experiments.tasks import shown_as

        if self.task not in TASKS or self.config.get("task") != self.task or self.metric != shown_as(self.task)[0]:
            raise ValueError("the task is another")
        if self.metric not in self.valid or self.metric not in self.test:
            raise ValueError("the metric is missing")
        return self


class _Control(BaseModel):
    """What is shown of a target; of the knobs, the one that was moved."""

    target: float
    hoyer: float | None
    noise_least: float | None
    noise_most: float | None
    q: float | None = None
    p: float | None = None
    strength: float | None = None
    k: float | None = None

    @model_validator(mode="after")
    def _moved(self) -> Self:
        if not self.model_fields_set & {"q", "p", "strength", "k"}:
            raise ValueError("there is no knob")
        return self


class _Shown(Result):
    """What the command shows besides."""

    control: _Control | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for measures in self.sparsity.values():
            if not measures.keys() >= set(MEASURES) or any(measures.get(name) is None for name in _COUNTS):
                raise ValueError("a module lacks measures")
            if not measures.get("units") or not measures.get("rows"):
                raise ValueError("a module has no units or no rows")
        return self


def result(folder: Path, config: Config | None = None) -> dict[str, Any]:
    """The result in a run's folder. Raises RunError where it is something else, or of a run with other options."""
    found = read_json(folder / RESULT, _Shown)
    if config is not None:
        check_options(folder / RESULT, {k: v for k, v in found["config"].items() if v is not None}, config)
    return found


def plain(value: Any) -> Any:
    """Numbers that JSON has no words for as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def disk(folder: Path, and_so: str = "") -> Iterator[None]:
    """Turn what the disk refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or folder} cannot be written ({error.strerror}){and_so}") from error
