"""The folder of a run: what it was told, where it ran, its metrics, its last two checkpoints, and how it ended.

A file is whole or not there. `metrics.jsonl` alone grows line by line; a run that goes on from a checkpoint first cuts
off the lines that were written after it.
"""

import io
import json
import math
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sparseout
from sparseout._utils.validation import expected
from sparseout_experiments.config import Config, write
from sparseout_experiments.training import files

CONFIG, ENVIRONMENT, METRICS, RESULT, FAILURE = (
    "config.toml", "environment.json", "metrics.jsonl", "result.json", "failure.json",
)  # fmt: skip
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
_OURS = (CONFIG, ENVIRONMENT, METRICS, RESULT, FAILURE, CHECKPOINT, "probe")
# Options that may differ when a run goes on: they say where and how long it may work, not what it computes.
_FREE = ("device", "checkpoint_minutes", "track", "data")


class RunFailed(Exception):
    """A run that ended without a result; its text is one sentence."""


class RunError(Exception):
    """A folder that a run cannot work in; its text is one sentence."""


def begin(folder: Path, config: Config, resume: bool) -> None:
    """Make the folder, or check that it holds this very run. Raises RunError."""
    with disk(folder):
        files.prepare(folder)
        for name in _OURS:  # what a killed process was writing
            for left in folder.glob(f".{name}-[0-9]*"):
                left.unlink(missing_ok=True)
        if not (folder / CONFIG).exists():
            if any(path.name != ENVIRONMENT for path in folder.iterdir()):  # what is there is not ours to write over
                got = f"{str(folder)!r}, which holds other things and no {CONFIG}"
                raise RunError(expected("out", "a new or empty folder, or that of a run", got))
            write_json(folder / ENVIRONMENT, environment())  # first, so that a folder with a configuration has it
            files.write(folder / CONFIG, write(config))
            return
        if not resume:
            raise RunError(expected("out", "a new folder, or with --resume that of a run", f"{str(folder)!r}"))
        try:
            before = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{folder / CONFIG} cannot be read ({error}): start another folder") from None
        now = tomllib.loads(write(config))
        for name in now | before:
            if name not in _FREE and before.get(name) != now.get(name):
                raise RunError(
                    f"the run in {folder} has {name} = {before.get(name)!r}, not {now.get(name)!r}: "
                    "resume it with the options it was started with, or start another folder"
                )
        (folder / FAILURE).unlink(missing_ok=True)


def withdraw(folder: Path) -> None:
    """Take back what `begin` wrote, if no checkpoint has come of it."""
    if not (folder / CHECKPOINT).exists() and not (folder / PREVIOUS).exists():
        with disk(folder):
            for name in (CONFIG, ENVIRONMENT, METRICS):
                (folder / name).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def environment() -> dict[str, Any]:
    """The versions, the device and the revision that a run was made with."""
    from importlib.metadata import version

    cuda = torch.cuda.is_available()
    return {
        "sparseout": sparseout.__version__,
        "revision": _revision(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "accelerate", "datasets")},
        "platform": platform.platform(),
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
    }


def _revision() -> str | None:
    """The commit of this source, with a + where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def log(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line of metrics, on the disk before this returns."""
    with disk(folder), open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(plain(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics; one that was cut short is left out."""
    found = []
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint and keep the one before it."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with disk(folder, "; the checkpoint before it is still there" if (folder / CHECKPOINT).exists() else ""):
        new = folder / f".{CHECKPOINT}-{os.getpid()}"
        try:
            files.write_synced(new, buffer.getvalue())
            if (folder / CHECKPOINT).exists():
                os.replace(folder / CHECKPOINT, folder / PREVIOUS)
            os.replace(new, folder / CHECKPOINT)
        finally:
            new.unlink(missing_ok=True)


def load(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The newest checkpoint that can be read, or None; and a sentence where another had to be passed over."""
    told = ""
    for name in (CHECKPOINT, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            return torch.load(folder / name, map_location="cpu", weights_only=True), told
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            told = f"{folder / name} cannot be read ({type(error).__name__}), so the run goes on from the one before it"
    return None, told and f"no checkpoint in {folder} can be read, so the run starts over"


def discard_newest(folder: Path) -> None:
    """Remove a newest checkpoint that cannot be read: the next one must not put it in the place of the good one."""
    with disk(folder):
        (folder / CHECKPOINT).unlink(missing_ok=True)


def cut(folder: Path, lines: int) -> None:
    """Keep so many lines of the metrics: the rest was written after the checkpoint that the run goes on from."""
    kept = metrics(folder)[:lines]
    with disk(folder):
        files.write(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """A whole file of JSON or none; what is not finite becomes null."""
    with disk(path.parent):
        files.write(path, json.dumps(plain(record), indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON. Raises RunError where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}): remove it to start over") from None
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
        raise RunError(f"{folder} cannot be written ({error.strerror}){and_so}") from error
