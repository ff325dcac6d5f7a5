"""Writing results so that a reader never meets half a file."""

import os
from pathlib import Path


def prepare(folder: Path) -> None:
    """Make `folder` and prove that a file can be written there. Raises OSError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it takes its place at the end."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
