"""Writing results so that a reader never meets half a file, and a refused command leaves no folder behind."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def prepare(folder: Path) -> list[Path]:
    """Make `folder` and prove that a file can be written there. Raises OSError where it cannot.

    Returns the folders that were not there before, innermost first.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        remove_empty(new)
        raise
    return new


@contextmanager
def prepared(*folders: Path) -> Iterator[None]:
    """A block for which the folders exist. If it fails, those that it found missing and left empty are removed."""
    new: list[Path] = []
    try:
        for folder in folders:
            new = prepare(folder) + new
        yield
    except BaseException:
        remove_empty(new)
        raise


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders that are empty, in this order."""
    for folder in folders:
        with suppress(OSError):  # not empty, or gone
            folder.rmdir()


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it takes its place at the end."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write_synced(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        # what people know: not the temporary file, and where the disk is full the folder
        error.filename = str(path if error.filename else path.parent)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on the disk, and not only on its way there, when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
