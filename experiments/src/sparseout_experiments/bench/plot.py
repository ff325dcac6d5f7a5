"""The rows as a picture: ratios as points on a line for each implementation, with a mark at 1."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sparseout_experiments.bench.cases import BUSY, count, size
from sparseout_experiments.bench.measure import Row
from sparseout_experiments.bench.store import Record, grouped
from sparseout_experiments.studies.engine.plots import canvas
from sparseout_experiments.studies.engine.style import COLOURS, png, style

_MARKERS = ("o", "s", "D", "^")
_ROW = 0.44  # inches an implementation


def picture(record: Record) -> bytes:
    """PNG: the operation above, models below, as far as there are any."""
    tables = {
        name: [row for rows in by_dtype.values() for row in rows]
        for name, by_dtype in grouped(row for row in record.rows if row.get("ratio")).items()
    }
    panels = [panel for panel in _PANELS if tables[panel.table]]
    rows_of = [tables[panel.table] for panel in panels]
    heights = [_ROW * max(len({row["implementation"] for row in rows}) - 1, 3) for rows in rows_of]
    device = record.environment["device"]["name"] + (" (quick run)" if record.quick else "")
    with style():
        figure = canvas(9.2, sum(heights) + 0.95 * len(heights) + 0.1, w_pad=0.12)
        grid: Any = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights) if panels else ()
        for (axes,), panel, rows in zip(grid, panels, rows_of, strict=True):
            _draw(axes, rows, panel.phase, panel.series)
            axes.set_title(f"{panel.title} on {device}")
        return png(figure, dpi=150)


def _of_operation(row: Row) -> tuple[str, str]:
    if row["threads"]:
        return f"{row['dtype']}, {count(row['threads'], 'thread')}", f"{size(row['elements'])} elements"
    return row["dtype"], f"{size(row['elements'])} elements" + (", host" if row["clock"] == "wall" else "")


def _of_model(row: Row) -> tuple[str, str]:
    return row["mode"] + (BUSY if row.get("busy") else ""), row["model"].replace(", ", "\n")


class _Panel(NamedTuple):
    """The rows of a table, drawn."""

    table: str
    phase: str
    series: Callable[[Row], tuple[str, str]]  # what the marker says and what the colour says
    title: str


_PANELS = (
    _Panel("operation", "both", _of_operation, "Forward and backward"),
    _Panel("busy", "both", _of_operation, "Forward and backward, one busy process a core"),
    _Panel("model", "step", _of_model, "A training step"),
)


def _draw(axes: Axes, rows: Sequence[Row], phase: str, series: Callable[[Row], tuple[str, str]]) -> None:
    """Markers and colours by series, side by side on the line of an implementation, in the order of the rows."""
    baseline = rows[0]["implementation"]
    implementations = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != baseline))
    drawn = list(dict.fromkeys(map(series, rows)))
    markers = dict(zip(dict.fromkeys(name[0] for name in drawn), _MARKERS, strict=False))
    names = list(dict.fromkeys(name[1] for name in drawn))
    ramp = LinearSegmentedColormap.from_list("", [COLOURS["second"], COLOURS["first"], COLOURS["ink"]])
    colours = {name: ramp(index / max(len(names) - 1, 1)) for index, name in enumerate(names)}
    for index, (marked, coloured) in enumerate(drawn):
        points = [row for row in rows if series(row) == (marked, coloured) and row["implementation"] != baseline]
        ends = [[row["ratio"][phase][end] for row in points] for end in ("low", "median", "high")]
        below, median, above = np.array(ends)
        aside = 0.7 * ((index + 0.5) / len(drawn) - 0.5)
        axes.errorbar(
            median,
            [implementations.index(row["implementation"]) + aside for row in points],
            xerr=[median - below, above - median],
            color=colours[coloured],
            marker=markers[marked],
            linestyle="none",
            elinewidth=1.1,
            markersize=5,
            zorder=3,
        )
    axes.axvline(1, color=COLOURS["ink"], linewidth=1.3, zorder=2)
    for line in range(1, len(implementations)):
        axes.axhline(line - 0.5, color=COLOURS["rule"], linewidth=0.8, zorder=1)
    axes.set(
        yticks=range(len(implementations)),
        yticklabels=implementations,
        ylim=(len(implementations) - 0.5, -0.5),
        xscale="log",
    )
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 2.2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"time as a multiple of {baseline}'s, the line at 1 (bars: 10 to 90% of rounds)")
    handles = [Line2D([], [], color=colours[name], linewidth=5, label=name) for name in names]
    grey: dict[str, Any] = {"color": COLOURS["muted"], "linestyle": "none", "markersize": 5.5}
    handles += [Line2D([], [], marker=marker, label=name, **grey) for name, marker in markers.items()]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
