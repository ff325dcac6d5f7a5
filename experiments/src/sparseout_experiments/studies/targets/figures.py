"""The figure of a task: the course of every run to a target."""

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine.style import COLOURS, png, style

_SHADES = (COLOURS["second"], "#7a5195", COLOURS["first"])  # of targets, from the densest


def course(runs: pd.DataFrame, tolerance: float) -> bytes:
    """Hoyer and q against the step as PNG, a line a run, and the targets with their tolerance."""
    with style():
        figure = Figure((9.2, 3.6), layout="constrained")
        sparsity, exponent = figure.subplots(1, 2)
        targets = runs.groupby("target")
        for index, (target, group) in enumerate(targets):
            colour = _SHADES[index % len(_SHADES)]
            sparsity.axhspan(target - tolerance, target + tolerance, color=colour, alpha=0.18, linewidth=0)
            for line, points in enumerate(group["course"]):
                steps, q, hoyer = pd.DataFrame(points, dtype=float).to_numpy().T
                label = None if line else f"target {target:.3f}"
                sparsity.plot(steps, hoyer, color=colour, linewidth=0.9, label=label)
                exponent.plot(steps, q, color=colour, linewidth=0.9)
        sparsity.set(xlabel="step", ylabel="Hoyer sparsity while training")
        exponent.set(xlabel="step", ylabel="exponent q")
        figure.legend(loc="outside lower center", ncols=len(targets))
        return png(figure)
