"""A study from its runs to its files of results and its page, the same way for every study."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparseout_experiments.studies.engine import jobs, pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Train
from sparseout_experiments.studies.engine.jobs import Ledger, OnProgress

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Request:
    """Request for a study: its parts, budget and options.

    Args:
        names: which of its parts: tasks, or data sets.
        work: folder of the runs.
        budget: how large, where the study has several budgets.
        sources: for names of data sets a folder or hub id to take instead.
        common: options for every run that are no part of the study, such as a device.
    """

    names: tuple[str, ...]
    work: Path
    budget: str = "small"
    sources: Mapping[str, str] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)


Content = Callable[[str, dict[Any, dict[str, Any]]], Mapping[str, Any]]  # of a task and the results of its runs
Page = Callable[[dict[str, dict[str, Any]]], tuple[str, Mapping[str, bytes]]]  # of the results of every task


@dataclass(frozen=True)
class Files:
    """The files of results of a study, one a task, and the page that is made of all of them.

    Args:
        study: its name.
        kind: what its files say that they hold.
        tasks: what there may be files of.
        budgets: where it has several, from the smallest; they are part of the names.
        title: the first line of the page.
        most_runs: how many runs there may be in the end.
        content: what a file holds, beside its task and what its runs were made with.
        page: the text and the figures.
        count: of how many runs a file is.
    """

    study: str
    kind: str
    tasks: tuple[str, ...] = ("",)
    budgets: tuple[str, ...] = ("",)
    title: str = ""
    most_runs: Callable[[Request], int] = lambda request: 0
    content: Content = lambda task, runs: {}
    page: Page = lambda records: ("", {})
    count: Callable[[Mapping[str, Any]], int] = lambda record: len(record["rows"]) + len(record.get("failed", ()))

    def path(self, results: Path, task: str = "", budget: str = "") -> Path:
        """The file of a task."""
        return results / f"{'-'.join(part for part in (self.study, budget, task) if part)}.json"

    def paths(self, results: Path) -> dict[tuple[str, str], Path]:
        """The files that a folder has, by budget and task."""
        named = {(budget, task): self.path(results, task, budget) for budget in self.budgets for task in self.tasks}
        return {name: path for name, path in named.items() if path.exists()}

    def load(self, path: Path) -> dict[str, Any]:
        """Content of a file. Raises ValueError for one that is none, or not there."""
        return files.load(path, self.kind)

    def load_all(self, results: Path) -> dict[str, dict[str, Any]]:
        """The results of every task that a folder has, of the largest budget. Raises ValueError as `load` does."""
        return {task: self.load(path) for (_, task), path in self.paths(results).items()}

    def some(self, results: Path) -> dict[str, dict[str, Any]]:
        """The same; raises ValueError where there are none, too."""
        return files.some(self.load_all(results), results, self.study)

    def check(self, request: Request, results: Path, page: Path) -> None:
        """Raise ValueError for a page that is another, or that was made from more runs than there will be."""
        budget = request.budget if request.budget in self.budgets else ""
        mine = [self.path(results, task, budget) for task in request.names]
        others = [self.load(path) for path in self.paths(results).values() if path not in mine]
        pages.check(page, self.title, self.most_runs(request) + sum(map(self.count, others)))

    def store(self, results: Path, content: Mapping[str, Any], task: str = "", budget: str = "") -> None:
        """Write a file."""
        files.save(self.path(results, task, budget), {"kind": self.kind, **content})

    def save(self, request: Request, ledger: Ledger[Any], results: Path) -> None:
        """Write a file for each task."""
        for task in request.names:
            mine = {run: result for run, result in ledger.results.items() if run.task == task}
            environments = files.distinct(result["environment"] for result in mine.values())
            self.store(results, {"task": task, "environments": environments, **self.content(task, mine)}, task)

    def render(self, results: Path, page: Path) -> None:
        """Make the page and its figures from the files of results.

        Raises ValueError where there are none, for a file that holds something else, and as `write` does.
        """
        records = self.some(results)
        self.write(page, sum(map(self.count, records.values())), lambda: self.page(records))

    def write(self, page: Path, runs: int, made: Callable[[], tuple[str, Mapping[str, bytes]]]) -> None:
        """Write what is made of so many runs. Raises ValueError where the page is another, or shows more of them."""
        pages.check(page, self.title, runs)
        text, images = made()
        pages.write_images(page, images)
        pages.write(page, text, runs)


def summary(record: Mapping[str, Any], frame: "pd.DataFrame") -> dict[str, Any]:
    """Summary of a task for every page: how many runs and seeds it has, how long these took, and what made them."""
    return {
        "count": len(frame),
        "seeds": frame["seed"].nunique(),
        "minutes": frame["seconds"].sum() / 60 if "seconds" in frame else math.nan,
        "made_with": pages.made_with(record["environments"]),
    }


class Study(Protocol):
    """Protocol of the module of a study.

    One whose runs are no task of the command line has a function `train` too, and one whose plan is not all known at
    once a function `total`: how many runs there will be, as far as that is known. One that can go on from its files of
    results alone has `recorded(request, results)`: the runs that these have, as a ledger wants them, or ValueError.
    """

    ALL_MUST_FINISH: bool  # or there are no results; otherwise a run that fails is a result of its kind

    def ledger(self, results: Mapping[Any, dict[str, Any]] | None = None) -> Ledger[Any]:
        """A ledger in which these runs have ended."""

    def plan(self, request: Request, ledger: Ledger[Any]) -> Mapping[Any, Job]:
        """The jobs that are known, given what the ledger has."""

    def check(self, request: Request, results: Path, page: Path) -> None:
        """Raise ValueError where the page would be refused in the end."""

    def save(self, request: Request, ledger: Ledger[Any], results: Path) -> None:
        """Write the files of results."""

    def render(self, results: Path, page: Path) -> None:
        """Make the page and its figures from the files of results, or raise ValueError."""


def _total(study: Study, request: Request, ledger: Ledger[Any]) -> int:
    own = getattr(study, "total", None)
    return int(own(request, ledger)) if own else len(study.plan(request, ledger))


def reproduce(
    study: Study,
    request: Request,
    results: Path,
    page: Path,
    workers: int = 2,
    scheduler: str | None = None,
    on_progress: OnProgress = lambda progress: None,
    train: Train | None = None,
    recorded: Mapping[Any, dict[str, Any]] | None = None,
) -> Ledger[Any]:
    """Train what is missing, write the files of results, and make the page.

    What was finished before is kept, whether this ends by itself, by Ctrl-C or by an error. If runs may fail, files and
    page then show what there is, unless what they show already is more. `recorded` runs are not trained again.

    Raises:
        ValueError: where the page would be refused.
        StudyStopped, ClusterError: where it cannot go on, in one sentence.
    """
    study.check(request, results, page)
    ledger = study.ledger(recorded)

    def plan() -> Mapping[Any, Job]:
        return study.plan(request, ledger)

    def total() -> int:
        return _total(study, request, ledger)

    def write() -> None:
        order = [*plan(), *ledger.results]  # of the plan, whatever ended first
        ledger.results = {name: ledger.results[name] for name in order if name in ledger.results}
        study.save(request, ledger, results)
        study.render(results, page)

    jobs.look(ledger, plan)
    try:
        if any(name not in ledger for name in plan()):
            own: Train = getattr(study, "train", jobs.train)  # a study may have a training of its own
            with Cluster(workers, train or own, scheduler) as cluster:
                jobs.run_all(cluster, ledger, plan, total, on_progress, all_must_finish=study.ALL_MUST_FINISH)
    except BaseException:
        if not study.ALL_MUST_FINISH:
            with suppress(ValueError):  # the page shows more, or there is nothing to show
                write()
        raise
    write()
    return ledger


def outlook(
    study: Study, request: Request, workers: int, recorded: Mapping[Any, dict[str, Any]] | None = None
) -> tuple[dict[str, tuple[int, int]], int, float]:
    """Runs that are known and that have ended, by task; runs in all; and seconds left, nan before the first."""
    ledger = study.ledger(recorded)
    jobs.look(ledger, lambda: study.plan(request, ledger))
    known, total = study.plan(request, ledger), _total(study, request, ledger)
    tasks: dict[str, tuple[int, int]] = {}
    for name, job in known.items():
        runs, ended = tasks.get(job.folder.parent.name, (0, 0))
        tasks[job.folder.parent.name] = (runs + 1, ended + (name in ledger))
    return tasks, total, jobs.time_left(ledger, known, total, workers)
