"""A sweep whose workers and whose command are killed at random ends as one that was left alone."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

GRID = [
    *("autoencoder", "--q", "1,1.5,2,2.5,3", "--method", "sparseout,bridgeout", "--seeds", "5", "--units", "16"),
    *("--epochs", "5", "--checkpoint-minutes", "0", "--device", "cpu", "--workers", "2"),
]
EPOCHS, RUNS = 5, 50
FEWER = ("--seeds", "1")  # 10 of them
DASK = [sys.executable, "-m", "dask"]


def sweep(out, *more):
    command = [sys.executable, "-m", "sparseout_experiments", "sweep", *GRID, *more, "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def end(process, timeout=600):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def results(out):
    """What every run found, without what depends on the clock."""
    found = {}
    for path in sorted(out.glob("*/result.json")):
        result = json.loads(path.read_text())
        found[path.parent.name] = {k: v for k, v in result.items() if k not in ("seconds", "environment", "notes")}
        epochs = [json.loads(line)["epoch"] for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        assert epochs == list(range(1, EPOCHS + 1)), path  # trained by one worker at a time
    return found


def again(process, out, *more):
    """Kill a command with all its processes, and start it again."""
    os.killpg(process.pid, signal.SIGKILL)
    end(process)
    return sweep(out, *more)


def wait_for(out, runs, process):
    """Until so many runs have ended."""
    while len(list(out.glob("*/result.json"))) < runs:
        time.sleep(0.1)
        assert process.poll() is None


def workers_of(process):
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    status, said = end(sweep(out))
    assert status == 0, said
    found = results(out)
    assert len(found) == RUNS
    return found


@pytest.mark.slow
def test_workers_and_the_command_killed(undisturbed, tmp_path):
    moment = random.Random(0)
    workers, commands = 10, 2  # to kill
    process = sweep(tmp_path)
    begun = 0
    while process.poll() is None:
        time.sleep(moment.uniform(0.2, 1.0))
        ended = len(list(tmp_path.glob("*/result.json")))
        if commands and ended > begun + 10:
            process, commands, begun = again(process, tmp_path), commands - 1, ended
        elif workers and ended > begun and len(alive := workers_of(process)) == 2:
            min(alive, key=psutil.Process.create_time).kill()  # in turn: the one that was not replaced last
            workers -= 1
    status, said = end(process)
    assert status == 0, said
    assert (workers, commands) == (0, 0), "it ended before everything was killed"
    assert results(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".lock*"))


def started(command, until):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = ""
    while not (found := re.search(until, said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    os.set_blocking(process.stderr.fileno(), False)
    return process, found[1]


@pytest.fixture
def cluster():
    """A scheduler and two workers as separate processes, and the scheduler's address."""
    listening = [*DASK, "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    scheduler, address = started(listening, r"Scheduler at:\s+(tcp://\S+)")
    working = [*DASK, "worker", address, "--nthreads", "1", "--no-dashboard"]
    workers = [started(working, r"(Registered to)")[0] for _ in range(2)]
    yield scheduler, workers, address
    for process in (*workers, scheduler):
        for one in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            one.kill()
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_separate_processes_one_of_which_is_killed_for_good(undisturbed, cluster, tmp_path):
    _, workers, address = cluster
    process = sweep(tmp_path, "--scheduler", address)
    wait_for(tmp_path, 5, process)
    process = again(process, tmp_path, "--scheduler", address)
    wait_for(tmp_path, 12, process)
    children = psutil.Process(workers[0].pid).children(recursive=True)
    workers[0].kill()
    for child in children:
        child.kill()
    wait_for(tmp_path, 18, process)
    process = again(process, tmp_path, "--scheduler", address)
    status, said = end(process)
    assert status == 0, said
    assert results(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".lock*"))


@pytest.mark.slow
def test_a_scheduler_that_goes_away_is_said_and_nothing_is_lost(undisturbed, cluster, tmp_path):
    scheduler, _, address = cluster
    process = sweep(tmp_path, *FEWER, "--scheduler", address)
    wait_for(tmp_path, 2, process)
    scheduler.kill()
    status, said = end(process, 120)
    assert status == 1
    assert re.search(
        r"^sparseout: the scheduler is gone: runs that have ended are kept, and the same command", said, re.M
    )
    assert "Traceback" not in said
    assert 2 <= len(list(tmp_path.glob("*/result.json"))) < 10
    status, said = end(sweep(tmp_path, *FEWER))
    assert status == 0, said
    found = results(tmp_path)
    assert len(found) == 10
    assert found == {name: undisturbed[name] for name in found}


@pytest.mark.slow
def test_no_scheduler_at_the_address(tmp_path):
    status, said = end(sweep(tmp_path / "new", "--scheduler", "tcp://127.0.0.1:9"), 120)
    assert status == 1
    assert "expected `--scheduler` to be the address of a Dask scheduler, but got 'tcp://127.0.0.1:9'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "new").exists()
