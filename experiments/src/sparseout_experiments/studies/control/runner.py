"""Every run of the study, each in a folder of its own, and what is known of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.grid import GRIDS, Run, Setting, Task, Value
from sparseout_experiments.studies.engine import jobs
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.training import run_folder


class Ledger(jobs.OwnLedger[Run]):
    """Ledger of the study: ended runs, what tuning chose, and what there is to run.

    The options of the study alone count: a default that changed since is no other run.
    """

    def note(self, name: Run, job: Job) -> bool:
        """As the base's; the result also gets its curve, and the measures after the last epoch."""
        ended = super().note(name, job)
        if name in self.results:
            self.results[name] |= _epochs(job.folder, self.results[name]["epochs"])
        return ended

    def chosen(self, budget: str, task: Task) -> dict[Setting, Value]:
        """The values that tuning chose, as far as its trials are done."""
        metric = GRIDS[task].metric
        scores = [(run, _score(result, metric)) for run, result in self.results.items() if run.task == task]
        scores += [(run, math.inf) for run in self.failures if run.task == task]
        return grid.choose(budget, task, scores)

    def plan(self, budget: str, task: Task) -> list[Run]:
        first = grid.first(budget, task)
        tuned = all(run in self.results or run in self.failures for run in first)
        return first + (grid.second(budget, task, self.chosen(budget, task)) if tuned else [])


def folder_of(run: Run, budget: str, work: Path) -> Path:
    """The folder of a run."""
    return work / budget / run.task / run.key


def _epochs(folder: Path, epochs: int) -> dict[str, Any]:
    """Measures on validation data after the last epoch, which need not be the one tested, and the losses of all."""
    lines = run_folder.metrics(folder)
    if not lines or lines[-1].get("epoch") != epochs or "mean" not in lines[-1]:
        return {"last": None}  # a run whose curve was tidied away is a result all the same
    last = {"last": lines[-1]["mean"]}
    try:
        return last | {"curve": [[line["train_loss"], line["valid"]["loss"]] for line in lines]}
    except LookupError:  # of a task that has no loss beside its metric
        return last


def _score(result: Mapping[str, Any], metric: str) -> float:
    value = result["valid"][metric]
    return math.inf if value is None or not math.isfinite(value) else float(value)
