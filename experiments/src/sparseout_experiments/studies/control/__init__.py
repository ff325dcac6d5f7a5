"""The control study of docs/protocol.md: what is run, what is kept of it, and the page of its results."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparseout_experiments.message import expected
from sparseout_experiments.studies.control import collect, grid
from sparseout_experiments.studies.control.grid import BUDGETS, Run, Task
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.study import Request, Study


class Control(Study):
    """The runs of the protocol, which a budget may have of several tasks."""

    name, kind, tasks, budgets = "control", collect.KIND, grid.TASKS, tuple(BUDGETS)
    title, ledger, all_must_finish = grid.TITLE, collect.Ledger, False

    def plan(self, request: Request, ledger: Any) -> dict[Run, Job]:
        """The jobs that are known. Tuning comes first; what it does not decide fills the time until its last trial.

        Then seed by seed: what is interrupted has compared all settings of all tasks on the seeds it did.
        """
        runs = [run for task in _tasks(request) for run in ledger.plan(request.budget, task)]
        return {run: _job(run, request) for run in sorted(runs, key=lambda run: (run.role != "tuning", run.seed))}

    def total(self, request: Request, ledger: Any) -> int:
        """Number of runs there will be: tuning decides how many follow."""
        return sum(
            max(len(ledger.plan(request.budget, task)), grid.count(request.budget, task)[0]) for task in _tasks(request)
        )

    def most_runs(self, request: Request) -> int:
        return sum(grid.count(request.budget, task)[1] for task in _tasks(request))

    def runs_of(self, request: Request, record: Mapping[str, Any]) -> Iterator[tuple[Run, Job, dict[str, Any]]]:
        shared = {name: record[name] for name in ("config", "environments")}
        for run, row in zip(collect.record_of(record).finished["run"], record["rows"], strict=True):
            yield run, _job(run, request), row | shared

    def save(self, request: Request, ledger: Any, results: Path) -> None:
        for task in _tasks(request):
            collect.save(results, request.budget, task, ledger)

    def render(self, results: Path, page: Path) -> None:
        from sparseout_experiments.studies.control.page import made  # matplotlib takes a second to import

        records = [record for record in collect.load_all(results) if len(record.frame)]
        runs = sum(len(record.frame) for record in files.present(records, results, self.name))
        self.write(results, page, runs, lambda: made(records))


STUDY = Control()


def _job(run: Run, request: Request) -> Job:
    options = grid.options(run, request.budget, request.sources, request.common)
    return Job(grid.RUN_AS.get(run.task, run.task), options, request.work / request.budget / run.task / run.key)


def _tasks(request: Request) -> list[Task]:
    """Those asked for that the budget has. Raises ValueError where there are none."""
    if tasks := [task for task in BUDGETS[request.budget] if task in request.names]:
        return tasks
    raise ValueError(expected("--only", f"of {', '.join(BUDGETS[request.budget])} at this budget", request.names[0]))
