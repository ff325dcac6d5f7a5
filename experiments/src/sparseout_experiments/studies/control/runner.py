"""Every run of the study, each in a folder of its own, and what is known of them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.grid import GRIDS, Run, Setting, Task, Value
from sparseout_experiments.studies.engine import jobs
from sparseout_experiments.studies.engine.cluster import Job


class Ledger(jobs.Ledger[Run]):
    """Ledger of the study: ended runs, what tuning chose, and what there is to run."""

    def wanted(self, job: Job) -> Mapping[str, Any]:
        """The options of the study alone: a default that changed since is no other run."""
        return job.options

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
        """The runs of a task as far as they are known."""
        first = grid.first(budget, task)
        tuned = all(run in self.results or run in self.failures for run in first)
        return first + (grid.second(budget, task, self.chosen(budget, task)) if tuned else [])


def folder_of(run: Run, budget: str, work: Path) -> Path:
    """The folder of a run."""
    return work / budget / run.task / run.key


def _epochs(folder: Path, epochs: int) -> dict[str, Any]:
    """Measures on validation data after the last epoch, which need not be the one tested, and the losses of all."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = lines[-1]["mean"] if lines[-1]["epoch"] == epochs else None
    except (OSError, ValueError, LookupError, TypeError):
        return {"last": None}  # a run whose curve was tidied away is a result all the same
    try:
        return {"last": last, "curve": [[line["train_loss"], line["valid"]["loss"]] for line in lines]}
    except LookupError:  # of a task that has no loss beside its metric
        return {"last": last}


def _score(result: Mapping[str, Any], metric: str) -> float:
    value = result["valid"][metric]
    return math.inf if value is None or not math.isfinite(value) else float(value)
