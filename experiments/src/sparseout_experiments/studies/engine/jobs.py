"""Runs that are wanted: what their folders hold is read, and the rest is trained by a cluster."""

import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, NamedTuple, TypeVar

from sparseout_experiments.studies.engine.cluster import Cluster, Job, is_cancelled
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.lock import locked

Name = TypeVar("Name", bound=Hashable)
# Options that say where and how a run works, and not what it computes.
TECHNICAL = ("device", "checkpoint_minutes", "track")


class StudyStopped(Exception):
    """The reason why a study cannot go on, in one sentence; whatever is finished stays."""


class Progress(NamedTuple):
    """Progress of the runs: how many have ended, failed ones among them, are running, and are wanted in all."""

    done: int
    failed: int
    running: int
    total: int
    left: float  # seconds until all are done, from the means so far; nan before the first
    now: str  # what has ended last


OnProgress = Callable[[Progress], None]


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    """Train one run; a failed one leaves `failure.json` in its folder, and one that is taken back its checkpoint."""
    from sparseout_experiments.config import resolve
    from sparseout_experiments.training.loop import perform

    def stop(progress: object) -> None:
        if is_cancelled():
            raise _Cancelled

    with suppress(run_folder.RunFailed, _Cancelled):
        perform(resolve(task, options), folder, stop, wait=True)


def train_own(run: Callable[[], dict[str, Any]], options: dict[str, Any], folder: Path, *packages: str) -> None:
    """Train one run of a study with a training of its own: what `run` finds is the result, written once it is whole.

    Where another process trains it, its end is waited for, and nothing is done if it has left a result. `packages` are
    those whose versions matter besides torch's.
    """
    from sparseout_experiments.training.environment import environment, one_thread

    with locked(folder, wait=True):
        if (folder / run_folder.RESULT).exists():
            return
        start = time.perf_counter()
        with one_thread():
            result = run()
        result |= {"config": options, "environment": environment(*packages)}
        run_folder.write_json(folder / run_folder.RESULT, result | {"seconds": time.perf_counter() - start})


class _Cancelled(Exception):
    """The run is no longer wanted."""


class Ledger(Generic[Name]):
    """Ledger of ended runs: with a result, with a failure, or lost, as their workers died again and again."""

    def __init__(self, results: Mapping[Name, dict[str, Any]] | None = None) -> None:
        self.results: dict[Name, dict[str, Any]] = dict(results or {})
        self.failures: dict[Name, str] = {}
        self.lost: dict[Name, str] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self.results or name in self.failures or name in self.lost

    def wanted(self, job: Job) -> Mapping[str, Any]:
        """The options that a run in the job's folder must have had."""
        from sparseout_experiments.config import record, resolve

        return record(resolve(job.task, job.options))

    def note(self, name: Name, job: Job) -> bool:
        """Enter what a run's folder holds, and say whether it has ended.

        Raises StudyStopped where the folder holds a run with other options than are wanted, but for where the data lie
        and where it was trained, or something else.
        """
        path = next(filter(Path.exists, (job.folder / run_folder.RESULT, job.folder / run_folder.FAILURE)), None)
        if path is None:
            return False
        try:
            record = run_folder.read_json(path)
            config, reason = dict(record["config"]), str(record["reason"]) if path.name == run_folder.FAILURE else None
        except (run_folder.RunError, LookupError, TypeError, ValueError):
            raise StudyStopped(f"{path} cannot be read: remove {job.folder} to repeat the run") from None
        for option, value in self.wanted(job).items():
            if option not in ("data", *TECHNICAL) and config.get(option) != value:
                raise StudyStopped(
                    f"{job.folder} holds a run with {option} = {config.get(option)} where the study wants {value}: "
                    "give the study another work folder, or remove this one"
                )
        if reason is None:
            self.results[name] = record
        else:
            self.failures[name] = reason
        return True


class OwnLedger(Ledger[Name]):
    """Ledger of a study with a training of its own: their options are those of the jobs, as they are."""

    def wanted(self, job: Job) -> Mapping[str, Any]:
        return job.options


def look(ledger: Ledger[Name], plan: Callable[[], Mapping[Name, Job]]) -> None:
    """Enter every run that has ended. What these decide is planned next, so it is looked at too."""
    while sum(ledger.note(name, job) for name, job in plan().items() if name not in ledger):
        pass


def run_all(
    cluster: Cluster,
    ledger: Ledger[Name],
    plan: Callable[[], Mapping[Name, Job]],
    total: Callable[[], int],
    on_progress: OnProgress = lambda progress: None,
    *,
    all_must_finish: bool = False,
) -> None:
    """Train the runs that the ledger lacks, in the order of the plan, and enter how they end.

    Args:
        plan: the jobs by name, as far as they are known by now; asked again whenever a run has ended.
        total: how many there will be, as far as that is known.
        on_progress: is told of the start, and of every run that has ended.
        all_must_finish: whether a run that fails or is lost ends it all.

    Raises:
        StudyStopped: for what every run would meet; for a run that ended without a result.
    """
    started: dict[Path, Name] = {}

    def go_on(now: str) -> None:
        known, begun = plan(), set(started.values())
        waiting = [name for name in known if name not in ledger and name not in begun]
        for name in waiting:
            if not cluster.free:
                break
            cluster.start(known[name])
            started[known[name].folder] = name
        failed, wanted = len(ledger.failures) + len(ledger.lost), total()
        left = time_left(ledger, known, wanted, cluster.workers)
        on_progress(Progress(len(ledger.results) + failed, failed, cluster.running, wanted, left, now))

    go_on("")
    while cluster.busy:
        outcome = cluster.wait()
        name = started[outcome.job.folder]
        if outcome.problem is not None:
            raise StudyStopped(f"{name}: {outcome.problem}")
        if outcome.lost is not None:
            ledger.lost[name] = outcome.lost
        elif not ledger.note(name, outcome.job):
            raise StudyStopped(f"{name}: the run ended without a result in {outcome.job.folder}")
        reason = ledger.failures.get(name, ledger.lost.get(name))
        if reason is not None and all_must_finish:
            raise StudyStopped(f"{name}: {reason}")
        go_on(f"{name} {'finished' if reason is None else 'failed'}")


def time_left(ledger: Ledger[Name], jobs: Mapping[Name, Job], total: int, workers: int) -> float:
    """Seconds until all are done, from the mean of each task; what is not known yet takes the mean of all.

    nan where nothing has finished.
    """
    took: dict[str, list[float]] = {}
    for name, result in ledger.results.items():
        if name in jobs:
            took.setdefault(jobs[name].task, []).append(result["seconds"])
    if not took:
        return math.nan
    mean = fmean(itertools.chain.from_iterable(took.values()))
    means = {task: fmean(durations) for task, durations in took.items()}
    known = [means.get(job.task, mean) for name, job in jobs.items() if name not in ledger]
    return (sum(known) + (total - len(jobs)) * mean) / max(1, workers)
