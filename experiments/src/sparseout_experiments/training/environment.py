"""The versions, the device and the revision that results were made with."""

import platform
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sparseout


def environment(*packages: str) -> dict[str, Any]:
    """Everything that a reader needs to repeat a run; `packages` are those whose versions matter besides torch's."""
    return {
        "sparseout": sparseout.__version__,
        "revision": _revision(),
        "python": platform.python_version(),
        **versions("torch", *packages),
        "platform": platform.platform(),
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, by the names that pip knows."""
    return {name: version(name) for name in packages}


@cache  # what is imported does not change
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
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many of torch's threads for a block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """One thread for a block: at the size of a study a second one doubles the processor time and saves none."""
    return threads(1)
