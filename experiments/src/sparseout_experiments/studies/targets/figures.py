"""The figure of a task: how far every run ended from its target, and the way there."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine.style import COLOURS
from sparseout_experiments.studies.targets.grid import KNOBS

_MARKS = {"hoyer": "o", "density": "s"}
_SHADES = dict(zip(KNOBS, ("#003f5c", "#7a5195", "#ef5675", "#ffa600", "#2f9e77"), strict=True))


def misses(runs: pd.DataFrame, courses: Sequence[Mapping[str, Any]], tolerance: float) -> Figure:
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
        axes.axhspan(-tolerance, tolerance, color="#999999", alpha=0.25, linewidth=0)
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
