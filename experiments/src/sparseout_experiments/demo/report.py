"""What the demonstration shows beside the page of a sweep: a table, a sentence for each scale, and a picture."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from sparseout_experiments.demo import Scale
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.studies.engine.pages import fixed, interval
from sparseout_experiments.studies.engine.statistics import Interval, direction, slope_interval

Row = Mapping[str, Any]  # of `Results.settings`

# Measures with their heading, the digits that are shown, and what they are multiplied by.
COLUMNS = {
    "hoyer": ("Hoyer", 3, 1),
    "hoyer_live": ("Hoyer live", 3, 1),
    "gini": ("Gini", 3, 1),
    "dead": ("Dead %", 1, 100),
    "metric": ("MSE x1000", 2, 1),
}
_WAYS = {-1: "falls", 1: "rises", 0: "has no clear direction"}


def settings(results: Results) -> list[Row]:
    """The settings over their seeds; what has no scale or no q has None."""
    rows = results.settings(("method", "scale", "q")).to_dict("records")
    return [row | {name: None if row[name] != row[name] else row[name] for name in ("scale", "q")} for row in rows]


def mean(row: Row, measure: str) -> Interval:
    """A measure of a setting over its seeds."""
    return Interval(row[measure], row[f"{measure}_half"], row["seeds"])


def group_name(scale: Scale | None) -> str:
    """The heading above the rows of one scale."""
    if isinstance(scale, float):
        return f"Unit {scale:g}"
    return {None: "For comparison", "paper": "Paper scale", "matched": "Matched power"}[scale]


def row_name(row: Row) -> str:
    """The name of a row within its group."""
    if row["q"] is not None:
        return f"q = {row['q']:g}"
    return "Dropout" if row["method"] == "dropout" else "no dropout"


def table(rows: Sequence[Row]) -> Table:
    """The numbers for a terminal of 80 columns: intervals for sparsity and error."""
    columns = (Column(heading, justify="right") for heading, *_ in COLUMNS.values())
    shown = Table("", *columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name, group in groupby(rows, key=lambda row: group_name(row["scale"])):
        shown.add_section()
        shown.add_row(Text(name, style="bold"))
        for row in group:
            cells = []
            for measure, (_, digits, times) in COLUMNS.items():
                value = mean(row, measure).times(times)
                plain = measure in ("gini", "dead")
                cells.append(fixed(value.mean, digits) if plain else interval(value, digits))
            shown.add_row(f"  {row_name(row)}", *cells)
    return shown


def verdict(results: Results, scale: Scale) -> str:
    """What q did to the sparsity of the code at one scale, over the seeds that have it at every q; or nothing."""
    frame = results.frame
    runs = frame[(frame["method"] == "sparseout") & (frame["scale"] == scale)]
    changes = {}
    for measure in ("hoyer", "hoyer_live"):
        of_measure = runs.astype({measure: float}).pivot(index="seed", columns="q", values=measure)
        whole = of_measure.dropna(axis="columns", how="all").dropna()
        if whole.shape[1] < 2 or whole.empty:
            return ""
        changes[measure] = slope_interval(list(whole), whole.to_numpy().tolist()), whole.mean()
    (slope, means), (of_live, live) = changes.values()

    def way(slope: Interval) -> str:
        return "changes" if math.isnan(slope.half) else _WAYS[direction(slope)]

    ends, live = ([f"{values.iloc[end]:.2f}" for end in (0, -1)] for values in (means, live))
    return (
        f"{group_name(scale)}: as q goes from {means.index[0]:g} to {means.index[-1]:g}, the Hoyer sparsity of the "
        f"code {way(slope)}, from {ends[0]} to {ends[1]}, by {interval(slope, 3, signed=True)} per unit of q; over "
        f"live units it {way(of_live)}, from {live[0]} to {live[1]}."
    )
