"""Means over seeds, and a verdict on how sparsity changes with q."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


# What each verdict says of the measure as q grows.
_SAYS: dict[Verdict, str] = {
    "apart": "falls at every step, no two of its 95% intervals overlapping",
    "falls": "falls overall (the 95% interval of its slope lies below 0) but not clearly at every step",
    "rises": "rises overall (the 95% interval of its slope lies above 0)",
    "unclear": "has no clear direction (the 95% interval of its slope includes 0)",
    "single": "moves (fewer than two seeds finished every q, so its slope has no interval)",
}
_SAYS_LIVE: dict[Verdict, str] = {
    "apart": "",
    "falls": "",
    "rises": ", rising",
    "unclear": ", without clear direction",
    "single": "",
}


def verdict(rows: Sequence[Row], scales: Iterable[Scale]) -> str:
    """One sentence, computed from the rows, on what turning q did to the sparsity of the code."""
    says: dict[str, list[str]] = {}
    ends: set[tuple[float, float]] = set()
    for scale in scales:
        curve = [row for row in dial(rows, scale) if not math.isnan(row.hoyer.mean)]
        if len(curve) < 2:
            continue
        first, last = curve[0], curve[-1]
        ends.add((first.setting.q or 0.0, last.setting.q or 0.0))
        live = _SAYS_LIVE[trend(curve, "hoyer_live").verdict]
        says.setdefault(_SAYS[trend(curve, "hoyer").verdict], []).append(
            f"{first.hoyer.mean:.2f} to {last.hoyer.mean:.2f} {scale_name(scale)} "
            f"({first.hoyer_live.mean:.2f} to {last.hoyer_live.mean:.2f} over live units{live})"
        )
    if all(len(dial(rows, scale)) == 1 for scale in scales):
        return "Only one q was given, so there is nothing to compare."
    if not says:
        return "Fewer than two values of q have a defined sparsity, so there is nothing to compare."
    span = " or ".join(f"{low:g} to {high:g}" for low, high in sorted(ends))
    clauses = (f"{said}: {' and '.join(numbers)}" for said, numbers in says.items())
    return f"As q goes from {span}, the Hoyer sparsity of the code {'; it '.join(clauses)}."


def scale_name(scale: Scale) -> str:
    """A scale, as part of a sentence."""
    names = {"paper": "at the paper's scale", "matched": "at matched noise power"}
    return names[scale] if isinstance(scale, str) else f"at unit {scale:g}"


def caveats(rows: Sequence[Row], blind_error: float) -> list[str]:
    """Sentences on numbers of the table that do not mean what they seem to."""
    found = []
    if any(math.isnan(row.hoyer.half) for row in rows):
        found.append('A "-" stands for what is undefined; an interval takes two seeds with a defined value.')
    diverged = [
        f"{_label(row.setting)}: {count} of {len(row.runs)}"
        for row in rows
        if (count := sum(not math.isfinite(run.error) for run in row.runs))
    ]
    if diverged:
        found.append(f"Runs that diverged, which are left out of the means: {'; '.join(diverged)}.")
    collapsed = [_label(row.setting) for row in rows if row.error.mean > 0.9 * blind_error]
    if collapsed:
        found.append(
            f"Collapsed: the network answers little better than with the average digit, whatever its sparsity "
            f"({'; '.join(collapsed)})."
        )
    undefined = [f"{_label(row.setting)}: {row.undefined} of {row.rows}" for row in rows if row.undefined]
    if undefined:
        found.append(
            "Sparsity is undefined for a digit whose code is all zero; such digits are left out of the means "
            f"of sparsity and kept in those of the error ({'; '.join(undefined)})."
        )
    return found


def notes(options: Options, rows: Sequence[Row]) -> list[str]:
    """Sentences on what these numbers show and do not show, computed from them."""
    dead = [
        " and ".join(f"{row.dead.mean:.0%} at q = {row.setting.q:g}" for row in ends) + f" {scale_name(scale)}"
        for scale in options.scales
        if (curve := dial(rows, scale))
        for ends in [curve[:: max(len(curve) - 1, 1)]]  # a single q is both
    ]
    digits = rows[0].runs[0].rows
    found = [
        f"A dead unit adds to Hoyer over all units. Units that fire for none of the {digits} test digits: "
        f"{'; '.join(dead)}; over more digits fewer would count as dead."
    ]
    dials = [row for row in rows if row.setting.method == "sparseout"]
    noisy = [row for row in rows if row.setting.method != "none"]
    none = next((row for row in rows if row.setting.method == "none"), None)
    if none and all(row.hoyer.mean > none.hoyer.mean for row in noisy):
        found.append(
            f"Every code trained with noise is sparser than the one without ({none.hoyer.mean:.2f}). Denser, "
            "for a q above 2, means denser than with Dropout."
        )
    if none and all(row.error.mean > none.error.mean for row in noisy):
        found.append(
            "The network without noise reconstructs best: this task needs no regularisation. The figures show "
            "a dial and its price, not a gain."
        )
    dropout = next((row for row in rows if row.setting.method == "dropout"), None)
    twos = [row for row in dials if row.setting.q == 2]
    if dropout and twos and all(_same(row, dropout) for row in twos):
        found.append(
            "The rows of q = 2 and of Dropout agree to the last bit, seed by seed: at q = 2 the layer is Dropout."
        )
    return found


def _same(row: Row, other: Row) -> bool:
    return [(run.hoyer, run.error) for run in row.runs] == [(run.hoyer, run.error) for run in other.runs]


def _label(setting: Setting) -> str:
    if setting.q is None or setting.scale is None:
        return setting.method
    return f"q = {setting.q:g} {scale_name(setting.scale)}"
