"""The figures of the theory."""

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparseout_experiments.studies.engine.plots import canvas
from sparseout_experiments.studies.engine.style import COLOURS, DASHES, DOTS

Record = Mapping[str, Any]
_SERIES = {"Gaussian": COLOURS["ink"], "Bernoulli": COLOURS["first"], "Poisson": COLOURS["second"]}
# Sparser is orange, denser is blue, and Dropout is black.
_BALLS = {0.5: "#8a3a0e", 1.0: COLOURS["second"], 1.5: "#e6a178", 2.0: COLOURS["ink"], 3.0: COLOURS["first"]}


def _figure(width: float, height: float) -> Figure:
    return canvas(width, height, h_pad=0.08, wspace=0.04)


def _penalty(record: Record) -> Figure:
    """R, exact and estimated, against q."""
    figure = _figure(9.2, 3.5)
    panels = figure.subplots(1, 3)
    for axes, curve in zip(panels, record["penalties"], strict=True):
        estimated = curve["estimated"]
        axes.plot(curve["q"], curve["penalty"], color=COLOURS["first"], label="R")
        axes.plot(curve["q"], curve["exact"], color=COLOURS["second"], linestyle=DASHES, label="E[loss] - loss")
        axes.errorbar(
            estimated["q"], estimated["mean"], [4 * error for error in estimated["standard_error"]],
            color=COLOURS["ink"], linestyle="none", marker="o", markersize=4, elinewidth=1.1, zorder=3,
            label="Monte-Carlo ± 4 standard errors",
        )  # fmt: skip
        axes.set(title=curve["family"], xlabel="exponent q", ylim=(0, None))
    panels[0].set_ylabel("added to the loss by the noise")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _remainder(record: Record) -> Figure:
    """The remainder against the amplitude, and the ratio against p."""
    figure = _figure(9.2, 3.8)
    left, right = figure.subplots(1, 2)
    for curve in record["remainders"]:
        half = curve["p"] == 0.5
        left.plot(
            curve["share"], curve["remainder"], color=_SERIES[curve["family"]],
            marker="s" if half else "o", linestyle=DASHES if half else "-", markersize=4.5,
            label=f"{curve['family']}, p = {curve['p']:g}: slope {4 if half else 3}",
        )  # fmt: skip
    left.set(
        xscale="log", yscale="log", xlabel="amplitude, as a share of the example's",
        ylabel="distance of R from the exact value", title="Falls with the amplitude",
    )  # fmt: skip
    left.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    left.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    left.legend(loc="lower right", fontsize=9)
    for curve in record["ratios"]:
        colour = _SERIES[curve["family"]]
        right.plot(curve["p"], curve["ratio"], color=colour, marker="o", markersize=4, label=curve["family"])
        right.axhline(curve["limit"], color=colour, linestyle=DOTS, linewidth=1.2, zorder=1)
    right.set(
        xscale="log", xlabel="drop probability p", ylabel="exact value over R",
        title="Does not fall with p (dots: the limit)",
    )  # fmt: skip
    right.legend(loc="best", fontsize=9)
    return figure


def _balls(record: Record) -> Figure:
    """The curves on which the sum of |h|^q over two features is 1, and the force on a feature."""
    figure = _figure(9.2, 4.1)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    along = np.linspace(0, np.pi / 2, 200)
    for q, colour in _BALLS.items():
        x, y = np.cos(along) ** (2 / q), np.sin(along) ** (2 / q)
        left.plot(
            np.concatenate([x, -x[::-1], -x, x[::-1]]), np.concatenate([y, y[::-1], -y, -y[::-1]]),
            color=colour, label=f"{q:g}",
        )  # fmt: skip
        size = np.geomspace(1e-4, 2, 400)
        right.plot(size, q / 2 * size ** (q - 1), color=colour)
        right.plot(size, size ** (q - 1), color=colour, linestyle=DASHES)
    left.set(aspect="equal", xlabel="$h_1$", ylabel="$h_2$", title="Where $|h_1|^q + |h_2|^q = 1$")
    right.set(
        ylim=(0, 4), xlim=(0, 2), xlabel="size of a feature |h|", ylabel="push towards 0, over $A''V w^2$",
        title="Force on a feature",
    )  # fmt: skip
    names: list[tuple[str, Any]] = [("exact: (q/2) $|h|^{q-1}$", "-"), ("detached: $|h|^{q-1}$", DASHES)]
    lines = [Line2D([], [], color=COLOURS["muted"], linestyle=style, label=name) for name, style in names]
    right.legend(handles=lines, loc="upper center")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", title="q")
    return figure


def _path(record: Record) -> Figure:
    """The features of one digit against q."""
    path = record["path"]
    lines = list(zip(*path["features"], strict=True))
    figure = _figure(7.4, 4.2)
    axes = figure.subplots()
    axes.axhline(0, color=COLOURS["muted"], linewidth=1, zorder=1)
    for line in lines:
        axes.plot(path["q"], line, color=COLOURS["first" if line[0] else "second"], linewidth=1.5)
    for mark in path["noise"]:
        axes.plot(
            [mark["q"]] * len(lines), mark["features"], "o", color=COLOURS["ink"], mfc=COLOURS["card"], ms=4.5, zorder=3
        )
    handles = [
        Line2D([], [], color=COLOURS["first"], label="minimum of loss + R"),
        Line2D([], [], color=COLOURS["second"], label="the same, 0 at q = 1"),
        Line2D([], [], color=COLOURS["ink"], mfc=COLOURS["card"], marker="o", ms=4.5, linestyle="none",
               label="found under the noise"),
    ]  # fmt: skip
    axes.set(xlabel="exponent q", ylabel="the 12 features of one digit")
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _training(record: Record) -> Figure:
    """Features learned under the noise against those learned under the penalty."""
    rows = record["equivalence"]
    gradients, qs = (len({row[name] for row in rows}) for name in ("gradient", "q"))
    figure = _figure(9.2, 4.5)
    panels: Any = figure.subplots(gradients, qs, squeeze=False)
    for axes, row in zip(panels.T.flat, rows, strict=True):  # both gradients of a q, then the next q
        wanted, noise = row["features"]["penalty"], row["features"]["noise"]
        end = 1.08 * max(map(abs, wanted + noise))
        axes.plot([-end, end], [-end, end], color=COLOURS["muted"], linewidth=1, zorder=1)
        axes.plot(wanted, noise, ".", color=COLOURS["first"], markersize=2.5, zorder=2)
        axes.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
        axes.set_title(f"q = {row['q']:g}, {row['gradient']}", fontsize=10)
        axes.annotate(f"distance {row['distance']:.2g}", (0.04, 0.9), xycoords="axes fraction", fontsize=9)
        axes.locator_params(nbins=4)
    figure.supxlabel("feature learned under the penalty: R (above), (2/q) R (below)", fontsize=10.5)
    figure.supylabel("feature learned under the noise", fontsize=10.5)
    return figure


def _rescaling(record: Record) -> Figure:
    """Balance and size of the features while a network of two layers trains."""
    figure = _figure(9.2, 4.2)
    left, right = figure.subplots(1, 2)
    qs = list(dict.fromkeys(run["q"] for run in record["rescaling"]))
    for run in record["rescaling"]:
        rows = run["rows"]
        time = [row["time"] for row in rows]
        colour = (COLOURS["second"], COLOURS["first"])[qs.index(run["q"])]
        style = DASHES if run["gradient"] == "detached" else DOTS if run["decay"] else "-"
        left.plot(time, [row["balance"] for row in rows], color=colour, linestyle=style)
        right.plot(time, [row["rms"] for row in rows], color=colour, linestyle=style)
        if run["gradient"] == "exact" and not run["decay"]:
            few = rows[:: max(len(rows) // 8, 1)]
            left.plot([row["time"] for row in few], [row["predicted"] for row in few], "o", color=colour, ms=4.5)
    left.set(xlabel="steps times rate", ylabel="$|U|^2 - |W|^2$", title="Balance of the two layers")
    right.set(xlabel="steps times rate", ylabel="root mean square", title="Size of the features", ylim=(0, None))
    handles = [
        *(Line2D([], [], color=(COLOURS["second"], COLOURS["first"])[place], linewidth=4, label=f"q = {q:g}")
          for place, q in enumerate(qs)),
        Line2D([], [], color=COLOURS["muted"], label="exact"),
        Line2D([], [], color=COLOURS["muted"], linestyle="none", marker="o", ms=4.5, label="predicted"),
        Line2D([], [], color=COLOURS["muted"], linestyle=DOTS, label="exact, weight decay"),
        Line2D([], [], color=COLOURS["muted"], linestyle=DASHES, label="detached"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=6, columnspacing=1.2, handlelength=1.8)
    return figure


FIGURES: dict[str, Callable[[Record], Figure]] = {
    "penalty": _penalty,
    "remainder": _remainder,
    "balls": _balls,
    "path": _path,
    "training": _training,
    "rescaling": _rescaling,
}
