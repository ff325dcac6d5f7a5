"""A lock on the folder of a run: two commands, or a task that a cluster runs twice, do not train it at the same time.

It is the kernel's (`flock`), which a process loses when it dies, however it dies. Between machines it holds where they
share it with their file system, as NFS does from version 4 on.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparseout_experiments.training import atomic_files

LOCK = ".lock"


class RunError(Exception):
    """A folder that a run cannot work in; its text is one sentence."""


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a run's folder.

    Args:
        folder: made if it is not there, with those above it; what was made is removed again if it is left empty.
        wait: wait for the lock, instead of an error if it is taken.

    Raises:
        RunError: if it is taken and `wait` is false, or the folder cannot be written.
    """
    path = folder / LOCK
    new = [missing for missing in (folder, *folder.parents) if not missing.exists()]
    new += [folder] if path.exists() else []  # its owner, if dead, could not remove it
    try:
        while (taken := _take(path, wait)) is None:
            continue
    except BlockingIOError:
        name = _owner(path)
        raise RunError(f"{folder} is being trained by {name}: wait for it, or stop it first") from None
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # before it is given back: who waits for this file then makes another
        finally:
            os.close(taken)
        atomic_files.remove_empty(new)


def _take(path: Path, wait: bool) -> int | None:
    """The descriptor of the lock; None where its file was removed meanwhile. Raises BlockingIOError if it is taken."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except (FileExistsError, FileNotFoundError):  # the owner has left an empty folder and removed it
        if any(os.path.lexists(above) and not above.is_dir() for above in path.parents):
            raise
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(file), os.stat(path)):
            with suppress(OSError):  # on a full disk it is a lock all the same
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _owner(path: Path) -> str:
    """The owner of a lock that is taken, as it names itself."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
