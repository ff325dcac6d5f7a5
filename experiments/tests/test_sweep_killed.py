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
from small import status_of
from sparseout_experiments import config
from sparseout_experiments.studies.engine import cluster as clusters
from sparseout_experiments.studies.engine.sweep import grid
from sparseout_experiments.training.loop import perform

SWEPT = {"method": ["sparseout", "bridgeout"], "q": [1.0, 1.5, 2.0, 2.5, 3.0]}  # in the order of their folders' names
EPOCHS, SEEDS = 5, 2
SAME = {"units": 16, "epochs": EPOCHS, "checkpoint_minutes": 0.0, "device": "cpu"}
OPTIONS = [
    f"--{name.replace('_', '-')}={','.join(map(str, values)) if isinstance(values, list) else values}"
    for name, values in (SWEPT | SAME).items()
]
GRID = ["autoencoder", *OPTIONS, "--workers", "2"]
FEWER = ("--seeds", "1")  # 10 of 20
DASK = [sys.executable, "-m", "dask"]


def sweep(out, *more):
    command = [
        sys.executable,
        "-m",
        "sparseout_experiments",
        "sweep",
        *GRID,
        "--seeds",
        str(SEEDS),
        *more,
        "--out",
        str(out),
    ]
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
    """What the runs of the sweep find, each for itself and in this process."""
    out = tmp_path_factory.mktemp("undisturbed")
    options = SWEPT | {name: [value] for name, value in SAME.items()}
    jobs = grid("autoencoder", options, SEEDS, out).values()
    for job in jobs:
        perform(config.resolve(job.task, job.options), job.folder)
    found = results(out)
    assert len(found) == len(jobs) == 20
    return found


@pytest.mark.slow
def test_workers_and_the_command_killed(undisturbed, tmp_path):
    moment = random.Random(0)
    workers, commands = 3, 1  # to kill
    process = sweep(tmp_path)
    begun = 0
    while process.poll() is None:
        time.sleep(moment.uniform(0.2, 1.0))
        ended = len(list(tmp_path.glob("*/result.json")))
        if commands and ended > begun + 4:
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


def those_of(undisturbed, out):
    found = results(out)
    assert len(found) == 10
    return {name: undisturbed[name] for name in found} == found


@pytest.mark.slow
def test_separate_processes_one_of_which_is_killed_for_good(undisturbed, cluster, tmp_path):
    _, workers, address = cluster
    given = (*FEWER, "--scheduler", address)
    process = sweep(tmp_path, *given)
    wait_for(tmp_path, 2, process)
    process = again(process, tmp_path, *given)
    wait_for(tmp_path, 5, process)
    children = psutil.Process(workers[0].pid).children(recursive=True)
    workers[0].kill()
    for child in children:
        child.kill()
    wait_for(tmp_path, 7, process)
    process = again(process, tmp_path, *given)
    status, said = end(process)
    assert status == 0, said
    assert those_of(undisturbed, tmp_path)
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
    assert those_of(undisturbed, tmp_path)


def test_no_scheduler_at_the_address(tmp_path, monkeypatch, capsys):
    patient = clusters.Client
    monkeypatch.setattr(clusters, "Client", lambda address, timeout: patient(address, timeout=timeout / 10))
    assert status_of("sweep", *GRID, "--scheduler", "tcp://127.0.0.1:9", "--out", str(tmp_path / "new")) == 1
    said = capsys.readouterr().err
    assert "expected `--scheduler` to be the address of a Dask scheduler, but got 'tcp://127.0.0.1:9'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "new").exists()
