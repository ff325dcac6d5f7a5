"""The figure of a data set: what every method pays for its sparsity."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.style import COLOURS, png, style

_LOOKS = {
    "none": (COLOURS["ink"], "*"),
    "dropout": ("#8a8f98", "o"),
    "gaussian": ("#56b4e9", "v"),
    "sparseout": (COLOURS["second"], "o"),
    "bridgeout": ("#009e73", "s"),
    "shakeout": ("#cc79a7", "^"),
    "penalty": (COLOURS["first"], "D"),
    "kwinners": ("#7a5195", "P"),
}


def price(runs: pd.DataFrame, measures: Mapping[str, str]) -> bytes:
    """Error against sparsity as PNG, a panel a measure, a line a method, a point a setting."""
    with style():
        figure = Figure((9.2, 4.4), layout="constrained")
        for axes, (measure, units) in zip(figure.subplots(1, 2, sharey=True), measures.items(), strict=True):
            for method, (colour, marker) in _LOOKS.items():
                settings = runs[runs["method"] == method].groupby("setting", dropna=False)
                points = pd.DataFrame(
                    [t_interval(group[measure]) + t_interval(1000 * group["mse"]) for _, group in settings],
                    columns=["x", "dx", "_", "y", "dy", "_"],
                ).sort_values("x")
                axes.errorbar(
                    *(points[name] for name in ("x", "y", "dy", "dx")),
                    color=colour, marker=marker, markersize=9 if method == "none" else 5.5, linewidth=1.3,
                    elinewidth=0.8, label=method if axes.get_subplotspec().is_first_col() else None,
                )  # fmt: skip
            axes.set(xlabel=f"Hoyer sparsity, {units}", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.label_outer()
        figure.axes[0].set_ylabel("test MSE x 1000")
        figure.legend(loc="outside lower center", ncols=4)
        return png(figure)
