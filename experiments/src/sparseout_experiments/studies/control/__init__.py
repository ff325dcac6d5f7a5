"""The control study of docs/protocol.md: run it, and make the page of its results."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparseout._utils.validation import expected
from sparseout_experiments.studies.control import collect, grid, runner
from sparseout_experiments.studies.control.grid import BUDGETS, TASKS, TITLE, Task
from sparseout_experiments.studies.control.runner import Ledger, OnProgress, Progress
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.cluster import Train
from sparseout_experiments.studies.engine.jobs import StudyStopped, train

__all__ = ["BUDGETS", "TASKS", "Ledger", "Progress", "StudyStopped", "render", "reproduce"]


def reproduce(
    budget: str,
    results: Path,
    work: Path,
    page: Path,
    workers: int = 2,
    tasks: Sequence[Task] = TASKS,
    on_progress: OnProgress | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    common: Mapping[str, Any] | None = None,
    scheduler: str | None = None,
    train: Train = train,
) -> Ledger:
    """Run what is missing of the study, write the files of results, and make the page from all that are there.

    What was finished before is kept, whether this ends by itself, by Ctrl-C or by an error. The files of results and
    the page then show what there is, unless what they show already is more.

    Args:
        budget: "small", "gpu" or "full".
        results: folder of the files of results, one a task.
        work: folder of the runs, one folder each.
        page: the Markdown file to write; figures go to `images` beside it.
        workers: processes at a time, one thread each.
        tasks: which tasks.
        on_progress: is told of every run.
        sources: for the data sets "mnist", "cifar10" and "wikitext-2" a folder or hub id to take instead.
        common: options for every run that are no part of the study, such as a device.
        train: trains one run.

    Raises:
        ValueError: for a budget, task or number of workers that is none.
        StudyStopped: where the study cannot go on, in one sentence.
    """
    if budget not in grid.BUDGETS:
        raise ValueError(expected("budget", f"one of {', '.join(grid.BUDGETS)}", repr(budget)))
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(expected("tasks", f"among {', '.join(TASKS)}", repr(unknown[0])))
    if workers < 1:
        raise ValueError(expected("workers", "a whole number >= 1", workers))
    others = [one for one in collect.load_all(results) if one.budget != budget or one.task not in tasks]
    planned = sum(grid.count(task)[1] for task in tasks)  # at most
    pages.check(page, TITLE, planned + sum(len(one.rows) + len(one.failures) for one in others))
    ledger = runner.look(budget, work, tasks)
    try:
        runner.run_all(
            budget,
            work,
            ledger,
            workers=workers,
            tasks=tasks,
            sources=sources,
            common=common,
            on_progress=on_progress,
            scheduler=scheduler,
            train=train,
        )
    except BaseException:
        with suppress(ValueError):  # what is on the page is more, or no run has finished: what stopped it is to be told
            _write(budget, tasks, ledger, results, page)
        raise
    _write(budget, tasks, ledger, results, page)
    return ledger


def _write(budget: str, tasks: Sequence[Task], ledger: Ledger, results: Path, page: Path) -> None:
    for task in tasks:
        collect.save(results, budget, task, ledger)
    render(results, page)


def render(results: Path, page: Path) -> None:
    """Make the page and its figures from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    from sparseout_experiments.studies.control.page import write  # matplotlib takes a second to import

    records = collect.load_all(results)
    if not any(record.rows or record.failures for record in records):
        raise ValueError(
            expected("--results", "a folder with results of `sparseout reproduce control`", repr(str(results)))
        )
    write(records, page)
