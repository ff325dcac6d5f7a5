"""Parts that figures share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sparseout_experiments.studies.engine.statistics import Interval
from sparseout_experiments.studies.engine.style import COLOURS


def canvas(width: float, height: float, **pads: float) -> Figure:
    """A figure in which neither labels nor panels touch; `pads` are those of the constrained layout."""
    given: dict[str, Any] = {"w_pad": 0.1, "h_pad": 0.1} | pads
    return Figure((width, height), layout=ConstrainedLayoutEngine(**given))


def points(axes: Axes, x: Sequence[float | Interval], y: Sequence[float | Interval], **look: Any) -> None:
    """Points with 95% intervals; a number has none, and one that is undefined is not drawn."""
    axes.errorbar(_means(x), _means(y), _halves(y), _halves(x), **look)


def _means(values: Iterable[float | Interval]) -> list[float]:
    return [value.mean if isinstance(value, Interval) else value for value in values]


def _halves(values: Sequence[float | Interval]) -> list[float] | None:
    halves = [value.half for value in values if isinstance(value, Interval)]
    return [0.0 if math.isnan(half) else half for half in halves] if halves else None


def references(axes: Axes, values: Mapping[str, float]) -> None:
    """A line for each value, named at its right end, at the limits that the axes have now."""
    low, high = axes.get_ylim()
    height = -math.inf
    for name, value in sorted(values.items(), key=lambda item: (item[1], item[0])):
        if math.isnan(value):
            continue
        axes.axhline(value, color=COLOURS["muted"], linewidth=1.1, zorder=1)
        height = max(value, height + 0.07 * (high - low))  # names that would touch are pushed apart
        axes.annotate(
            name, (1.0, height), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            fontsize=9, color=COLOURS["muted"], annotation_clip=False,
        )  # fmt: skip
