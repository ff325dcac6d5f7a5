"""Does it help to revive dead units? Small networks in which the noise kills units, with revival and without."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.statistics import t_interval, within_seeds
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.revival import figures, training
from sparseout_experiments.studies.revival.training import ARMS, TASKS, train

SEEDS = (0, 1, 2, 3, 4)


class Run(NamedTuple):
    """One training."""

    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}: {self.arm}, seed {self.seed}"


class Revival(study.Study):
    """Every arm with every seed."""

    name, kind, tasks = "revival", "sparseout revival", tuple(TASKS)
    title = "# Does it help to revive dead units?"
    train = staticmethod(train)

    def plan(self, request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
        return {
            Run(name, arm, seed): Job(
                name, {"arm": arm, "seed": seed}, request.work / name / f"{arm.replace(' ', '_')}_seed={seed}"
            )
            for name in request.names
            for seed in SEEDS
            for arm in ARMS
        }

    def content(self, task: str, results: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
        return {"rows": [{"arm": run.arm, "seed": run.seed} | _numbers(result) for run, result in results.items()]}

    def page(self, records: Mapping[str, Mapping[str, Any]]) -> study.Page:
        tasks = [summary(record) for record in records.values()]
        text = pages.rendered(__package__, "page.md.j2", tasks=tasks, setup=training, arms=ARMS)
        return text, {"revival": figures.course({task["title"]: task["frame"] for task in tasks})}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a task for the page."""
    task, frame = TASKS[record["task"]], pd.DataFrame(record["rows"])
    arms = []
    for arm in ARMS:
        runs = frame[frame["arm"] == arm]
        measures = ["live", "error", "hoyer", *(["wrong"] if "wrong" in frame else [])]
        row: dict[str, Any] = {name: t_interval(list(runs[name])) for name in measures}
        row |= {"arm": arm, "revived": t_interval([float(sum(each)) for each in runs["revived"]])}
        never = frame[frame["arm"] == "never"]
        row |= {f"{name}_gain": within_seeds(runs, never, name) for name in ("live", "error")}
        arms.append(row)
    return study.summary(record, frame) | {
        "title": task.title,
        "error": task.error,
        "layers": task.layers,
        "units": task.layers * training.UNITS,
        "arms": arms,
        "wrong": "wrong" in frame,
        "frame": frame,
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in ("error", "wrong", "live", "hoyer", "revived") if name in result]
    return {name: result[name] for name in names} | {"course": [round(value, 4) for value in result["course"]]}


STUDY = Revival()
