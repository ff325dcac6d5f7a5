"""The figures of the demonstration."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from torch import Tensor

from sparseout_experiments.demo import BINS, HIGHEST, LOWEST, Scale
from sparseout_experiments.demo.summary import Row, dial, interval
from sparseout_experiments.demo.training import Look
from sparseout_experiments.studies.engine.plots import canvas, inline, points, references
from sparseout_experiments.studies.engine.style import COLOURS, DASHES, DOTS, image, style

_SIZE = (4.6, 3.6)
_SERIES = ((COLOURS["first"], "o"), (COLOURS["second"], "s"))
_SIDE, _GAP, _ENLARGED = 8, 1, 6  # of pictures of digits
_GROUPS = {"paper": "Paper scale", "matched": "Matched power"}


def group_name(scale: Scale | None) -> str:
    """The heading above the rows of one scale."""
    if scale is None:
        return "For comparison"
    return _GROUPS[scale] if isinstance(scale, str) else f"Unit {scale:g}"


def row_name(row: Row) -> str:
    """The name of a row within its group."""
    if row["q"] is not None:
        return f"q = {row['q']:g}"
    return "Dropout" if row["method"] == "dropout" else "no dropout"


class _Curve(NamedTuple):
    """The rows of one scale, and how they are drawn."""

    name: str
    colour: str
    marker: str
    rows: list[Row]


def _curves(rows: Sequence[Row], scales: Sequence[Scale]) -> list[_Curve]:
    looks = zip(scales, _SERIES, strict=False)
    return [_Curve(group_name(scale).lower(), *look, dial(rows, scale)) for scale, look in looks]


def svgs(rows: Sequence[Row], scales: Sequence[Scale], looks: Mapping[str, Look]) -> dict[str, str]:
    """Figures 1 to 3 for the page, by name."""
    numbers = "; ".join(
        f"{group_name(row['scale'])}, {row_name(row)}: sparsity {row['hoyer']:.2f}, "
        f"error {row['metric']:.1f} thousandths"
        for row in rows
    )
    with style("none"):
        sparsity, cost = (Figure(_SIZE, layout="constrained") for _ in range(2))
        _sparsity(sparsity.subplots(), rows, scales)
        _cost(cost.subplots(), rows, scales)
        activations = _activations(rows, scales, looks)
        return {
            "sparsity": inline(sparsity, "sparsity", f"Hoyer sparsity of the code against q. {numbers}."),
            "cost": inline(cost, "cost", f"Reconstruction error against Hoyer sparsity. {numbers}."),
            "activations": inline(activations, "activations", "Share of zeros and histogram of the other activations."),
        }


def picture(rows: Sequence[Row], scales: Sequence[Scale]) -> bytes:
    """Figures 1 and 2 side by side as PNG, 1600 pixels wide."""
    with style():
        figure = canvas(8.9, 3.6, w_pad=0.12, wspace=0.04)
        left, right = figure.subplots(1, 2)
        _sparsity(left, rows, scales)
        _cost(right, rows, scales)
        left.set_title("The dial: sparsity against q")
        right.set_title("What turning it costs")
        return image(figure, "png", dpi=180)


def _sparsity(axes: Axes, rows: Sequence[Row], scales: Sequence[Scale]) -> None:
    qs = sorted({row["q"] for row in rows if row["q"] is not None})
    apart = 0.016 * (qs[-1] - qs[0]) if len(scales) > 1 else 0.0  # side by side, or one would hide the other
    for index, (name, colour, marker, curve) in enumerate(_curves(rows, scales)):
        x = [row["q"] + apart * (index - 0.5) for row in curve]
        hoyer = [interval(row, "hoyer") for row in curve]
        points(axes, x, hoyer, color=colour, marker=marker, capsize=3, label=name, zorder=3)
        axes.plot(x, [row["hoyer_live"] for row in curve], color=colour, linestyle=DOTS)
    axes.set(xlabel="exponent q", ylabel="Hoyer sparsity of the code", ylim=(0, 1.02))
    references(axes, {row_name(row): row["hoyer"] for row in rows if row["q"] is None})
    if len(qs) <= 8:
        axes.set_xticks(qs, [f"{q:g}" for q in qs])
    live = Line2D([], [], color=COLOURS["ink"], linestyle=DOTS, label="live units alone")
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], live], loc="best")


def _cost(axes: Axes, rows: Sequence[Row], scales: Sequence[Scale]) -> None:
    curves = _curves(rows, scales)
    for name, colour, marker, curve in curves:
        across, up = ([interval(row, measure) for row in curve] for measure in ("hoyer", "metric"))
        points(axes, across, up, color=colour, marker=marker, elinewidth=1.1, label=name, zorder=3)
    for row in rows:
        if row["method"] == "dropout":
            look: dict[str, Any] = {"color": COLOURS["ink"], "mfc": COLOURS["card"], "mew": 1.4, "ms": 9, "zorder": 2}
            axes.plot(row["hoyer"], row["metric"], "D", **look, label="Dropout")
        elif row["method"] == "none":  # far from the others, which it would crowd together
            text = f"no dropout, off the chart:\n{row['hoyer']:.2f}, error {row['metric']:.2g}"
            axes.annotate(text, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=9.5, color=COLOURS["muted"])
    axes.set(xlabel="Hoyer sparsity of the code", ylabel="reconstruction error x 1000", yscale="log")
    axes.margins(x=0.1, y=0.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower right", title="numbers: q", alignment="left")
    _name_points(axes, curves)


def _name_points(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Write q beside each point, above the curve that pays more at this q, and once where points nearly coincide."""
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # places the axes, without which there are no distances on paper
    named: list[tuple[str, float, tuple[float, float]]] = []
    for name, colour, _, curve in curves:
        for row in curve:
            q, point = row["q"], (row["hoyer"], row["metric"])
            at = tuple(axes.transData.transform(point))
            near = [math.dist(at, other) < (16 if of == name else 8) for of, p, other in named if of == name or p == q]
            if any(near) or not all(map(math.isfinite, at)):
                continue
            named.append((name, q, at))
            same_q = [other for curve in curves for other in curve.rows if other["q"] == q and other is not row]
            above = all(other["metric"] < row["metric"] for other in same_q)
            axes.annotate(
                f"{q:g}",
                point,
                (-5, 5) if above else (5, -5),
                textcoords="offset points",
                ha="right" if above else "left",
                va="bottom" if above else "top",
                color=colour,
                fontsize=9.5,
                fontweight="bold",
            )


def _activations(rows: Sequence[Row], scales: Sequence[Scale], looks: Mapping[str, Look]) -> Figure:
    """For each q the share of zeros and the histogram of the rest, over all seeds."""
    colours = {group_name(scale): colour for scale, (colour, _) in zip(scales, _SERIES, strict=False)}
    bands: dict[str, list[tuple[str, Row]]] = {}
    for row in sorted(rows, key=lambda row: row["q"] or 0.0):
        if row["method"] != "dropout":
            bands.setdefault(row_name(row), []).append((colours.get(group_name(row["scale"]), COLOURS["muted"]), row))
    histogram = partial(_histogram, looks=looks)
    layout = ConstrainedLayoutEngine(hspace=0.02, h_pad=0.02, wspace=0.1)
    figure = Figure((_SIZE[0], 0.62 * len(bands) + 0.9), layout=layout)
    grid = figure.subplots(len(bands), 2, sharex="col", squeeze=False, width_ratios=(1, 1.9))
    width = (HIGHEST - LOWEST) / BINS
    centres = [LOWEST + width * (i + 0.5) for i in range(BINS)]
    for (zeros, sizes), (name, band) in zip(grid, bands.items(), strict=True):
        for axes in (zeros, sizes):
            axes.grid(visible=False)
        zeros.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
        for index, (colour, row) in enumerate(band):
            _bar(zeros, index, 100 * (1 - row["density"]), colour)
            heights = histogram(row)
            if index == 0:
                sizes.fill_between(centres, heights, color=colour, alpha=0.2, linewidth=0)
            sizes.plot(centres, heights, color=colour, linewidth=1.5, linestyle=DASHES if index else "-")
        zeros.set(ylim=(0.6 - len(band), 0.6), yticks=[])
        sizes.set(ylim=(0, None), yticks=[])
        sizes.spines["left"].set_visible(False)
    grid[0, 0].set_title("exactly zero")
    grid[0, 1].set_title("sizes of the others")
    grid[-1, 0].set(xlabel="% of activations", xlim=(0, 100))
    # the whole powers of ten around all bins that hold more than a trace of any row
    used = [i for band in bands.values() for _, row in band for i, height in enumerate(histogram(row)) if height > 2e-3]
    low, high = (LOWEST + width * min(used), LOWEST + width * (max(used) + 1)) if used else (LOWEST, HIGHEST)
    ticks = range(math.floor(low), math.ceil(high) + 1)
    grid[-1, 1].set(xlabel="activation", xlim=(ticks[0], ticks[-1]))
    grid[-1, 1].set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
    return figure


def _bar(axes: Axes, index: int, share: float, colour: str) -> None:
    """A bar with its number, inside where there is room."""
    inside = share > 50
    axes.barh(-index, share, 0.72, color=colour)
    axes.annotate(
        f"{share:.0f}%",
        (share, -index),
        (-4 if inside else 4, 0),
        textcoords="offset points",
        ha="right" if inside else "left",
        va="center",
        color=COLOURS["card" if inside else "ink"],
        fontsize=9,
    )


def _histogram(row: Row, looks: Mapping[str, Look]) -> list[float]:
    """The share of each bin among the non-zero activations of all seeds."""
    counts = [sum(bins) for bins in zip(*(looks[run].histogram for run in row["runs"] if run in looks), strict=True)]
    return [count / max(sum(counts), 1) for count in counts] or [0.0] * BINS


def digits(rows: Tensor) -> str:
    """Images with values in [0, 1], as ink on paper."""
    return _strip(rows.clamp(0, 1), "gray_r")


def filters(rows: Tensor) -> str:
    """Weights: blue below 0, white at 0, red above, each picture scaled by its own largest weight."""
    peak = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return _strip((rows / peak + 1) / 2, "RdBu_r")


def _strip(rows: Tensor, colours: str) -> str:
    """Pictures side by side with transparent gaps, as a data URI."""
    painted = colormaps[colours](rows.nan_to_num(0.5).numpy().reshape(len(rows), _SIDE, _SIDE))
    gap = np.zeros((_SIDE, _GAP, 4))
    strip = np.concatenate([part for tile in painted for part in (tile, gap)][:-1], axis=1)
    strip = strip.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
    buffer = io.BytesIO()
    imsave(buffer, strip, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
