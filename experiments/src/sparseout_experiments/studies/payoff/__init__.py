"""What is sparsity worth in evaluation? Classifiers trained to a density, compacted, made sparse, and timed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparseout_experiments.studies.control import collect
from sparseout_experiments.studies.engine import jobs, pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Outcome, Train
from sparseout_experiments.studies.engine.jobs import StudyStopped
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.sweep import OnProgress
from sparseout_experiments.studies.payoff import figures, training, transformer
from sparseout_experiments.studies.payoff.training import METHODS, STEERED, TARGETS, TASKS

__all__ = ["NAMES", "TASKS", "StudyStopped", "load_all", "render", "reproduce"]

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
Run = tuple[str, str, float | None, int]  # task, method, target, seed


def plan(names: Sequence[str], work: Path, sources: Mapping[str, str], seeds: int) -> dict[Run, Job]:
    """Every run, seed by seed, so that an interrupted study has compared all methods on the seeds it did."""
    found: dict[Run, Job] = {}
    for name in names:
        if name == MINILM:
            found[name, "threshold", None, 0] = Job(name, {"seed": 0}, work / name)
            continue
        for seed in TASKS[name].seeds[:seeds]:
            for method in METHODS:
                for target in TARGETS if method in STEERED else (None,):
                    options = {"data": sources.get(name, name), "method": method, "target": target, "seed": seed}
                    key = f"{method}_target={target}_seed={seed}"
                    found[name, method, target, seed] = Job(name, options, work / name / key)
    return found


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    """Train one classifier, or measure the transformer."""
    (transformer.train if task == MINILM else training.train)(task, options, folder)


def reproduce(
    results: Path,
    work: Path,
    page: Path,
    workers: int = 1,
    names: Sequence[str] = NAMES,
    on_progress: OnProgress | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    seeds: int = 3,
    scheduler: str | None = None,
    train: Train = train,
) -> None:
    """Run what is missing, write a file of results for each task, and make the page.

    Args:
        results: folder of the files of results.
        work: folder of the runs.
        page: the Markdown file to write; figures go to `images` beside it.
        workers: processes at a time, one thread each. More than one disturb each other's times.
        names: which of digits, mnist, minilm.
        on_progress: is told how many runs of how many are done, and which ended last.
        sources: a folder or hub id to take for a data set.
        seeds: how many of each setting.
        scheduler: the address of a Dask scheduler, instead of workers of this machine.
        train: trains one run.

    Raises:
        StudyStopped: where it cannot go on, in one sentence; what is finished is kept.
    """
    wanted = plan(names, work, sources or {}, seeds)
    others = (len(record["rows"]) for name, record in load_all(results).items() if name not in names)
    pages.check(page, TITLE, len(wanted) + sum(others))
    found: dict[Run, dict[str, Any]] = {}

    def look(run: Run) -> bool:
        result, reason = jobs.outcome_of(wanted[run].folder, wanted[run].options)
        if reason is not None:
            raise StudyStopped(f"{_said(run)}: {reason}")
        if result is not None:
            found[run] = result
        return result is not None

    def ended(run: Run, outcome: Outcome) -> dict[Run, Job]:
        if (problem := outcome.problem or outcome.lost) or not look(run):
            raise StudyStopped(f"{_said(run)}: {problem or 'the run ended without a result'}")
        if on_progress is not None:
            on_progress(len(found), len(wanted), _said(run))
        return {}

    missing = {run: job for run, job in wanted.items() if not look(run)}
    if missing:
        with Cluster(min(workers, len(missing)), train, scheduler) as cluster:
            jobs.run_all(cluster, missing, lambda run: None, ended)
    for name in names:
        mine = {run: found[run] for run in wanted if run[0] == name}
        head = {"kind": KIND, "task": name, "environments": collect.distinct([r["environment"] for r in mine.values()])}
        if name == MINILM:
            ((_, result),) = mine.items()
            numbers = {key: result[key] for key in ("shape", "sentences", "tokens", "texts", "rows")}
            files.save(_path(results, name), head | numbers)
        else:
            rows = [
                {"method": method, "target": target, "seed": seed} | _numbers(result)
                for (_, method, target, seed), result in mine.items()
            ]
            files.save(_path(results, name), head | {"rows": rows})
    render(results, page)


def render(results: Path, page: Path) -> None:
    """Make the page and its figures from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    records = files.some(load_all(results), results, "payoff")
    tasks = [summary(record) for name, record in records.items() if name in TASKS]
    minilm = records.get(MINILM)
    values = {"tasks": tasks, "minilm": minilm, "setup": training, "labels": LABELS, "tolerance": TOLERANCE}
    made = [] if minilm is None else pages.made_with((environment, True) for environment in minilm["environments"])
    text = pages.rendered(__package__, "page.md.j2", **values, minilm_made_with=made)
    runs = sum(len(record["rows"]) for record in records.values())
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
        "told": sum(bool(told) for told in frame["told"]),
        "minutes": frame["seconds"].sum() / 60,
        "made_with": pages.made_with((environment, True) for environment in record["environments"]),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("config", "environment")
    return {name: value for name, value in result.items() if name not in left_out}


def _said(run: Run) -> str:
    task, method, target, seed = run
    return f"{task}, {method}{'' if target is None else f' to {target:g}'}, seed {seed}"


def _path(results: Path, name: str) -> Path:
    return results / f"payoff-{name}.json"
