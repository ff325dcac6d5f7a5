"""The figures of a data set: what every method pays for its sparsity, and for its density."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sparseout_experiments.studies.engine.plots import points
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.style import COLOURS

_LOOKS = {
    "none": (COLOURS["ink"], "*"),
    "dropout": ("#8a8f98", "o"),
    "gaussian": ("#56b4e9", "v"),
    "sparseout": (COLOURS["second"], "o"),
    "bridgeout": ("#009e73", "s"),
    "shakeout": ("#cc79a7", "^"),
    "penalty": (COLOURS["first"], "D"),
    "l1_warmup": ("#e69f00", "d"),
    "kwinners": ("#7a5195", "P"),
    "statistical_topk": ("#8c510a", "X"),
    "relu2": ("#4d9221", "p"),
}


def price(runs: pd.DataFrame, measures: Mapping[str, str]) -> Figure:
    """Error against sparsity, a panel a measure, a line a method, a point a setting."""
    figure = Figure((9.2, 4.6), layout="constrained")
    for axes, (measure, units) in zip(figure.subplots(1, 2, sharey=True), measures.items(), strict=True):
        _draw(axes, runs, measure)
        axes.set_xlabel(f"Hoyer sparsity, {units}")
        axes.label_outer()
    return _finished(figure)


def density(runs: pd.DataFrame) -> Figure:
    """Error against density, a line a method, a point a setting."""
    figure = Figure((6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    _draw(axes, runs, "density")
    axes.set_xlabel("density: the fraction of units that are not 0")
    return _finished(figure)


def _draw(axes: Axes, runs: pd.DataFrame, measure: str) -> None:
    for method, (colour, marker) in _LOOKS.items():
        settings = [group for _, group in runs[runs["method"] == method].groupby("setting", dropna=False)]
        if settings:
            points(
                axes,
                [t_interval(list(group[measure])) for group in settings],
                [t_interval(list(1000 * group["mse"])) for group in settings],
                color=colour, marker=marker, markersize=9 if method == "none" else 5.5, linewidth=1.3, elinewidth=0.8,
                label=method,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finished(figure: Figure) -> Figure:
    first = figure.axes[0]
    first.set_ylabel("test MSE x 1000")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
