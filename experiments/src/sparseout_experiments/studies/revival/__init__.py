"""Does it help to revive dead units? Small networks in which the noise kills units, with revival and without."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger, OwnLedger
from sparseout_experiments.studies.engine.statistics import Difference, paired, t_interval
from sparseout_experiments.studies.engine.study import Files, Request
from sparseout_experiments.studies.revival import figures, training
from sparseout_experiments.studies.revival.training import ARMS, TASKS, train

__all__ = ["ALL_MUST_FINISH", "TASKS", "check", "ledger", "load_all", "plan", "render", "save", "total", "train"]

ALL_MUST_FINISH = True

FILES = Files("revival", "sparseout revival", "# Does it help to revive dead units?", tuple(TASKS))
load_all = FILES.load_all
SEEDS = (0, 1, 2, 3, 4)


class Run(NamedTuple):
    """One training."""

    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}: {self.arm}, seed {self.seed}"


ledger = OwnLedger


def plan(request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
    """Every arm with every seed."""
    return {
        Run(name, arm, seed): Job(
            name, {"arm": arm, "seed": seed}, request.work / name / f"{arm.replace(' ', '_')}_seed={seed}"
        )
        for name in request.names
        for seed in SEEDS
        for arm in ARMS
    }


def total(request: Request, ledger: Ledger[Run]) -> int:
    """How many runs there are."""
    return len(request.names) * len(SEEDS) * len(ARMS)


def check(request: Request, results: Path, page: Path) -> None:
    """Raise ValueError for a page that is another, or that was made from more runs."""
    FILES.check(request, results, page, total(request, ledger()))


def save(request: Request, ledger: Ledger[Run], results: Path) -> None:
    """Write a file of results for each task."""

    def content(name: str, runs: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
        return {"rows": [{"arm": run.arm, "seed": run.seed} | _numbers(result) for run, result in runs.items()]}

    FILES.save(request, ledger, results, content)


def render(results: Path, page: Path) -> None:
    """Make the page and its figure from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    records = FILES.some(results)
    tasks = [summary(record) for record in records.values()]
    text = pages.rendered(__package__, "page.md.j2", tasks=tasks, setup=training, arms=ARMS)
    course = figures.course({task["title"]: task["frame"] for task in tasks})
    FILES.write(records, page, text, {"revival": course})


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a task."""
    task, frame = TASKS[record["task"]], pd.DataFrame(record["rows"])
    arms = []
    for arm in ARMS:
        runs = frame[frame["arm"] == arm]
        measures = ["live", "error", "hoyer", *(["wrong"] if "wrong" in frame else [])]
        row: dict[str, Any] = {name: t_interval(list(runs[name])) for name in measures}
        row |= {"arm": arm, "revived": t_interval([float(sum(each)) for each in runs["revived"]])}
        row |= {f"{name}_gain": _against_none(frame, arm, name) for name in ("live", "error")}
        arms.append(row)
    return {
        "title": task.title,
        "error": task.error,
        "layers": task.layers,
        "units": task.layers * training.UNITS,
        "arms": arms,
        "wrong": "wrong" in frame,
        "frame": frame,
        "seeds": frame["seed"].nunique(),
        "made_with": pages.made_with((environment, True) for environment in record["environments"]),
    }


def _against_none(frame: pd.DataFrame, arm: str, measure: str) -> Difference:
    """The measure of an arm less that without revival, within seeds."""
    first, second = (
        dict(zip(runs["seed"], runs[measure], strict=True))
        for runs in (frame[frame["arm"] == arm], frame[frame["arm"] == "never"])
    )
    return paired(first, second)


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in ("error", "wrong", "live", "hoyer", "revived") if name in result]
    return {name: result[name] for name in names} | {"course": [round(value, 4) for value in result["course"]]}
