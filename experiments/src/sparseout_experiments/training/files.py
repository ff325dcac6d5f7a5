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
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write_synced(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on the disk, and not only on its way there, when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
