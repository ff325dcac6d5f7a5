"""Picture of a sparsity report: measures, units that never or always fire, and how large activations are."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from sparseout.monitor._histogram import LOWEST, PER_DECADE
from sparseout.monitor._table import measures_of

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito


def draw(report: Sequence[dict[str, Any]]) -> Figure:
    """One line for each module and mode, in the order of the model."""
    records = [record for record in report if record["axis"] == "population"]
    count = max(1, len(records))
    figure = Figure(figsize=(12, 1.8 + 0.3 * count), layout="constrained")
    values, units, sizes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 3))
    positions = list(range(len(records)))
    names = [*measures_of(records), *(["hoyer_live"] if records else [])]
    for name, colour in zip(names, _COLOURS, strict=False):
        style = {"markersize": 10, "fillstyle": "none"} if name == "hoyer_live" else {}  # a ring, seen around hoyer's
        values.plot([record[name] for record in records], positions, "o", color=colour, label=name, **style)
    values.set(xlabel="over the units of a row", yticks=positions, ylim=(count - 0.5, -0.5))
    values.set_yticklabels([f"{r['module'] or '(model)'} {r['mode']}" for r in records])
    if not {"kurtosis"} & set(names):
        values.set_xlim(-0.02, 1.02)
    for axes in (values, units):
        axes.grid(axis="x", alpha=0.3)
    shares = {key: [r[key] / max(1, r["units"]) for r in records] for key in ("dead_units", "always_on_units")}
    units.barh(positions, shares["dead_units"], color="#999999", label="never fire")
    units.barh(positions, [-share for share in shares["always_on_units"]], color="#56b4e9", label="always fire")
    units.axvline(0, color="black", linewidth=0.8)
    units.set(xlabel="fraction of units", xlim=(-1.02, 1.02), xticks=(-1, -0.5, 0, 0.5, 1))
    units.set_xticklabels(["1", "0.5", "0", "0.5", "1"])
    if records:
        for axes in (values, units):
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize="small")
        shown = [_shares(record) for record in records]
        high = LOWEST + len(shown[0]) / PER_DECADE
        image = sizes.imshow(
            shown, aspect="auto", extent=(LOWEST, high, count - 0.5, -0.5), cmap="magma_r", vmin=0, interpolation="none"
        )
        figure.colorbar(image, ax=sizes, label="share of values not 0")
    sizes.set(xlabel="log10 |x|", title="how large activations are")
    sizes.title.set_fontsize("small")
    return figure


def _shares(record: dict[str, Any]) -> list[float]:
    total = max(1, sum(record["histogram"]))
    return [count / total for count in record["histogram"]]
