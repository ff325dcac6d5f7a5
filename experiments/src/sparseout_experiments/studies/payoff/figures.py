"""The figures: what density costs in error and saves in time, and what thresholds do to a transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine.plots import points
from sparseout_experiments.studies.engine.style import COLOURS, CYCLE


def price(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """Test error, parameters after compaction and time of one row against the density reached."""
    figure = Figure((9.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row["label"] for row in settings))
    for colour, label in zip(CYCLE, methods, strict=False):
        rows = sorted((r for r in settings if r["label"] == label), key=lambda r: r["density"].mean)
        density = [100 * row["density"].mean for row in rows]
        error = [row["error"].times(100) for row in rows]
        points(panels[0], density, error, color=colour, marker="o", capsize=2, label=label)
        parameters = [100 * row["parameters_compact"] / row["parameters"] for row in rows]
        panels[1].plot(density, parameters, color=colour, marker="o")
        panels[2].plot(density, [row["sparse_1"] for row in rows], color=colour, marker="o")
    panels[0].set(ylabel="test error, %")
    panels[1].set(ylabel="parameters after compaction, %", ylim=(0, None))
    panels[2].set(ylabel="µs for one row", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="active units, %", xlim=(0, None))
    dense = next(row for row in settings if row["method"] == "none")
    panels[2].axhline(dense["dense_1"], color=COLOURS["muted"], linewidth=1, linestyle="--")
    panels[2].annotate("dense", (0.02, dense["dense_1"]), xycoords=("axes fraction", "data"), va="bottom")
    figure.legend(loc="outside lower center", ncols=len(methods))
    return figure


def thresholds(rows: pd.DataFrame) -> Figure:
    """Cosine similarity and time of the FFNs against the density of their hidden units."""
    figure = Figure((9.2, 3.2), layout="constrained")
    near, fast = figure.subplots(1, 2)
    density = 100 * rows["reached"]
    near.plot(density, rows["cosine"], marker="o", label="mean")
    near.plot(density, rows["cosine_least"], marker="o", label="least")
    near.set(xlabel="active units, %", ylabel="cosine similarity to dense", ylim=(None, 1))
    near.legend()
    fast.plot(density, rows["us_dense"] / 1000, marker="o", label="dense")
    fast.plot(density, rows["us_sparse"] / 1000, marker="o", label="thresholds, sparse")
    fast.set(xlabel="active units, %", ylabel="ms for the FFNs of a sentence", ylim=(0, None))
    fast.legend()
    return figure
