"""A study from its runs to its files of results and its page, the same way for every study."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparseout_experiments.studies.engine import jobs, pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Train
from sparseout_experiments.studies.engine.jobs import Ledger, OnProgress


@dataclass(frozen=True)
class Request:
    """What is wanted of a study.

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


@dataclass(frozen=True)
class Files:
    """The files of results of a study, one a task, and the page that is made of all of them.

    Args:
        study: its name.
        kind: what its files say that they hold.
        title: the first line of the page.
        tasks: what there may be files of.
        count: of how many runs a file is.
    """

    study: str
    kind: str
    title: str
    tasks: tuple[str, ...]
    count: Callable[[Mapping[str, Any]], int] = lambda record: len(record["rows"])

    def _path(self, results: Path, task: str) -> Path:
        return results / f"{self.study}-{task}.json"

    def load_all(self, results: Path) -> dict[str, dict[str, Any]]:
        """The results of every task that a folder has. Raises ValueError for a file that is none."""
        paths = {task: self._path(results, task) for task in self.tasks}
        return {task: files.load(path, self.kind) for task, path in paths.items() if path.exists()}

    def some(self, results: Path) -> dict[str, dict[str, Any]]:
        """The same; raises ValueError where there are none, too."""
        return files.some(self.load_all(results), results, self.study)

    def check(self, request: Request, results: Path, page: Path, total: int) -> None:
        """Raise ValueError for a page that is another, or that was made from more runs than there will be."""
        others = [record for task, record in self.load_all(results).items() if task not in request.names]
        pages.check(page, self.title, total + sum(map(self.count, others)))

    def save(
        self,
        request: Request,
        ledger: Ledger[Any],
        results: Path,
        content: Callable[[str, dict[Any, dict[str, Any]]], Mapping[str, Any]],
    ) -> None:
        """Write a file for each task; `content` gives what it holds of the results of a task's runs."""
        for task in request.names:
            mine = {run: result for run, result in ledger.results.items() if run.task == task}
            environments = files.distinct(result["environment"] for result in mine.values())
            head = {"kind": self.kind, "task": task, "environments": environments}
            files.save(self._path(results, task), {**head, **content(task, mine)})

    def write(
        self, records: Mapping[str, Mapping[str, Any]], page: Path, text: str, images: Mapping[str, bytes]
    ) -> None:
        """Write the page and its figures. Raises ValueError where the page is another, or was made from more runs."""
        runs = sum(map(self.count, records.values()))
        pages.check(page, self.title, runs)
        pages.write_images(page, images)
        pages.write(page, text, runs)


class Study(Protocol):
    """What the module of a study has; one whose runs are no task of the command line has a function `train` too."""

    ALL_MUST_FINISH: bool  # or there are no results; otherwise a run that fails is a result of its kind

    def ledger(self) -> Ledger[Any]:
        """An empty ledger."""

    def plan(self, request: Request, ledger: Ledger[Any]) -> Mapping[Any, Job]:
        """The jobs that are known, given what the ledger has."""

    def total(self, request: Request, ledger: Ledger[Any]) -> int:
        """How many runs there will be, as far as that is known."""

    def check(self, request: Request, results: Path, page: Path) -> None:
        """Raise ValueError where the page would be refused in the end."""

    def save(self, request: Request, ledger: Ledger[Any], results: Path) -> None:
        """Write the files of results."""

    def render(self, results: Path, page: Path) -> None:
        """Make the page and its figures from the files of results, or raise ValueError."""


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
    ledger = study.ledger()
    ledger.results |= recorded or {}

    def plan() -> Mapping[Any, Job]:
        return study.plan(request, ledger)

    def total() -> int:
        return study.total(request, ledger)

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
    ledger = study.ledger()
    ledger.results |= recorded or {}
    jobs.look(ledger, lambda: study.plan(request, ledger))
    known, total = study.plan(request, ledger), study.total(request, ledger)
    tasks: dict[str, tuple[int, int]] = {}
    for name, job in known.items():
        runs, ended = tasks.get(job.folder.parent.name, (0, 0))
        tasks[job.folder.parent.name] = (runs + 1, ended + (name in ledger))
    return tasks, total, jobs.time_left(ledger, known, total, workers)
