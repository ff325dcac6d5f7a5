"""Does a controller meet its targets? First the range that fixed q's reach, then runs to targets within it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.targets import figures
from sparseout_experiments.studies.targets.grid import START, TASKS, Results, Run, Task, reach, runs
from sparseout_experiments.training import run_folder

__all__ = ["ALL_MUST_FINISH", "TASKS", "check", "ledger", "load_all", "plan", "render", "save", "total"]

ALL_MUST_FINISH = True
ledger = Ledger

TITLE = "# Are targets met?"
KIND = "sparseout targets"
POINTS = 100  # of a run's course that are kept, evenly spaced
TOLERANCE = 0.02  # of the target, in Hoyer
NOISE = 0.1  # of the power of Dropout's noise


def plan(request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
    """The jobs at fixed q's, and of each task whose range these have shown, the jobs to targets."""
    return {run: run.job(TASKS[run.name], request.work) for run in runs(request.names, ledger.results)}


def total(request: Request, ledger: Ledger[Run]) -> int:
    """How many runs there will be."""
    return sum(TASKS[name].runs for name in request.names)


def check(request: Request, results: Path, page: Path) -> None:
    """Raise ValueError for a page that is another, or that was made from more runs."""
    others = (len(record["rows"]) for name, record in load_all(results).items() if name not in request.names)
    pages.check(page, TITLE, total(request, Ledger()) + sum(others))


def save(request: Request, ledger: Ledger[Run], results: Path) -> None:
    """Write a file of results for each task."""
    jobs = plan(request, ledger)
    for name in request.names:
        mine = {run: result for run, result in ledger.results.items() if run.name == name}
        rows = [_row(run, result, jobs[run].folder) for run, result in mine.items()]
        files.save(_path(results, name), _head(name, TASKS[name], mine) | {"rows": rows})


def render(results: Path, page: Path) -> None:
    """Make the page and its figures from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    records = files.some(load_all(results), results, "targets")
    tasks = [summary(record) for record in records.values()]
    count = sum(task["count"] for task in tasks)
    text = pages.rendered(__package__, "page.md.j2", tasks=tasks, start=START, tolerance=TOLERANCE, noise=NOISE)
    pages.check(page, TITLE, count)
    pages.write_images(page, {f"targets-{task['name']}": figures.course(task["steered"], TOLERANCE) for task in tasks})
    pages.write(page, text, count)


def load_all(results: Path) -> dict[str, dict[str, Any]]:
    """The results of every task that a folder has. Raises ValueError for a file that is none."""
    return {name: files.load(path, KIND) for name in TASKS if (path := _path(results, name)).exists()}


def _path(results: Path, name: str) -> Path:
    return results / f"targets-{name}.json"


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a task."""
    frame = pd.json_normalize(record["rows"])
    frame["off"] = frame["control.hoyer"].astype(float) - frame["target"]
    low, high = record["range"]
    steered = frame[frame["part"].notna()]
    return {
        "name": record["task"],
        "title": TASKS[record["task"]].title,
        "config": record["config"],
        "range": (low, high),
        "width": (high - low) or float("nan"),
        "count": len(frame),
        "seeds": frame["seed"].nunique(),
        "steps": int(frame["steps"].iloc[0]),
        "minutes": frame["seconds"].sum() / 60,
        "made_with": pages.made_with((environment, True) for environment in record["environments"]),
        "steered": steered,
        "runs": len(steered),
        "met": int((steered["off"].abs() <= TOLERANCE).sum()),
        "farthest": steered["off"].abs().max(),
        "told": int(steered["told"].map(bool).sum()),
        "noise": _noise(frame),
        "constant": _noise(frame)[0] >= 1 - NOISE and _noise(frame)[1] <= 1 + NOISE,
        "targets": [{"part": part, **_target(group)} for part, group in steered.groupby("part")],
        "fixed": [{"q": q, "hoyer": t_interval(group["control.hoyer"])} for q, group in frame.groupby("q")],
    }


def _target(runs: pd.DataFrame) -> dict[str, Any]:
    return {
        "target": runs["target"].iloc[0],
        "hoyer": t_interval(runs["control.hoyer"]),
        "off": max(runs["off"], key=abs),
        "q": t_interval(runs["control.q"]),
        "noise": _noise(runs),
    }


def _noise(runs: pd.DataFrame) -> tuple[float, float]:
    return runs["control.noise_least"].min(), runs["control.noise_most"].max()


def _head(name: str, task: Task, results: Results) -> dict[str, Any]:
    return {
        "kind": KIND,
        "task": name,
        "config": files.shared([result["config"] for result in results.values()]),
        "environments": files.distinct([result["environment"] for result in results.values()]),
        "range": reach(name, task, results),
    }


def _row(run: Run, result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "q": run.q,
        "part": run.part,
        "target": None if run.part is None else run.target,
        "seed": run.seed,
        "control": result["control"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "told": [warning for warning in result["warnings"] if "out of reach" in warning],
        "course": None if run.part is None else _course(folder),
    }


def _course(folder: Path) -> list[list[float | None]]:
    """Step, q and Hoyer of every so many intervals, the last one among them."""
    course = [entry for line in run_folder.metrics(folder) for entry in line["control"]]
    return [
        [entry["step"], *(None if entry[name] is None else round(entry[name], 4) for name in ("q", "hoyer"))]
        for entry in files.thinned(course, POINTS)
    ]
