"""A lock on the folder of a run: two commands, or a task that a cluster runs twice, do not train it at the same time.

The lock is a file that names its owner. On the owner's machine the kernel says whether it still lives (`flock`, which a
process loses when it dies, however it dies). From other machines, where a shared file system may not know `flock`, its
owner lives as long as it touches the file.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseout_experiments.training import atomic_files

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between touches of a lock
STALE = 60.0  # seconds without a touch after which an owner on another machine counts as dead


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
        while (taken := _take(path)) is None:
            owner = _owner(path)
            if owner is None or _is_dead(path, owner):
                continue
            if not wait:
                name = f"process {owner[1]} on {owner[0]}"
                raise RunError(f"{folder} is being trained by {name}: wait for it, or stop it first")
            time.sleep(0.2)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror})") from error
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        path.unlink(missing_ok=True)
        os.close(taken)
        atomic_files.remove_empty(new)


def _take(path: Path) -> int | None:
    """The descriptor of the lock, if it was free."""
    own = path.with_name(f"{LOCK}-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(own, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
    except (FileExistsError, FileNotFoundError):  # the owner has left an empty folder and removed it
        if any(os.path.lexists(above) and not above.is_dir() for above in path.parents):
            raise
        return None
    try:
        os.write(file, json.dumps([socket.gethostname(), os.getpid()]).encode())
        fcntl.flock(file, fcntl.LOCK_EX)
        os.link(own, path)  # atomic, on a network file system too: fails if there is a lock
    except (FileExistsError, FileNotFoundError):
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    finally:
        own.unlink(missing_ok=True)
    return file


def _owner(path: Path) -> tuple[str, int] | None:
    """Host and process of the owner; None if the lock has just been given back."""
    try:
        host, process = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None if not path.exists() else ("another machine", 0)
    return str(host), int(process)


def _is_dead(path: Path, owner: tuple[str, int]) -> bool:
    """Whether the owner has died; then its lock is taken away, by whoever comes first."""
    try:
        with path.open("rb") as file:
            if owner[0] == socket.gethostname():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            elif time.time() - os.fstat(file.fileno()).st_mtime < STALE:
                return False
            grave = path.with_name(f"{LOCK}-dead-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # another has been quicker, and holds it now
                return True
            path.rename(grave)
            grave.unlink()
    except FileNotFoundError:
        pass
    return True


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        try:
            os.utime(path)
        except OSError:  # the disk is gone; whoever trains will say so
            return
