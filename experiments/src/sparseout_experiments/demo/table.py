"""The table of results: the same cells in the terminal and on the page."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from sparseout_experiments.demo import Scale, Setting
from sparseout_experiments.demo.summary import Row
from sparseout_experiments.studies.engine.statistics import Interval

# Heading and unit.
HEADINGS = (("Hoyer", ""), ("Hoyer", "live"), ("Gini", ""), ("Dead", "%"), ("MSE", "x1000"))
_GROUPS = {"paper": "Paper scale", "matched": "Matched power"}


class Cell(NamedTuple):
    """A mean and half the width of its interval, as text."""

    mean: str
    half: str


class Line(NamedTuple):
    """One row of the table, under the heading of its group."""

    group: str
    name: str
    cells: tuple[Cell, ...]


def lines(rows: Sequence[Row]) -> list[Line]:
    """The table. Dead units are a percentage of all units, errors are mean squared errors times 1000."""
    return [
        Line(
            group_name(row.setting.scale),
            row_name(row.setting),
            (
                _cell(row.hoyer, 3),
                _cell(row.hoyer_live, 3),
                _cell(row.gini, 3),
                _cell(row.dead, 1, times=100),
                _cell(row.error, 2, times=1000),
            ),
        )
        for row in rows
    ]


def group_name(scale: Scale | None) -> str:
    """The heading above the rows of one scale."""
    if scale is None:
        return "For comparison"
    return _GROUPS[scale] if isinstance(scale, str) else f"Unit {scale:g}"


def row_name(setting: Setting) -> str:
    """The name of a row within its group."""
    if setting.q is not None:
        return f"q = {setting.q:g}"
    return "Dropout" if setting.method == "dropout" else "no dropout"


def _cell(interval: Interval, digits: int, times: float = 1) -> Cell:
    mean, half = (
        "-" if math.isnan(value) else f"{value * times:.{digits}f}" for value in (interval.mean, interval.half)
    )
    return Cell(mean, half if half == "-" else f"±{half}")


def terminal(rows: Sequence[Row]) -> Table:
    """The table for a terminal of 80 columns: intervals for sparsity and error."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for heading in HEADINGS:
        table.add_column(" ".join(heading).strip(), justify="right")
    group = None
    for line in lines(rows):
        if line.group != group:
            group = line.group
            table.add_section()
            table.add_row(Text(group, style="bold"))
        hoyer, live, gini, dead, error = line.cells
        table.add_row(f"  {line.name}", *(" ".join(c) for c in (hoyer, live)), gini.mean, dead.mean, " ".join(error))
    return table
