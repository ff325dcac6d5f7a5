"""The picture of the demonstration: the dial, and what turning it costs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sparseout_experiments.demo import Scale
from sparseout_experiments.demo.report import Row, group_name, mean, row_name
from sparseout_experiments.studies.engine.plots import canvas, points, references
from sparseout_experiments.studies.engine.style import COLOURS, DOTS, png, style


class _Curve(NamedTuple):
    """The rows of one scale by rising q, and how they are drawn."""

    name: str
    colour: str
    marker: str
    rows: list[Row]


def picture(rows: Sequence[Row], scales: Sequence[Scale]) -> bytes:
    """PNG, 1600 pixels wide."""
    looks = zip(scales, ((COLOURS["first"], "o"), (COLOURS["second"], "s")), strict=False)
    curves = [
        _Curve(group_name(scale).lower(), *look, sorted((row for row in rows if row["scale"] == scale), key=_q))
        for scale, look in looks
    ]
    others = [row for row in rows if row["q"] is None]
    with style():
        figure = canvas(8.9, 3.6, w_pad=0.12, wspace=0.04)
        left, right = figure.subplots(1, 2)
        _sparsity(left, curves, others)
        _cost(right, curves, others)
        left.set_title("The dial: sparsity against q")
        right.set_title("What turning it costs")
        return png(figure, dpi=180)


def _q(row: Row) -> float:
    return float(row["q"])


def _sparsity(axes: Axes, curves: Sequence[_Curve], others: Sequence[Row]) -> None:
    qs = [_q(row) for row in curves[0].rows]
    apart = 0.016 * (qs[-1] - qs[0]) if len(curves) > 1 else 0.0  # side by side, or one would hide the other
    for index, (name, colour, marker, rows) in enumerate(curves):
        x = [_q(row) + apart * (index - 0.5) for row in rows]
        hoyer = [mean(row, "hoyer") for row in rows]
        points(axes, x, hoyer, color=colour, marker=marker, capsize=3, label=name, zorder=3)
        axes.plot(x, [row["hoyer_live"] for row in rows], color=colour, linestyle=DOTS)
    axes.set(xlabel="exponent q", ylabel="Hoyer sparsity of the code", ylim=(0, 1.02))
    references(axes, {row_name(row): row["hoyer"] for row in others})
    if len(qs) <= 8:
        axes.set_xticks(qs, [f"{q:g}" for q in qs])
    live = Line2D([], [], color=COLOURS["ink"], linestyle=DOTS, label="live units alone")
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], live], loc="best")


def _cost(axes: Axes, curves: Sequence[_Curve], others: Sequence[Row]) -> None:
    for name, colour, marker, rows in curves:
        across, up = ([mean(row, measure) for row in rows] for measure in ("hoyer", "metric"))
        points(axes, across, up, color=colour, marker=marker, elinewidth=1.1, label=name, zorder=3)
    for row in others:
        if row["method"] == "dropout":
            look: dict[str, Any] = {"color": COLOURS["ink"], "mfc": COLOURS["card"], "mew": 1.4, "ms": 9, "zorder": 2}
            axes.plot(row["hoyer"], row["metric"], "D", **look, label="Dropout")
        else:  # far from the others, which it would crowd together
            text = f"no dropout, off the chart:\n{row['hoyer']:.2f}, error {row['metric']:.2g}"
            axes.annotate(text, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=9.5, color=COLOURS["muted"])
    axes.set(xlabel="Hoyer sparsity of the code", ylabel="reconstruction error x 1000", yscale="log")
    axes.margins(x=0.1, y=0.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower right", title="numbers: q", alignment="left")
    for curve in curves:
        _name_points(axes, curve, [row for other in curves if other is not curve for row in other.rows])


def _name_points(axes: Axes, curve: _Curve, others: Sequence[Row]) -> None:
    """Write q beside each point, on the side away from the other curve; once for q = 2, which both share."""
    for row in curve.rows:
        same = [other["metric"] for other in others if other["q"] == row["q"]]
        above = all(metric < row["metric"] for metric in same)
        if row["q"] == 2 and curve.marker != "o":
            continue
        look: dict[str, Any] = {"xytext": (-5, 5) if above else (5, -5), "textcoords": "offset points"}
        look |= {"ha": "right", "va": "bottom"} if above else {"ha": "left", "va": "top"}
        look |= {"color": curve.colour, "fontsize": 9.5, "fontweight": "bold"}
        axes.annotate(f"{row['q']:g}", (row["hoyer"], row["metric"]), **look)
