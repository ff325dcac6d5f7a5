"""The control study of docs/protocol.md: what is run, what is kept of it, and the page of its results."""

from pathlib import Path
from typing import Any

from sparseout_experiments.message import expected
from sparseout_experiments.studies.control import collect, grid, runner
from sparseout_experiments.studies.control.collect import FILES
from sparseout_experiments.studies.control.grid import BUDGETS, TASKS, Run, Task
from sparseout_experiments.studies.control.runner import Ledger
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.study import Request

__all__ = ["ALL_MUST_FINISH", "BUDGETS", "TASKS", "check", "ledger", "plan", "recorded", "render", "save", "total"]

ALL_MUST_FINISH = False
ledger, check = Ledger, FILES.check


def plan(request: Request, ledger: Ledger) -> dict[Run, Job]:
    """The jobs that are known. Tuning comes first; what it does not decide fills the time until its last trial.

    Then seed by seed: what is interrupted has compared all settings of all tasks on the seeds it did.
    """
    runs = [run for task in _tasks(request) for run in ledger.plan(request.budget, task)]
    return {
        run: Job(
            grid.RUN_AS.get(run.task, run.task),
            grid.options(run, request.budget, request.sources, request.common),
            runner.folder_of(run, request.budget, request.work),
        )
        for run in sorted(runs, key=lambda run: (run.role != "tuning", run.seed))
    }


def total(request: Request, ledger: Ledger) -> int:
    """Number of runs there will be: tuning decides how many follow."""
    return sum(
        max(len(ledger.plan(request.budget, task)), grid.count(request.budget, task)[0]) for task in _tasks(request)
    )


def recorded(request: Request, results: Path) -> dict[Run, dict[str, Any]]:
    """The finished runs that the files of results have. Raises ValueError where they are not this study's."""
    found: dict[Run, dict[str, Any]] = {}
    for task in _tasks(request):
        found |= collect.recorded(results, request.budget, task)
    return found


def save(request: Request, ledger: Ledger, results: Path) -> None:
    """Write the files of results, one a task."""
    for task in _tasks(request):
        collect.save(results, request.budget, task, ledger)


def render(results: Path, page: Path) -> None:
    """Make the page and its figures from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    from sparseout_experiments.studies.control.page import made  # matplotlib takes a second to import

    records = [record for record in collect.load_all(results) if len(record.frame)]
    runs = sum(len(record.frame) for record in files.some(records, results, "control"))
    FILES.write(page, runs, lambda: made(records))


def _tasks(request: Request) -> list[Task]:
    """Those asked for that the budget has. Raises ValueError where there are none."""
    if tasks := [task for task in BUDGETS[request.budget] if task in request.names]:
        return tasks
    raise ValueError(expected("--only", f"of {', '.join(BUDGETS[request.budget])} at this budget", request.names[0]))
