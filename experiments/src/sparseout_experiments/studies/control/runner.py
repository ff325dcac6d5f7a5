"""Every run of the study, each in a folder of its own: what is finished is skipped, what was interrupted goes on."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.grid import GRIDS, Run, Setting, Task, Value
from sparseout_experiments.studies.engine import jobs
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Outcome, Train
from sparseout_experiments.studies.engine.jobs import StudyStopped


class Progress(NamedTuple):
    """One event: a run that has been started, has finished, failed, or was lost with its process.

    `total` is the number of runs as far as it is known: tuning decides how many follow.
    """

    run: Run
    status: str
    done: int
    total: int
    seconds: float  # that this run took; 0 where it has just been started
    left: float  # seconds until all are done, from the means so far; nan where nothing has finished


OnProgress = Callable[[Progress], None]


@dataclass
class Ledger:
    """Results and failures by run, and runs whose process was lost."""

    results: dict[Run, dict[str, Any]] = field(default_factory=dict)
    failures: dict[Run, str] = field(default_factory=dict)
    lost: dict[Run, str] = field(default_factory=dict)

    def __contains__(self, run: Run) -> bool:
        return run in self.results or run in self.failures or run in self.lost

    def chosen(self, task: Task) -> dict[Setting, Value]:
        """The values that tuning chose, as far as its trials are done."""
        metric = GRIDS[task].metric
        scores = [(run, _score(result, metric)) for run, result in self.results.items() if run.task == task]
        scores += [(run, math.inf) for run in self.failures if run.task == task]
        return grid.choose(task, scores)

    def plan(self, task: Task) -> list[Run]:
        """The runs of a task as far as they are known."""
        first = grid.first(task)
        tuned = all(run in self.results or run in self.failures for run in first)
        return first + (grid.second(task, self.chosen(task)) if tuned else [])


def folder_of(run: Run, budget: str, work: Path) -> Path:
    """The folder of a run."""
    return work / budget / run.task / run.key


def found(run: Run, budget: str, work: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The result of a run, or the reason of its failure, from its folder. Raises StudyStopped where it is another's."""
    folder = folder_of(run, budget, work)
    result, reason = jobs.outcome_of(folder, grid.options(run, budget, {}, {}))
    return (None, reason) if result is None else (result | {"last": _last(folder, result["epochs"])}, None)


def _last(folder: Path, epochs: int) -> dict[str, Any] | None:
    """The measures on validation data after the last epoch, which need not be the epoch that was tested."""
    try:
        line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        measures: dict[str, Any] = line["mean"]
        return measures if line["epoch"] == epochs else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # a run whose curve was tidied away is a result all the same


def look(budget: str, work: Path, tasks: Sequence[Task]) -> Ledger:
    """The results and failures in the folders."""
    ledger = Ledger()
    for task in tasks:
        for stage in range(2):  # the second stage is known once the first has been read
            for run in ledger.plan(task) if stage else grid.first(task):
                if run not in ledger:
                    _note(ledger, run, budget, work)
    return ledger


def run_all(
    budget: str,
    work: Path,
    ledger: Ledger,
    *,
    workers: int = 2,
    tasks: Sequence[Task] = grid.TASKS,
    sources: Mapping[str, str] | None = None,
    common: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    scheduler: str | None = None,
    train: Train = jobs.train,
) -> None:
    """Run what `ledger` lacks and note it there. Raises StudyStopped; KeyboardInterrupt ends the workers and passes on.

    Tuning comes first; what it does not decide fills the time until its last trial is done.
    """
    state = _State(ledger, tasks, workers, on_progress)

    def missing() -> dict[Run, Job]:
        return {
            run: Job(run.task, grid.options(run, budget, sources or {}, common or {}), folder_of(run, budget, work))
            for run in state.missing()
        }

    def started(run: Run) -> None:
        state.report(run, "started", 0.0)

    def ended(run: Run, outcome: Outcome) -> dict[Run, Job]:
        if outcome.problem is not None:
            raise StudyStopped(f"{run.task}, {run.key}: {outcome.problem}")
        if outcome.lost is not None:
            ledger.lost[run] = outcome.lost
        elif not _note(ledger, run, budget, work):
            raise StudyStopped(f"{run.task}, {run.key}: the run ended without a result in {outcome.job.folder}")
        status = "lost" if run in ledger.lost else "failed" if run in ledger.failures else "finished"
        state.report(run, status, outcome.seconds)
        return missing()

    with Cluster(workers, train, scheduler) as cluster:
        first = dict(sorted(missing().items(), key=lambda item: item[0].role != "tuning"))
        jobs.run_all(cluster, first, started, ended)


class _State:
    """Progress of the study, reported to a callback."""

    def __init__(self, ledger: Ledger, tasks: Sequence[Task], workers: int, on_progress: OnProgress | None) -> None:
        self.ledger, self.tasks, self.workers, self.on_progress = ledger, tasks, workers, on_progress

    def missing(self) -> list[Run]:
        return [run for task in self.tasks for run in self.ledger.plan(task) if run not in self.ledger]

    def report(self, run: Run, status: str, seconds: float) -> None:
        if self.on_progress is None:
            return
        totals = {task: max(len(self.ledger.plan(task)), grid.count(task)[0]) for task in self.tasks}
        done = Counter(one.task for part in vars(self.ledger).values() for one in part)
        left = self._left({task: total - done[task] for task, total in totals.items()})
        self.on_progress(Progress(run, status, sum(done[task] for task in totals), sum(totals.values()), seconds, left))

    def _left(self, missing: Mapping[Task, int]) -> float:
        """Seconds to go, from the mean of each task; a task of which nothing is known counts as the mean of all."""
        took: dict[Task, list[float]] = {task: [] for task in missing}
        for run, result in self.ledger.results.items():
            took.setdefault(run.task, []).append(result["seconds"])
        every = [seconds for some in took.values() for seconds in some]
        if not every:
            return math.nan
        return sum(count * _mean(took[task] or every) for task, count in missing.items()) / self.workers


def _note(ledger: Ledger, run: Run, budget: str, work: Path) -> bool:
    result, reason = found(run, budget, work)
    if result is not None:
        ledger.results[run] = result
    if reason is not None:
        ledger.failures[run] = reason
    return result is not None or reason is not None


def _score(result: Mapping[str, Any], metric: str) -> float:
    value = result["valid"][metric]
    return math.inf if value is None or not math.isfinite(value) else float(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
