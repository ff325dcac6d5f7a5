"""Does a controller meet its targets, whatever the knob? First the range of fixed values, then targets within it."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.targets import figures, grid, training
from sparseout_experiments.studies.targets.grid import KNOBS, TASKS, Run

POINTS = 60  # of the course of a run of the first seed that are kept, evenly spaced
TOLERANCE = 0.01  # of the target, in Hoyer and in density


class Targets(study.Study):
    """Runs at fixed values, and of each knob whose range these have shown, runs to targets."""

    name, kind, tasks = "targets", "sparseout targets of knobs", tuple(TASKS)
    title = "# Are targets met?"
    train = staticmethod(training.train)

    def plan(self, request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
        return {run: run.job(request.work) for run in grid.runs(request.names, ledger.results)}

    def total(self, request: Request, ledger: Ledger[Run]) -> int:
        return sum(grid.count(name) for name in request.names)

    def content(self, task: str, results: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
        return {"rows": [_row(run, result) for run, result in results.items()]}

    def page(self, records: Mapping[str, Mapping[str, Any]]) -> study.Page:
        tasks = [summary(record) for record in records.values()]
        text = pages.rendered(__package__, "page.md.j2", tasks=tasks, tolerance=TOLERANCE, setup=training, knobs=KNOBS)
        return text, {
            f"targets-{task['name']}": figures.misses(task["to_target"], task["courses"], TOLERANCE) for task in tasks
        }


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a task for the page."""
    frame = pd.DataFrame(record["rows"])
    to_target = frame[frame["target"].notna()].copy()
    to_target["tested"] = [row[row["measure"]] - row["target"] for row in to_target.to_dict("records")]
    to_target["off"] = to_target["last_tenth"] - to_target["target"]
    rows = [_targets(frame, group) for _, group in to_target.groupby(["measure", "knob"], sort=False)]
    return study.summary(record, frame) | {
        "name": record["task"],
        "title": TASKS[record["task"]].title,
        "task": TASKS[record["task"]],
        "to_target": to_target,
        "courses": [row for row in to_target.to_dict("records") if row["course"]],
        "rows": sorted(rows, key=lambda row: (row["measure"] != "hoyer", list(KNOBS).index(row["knob"]))),
        "met": sum(row["met"] for row in rows),
        "runs": len(to_target),
        "met_tested": sum(row["met_tested"] for row in rows),
        "farthest": to_target["off"].abs().max(),
        "farthest_tested": to_target["tested"].abs().max(),
        "missed": [row for row in to_target.to_dict("records") if max(abs(row["off"]), abs(row["tested"])) > TOLERANCE],
    }


def _targets(frame: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    knob, measure = runs["knob"].iloc[0], runs["measure"].iloc[0]
    fixed = frame[(frame["knob"] == knob) & frame["target"].isna()]
    means = fixed.groupby("value")[measure].mean()
    return {
        "knob": knob,
        "measure": measure,
        "range": (means.min(), means.max()),
        "targets": sorted(runs["target"].unique()),
        "values": [runs[runs["target"] == target]["value"].mean() for target in sorted(runs["target"].unique())],
        "met": int((runs["off"].abs() <= TOLERANCE).sum()),
        "runs": len(runs),
        "off": max(runs["off"], key=abs),
        "met_tested": int((runs["tested"].abs() <= TOLERANCE).sum()),
        "tested": max(runs["tested"], key=abs),
    }


def _row(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    course = result["course"]
    kept = files.thinned(course, POINTS) if course and run.seed == 0 else []
    last = course[-max(1, len(course) // 10) :]
    return {
        "knob": run.knob,
        "seed": run.seed,
        "value": result["value"],
        "measure": run.measure,
        "part": run.part,
        "target": run.target,
        "hoyer": result["hoyer"],
        "density": result["density"],
        "seconds": result["seconds"],
        "messages": result["messages"],
        "last_tenth": sum(point[2] for point in last) / len(last) if last else None,
        "course": [[step, *(float(f"{number:.5g}") for number in numbers)] for step, *numbers in kept],
    }


STUDY = Targets()
