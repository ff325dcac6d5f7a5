"""Means over seeds, how sparsity changes with q, and what there is to say of it, whose words are in sentences.j2."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader

from sparseout_experiments.demo import Options, Run, Scale, Setting, settings
from sparseout_experiments.studies.engine.statistics import Interval, direction, falls_apart, slope_interval, t_interval

Verdict = Literal["apart", "falls", "rises", "unclear", "single"]


@dataclass(frozen=True)
class Row:
    """One setting over its seeds."""

    setting: Setting
    runs: tuple[Run, ...]
    hoyer: Interval
    hoyer_live: Interval
    gini: Interval
    dead: Interval
    error: Interval

    @property
    def undefined(self) -> int:
        """Test digits, over all seeds, whose code is all zero: no measure is defined for them."""
        return sum(run.undefined_rows for run in self.runs)

    @property
    def rows(self) -> int:
        """Test digits measured, over all seeds."""
        return sum(run.rows for run in self.runs)

    @property
    def diverged(self) -> int:
        """Runs without a finite error."""
        return sum(not math.isfinite(run.error) for run in self.runs)

    @property
    def numbers(self) -> list[tuple[float, float]]:
        """Sparsity and error, seed by seed."""
        return [(run.hoyer, run.error) for run in self.runs]


def summarise(options: Options, runs: Iterable[Run]) -> list[Row]:
    """The rows of the table, in its order; settings without a finished run are left out."""
    by_setting: dict[Setting, list[Run]] = {setting: [] for setting in settings(options)}
    for run in runs:
        by_setting[run.setting].append(run)
    return [_row(setting, tuple(some)) for setting, some in by_setting.items() if some]


def _row(setting: Setting, runs: tuple[Run, ...]) -> Row:
    names = ("hoyer", "hoyer_live", "gini", "dead", "error")
    return Row(setting, runs, *(t_interval([getattr(run, name) for run in runs]) for name in names))


def dial(rows: Iterable[Row], scale: Scale) -> list[Row]:
    """The rows of Sparseout at one scale, by rising q."""
    chosen = [row for row in rows if row.setting.method == "sparseout" and row.setting.scale == scale]
    return sorted(chosen, key=lambda row: row.setting.q or 0.0)


class Trend(NamedTuple):
    """The trend of one measure with q at one scale."""

    verdict: Verdict
    slope: Interval


def trend(curve: Sequence[Row], measure: Literal["hoyer", "hoyer_live"]) -> Trend:
    """The slope of a measure against q over the seeds that finished every q, and what it amounts to."""
    by_seed: dict[int, list[float]] = {}
    for row in curve:
        for run in row.runs:
            by_seed.setdefault(run.seed, []).append(getattr(run, measure))
    whole = [values for values in by_seed.values() if len(values) == len(curve)]
    found = slope_interval([row.setting.q or 0.0 for row in curve], whole)
    if found.n < 2:
        return Trend("single", found)
    if falls_apart([getattr(row, measure) for row in curve]):
        return Trend("apart", found)
    verdicts: dict[int, Verdict] = {-1: "falls", 1: "rises", 0: "unclear"}
    return Trend(verdicts[direction(found)], found)


def verdict(rows: Sequence[Row], scales: Iterable[Scale]) -> str:
    """One sentence on what turning q did to the sparsity of the code."""
    curves = []
    for scale in scales:
        curve = [row for row in dial(rows, scale) if not math.isnan(row.hoyer.mean)]
        if len(curve) > 1:
            first, last = curve[0], curve[-1]
            found: dict[str, Any] = {"scale": scale, "ends": (first.setting.q, last.setting.q)}
            found |= {"trend": trend(curve, "hoyer").verdict, "trend_live": trend(curve, "hoyer_live").verdict}
            found["hoyer"] = first.hoyer.mean, last.hoyer.mean
            curves.append(found | {"hoyer_live": (first.hoyer_live.mean, last.hoyer_live.mean)})
    return _said("verdict", curves, all(len(dial(rows, scale)) == 1 for scale in scales))[0]


def scale_name(scale: Scale) -> str:
    """A scale, as part of a sentence."""
    return _said("scale", scale)[0]


def caveats(rows: Sequence[Row], blind_error: float) -> list[str]:
    """Sentences on numbers of the table that do not mean what they seem to."""
    return _said("caveats", rows, blind_error)


def notes(options: Options, rows: Sequence[Row]) -> list[str]:
    """Sentences on what these numbers show and do not show."""
    curves = [curve for scale in options.scales if (curve := dial(rows, scale))]
    ends = [curve[:: max(len(curve) - 1, 1)] for curve in curves]  # a single q is both
    alone = {row.setting.method: row for row in rows if row.setting.method != "sparseout"}
    return _said("notes", ends, rows, alone.get("none"), alone.get("dropout"))


def _said(macro: str, *values: Any) -> list[str]:
    """The sentences of a macro, which empty lines part."""
    text: str = getattr(_sentences(), macro)(*values)
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


@cache
def _sentences() -> Any:
    environment = Environment(loader=PackageLoader(__package__, ""), trim_blocks=True, lstrip_blocks=True)
    environment.tests["nan"] = math.isnan
    return environment.get_template("sentences.j2").module
