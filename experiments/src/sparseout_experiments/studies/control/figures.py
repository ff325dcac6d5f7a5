"""The figures of the study."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.dial import COLLAPSED, PChoice, cached_dial, collapsed, mean
from sparseout_experiments.studies.control.grid import GRIDS
from sparseout_experiments.studies.engine.plots import canvas, points, references
from sparseout_experiments.studies.engine.statistics import Interval
from sparseout_experiments.studies.engine.style import COLOURS, DOTS

SERIES = {"matched": (COLOURS["first"], "o", "matched noise"), "paper": (COLOURS["second"], "s", "the paper's scale")}
NETWORKS = {"autoencoder": "autoencoder", "image": "Wide-ResNet", "language": "LSTM", "transformer": "transformer"}
HOLLOW = f"collapsed: over {100 * COLLAPSED:g}% of samples have no active unit"
_WIDE = 4  # entries of a legend, one of them long, that fit no single line
_AXES = {"hoyer": "Hoyer sparsity", "mse": "test error (MSE)", "error": "test error", "perplexity": "test perplexity"}


def draw(record: Record) -> dict[str, Figure]:
    """Every figure of a task by name; those that have no run yet are left out."""
    if not _analysed(record) or len(record.grid.scales) == 1:  # those of one scale share a figure
        return {}
    if record.task == "autoencoder":
        return {name: panels(record, name) for name in _PANELS}
    return {"overview": overview(record)}


def draw_together(records: Sequence[Record]) -> dict[str, Figure]:
    """The figures that show networks side by side, at a budget with one scale alone; none where nothing has run."""
    shown = [record for record in records if _analysed(record) and len(record.grid.scales) == 1]
    with_curve = [record for record in shown if record.finished["curve"].notna().any()]
    drawn = {"networks": networks(shown)} if shown else {}
    return drawn | ({"curves": curves(with_curve)} if with_curve else {})


def _analysed(record: Record) -> bool:
    return bool(record.analysed["q"].notna().any())


def plain(record: Record, method: str, p: PChoice) -> pd.DataFrame:
    """The analysed runs of "none" or of Dropout, which q = 2 is."""
    if method == "none":
        return record.analysed[record.analysed["method"] == "none"]
    return cached_dial(record, "matched", "detached", p).of(2.0)


def panels(record: Record, name: str) -> Figure:
    """Every dial of the autoencoder: rows are gradients, columns are p's."""
    grid = record.grid
    ps = tuple(reversed(grid.p))
    figure = canvas(9.2, 6.9, wspace=0.03, hspace=0.03)
    axes = figure.subplots(len(grid.gradients), len(ps), sharex=True, sharey=True, squeeze=False)
    for line, gradient in zip(axes, grid.gradients, strict=True):
        for panel, p in zip(line, ps, strict=True):
            _PANELS[name](panel, record, gradient, p)
            panel.set_title(f"p = {p:g}, {gradient} gradient")
            panel.label_outer()
    _legend(figure, *axes.flat)
    return figure


def _dial(axes: Axes, record: Record, gradient: str, p: PChoice) -> None:
    _against_q(axes, record, gradient, p, "hoyer", live=True)
    axes.set(ylim=(0, 1.02))


def _dead(axes: Axes, record: Record, gradient: str, p: PChoice) -> None:
    _against_q(axes, record, gradient, p, "dead")
    count = record.samples()
    axes.set(ylabel=f"% of units dead\nover {count or 'all':{',' if count else ''}} test images", ylim=(0, 102))


def _against_q(axes: Axes, record: Record, gradient: str, p: PChoice, measure: str, live: bool = False) -> None:
    """A measure against q, with a line for "none", and one for Dropout, named at the right end."""
    qs = record.grid.q
    apart = 0.02 * (qs[-1] - qs[0])  # side by side, or one would hide the other
    for side, (scale, (colour, marker, name)) in zip((-1, 1), SERIES.items(), strict=True):
        rows = _placed(record, scale, gradient, p)
        if not rows:
            continue
        x = [q + side * apart / 2 for q in rows]
        values = [_shown(group, measure) for group in rows.values()]
        points(axes, x, values, color=colour, marker=marker, capsize=3, label=name, zorder=3)
        _hollow(axes, rows, x, values, colour, marker)
        if live:
            axes.plot(x, [mean(group, "hoyer_live").mean for group in rows.values()], color=colour, linestyle=DOTS)
    if live:
        label = "live units alone" + (" (in the same colours)" if len(record.grid.scales) > 1 else "")
        axes.plot([], [], color=COLOURS["ink"], linestyle=DOTS, label=label)
    axes.set_xticks(qs, [f"{q:g}" for q in qs])
    name = GRIDS[record.task].metric if measure == "metric" else measure
    axes.set(xlabel="exponent q", ylabel=_AXES.get(name, name))
    baselines = {name: plain(record, name.lower(), p) for name in ("none", "Dropout")}
    references(axes, {name: _shown(runs, measure).mean for name, runs in baselines.items()})


def _shown(rows: pd.DataFrame, measure: str) -> Interval:
    return mean(rows, measure).times(100 if measure == "dead" else 1)


def _hollow(
    axes: Axes, rows: Mapping[float, pd.DataFrame], x: Sequence[float], y: Sequence[Interval], colour: str, marker: str
) -> None:
    """Points of collapsed settings again, as outlines."""
    hollow = [collapsed(group) for group in rows.values()]
    if any(hollow):
        style: dict[str, Any] = {"marker": marker, "linestyle": "", "mfc": COLOURS["card"], "mew": 1.5, "zorder": 3.5}
        axes.plot(list(compress(x, hollow)), [interval.mean for interval in compress(y, hollow)], color=colour, **style)
        axes.plot([], [], label=HOLLOW, color=COLOURS["ink"], **style | {"marker": "o"})


def _plane(axes: Axes, record: Record, gradient: str, p: PChoice) -> None:
    """The metric against measured sparsity, every setting in one plane."""
    for scale, (colour, marker, name) in SERIES.items():
        rows = _placed(record, scale, gradient, p)
        if not rows:
            continue
        across = [mean(group, "hoyer") for group in rows.values()]
        up = [mean(group, "metric") for group in rows.values()]
        points(axes, across, up, color=colour, marker=marker, elinewidth=1.1, label=name, zorder=3)
        _hollow(axes, rows, [interval.mean for interval in across], up, colour, marker)
        ends = slice(None, None, max(len(rows) - 1, 1))
        for q in list(rows)[ends] if scale == "matched" else ():  # of one series: they would touch
            x, y = mean(rows[q], "hoyer").mean, mean(rows[q], "metric").mean
            if math.isfinite(x) and math.isfinite(y):
                axes.annotate(
                    f"q={q:g}", (x, y), (0, 16), textcoords="offset points", ha="center", va="center", color=colour,
                    fontsize=9, zorder=5, bbox={"fc": COLOURS["card"], "ec": "none", "alpha": 0.8, "pad": 0.5},
                )  # fmt: skip
    for method, sign, size, name in (("dropout", "D", 7, "Dropout (q = 2)"), ("none", "*", 12, "none: no noise")):
        if len(runs := plain(record, method, p)):
            along, down = mean(runs, "hoyer"), mean(runs, "metric")
            ink = COLOURS["ink"]
            if method == "none":
                points(axes, [along], [down], color=ink, elinewidth=1.1, zorder=3)
            axes.plot(along.mean, down.mean, sign, color=ink, ms=size, zorder=4, label=name)
    axes.margins(0.14)
    axes.xaxis.set_major_locator(MaxNLocator(4))  # more would touch in the narrow panel
    axes.set(xlabel="measured Hoyer sparsity (right: sparser)", ylabel=_AXES[GRIDS[record.task].metric])


_PANELS: dict[str, Callable[[Axes, Record, str, PChoice], None]] = {"dial": _dial, "price": _plane, "dead": _dead}


def overview(record: Record) -> Figure:
    """Sparsity against q, the metric against q, and the metric against measured sparsity."""
    figure = canvas(12.6, 4.3, wspace=0.04)
    dial, price, plane = figure.subplots(1, 3)
    _against_q(dial, record, "detached", "common", "hoyer", live=any(record.finished["dead"]))
    _against_q(price, record, "detached", "own", "metric")
    _plane(plane, record, "detached", "own")
    name = _AXES[GRIDS[record.task].metric]
    dial.set_title("Sparsity against q")
    price.set_title(f"{name.capitalize()} against q")
    plane.set_title(f"{name.capitalize()} against measured sparsity")
    _legend(figure, dial, plane)
    return figure


def networks(records: Sequence[Record]) -> Figure:
    """A column for each network: sparsity against q, and the metric against measured sparsity."""
    figure = canvas(3.7 * len(records) + 0.5, 7.4, hspace=0.04)
    for record, (dial, plane) in zip(records, figure.subplots(2, len(records), squeeze=False).T, strict=True):
        _against_q(dial, record, "detached", "common", "hoyer", live=any(record.analysed["dead"]))
        _plane(plane, record, "detached", "own")
        dial.set_title(NETWORKS[record.task])
    _legend(figure, *figure.axes, columns=2 * len(records) - 1)
    return figure


def curves(records: Sequence[Record]) -> Figure:
    """The loss over epochs, without noise and with Dropout (q = 2), means over seeds."""
    figure = canvas(3.7 * len(records) + 0.5, 4.0)
    for record, axes in zip(records, figure.subplots(1, len(records), squeeze=False)[0], strict=True):
        for method, colour, name in (("none", COLOURS["ink"], "no noise"), ("dropout", COLOURS["first"], "Dropout")):
            train, valid = losses(plain(record, method, "own"))
            if valid:
                epochs = range(1, len(valid) + 1)
                axes.plot(epochs, valid, color=colour, marker="o", label=f"{name}, validation data")
                axes.plot(epochs, train, color=colour, linestyle=DOTS, label=f"{name}, in training")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", title=NETWORKS[record.task])
    _legend(figure, *figure.axes, columns=2 * len(records) - 1)
    return figure


def losses(rows: pd.DataFrame) -> tuple[list[float], list[float]]:
    """The means over runs of the losses of every epoch, in training and on validation data; empty if none were kept."""
    kept = [np.array(curve, float) for curve in rows["curve"].dropna()]  # what is null in a file is nan
    train, valid = np.mean(kept, axis=0).T.tolist() if kept else ([], [])
    return train, valid


def _placed(record: Record, scale: str, gradient: str, p: PChoice) -> dict[float, pd.DataFrame]:
    """The runs by q; the paper's scale is run at each setting's own p alone, since its noise differs anyhow."""
    if scale not in record.grid.scales:
        return {}
    dial = cached_dial(record, scale, gradient, "own" if scale == "paper" and p == "common" else p)
    return {q: runs for q in dial.q if len(runs := dial.of(q))}


def _legend(figure: Figure, *of: Axes, columns: int | None = None) -> None:
    """One legend below for all panels, the series first, in at most so many columns."""
    handles: dict[str, Any] = {}
    for axes in of:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    series = [name for _, _, name in SERIES.values()]
    names = sorted(handles, key=lambda name: series.index(name) if name in series else len(series) + (name == HOLLOW))
    fit = len(names) if len(names) < _WIDE or HOLLOW not in names else math.ceil(len(names) / 2)
    ncols = min(fit, columns or fit)
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=ncols)
