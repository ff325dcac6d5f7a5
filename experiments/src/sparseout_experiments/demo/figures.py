"""The figures of the demonstration."""

import math
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sparseout_experiments.demo import BINS, HIGHEST, LOWEST, Scale
from sparseout_experiments.demo.summary import Row, dial
from sparseout_experiments.demo.svg import inline
from sparseout_experiments.demo.table import group_name, row_name
from sparseout_experiments.studies.engine.style import COLOURS, STYLE, image, style

_SIZE = (4.6, 3.6)
_SERIES = ((COLOURS["first"], "o"), (COLOURS["second"], "s"))
_DOTS = (0, (1.2, 1.6))


def sparsity(rows: Sequence[Row], scales: Sequence[Scale]) -> str:
    """Figure 1 as SVG: Hoyer against q."""
    return _alone(_sparsity, rows, scales, "sparsity", "Hoyer sparsity of the code against q.")


def cost(rows: Sequence[Row], scales: Sequence[Scale]) -> str:
    """Figure 2 as SVG: error against Hoyer."""
    return _alone(_cost, rows, scales, "cost", "Reconstruction error against Hoyer sparsity.")


def picture(rows: Sequence[Row], scales: Sequence[Scale]) -> bytes:
    """Figures 1 and 2 side by side as PNG, 1600 pixels wide."""
    with style():
        figure = Figure((8.9, 3.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04))
        left, right = figure.subplots(1, 2)
        _sparsity(left, rows, scales)
        _cost(right, rows, scales)
        left.set_title("The dial: sparsity against q")
        right.set_title("What turning it costs")
        return image(figure, "png", dpi=180)


def activations(rows: Sequence[Row], scales: Sequence[Scale]) -> str:
    """Figure 3 as SVG: for each q the share of zeros and the histogram of the rest, over all seeds."""
    series = {scale: colour for scale, (colour, _) in zip(scales, _SERIES, strict=False)}
    bands: dict[str, list[tuple[str, Row]]] = {}
    for row in sorted(rows, key=lambda row: row.setting.q or 0.0):
        scale = row.setting.scale
        if row.setting.method != "dropout":
            colour = COLOURS["muted"] if scale is None else series[scale]
            bands.setdefault(row_name(row.setting), []).append((colour, row))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        layout = ConstrainedLayoutEngine(hspace=0.02, h_pad=0.02, wspace=0.1)
        figure = Figure((_SIZE[0], 0.62 * len(bands) + 0.9), layout=layout)
        grid = figure.subplots(len(bands), 2, sharex="col", squeeze=False, width_ratios=(1, 1.9))
        for (zeros, sizes), (name, band) in zip(grid, bands.items(), strict=True):
            _zeros(zeros, band)
            zeros.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
            _sizes(sizes, band)
        grid[0, 0].set_title("exactly zero")
        grid[0, 1].set_title("sizes of the others")
        grid[-1, 0].set(xlabel="% of activations", xlim=(0, 100))
        ticks = _used([row for band in bands.values() for _, row in band])
        grid[-1, 1].set(xlabel="activation", xlim=(ticks[0], ticks[-1]))
        grid[-1, 1].set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
        return inline(figure, "activations", "Share of zeros and histogram of the other activations.")


def _alone(
    draw: Callable[[Axes, Sequence[Row], Sequence[Scale]], None],
    rows: Sequence[Row],
    scales: Sequence[Scale],
    name: str,
    alt: str,
) -> str:
    points = "; ".join(
        f"{group_name(row.setting.scale)}, {row_name(row.setting)}: sparsity {row.hoyer.mean:.2f}, "
        f"error {1000 * row.error.mean:.1f} thousandths"
        for row in rows
    )
    with style("none"):
        figure = Figure(_SIZE, layout="constrained")
        draw(figure.subplots(), rows, scales)
        return inline(figure, name, f"{alt} {points}.")


def _sparsity(axes: Axes, rows: Sequence[Row], scales: Sequence[Scale]) -> None:
    qs = sorted({row.setting.q for row in rows if row.setting.q is not None})
    apart = 0.016 * (qs[-1] - qs[0]) if len(scales) > 1 else 0.0  # side by side, or one would hide the other
    for place, (scale, (colour, marker)) in enumerate(zip(scales, _SERIES, strict=False)):
        curve = dial(rows, scale)
        x = [(row.setting.q or 0.0) + apart * (place - 0.5) for row in curve]
        means, halves = [row.hoyer.mean for row in curve], [_drawn(row.hoyer.half) for row in curve]
        name = _legend(scale)
        axes.errorbar(x, means, halves, color=colour, marker=marker, capsize=3, label=name, zorder=3)
        axes.plot(x, [row.hoyer_live.mean for row in curve], color=colour, linestyle=_DOTS)
    references = sorted((row for row in rows if row.setting.q is None), key=lambda row: row.hoyer.mean)
    height = -math.inf
    for row in references:
        if math.isnan(row.hoyer.mean):
            continue
        axes.axhline(row.hoyer.mean, color=COLOURS["muted"], linewidth=1.1, zorder=1)
        height = max(row.hoyer.mean, height + 0.05)  # names that would touch are pushed apart
        axes.annotate(
            row_name(row.setting),
            (1.0, height),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=COLOURS["muted"],
        )
    axes.set(xlabel="exponent q", ylabel="Hoyer sparsity of the code", ylim=(0, 1.02))
    if len(qs) <= 8:
        axes.set_xticks(qs, [f"{q:g}" for q in qs])
    live = Line2D([], [], color=COLOURS["ink"], linestyle=_DOTS, label="live units alone")
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], live], loc="best")


def _cost(axes: Axes, rows: Sequence[Row], scales: Sequence[Scale]) -> None:
    for scale, (colour, marker) in zip(scales, _SERIES, strict=False):
        curve = dial(rows, scale)
        axes.errorbar(
            [row.hoyer.mean for row in curve],
            [1000 * row.error.mean for row in curve],
            [_drawn(1000 * row.error.half) for row in curve],
            [_drawn(row.hoyer.half) for row in curve],
            color=colour,
            marker=marker,
            elinewidth=1.1,
            label=_legend(scale),
            zorder=3,
        )
    for row in rows:
        if row.setting.method == "dropout":
            x, y = row.hoyer.mean, 1000 * row.error.mean
            ink, card = COLOURS["ink"], COLOURS["card"]
            axes.plot(x, y, "D", color=ink, mfc=card, mew=1.4, ms=9, zorder=2, label="Dropout")
        elif row.setting.method == "none":  # far from the others, which it would crowd together
            text = f"no dropout, off the chart:\n{row.hoyer.mean:.2f}, error {1000 * row.error.mean:.2g}"
            axes.annotate(text, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=9.5, color=COLOURS["muted"])
    axes.set(xlabel="Hoyer sparsity of the code", ylabel="reconstruction error x 1000", yscale="log")
    axes.margins(x=0.1, y=0.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower right", title="numbers: q", alignment="left")
    _name_points(axes, [(colour, dial(rows, scale)) for scale, (colour, _) in zip(scales, _SERIES, strict=False)])


def _name_points(axes: Axes, curves: Sequence[tuple[str, list[Row]]]) -> None:
    """Write q beside each point: above the curve that pays more at this q, below the other.

    Neighbours of one curve that nearly coincide share a name, and a name is not written twice at one place.
    """
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # places the axes, without which there are no distances on paper
    written: list[tuple[float, float, str]] = []
    for place, (colour, curve) in enumerate(curves):
        groups: list[tuple[float, float, list[Row]]] = []
        for row in curve:
            x, y = axes.transData.transform((row.hoyer.mean, 1000 * row.error.mean))
            if groups and math.dist((x, y), groups[-1][:2]) < 16:
                groups[-1][2].append(row)
            elif math.isfinite(x) and math.isfinite(y):
                groups.append((x, y, [row]))
        for x, y, group in groups:
            name = ", ".join(f"{row.setting.q:g}" for row in group)
            if any(name == other and math.dist((x, y), at) < 8 for *at, other in written):
                continue
            written.append((x, y, name))
            others = [(i, row) for i, (_, rows) in enumerate(curves) for row in rows if i != place]
            same_q = [(row.error.mean, -i) for i, row in others if row.setting.q == group[0].setting.q]
            above = all(other < (group[0].error.mean, -place) for other in same_q)
            axes.annotate(
                name,
                (group[0].hoyer.mean, 1000 * group[0].error.mean),
                (-5, 5) if above else (5, -5),
                textcoords="offset points",
                ha="right" if above else "left",
                va="bottom" if above else "top",
                color=colour,
                fontsize=9.5,
                fontweight="bold",
            )


def _zeros(axes: Axes, band: Sequence[tuple[str, Row]]) -> None:
    for place, (colour, row) in enumerate(band):
        share = 100 * (1 - sum(run.density for run in row.runs) / len(row.runs))
        inside = share > 50
        axes.barh(-place, share, 0.72, color=colour)
        axes.annotate(
            f"{share:.0f}%",
            (share, -place),
            (-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color=COLOURS["card" if inside else "ink"],
            fontsize=9,
        )
    axes.set(ylim=(0.6 - len(band), 0.6), yticks=[])


def _sizes(axes: Axes, band: Sequence[tuple[str, Row]]) -> None:
    width = (HIGHEST - LOWEST) / BINS
    centres = [LOWEST + width * (i + 0.5) for i in range(BINS)]
    for place, (colour, row) in enumerate(band):
        heights = _histogram(row)
        if place == 0:
            axes.fill_between(centres, heights, color=colour, alpha=0.2, linewidth=0)
        axes.plot(centres, heights, color=colour, linewidth=1.5, linestyle=(0, (4, 2)) if place else "-")
    axes.set(ylim=(0, None), yticks=[])
    axes.spines["left"].set_visible(False)


def _histogram(row: Row) -> list[float]:
    """The share of each bin among the non-zero activations of all seeds."""
    counts = [sum(bins) for bins in zip(*(run.histogram for run in row.runs), strict=True)]
    return [count / max(sum(counts), 1) for count in counts]


def _used(rows: Sequence[Row]) -> range:
    """The whole powers of ten around all bins that hold more than a trace of any row."""
    used = [i for row in rows for i, height in enumerate(_histogram(row)) if height > 2e-3]
    width = (HIGHEST - LOWEST) / BINS
    low, high = (LOWEST + width * min(used), LOWEST + width * (max(used) + 1)) if used else (LOWEST, HIGHEST)
    return range(math.floor(low), math.ceil(high) + 1)


def _drawn(half: float) -> float:
    return 0.0 if math.isnan(half) else half


def _legend(scale: Scale) -> str:
    return group_name(scale).lower()
