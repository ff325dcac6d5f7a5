"""What is sparsity worth in evaluation? Classifiers trained to a density, compacted, made sparse, and timed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger, OwnLedger
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.payoff import figures, training, transformer
from sparseout_experiments.studies.payoff.training import METHODS, STEERED, TARGETS, TASKS

__all__ = ["ALL_MUST_FINISH", "NAMES", "TASKS", "check", "ledger", "load_all", "plan", "render", "save", "total"]

ALL_MUST_FINISH = True

TITLE = "# What is sparsity worth?"
KIND = "sparseout payoff"
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
        """As options, and a folder."""
        if self.task == MINILM:
            return Job(MINILM, {"seed": 0}, request.work / MINILM)
        options = {"data": request.sources.get(self.task, self.task), **self._asdict()}
        options.pop("task")
        return Job(
            self.task, options, request.work / self.task / f"{self.method}_target={self.target}_seed={self.seed}"
        )


ledger = OwnLedger


def plan(request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
    """Every run, seed by seed."""
    runs = [
        Run(name, method, target, seed)
        for name in request.names
        if name != MINILM
        for seed in TASKS[name].seeds
        for method in METHODS
        for target in (TARGETS if method in STEERED else (None,))
    ]
    return {run: run.job(request) for run in [*runs, *([Run(MINILM)] if MINILM in request.names else [])]}


def total(request: Request, ledger: Ledger[Run]) -> int:
    """How many runs there are."""
    return len(plan(request, ledger))


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    """Train one classifier, or measure the transformer."""
    (transformer.train if task == MINILM else training.train)(task, options, folder)


def check(request: Request, results: Path, page: Path) -> None:
    """Raise ValueError for a page that is another, or that was made from more runs."""
    others = [record for name, record in load_all(results).items() if name not in request.names]
    pages.check(page, TITLE, total(request, ledger()) + sum(map(_runs, others)))


def save(request: Request, ledger: Ledger[Run], results: Path) -> None:
    """Write a file of results for each task."""
    for name in request.names:
        mine = {run: result for run, result in ledger.results.items() if run.task == name}
        made = files.distinct([dict(result["environment"]) for result in mine.values()])
        head = {"kind": KIND, "task": name, "environments": made}
        if name == MINILM:
            (result,) = mine.values()
            numbers = {key: result[key] for key in ("shape", "sentences", "tokens", "texts", "load", "rows")}
            files.save(_path(results, name), head | numbers)
        else:
            rows = [{**run._asdict(), **_numbers(result)} for run, result in mine.items()]
            files.save(_path(results, name), head | {"rows": rows})


def render(results: Path, page: Path) -> None:
    """Make the page and its figures from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    records = files.some(load_all(results), results, "payoff")
    tasks = [summary(record) for name, record in records.items() if name in TASKS]
    minilm = records.get(MINILM)
    values: dict[str, Any] = {
        "tasks": tasks,
        "minilm": minilm,
        "setup": training,
        "labels": LABELS,
        "tolerance": TOLERANCE,
    }
    made = [] if minilm is None else pages.made_with((environment, True) for environment in minilm["environments"])
    values["missing"] = [task.title for name, task in TASKS.items() if name not in records]
    text = pages.rendered(__package__, "page.md.j2", **values, minilm_made_with=made)
    runs = sum(map(_runs, records.values()))
    pages.check(page, TITLE, runs)
    images = {f"payoff-{task['name']}": figures.price(task["settings"]) for task in tasks}
    if minilm is not None:
        images["payoff-minilm"] = figures.thresholds(pd.DataFrame(minilm["rows"]))
    pages.write_images(page, images)
    pages.write(page, text, runs)


def load_all(results: Path) -> dict[str, dict[str, Any]]:
    """The results of every task that a folder has. Raises ValueError for a file that is none."""
    return {name: files.load(path, KIND) for name in NAMES if (path := _path(results, name)).exists()}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a task."""
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
    return {
        "name": name,
        "title": TASKS[name].title,
        "task": TASKS[name],
        "settings": settings,
        "dense": next(row for row in settings if row["method"] == "none"),
        "count": len(frame),
        "seeds": frame["seed"].nunique(),
        "missing": [LABELS[method] for method in METHODS if method not in set(frame["method"])],
        "sparse": any(row["sparse_layers"] for row in settings),
        "load": (frame["load"].min(), frame["load"].max()),
        "told": sum(bool(told) for told in frame["told"]),
        "minutes": frame["seconds"].sum() / 60,
        "made_with": pages.made_with((environment, True) for environment in record["environments"]),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("config", "environment")
    return {name: value for name, value in result.items() if name not in left_out}


def _runs(record: Mapping[str, Any]) -> int:
    return 1 if record["task"] == MINILM else len(record["rows"])


def _path(results: Path, name: str) -> Path:
    return results / f"payoff-{name}.json"
