"""Does a controller meet its targets, whatever the knob? First the range of fixed values, then targets within it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.engine.style import COLOURS
from sparseout_experiments.studies.targets import grid, training
from sparseout_experiments.studies.targets.grid import KNOBS, TASKS, Run

POINTS = 60  # of the course of a run of the first seed that are kept, evenly spaced
TOLERANCE = 0.01  # of the target, in Hoyer and in density
_MARKS = {"hoyer": "o", "density": "s"}
_SHADES = dict(zip(KNOBS, ("#003f5c", "#7a5195", "#ef5675", "#ffa600", "#2f9e77"), strict=True))


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
        return text, {f"targets-{task['name']}": misses(task["to_target"], task["courses"]) for task in tasks}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a task for the page."""
    frame = pd.DataFrame(record["rows"])
    to_target = frame[frame["target"].notna()].copy()
    to_target["tested"] = [row[row["measure"]] - row["target"] for row in to_target.to_dict("records")]
    to_target["off"] = to_target["last_tenth"] - to_target["target"]
    rows: list[dict[str, Any]] = []
    for (measure, knob), runs in to_target.groupby(["measure", "knob"], sort=False):
        of_fixed = frame[(frame["knob"] == knob) & frame["target"].isna()].groupby("value")[measure].mean()
        of_target = runs.groupby("target")["value"].mean()
        row = {"knob": knob, "measure": measure, "range": (of_fixed.min(), of_fixed.max()), "runs": len(runs)}
        row |= {"targets": list(of_target.index), "values": list(of_target)}
        for met, off in (("met", "off"), ("met_tested", "tested")):
            row |= {met: int((runs[off].abs() <= TOLERANCE).sum()), off: max(runs[off], key=abs)}
        rows.append(row)
    return study.summary(record, frame, TASKS) | {
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


def _row(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    course = result["course"]
    kept = files.thinned(course, POINTS) if course and run.seed == 0 else []
    last = course[-max(1, len(course) // 10) :]
    return {
        **{name: getattr(run, name) for name in ("knob", "seed", "value", "measure", "part", "target")},
        **{name: result[name] for name in ("value", "hoyer", "density", "seconds", "messages")},
        "last_tenth": sum(point[2] for point in last) / len(last) if last else None,
        "course": [[step, *(float(f"{number:.5g}") for number in numbers)] for step, *numbers in kept],
    }


def misses(runs: pd.DataFrame, courses: Sequence[Mapping[str, Any]]) -> Figure:
    """Left, every run's distance from its target in evaluation, by knob; right, the distance while training."""
    figure = Figure((9.2, 3.6), layout="constrained")
    ends, way = figure.subplots(1, 2)
    knobs = [knob for knob in KNOBS if knob in set(runs["knob"])]
    for index, measure in enumerate(measures := [name for name in _MARKS if name in set(runs["measure"])]):
        for place, knob in enumerate(knobs):
            group = runs[(runs["knob"] == knob) & (runs["measure"] == measure)]
            spread = [
                place + 0.32 * (index - (len(measures) - 1) / 2) + 0.01 * (n - len(group) / 2)
                for n in range(len(group))
            ]
            label = measure if place == 0 else None
            colour = (COLOURS["first"], COLOURS["second"])[index]
            ends.plot(spread, group["tested"], _MARKS[measure], color=colour, markersize=3, alpha=0.7, label=label)
    for axes in (ends, way):
        axes.axhspan(-TOLERANCE, TOLERANCE, color="#999999", alpha=0.25, linewidth=0)
        axes.axhline(0, color="#666666", linewidth=0.6)
    ends.set_xticks(range(len(knobs)), knobs)
    ends.set(ylabel="reached less target, on test data")
    ends.legend(loc="best")
    shown = set()
    for row in courses:
        if row["measure"] != "hoyer":
            continue
        steps, _, measured = zip(*row["course"], strict=True)
        knob = row["knob"]
        label = None if knob in shown else knob
        shown.add(knob)
        way.plot(steps, [value - row["target"] for value in measured], color=_SHADES[knob], linewidth=0.9, label=label)
    way.set(xlabel="step", ylabel="Hoyer on the probe less target", ylim=(-0.15, 0.15))
    way.legend(loc="best", ncols=2)
    return figure


STUDY = Targets()
