"""The page: whether the targets were met, at what noise, and the course that every run took."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.style import COLOURS, png, style
from sparseout_experiments.training import atomic_files

TITLE = "# Are targets met?"
START = 2.5  # q at the beginning of a run to a target
WITHIN = 0.02  # of the target, in Hoyer
NOISE = 0.1  # of the power of Dropout's noise

_TITLES = {
    "autoencoder": "Autoencoder on digits",
    "language": "LSTM language model on Python's help texts",
}
_SHADES = (COLOURS["second"], "#7a5195", COLOURS["first"])  # of targets, from the densest
Rows = Sequence[Mapping[str, Any]]


def write(records: Mapping[str, Mapping[str, Any]], page: Path) -> None:
    """Write the page and its figures, which lie in a folder `images` beside it."""
    runs = sum(len(record["rows"]) for record in records.values())
    pages.check(page, TITLE, runs)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = _head(records)
    for name, record in records.items():
        picture = images / f"targets-{name}.png"
        atomic_files.write(picture, _drawn(record))
        alt = f"{_TITLES[name]}: Hoyer and q against the step, one line a run"
        lines += [f"## {_TITLES[name]}", "", _what(record), "", *_table(record), ""]
        lines += [f"![{alt}]({os.path.relpath(picture, page.parent)})", "", _CAPTION, "", *_fixed(record), ""]
    pages.write(page, pages.wrapped("\n".join(lines)), runs)


_CAPTION = (
    "*Left: Hoyer of what the noise layers take in, while training; the bands are the targets, 0.02 to either side. "
    "Right: q. One line a run. `sparseout reproduce targets` draws it.*"
)


def _head(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    verdicts = [_verdict(name, record) for name, record in records.items()]
    return [
        TITLE,
        "",
        "A controller moves q until the activations are as sparse as wanted. The test: each of several fixed q's is "
        "run first, which shows the range of sparsities that the network can have; then targets are set at a quarter, "
        f"half and three quarters of that range, and every run to a target starts from q = {START:g}. A target is "
        f"**met** if in every run the mean of Hoyer over the last tenth of training is within {WITHIN:g} of it; how "
        "much of the range that is stands beside it, since the ranges differ. The noise is **constant** if its power, "
        f"over every interval of 10 steps, is within {NOISE:.0%} of what Dropout's would have been. Both rules were "
        "fixed before the runs. So were the controller's defaults, which all runs use: they had been chosen on these "
        "two tasks at p = 0.5. Sparsity here is that of training, measured where the noise acts; in evaluation it can "
        "differ.",
        "",
        *(f"- {sentence}" for sentence in verdicts),
        "",
        "`sparseout reproduce targets` runs all of it and makes this page from the files in `results/`; no number on "
        "it was typed.",
        "",
    ]


def _verdict(name: str, record: Mapping[str, Any]) -> str:
    runs = _steered(record)
    off = max(abs(_off(row)) for row in runs)
    met = sum(abs(_off(row)) <= WITHIN for row in runs)
    least, most = _noise(record["rows"])
    constant = "constant" if least >= 1 - NOISE and most <= 1 + NOISE else "not constant"
    count = "all" if met == len(runs) else f"{met} of"
    width = _width(record)
    return (
        f"**{_TITLES[name]}**: targets met in {count} {len(runs)} runs, the farthest off by {off:.4f}, which is "
        f"{off / width:.1%} of the range {width:.3f} that fixed q's reach (the tolerance of {WITHIN:g} is "
        f"{WITHIN / width:.0%} of it); noise {constant}, {least:.3f} to {most:.3f} of Dropout's power."
    )


def _width(record: Mapping[str, Any]) -> float:
    low, high = record["range"]
    return float(high - low) or math.nan


def _what(record: Mapping[str, Any]) -> str:
    config = record["config"]
    size = ", ".join(f"{config[name]} {name}" for name in ("units", "layers") if config.get(name))
    low, high = record["range"]
    steps = record["rows"][0]["steps"]
    hours = sum(row["seconds"] for row in record["rows"]) / 60
    return (
        f"{size}; p = {config['p']:g}, {steps} steps of batch {config['batch']}; fixed q's reach Hoyer {low:.3f} to "
        f"{high:.3f}. {len(record['rows'])} runs, {hours:.0f} minutes of running one after the other. Made with "
        f"{' and with '.join(pages.made_with((one, True) for one in record['environments']))}."
    )


def _table(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "| part of the range | target | Hoyer reached | farthest off | of the range | q at the end | noise power |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for part, rows in _grouped(_steered(record), "part").items():
        reached = t_interval([_number(row["control"]["hoyer"]) for row in rows])
        q = t_interval([row["control"]["q"] for row in rows])
        least, most = _noise(rows)
        farthest = max((_off(row) for row in rows), key=abs)
        lines.append(
            f"| {part:.0%} | {rows[0]['target']:.3f} | {reached.mean:.3f} ± {_half(reached.half)} | {farthest:+.4f} | "
            f"{farthest / _width(record):+.1%} | {q.mean:.2f} ± {q.half:.2f} | {least:.3f} to {most:.3f} |"
        )
    told = sum(bool(row["told"]) for row in _steered(record))
    seeds = len({row["seed"] for row in record["rows"]})
    after = f"Means over {seeds} seeds with 95% t intervals; noise power as a multiple of Dropout's, least and most of "
    after += "all intervals. " + (f"In {told} runs the controller reported the target as out of reach." if told else "")
    return [*lines, "", after.rstrip()]


def _fixed(record: Mapping[str, Any]) -> list[str]:
    groups = _grouped([row for row in record["rows"] if row["q"] is not None], "q")
    found = [t_interval([_number(row["control"]["hoyer"]) for row in rows]) for rows in groups.values()]
    return [
        "| fixed q | " + " | ".join(f"{q:g}" for q in groups) + " |",
        "|---|" + "--:|" * len(groups),
        "| Hoyer | " + " | ".join(f"{one.mean:.3f} ± {_half(one.half)}" for one in found) + " |",
    ]


def _drawn(record: Mapping[str, Any]) -> bytes:
    with style():
        figure = Figure((9.2, 3.6), layout="constrained")
        sparsity, exponent = figure.subplots(1, 2)
        groups = _grouped(_steered(record), "part")
        shades = [_SHADES[place % len(_SHADES)] for place in range(len(groups))]
        for colour, rows in zip(shades, groups.values(), strict=True):
            target = rows[0]["target"]
            sparsity.axhspan(target - WITHIN, target + WITHIN, color=colour, alpha=0.18, linewidth=0)
            for place, row in enumerate(rows):
                steps, q, hoyer = (
                    [math.nan if v is None else v for v in one] for one in zip(*row["course"], strict=True)
                )
                label = None if place else f"target {target:.3f}"
                sparsity.plot(steps, hoyer, color=colour, linewidth=0.9, label=label)
                exponent.plot(steps, q, color=colour, linewidth=0.9)
        sparsity.set(xlabel="step", ylabel="Hoyer sparsity while training")
        exponent.set(xlabel="step", ylabel="exponent q")
        figure.legend(loc="outside lower center", ncols=len(groups))
        return png(figure)


def _steered(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in record["rows"] if row["part"] is not None]


def _grouped(rows: Rows, name: str) -> dict[float, list[Mapping[str, Any]]]:
    found: dict[float, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[name]):
        found.setdefault(row[name], []).append(row)
    return found


def _off(row: Mapping[str, Any]) -> float:
    off: float = _number(row["control"]["hoyer"]) - row["target"]
    return off


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _noise(rows: Rows) -> tuple[float, float]:
    return min(row["control"]["noise_least"] for row in rows), max(row["control"]["noise_most"] for row in rows)


def _half(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.4f}"
