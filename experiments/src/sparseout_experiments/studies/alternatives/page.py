"""The generated parts of the page: what every method pays for the same sparsity, in figures and tables."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.statistics import Interval, holm, p_value, t_interval
from sparseout_experiments.studies.engine.style import COLOURS, png, style
from sparseout_experiments.training import atomic_files

SIGNIFICANT = 0.05
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8)  # of sparsity, at which errors are compared

_TITLES = {"digits": "Digits (8 x 8)", "mnist": "MNIST"}
_MEASURES = {"hoyer": "all units", "hoyer_live": "live units"}
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
Row = Mapping[str, Any]


def check(page: Path, names: Iterable[str]) -> str:
    """The text of a page that has places for the results on these data. Raises ValueError."""
    if not page.is_file():
        raise ValueError(expected("--page", "a file that is there, whose marked parts are filled in", repr(str(page))))
    text = page.read_text(encoding="utf-8")
    pages.filled(text, {f"alternatives-{name}": "" for name in names})
    return text


def write(records: Mapping[str, Mapping[str, Any]], page: Path) -> None:
    """Fill the page, and write its figures to the folder `images` beside it."""
    text = check(page, records)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    blocks = {}
    for name, record in records.items():
        picture = images / f"alternatives-{name}.png"
        atomic_files.write(picture, _drawn(record))
        alt = f"{_TITLES[name]}: reconstruction error against Hoyer, one line a method"
        shown = f"![{alt}]({os.path.relpath(picture, page.parent)})"
        blocks[f"alternatives-{name}"] = pages.wrapped(
            "\n".join([_what(name, record), "", shown, "", _CAPTION, "", *_equal(record), "", *_all(record)])
        )
    atomic_files.write(page, pages.filled(text, blocks))


_CAPTION = (
    "*Error against measured sparsity, over all units and over live ones: down is better, right is sparser. Each point "
    "is a setting of the method's knob, mean over seeds with 95% intervals. `sparseout reproduce alternatives` draws "
    "it.*"
)


def curves(rows: Sequence[Row], measure: str) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """For every method and seed its points (sparsity, error), sorted by sparsity; undefined ones left out."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        points = found.setdefault(row["method"], {}).setdefault(row["seed"], [])
        if row[measure] is not None and row["mse"] is not None:
            points.append((row[measure], row["mse"]))
    return {method: {seed: sorted(some) for seed, some in seeds.items()} for method, seeds in found.items()}


def error_at(points: Sequence[tuple[float, float]], level: float) -> float:
    """The error at a sparsity, on the straight line between the two settings around it; nan outside of all."""
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= level <= high:
            return before if high == low else before + (after - before) * (level - low) / (high - low)
    return math.nan


def at_level(seeds: Mapping[int, Sequence[tuple[float, float]]], level: float) -> Interval | None:
    """The error at a sparsity over seeds; None unless every seed reaches it."""
    errors = [error_at(points, level) for points in seeds.values()]
    return None if any(map(math.isnan, errors)) else t_interval(errors)


def _what(name: str, record: Mapping[str, Any]) -> str:
    config, rows = record["config"], record["rows"]
    seeds = len({row["seed"] for row in rows})
    minutes = sum(row["seconds"] for row in rows) / 60
    told = [(one, True) for one in record["environments"]]
    return (
        f"{_TITLES[name]}: autoencoders of {config['units']} units, {config['epochs']} epochs of batch "
        f"{config['batch']}; {len(rows)} runs, {seeds} seeds, {minutes:.0f} minutes of running one after the other. "
        "Seconds a run depend on what else a machine does, and are a rough guide. "
        f"Made with {' and with '.join(pages.made_with(told))}."
    )


def _equal(record: Mapping[str, Any]) -> list[str]:
    lines = []
    p_values = against_least(record)
    for measure, units in _MEASURES.items():
        found = {method: seeds for method, seeds in curves(record["rows"], measure).items() if method != "none"}
        errors = {method: [at_level(seeds, level) for level in LEVELS] for method, seeds in found.items()}
        bold = [{m for m, p in p_values[measure, level].items() if p > SIGNIFICANT} for level in LEVELS]
        lines += [
            f"Test MSE x 1000 at equal Hoyer over {units}, interpolated between settings, with 95% t intervals over "
            "seeds; - where not every seed reaches it. Bold: the least of each column, and those level with it (the "
            "difference within seeds is not significant at 5%, after Holm's correction for both tables).",
            "",
            "| method | " + " | ".join(f"{level:g}" for level in LEVELS) + " |",
            "|---|" + "--:|" * len(LEVELS),
            *(
                f"| {method} | " + " | ".join(_cell(one, method in b) for one, b in zip(some, bold, strict=True)) + " |"
                for method, some in errors.items()
            ),
            "",
        ]
    return lines[:-1]


def against_least(record: Mapping[str, Any]) -> dict[tuple[str, float], dict[str, float]]:
    """By measure and level, the method of least mean error, and the others with the p-value of their difference.

    Differences are taken within seeds; p-values are corrected by Holm for all of them, over both measures.
    """
    found: dict[tuple[str, float], dict[str, float]] = {}
    for measure, level in itertools.product(_MEASURES, LEVELS):
        errors = {
            name: [error_at(seeds[seed], level) for seed in sorted(seeds)]
            for name, seeds in curves(record["rows"], measure).items()
            if name != "none" and at_level(seeds, level) is not None
        }
        best = min(errors.values(), key=sum, default=[])
        found[measure, level] = {
            name: p_value([a - b for a, b in zip(some, best, strict=True)]) for name, some in errors.items()
        }
    others = [(place, name) for place, some in found.items() for name in some if some[name] < 1]
    corrected = holm([found[place][name] for place, name in others])
    for (place, name), value in zip(others, corrected, strict=True):
        found[place][name] = value
    return found


def _cell(one: Interval | None, bold: bool) -> str:
    if one is None:
        return "-"
    text = f"{1000 * one.mean:.1f} ± {1000 * one.half:.1f}"
    return f"**{text}**" if bold else text


def _all(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| method | setting | Hoyer | live units | dead, over {_samples(record)} | rows undefined | test MSE x 1000 | "
        "seconds a run |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (method, setting), rows in _settings(record["rows"]).items():
        knob = "" if setting is None else f"{record['methods'][method]['knob']} = {setting:g}"
        means = {name: t_interval([_number(row[name]) for row in rows]) for name in ("hoyer", "hoyer_live", "mse")}
        dead, undefined, seconds = (
            sum(row[name] for row in rows) / len(rows) for name in ("dead", "undefined", "seconds")
        )
        lines.append(
            f"| {method} | {knob} | {means['hoyer'].mean:.3f} | {means['hoyer_live'].mean:.3f} | {dead:.0%} | "
            f"{undefined:.1%} | {1000 * means['mse'].mean:.2f} ± {1000 * means['mse'].half:.2f} | {seconds:.1f} |"
        )
    return [
        "Every setting; a unit is dead if it fires for none of the test samples, so the share falls as their number "
        "grows:",
        "",
        *lines,
    ]


def _samples(record: Mapping[str, Any]) -> str:
    size = record["config"].get("test_size") or {"digits": 450, "mnist": 10_000}[record["data"]]
    return f"{size:,} samples"


def _settings(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["setting"]), []).append(row)
    return found


def _drawn(record: Mapping[str, Any]) -> bytes:
    with style():
        figure = Figure((9.2, 4.4), layout="constrained")
        for axes, (measure, units) in zip(figure.subplots(1, 2, sharey=True), _MEASURES.items(), strict=True):
            for method, (colour, marker) in _LOOKS.items():
                some = [rows for (name, _), rows in _settings(record["rows"]).items() if name == method]
                x = [t_interval([_number(row[measure]) for row in rows]) for rows in some]
                y = [t_interval([1000 * _number(row["mse"]) for row in rows]) for rows in some]
                order = sorted(range(len(x)), key=lambda at: (math.isnan(x[at].mean), x[at].mean))
                axes.errorbar(
                    [x[at].mean for at in order],
                    [y[at].mean for at in order],
                    [y[at].half for at in order],
                    [x[at].half for at in order],
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


def _number(value: float | None) -> float:
    return math.nan if value is None else value
