"""What is sparsity worth in evaluation? Classifiers trained to a density, compacted, made sparse, and timed."""

import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger, train_own
from sparseout_experiments.studies.engine.plots import points
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.engine.style import COLOURS, CYCLE
from sparseout_experiments.studies.payoff import training, transformer
from sparseout_experiments.studies.payoff.training import METHODS, SEEDS, STEERED, TARGETS, TASKS

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


class Payoff(study.Study):
    """Every classifier, seed by seed, and the transformer."""

    name, kind, tasks = "payoff", "sparseout payoff", NAMES
    title = "# What is sparsity worth?"

    def plan(self, request: Request, ledger: Ledger[str]) -> dict[str, Job]:
        jobs = {}
        for name, seed, method in product([name for name in request.names if name in TASKS], SEEDS, METHODS):
            for target in TARGETS if method in STEERED else (None,):
                data = request.sources.get(name, name)
                options = {"data": data, "method": method, "target": target, "seed": seed}
                folder = request.work / name / f"{method}_target={target}_seed={seed}"
                what = method if target is None else f"{method} to {target:g}"
                jobs[f"{name}: {what}, seed {seed}"] = Job(name, options, folder)
        if MINILM in request.names:
            jobs[f"{MINILM}: threshold, seed 0"] = Job(MINILM, {"seed": 0}, request.work / MINILM)
        return jobs

    @staticmethod
    def train(task: str, options: dict[str, Any], folder: Path) -> None:
        def run() -> dict[str, Any]:
            found = transformer.run() if task == MINILM else training.run(task, **options)
            return found | {"load": os.getloadavg()[0]}

        train_own(run, options, folder, *(["transformers"] if task == MINILM else []))

    def content(self, task: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        if task == MINILM:
            (result,) = results.values()
            return {key: result[key] for key in ("shape", "sentences", "tokens", "texts", "load", "rows")}
        return {"rows": [{"task": task} | _numbers(result) for result in results.values()]}

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
        drawn = {f"payoff-{task['name']}": price(task["settings"]) for task in tasks}
        if minilm is not None:
            drawn["payoff-minilm"] = thresholds(pd.DataFrame(minilm["rows"]))
        return text, drawn


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a task for the page."""
    frame = pd.json_normalize(record["rows"])
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
    return study.summary(record, frame, TASKS) | {
        "settings": settings,
        "dense": next(row for row in settings if row["method"] == "none"),
        "missing": [LABELS[method] for method in METHODS if method not in set(frame["method"])],
        "sparse": any(row["sparse_layers"] for row in settings),
        "load": (frame["load"].min(), frame["load"].max()),
        "told": sum(bool(told) for told in frame["told"]),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    of_run = {name: result["config"][name] for name in ("method", "target", "seed")}
    return of_run | {name: value for name, value in result.items() if name not in ("config", "environment")}


def price(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """Test error, parameters after compaction and time of one row against the density reached."""
    figure = Figure((9.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row["label"] for row in settings))
    for colour, label in zip(CYCLE, methods, strict=False):
        rows = sorted((r for r in settings if r["label"] == label), key=lambda r: r["density"].mean)
        density = [100 * row["density"].mean for row in rows]
        error = [row["error"].times(100) for row in rows]
        points(panels[0], density, error, color=colour, marker="o", capsize=2, label=label)
        parameters = [100 * row["parameters_compact"] / row["parameters"] for row in rows]
        panels[1].plot(density, parameters, color=colour, marker="o")
        panels[2].plot(density, [row["sparse_1"] for row in rows], color=colour, marker="o")
    panels[0].set(ylabel="test error, %")
    panels[1].set(ylabel="parameters after compaction, %", ylim=(0, None))
    panels[2].set(ylabel="µs for one row", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="active units, %", xlim=(0, None))
    dense = next(row for row in settings if row["method"] == "none")
    panels[2].axhline(dense["dense_1"], color=COLOURS["muted"], linewidth=1, linestyle="--")
    panels[2].annotate("dense", (0.02, dense["dense_1"]), xycoords=("axes fraction", "data"), va="bottom")
    figure.legend(loc="outside lower center", ncols=len(methods))
    return figure


def thresholds(rows: pd.DataFrame) -> Figure:
    """Cosine similarity and time of the FFNs against the density of their hidden units."""
    figure = Figure((9.2, 3.2), layout="constrained")
    near, fast = figure.subplots(1, 2)
    density = 100 * rows["reached"]
    near.plot(density, rows["cosine"], marker="o", label="mean")
    near.plot(density, rows["cosine_least"], marker="o", label="least")
    near.set(xlabel="active units, %", ylabel="cosine similarity to dense", ylim=(None, 1))
    near.legend()
    fast.plot(density, rows["us_dense"] / 1000, marker="o", label="dense")
    fast.plot(density, rows["us_sparse"] / 1000, marker="o", label="thresholds, sparse")
    fast.set(xlabel="active units, %", ylabel="ms for the FFNs of a sentence", ylim=(0, None))
    fast.legend()
    return figure


STUDY = Payoff()
