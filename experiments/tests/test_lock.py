"""The lock on a run's folder: one owner at a time, freed by death."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sparseout_experiments.training import lock
from sparseout_experiments.training.lock import RunError

HOLD = """
import signal, sys, time
from pathlib import Path
from sparseout_experiments.training.lock import locked
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell started in the background
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# Each adds 1 to a number in a file, with a pause between reading and writing.
COUNT = """
import sys, time
from pathlib import Path
from sparseout_experiments.training.lock import locked
number = Path(sys.argv[1]).parent / "number"
for _ in range(15):
    with locked(Path(sys.argv[1]), wait=True):
        before = int(number.read_text())
        time.sleep(0.003)
        number.write_text(str(before + 1))
"""


@pytest.fixture
def owner(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_that_is_being_trained_is_refused_with_its_owner(tmp_path, owner):
    with (
        pytest.raises(RunError, match=rf"run is being trained by process {owner.pid} on \S+: wait for it, or stop"),
        lock.locked(tmp_path / "run"),
    ):
        pass


def test_a_dead_owner_holds_nothing(tmp_path, owner):
    os.kill(owner.pid, signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(RunError), lock.locked(tmp_path / "run"):
        pass
    owner.kill()
    begun = time.monotonic()
    with lock.locked(tmp_path / "run", wait=True):
        assert time.monotonic() - begun < 5
        assert f"process {os.getpid()} on " in (tmp_path / "run/.lock").read_text()
    assert not (tmp_path / "run").exists()  # nothing was written there


def test_never_two_owners(tmp_path):
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, tmp_path / "run"]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "45"


def test_a_folder_that_another_removes_as_it_is_made(tmp_path, monkeypatch):
    """Path.mkdir lets FileExistsError through where the folder is gone when it looks again."""
    make, failures = Path.mkdir, [FileExistsError(errno.EEXIST, "File exists")]

    def mkdir(path, *args, **kwargs):
        if failures:
            raise failures.pop()
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with lock.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not failures


def test_it_is_given_back_though_its_file_cannot_be_removed(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Read-only"), lock.locked(tmp_path / "run"):
        patched.setattr(Path, "unlink", refuse)
    with lock.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("folder", ["file", "file/run", "gone", "gone/run", "/dev/null"])
def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    with pytest.raises(RunError, match="cannot be written"), lock.locked(tmp_path / folder):
        pass
