"""A study from its runs to its files of results and its page, the same way for every study."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseout_experiments.studies.engine import jobs, pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Train
from sparseout_experiments.studies.engine.jobs import Ledger, OnProgress, OwnLedger

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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


Page = tuple[str, Mapping[str, "Figure"]]


class Study:
    """A study, from its runs to its files of results, one a task, and to the page that is made of all of them.

    A subclass says what is run (`plan`), what is kept of it (`content`) and how it is shown (`page`), or goes its own
    way in `check`, `save` and `render`. One that can go on from its files of results alone has `runs_of` too.
    """

    name: str
    kind: str  # what its files say that they hold
    tasks: tuple[str, ...]
    budgets: tuple[str, ...] = ("",)  # from the smallest; they are part of the files' names
    title: str  # the first line of the page
    all_must_finish = True  # or there are no results; otherwise a run that fails is a result of its kind
    ledger: type[Ledger[Any]] = OwnLedger
    train: Train = staticmethod(jobs.train)

    def plan(self, request: Request, ledger: Ledger[Any]) -> Mapping[Any, Job]:
        """The jobs that are known, given what the ledger has."""
        raise NotImplementedError

    def total(self, request: Request, ledger: Ledger[Any]) -> int:
        """Number of runs there will be, as far as that is known."""
        return len(self.plan(request, ledger))

    def most_runs(self, request: Request) -> int:
        """Number of runs there may be in the end."""
        return self.total(request, self.ledger())

    def runs_of(self, request: Request, record: Mapping[str, Any]) -> Iterable[tuple[Any, Job, dict[str, Any]]]:
        """The finished runs that a file of results has, as a ledger wants them, each with its job."""
        raise NotImplementedError

    def recorded(self, request: Request, results: Path) -> dict[Any, dict[str, Any]]:
        """The runs that the files of results have; where there is no file there are none, and failed ones run again.

        Raises ValueError for a file of something else, or of runs with other options than are wanted.
        """
        recorded, wanted = {}, self.ledger().wanted
        for path in (self.path(results, task, request.budget) for task in request.names):
            if path.exists():
                record = self.load(path)
                with files.shown(path, self.kind):
                    of_file = list(self.runs_of(request, record))
                for run, job, result in of_file:
                    files.check_options(path, record["config"], wanted(job))
                    recorded[run] = result
        return recorded

    def content(self, task: str, results: Mapping[Any, dict[str, Any]]) -> Mapping[str, Any]:
        """Content of the file of a task, beside its task and what its runs were made with."""
        raise NotImplementedError

    def page(self, records: Mapping[str, dict[str, Any]]) -> Page:
        """The text, and the figures by name, made of the results of every task."""
        raise NotImplementedError

    def count(self, record: Mapping[str, Any]) -> int:
        return len(record["rows"]) + len(record.get("failed", ()))

    def path(self, results: Path, task: str, budget: str = "") -> Path:
        return results / f"{'-'.join(part for part in (self.name, budget, task) if part)}.json"

    def paths(self, results: Path) -> dict[tuple[str, str], Path]:
        named = {(budget, task): self.path(results, task, budget) for budget in self.budgets for task in self.tasks}
        return {name: path for name, path in named.items() if path.exists()}

    def load(self, path: Path) -> dict[str, Any]:
        """Content of a file. Raises ValueError for one that is none, or not there."""
        return files.load(path, self.kind)

    def load_all(self, results: Path) -> dict[str, dict[str, Any]]:
        """The results of every task that a folder has, of the largest budget. Raises ValueError as `load` does."""
        return {task: self.load(path) for (_, task), path in self.paths(results).items()}

    def check(self, request: Request, results: Path, page: Path) -> None:
        """Raise ValueError for a page that is another, or that was made from more runs than there will be."""
        budget = request.budget if request.budget in self.budgets else ""
        replaced = [self.path(results, task, budget) for task in request.names]
        kept = [self.load(path) for path in self.paths(results).values() if path not in replaced]
        with files.shown(results, self.kind):
            count = sum(map(self.count, kept))
        pages.check(page, self.title, self.most_runs(request) + count)

    def save(self, request: Request, ledger: Ledger[Any], results: Path) -> None:
        plan = self.plan(request, ledger)
        for task in request.names:
            of_task = {name: ledger.results[name] for name, job in plan.items() if job.task == task}
            environments = files.distinct(result["environment"] for result in of_task.values())
            content = {"kind": self.kind, "task": task, "environments": environments, **self.content(task, of_task)}
            files.save(self.path(results, task), content)

    def render(self, results: Path, page: Path) -> None:
        """Make the page and its figures from the files of results.

        Raises ValueError where there are none, for a file that holds something else, and as `write` does.
        """
        records = files.present(self.load_all(results), results, self.name)
        with files.shown(results, self.kind):
            count = sum(map(self.count, records.values()))
        self.write(results, page, count, lambda: self.page(records))

    def write(self, results: Path, page: Path, runs: int, made: Callable[[], Page]) -> None:
        """Write what is made of so many runs. Raises ValueError where the page is another, or shows more of them."""
        from sparseout_experiments.studies.engine.style import style  # matplotlib takes a second to import

        pages.check(page, self.title, runs)
        with style():
            with files.shown(results, self.kind):
                text, figures = made()
            pages.write_images(page, figures)
        pages.write(page, text, runs)


def summary(record: Mapping[str, Any], frame: "pd.DataFrame", tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Summary of a task for every page: how many runs and seeds it has, how long these took, and what made them."""
    name = record["task"]
    return {
        "name": name,
        "task": tasks[name],
        "count": len(frame),
        "seeds": frame["seed"].nunique(),
        "minutes": frame["seconds"].sum() / 60 if "seconds" in frame else math.nan,
        "made_with": pages.made_with(record["environments"]),
    }


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

    def write() -> None:
        study.save(request, ledger, results)
        study.render(results, page)

    jobs.look(ledger, plan)
    try:
        if any(name not in ledger for name in plan()):
            with Cluster(workers, train or study.train, scheduler) as cluster:
                total = partial(study.total, request, ledger)
                jobs.run_all(cluster, ledger, plan, total, on_progress, all_must_finish=study.all_must_finish)
    except BaseException:
        if not study.all_must_finish:
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
    known, total = study.plan(request, ledger), study.total(request, ledger)
    tasks: dict[str, tuple[int, int]] = {}
    for name, job in known.items():
        runs, ended = tasks.get(job.folder.parent.name, (0, 0))
        tasks[job.folder.parent.name] = (runs + 1, ended + (name in ledger))
    return tasks, total, jobs.time_left(ledger, known, total, workers)
