"""Settings over their seeds, how sparsity changes with q, and what there is to say of it in words of sentences.j2."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader

from sparseout_experiments.demo import Scale
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.studies.engine.statistics import Interval, direction, falls_apart, slope_interval, t_interval

Verdict = Literal["apart", "falls", "rises", "unclear", "single"]
Row = Mapping[str, Any]  # of `Results.settings`


def summarise(results: Results) -> list[Row]:
    """The rows of the table, in its order; settings without a run that has ended are left out."""
    rows = results.settings(("method", "scale", "q")).to_dict("records")
    for row in rows:
        row |= {name: None if row[name] != row[name] else row[name] for name in ("scale", "q")}
    return [row for row in rows if row["seeds"] or row["failed"]]


def interval(row: Row, measure: str) -> Interval:
    """A measure of a setting over its seeds."""
    return Interval(row[measure], row[f"{measure}_half"], row["seeds"])


def dial(rows: Iterable[Row], scale: Scale) -> list[Row]:
    """The rows of Sparseout at one scale, by rising q."""
    chosen = [row for row in rows if row["method"] == "sparseout" and row["scale"] == scale]
    return sorted(chosen, key=lambda row: row["q"])


class Trend(NamedTuple):
    """Effect of q on one measure at one scale: its verdict, the slope, and at the ends the q's and the means."""

    verdict: Verdict
    slope: Interval
    ends: tuple[float, float]
    means: tuple[float, float]


def trend(results: Results, scale: Scale, measure: Literal["hoyer", "hoyer_live"]) -> Trend | None:
    """The slope of a measure against q over the seeds that have it at every q; None for fewer than two q's."""
    frame = results.frame
    runs = frame[(frame["method"] == "sparseout") & (frame["scale"] == scale)].astype({measure: float})
    table = runs.pivot(index="seed", columns="q", values=measure).dropna(axis="columns", how="all")
    if table.shape[1] < 2:
        return None
    slope = slope_interval(list(table), table.dropna().to_numpy().tolist())
    means = table.mean()
    verdicts: dict[int, Verdict] = {-1: "falls", 1: "rises", 0: "unclear"}
    verdict = verdicts[direction(slope)]
    if slope.n < 2:
        verdict = "single"
    elif falls_apart([t_interval(table[q]) for q in table]):
        verdict = "apart"
    return Trend(verdict, slope, (table.columns[0], table.columns[-1]), (means.iloc[0], means.iloc[-1]))


def verdict(results: Results, scales: Sequence[Scale]) -> str:
    """One sentence on what turning q did to the sparsity of the code."""
    trends = [(scale, trend(results, scale, "hoyer"), trend(results, scale, "hoyer_live")) for scale in scales]
    known = [(scale, *both) for scale, *both in trends if all(both)]
    only = all(len(dial(summarise(results), scale)) == 1 for scale in scales)
    return _rendered("verdict", known, only)[0]


def scale_name(scale: Scale) -> str:
    """A scale, as part of a sentence."""
    return _rendered("scale", scale)[0]


def caveats(rows: Sequence[Row], blind_error: float) -> list[str]:
    """Sentences on numbers of the table that do not mean what they seem to."""
    return _rendered("caveats", rows, blind_error)


def notes(results: Results, rows: Sequence[Row], scales: Sequence[Scale], samples: int) -> list[str]:
    """Sentences on what these numbers show and do not show."""
    curves = [curve for scale in scales if (curve := dial(rows, scale))]
    ends = [curve[:: max(len(curve) - 1, 1)] for curve in curves]  # a single q is both
    return _rendered("notes", ends, rows, samples, _is_dropout_at_2(results))


def _is_dropout_at_2(results: Results) -> bool:
    """Whether all that is known of runs at q = 2 is, seed by seed, what is known of Dropout's."""
    frame = results.frame[results.frame["status"] == "finished"]
    numbers = frame[["seed", "hoyer", "metric"]].astype(float)
    dropout = numbers[frame["method"] == "dropout"].to_numpy().tolist()
    twos = [numbers.loc[group.index].to_numpy().tolist() for _, group in frame[frame["q"] == 2].groupby("scale")]
    return bool(dropout and twos) and all(two == dropout for two in twos)


def _rendered(macro: str, *values: Any) -> list[str]:
    """The sentences of a macro, which empty lines part."""
    text: str = getattr(_sentences(), macro)(*values)
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


@cache
def _sentences() -> Any:
    environment = Environment(loader=PackageLoader(__package__, ""), trim_blocks=True, lstrip_blocks=True)
    environment.tests["nan"] = math.isnan
    return environment.get_template("sentences.j2").module
