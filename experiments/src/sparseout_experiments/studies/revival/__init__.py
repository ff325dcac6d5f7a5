"""Does it help to revive dead units? Small networks in which the noise kills units, with revival and without."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.statistics import t_interval, within_seeds
from sparseout_experiments.studies.engine.study import Request
from sparseout_experiments.studies.engine.style import CYCLE
from sparseout_experiments.studies.revival import training
from sparseout_experiments.studies.revival.training import ARMS, TASKS, train

SEEDS = (0, 1, 2, 3, 4)


class Revival(study.Study):
    """Every arm with every seed."""

    name, kind, tasks = "revival", "sparseout revival", tuple(TASKS)
    title = "# Does it help to revive dead units?"
    train = staticmethod(train)

    def plan(self, request: Request, ledger: Ledger[str]) -> dict[str, Job]:
        return {
            f"{name}: {arm}, seed {seed}": Job(
                name, {"arm": arm, "seed": seed}, request.work / name / f"{arm.replace(' ', '_')}_seed={seed}"
            )
            for name in request.names
            for seed in SEEDS
            for arm in ARMS
        }

    def content(self, task: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {"rows": [_row(result) for result in results.values()]}

    def page(self, records: Mapping[str, Mapping[str, Any]]) -> study.Page:
        tasks = [summary(record) for record in records.values()]
        text = pages.rendered(__package__, "page.md.j2", tasks=tasks, setup=training, arms=ARMS)
        return text, {"revival": course({task["task"].title: task["frame"] for task in tasks})}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a task for the page."""
    frame = pd.DataFrame(record["rows"])
    arms = []
    for arm in ARMS:
        runs = frame[frame["arm"] == arm]
        measures = ["live", "error", "hoyer", *(["wrong"] if "wrong" in frame else [])]
        row: dict[str, Any] = {name: t_interval(list(runs[name])) for name in measures}
        row |= {"arm": arm, "revived": t_interval([float(sum(each)) for each in runs["revived"]])}
        never = frame[frame["arm"] == "never"]
        row |= {f"{name}_gain": within_seeds(runs, never, name) for name in ("live", "error")}
        arms.append(row)
    return study.summary(record, frame, TASKS) | {"arms": arms, "wrong": "wrong" in frame, "frame": frame}


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    found = result["config"] | result
    names = [name for name in ("arm", "seed", "error", "wrong", "live", "hoyer", "revived") if name in found]
    return {name: found[name] for name in names} | {"course": [round(value, 4) for value in result["course"]]}


def course(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """The part of the units that are live against the epoch, a panel a task, a line a run."""
    figure = Figure((9.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(frames), squeeze=False)[0]
    for panel, (title, frame) in zip(panels, frames.items(), strict=True):
        for colour, arm in zip(CYCLE, ARMS, strict=False):
            for index, values in enumerate(frame[frame["arm"] == arm]["course"]):
                epochs = np.arange(1, len(values) + 1)
                label = None if index else f"revived {arm}" if arm != "never" else arm
                panel.plot(epochs, 100 * np.array(values), color=colour, linewidth=0.9, label=label)
        panel.set(title=title, xlabel="epoch", ylabel="live units, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    return figure


STUDY = Revival()
