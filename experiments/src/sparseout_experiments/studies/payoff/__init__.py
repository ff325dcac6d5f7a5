"""What is sparsity worth in evaluation? Classifiers trained to a density, compacted, made sparse, and timed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.payoff import figures, training, transformer
from sparseout_experiments.studies.payoff.training import METHODS, STEERED, TARGETS, TASKS

MINILM = "minilm"
NAMES = (*TASKS, MINILM)
TOLERANCE = 0.25  # of a target, relative to it, within which it is met
LABELS = {
    "none": "no noise",
    "dropout": "Dropout",
    "sparseout": "Sparseout",
    "penalty": "L1 penalty",
    "topk": "statistical top-k",
}


class Run(NamedTuple):
    """One training of a classifier; or the measurements of the transformer."""

    task: str
    method: str = "threshold"
    target: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.task}: {self.method}{'' if self.target is None else f' to {self.target:g}'}, seed {self.seed}"

    def job(self, request: Request) -> Job:
        if self.task == MINILM:
            return Job(MINILM, {"seed": 0}, request.work / MINILM)
        options = {"data": request.sources.get(self.task, self.task), **self._asdict()}
        options.pop("task")
        return Job(
            self.task, options, request.work / self.task / f"{self.method}_target={self.target}_seed={self.seed}"
        )


class Payoff(study.Study):
    """Every classifier, seed by seed, and the transformer."""

    name, kind, tasks = "payoff", "sparseout payoff", NAMES
    title = "# What is sparsity worth?"

    def plan(self, request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
        runs = [
            Run(name, method, target, seed)
            for name in request.names
            if name != MINILM
            for seed in TASKS[name].seeds
            for method in METHODS
            for target in (TARGETS if method in STEERED else (None,))
        ]
        return {run: run.job(request) for run in [*runs, *([Run(MINILM)] if MINILM in request.names else [])]}

    @staticmethod
    def train(task: str, options: dict[str, Any], folder: Path) -> None:
        (transformer.train if task == MINILM else training.train)(task, options, folder)

    def content(self, task: str, results: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
        if task == MINILM:
            (result,) = results.values()
            return {key: result[key] for key in ("shape", "sentences", "tokens", "texts", "load", "rows")}
        return {"rows": [{**run._asdict(), **_numbers(result)} for run, result in results.items()]}

    def count(self, record: Mapping[str, Any]) -> int:
        return 1 if record["task"] == MINILM else len(record["rows"])

    def page(self, records: Mapping[str, Mapping[str, Any]]) -> study.Page:
        tasks = [summary(record) for name, record in records.items() if name in TASKS]
        minilm = records.get(MINILM)
        text = pages.rendered(
            __package__,
            "page.md.j2",
            tasks=tasks,
            minilm=minilm,
            minilm_made_with="" if minilm is None else pages.made_with(minilm["environments"]),
            missing=[task.title for name, task in TASKS.items() if name not in records],
            setup=training,
            labels=LABELS,
            tolerance=TOLERANCE,
        )
        drawn = {f"payoff-{task['name']}": figures.price(task["settings"]) for task in tasks}
        if minilm is not None:
            drawn["payoff-minilm"] = figures.thresholds(pd.DataFrame(minilm["rows"]))
        return text, drawn


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a task for the page."""
    name, frame = record["task"], pd.json_normalize(record["rows"])
    settings = []
    for (method, target), group in frame.groupby(["method", "target"], sort=False, dropna=False):
        row: dict[str, Any] = {key: t_interval(list(group[key])) for key in ("error", "density")}
        for key in ("parameters", "parameters_compact", "macs_dense", "macs_effective", "macs_compact_effective"):
            row[key] = float(group[key].mean())
        for network in ("dense", "compact", "sparse"):
            for rows in training.BATCHES:
                row[f"{network}_{rows}"] = float(group[f"us.{network}.{rows}"].median())
        row |= {"method": method, "target": None if target != target else target, "label": LABELS[str(method)]}
        row["met"] = target != target or bool(((group["density"] - target).abs() <= TOLERANCE * target).all())
        row["sparse_layers"] = float(group["sparse_layers"].map(len).mean())
        row["error_change"] = float((group["error_sparse"] - group["error"]).abs().max())
        settings.append(row)
    return study.summary(record, frame) | {
        "name": name,
        "title": TASKS[name].title,
        "task": TASKS[name],
        "settings": settings,
        "dense": next(row for row in settings if row["method"] == "none"),
        "missing": [LABELS[method] for method in METHODS if method not in set(frame["method"])],
        "sparse": any(row["sparse_layers"] for row in settings),
        "load": (frame["load"].min(), frame["load"].max()),
        "told": sum(bool(told) for told in frame["told"]),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("config", "environment")
    return {name: value for name, value in result.items() if name not in left_out}


STUDY = Payoff()
