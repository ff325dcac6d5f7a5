"""The verdicts, by the rules of docs/protocol.md."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

from sparseout_experiments.studies.control.collect import Record, Row
from sparseout_experiments.studies.control.grid import (
    BUDGETS,
    GRIDS,
    HOYER_MARGIN,
    SEEDS,
    Setting,
    Task,
    Value,
    grid_of,
)
from sparseout_experiments.studies.engine.statistics import (
    Interval,
    direction,
    effect_size,
    equivalent,
    slope,
    t_interval,
)

Verdict = Literal["supported", "contradicted", "no effect", "undecided"]
Measure = Literal["hoyer", "hoyer_live", "metric", "last_hoyer", "last_hoyer_live"]
PChoice = float | Literal["own", "common"]  # a p of the grid; each setting's own p; the p of q = 2 for all
Curve = dict[float, dict[int, float]]  # values by q and seed

LEAST_SEEDS = 5
LEAST_Q = 3
UNDEFINED = 0.01  # of the samples may have no measure before the page warns
COLLAPSED = 0.05  # of the samples, in any seed: more, and a setting counts as collapsed


class Contrast(NamedTuple):
    """A contrast before it is computed: what is read, where, and which way the claim points."""

    claim: Literal["C1", "C2", "C3"]
    task: Task
    measure: Measure
    scale: str
    gradient: str
    p: PChoice
    primary: bool = False
    post_hoc: str = ""  # what was added after data had been seen, and how it differs from the primary contrast

    @property
    def side(self) -> int:
        """The sign of the slope that the claim expects."""
        return +1 if self.claim == "C3" else -1

    @property
    def margin(self) -> float | None:
        """The largest difference that does not matter."""
        return GRIDS[self.task].margin if self.measure == "metric" else HOYER_MARGIN

    @property
    def relative(self) -> bool:
        """Whether the margin is a fraction of the value at the smallest q."""
        return self.measure == "metric" and GRIDS[self.task].relative


class ContrastResult(NamedTuple):
    """A contrast: its verdict, why it has none where it has none, and the numbers behind it."""

    contrast: Contrast
    verdict: Verdict
    why: str
    slope: Interval
    effect: float  # size of `ends`: Cohen's d_z
    ends: Interval  # the difference between the largest and the smallest q, relative where the margin is
    span: float  # between the largest and the smallest mean, relative where the margin is
    q: tuple[float, ...]
    left_out: tuple[float, ...]  # q's without a defined measure


Claim = Literal["C2", "C3"]
CLAIMS: dict[Task, Claim] = {"image": "C2", "language": "C3", "transformer": "C3"}  # of the metric
UNITS: tuple[Measure, ...] = ("hoyer", "hoyer_live")
SOUND = "without collapsed q's"
LAST = "at the last epoch, validation data"


@cache
def contrasts(budget: str) -> list[Contrast]:
    """The contrasts of a budget, by claim, the primary ones first."""
    found: list[Contrast] = []
    whole = "autoencoder" in BUDGETS[budget]  # C1 is read there, and where it is not run, in the networks that are
    if whole:
        grid = grid_of(budget, "autoencoder")
        found = [
            Contrast(
                "C1", "autoencoder", measure, scale, gradient, p, (gradient, scale, p) == ("detached", "matched", 0.5)
            )
            for gradient in grid.gradients
            for scale in grid.scales
            for p in reversed(grid.p)
            for measure in UNITS
        ]
    choices: tuple[tuple[str, PChoice], ...] = (("matched", "common"), ("paper", "own"))
    for task, claim in CLAIMS.items():
        if task not in BUDGETS[budget]:
            continue
        some = [(scale, p) for scale, p in choices if scale in grid_of(budget, task).scales]
        found += [
            Contrast("C1", task, measure, scale, "detached", p, primary=not whole)
            for scale, p in some
            for measure in UNITS
        ]
        found.append(Contrast(claim, task, "metric", "matched", "detached", "own", primary=True))
        found += [Contrast(claim, task, "metric", scale, "detached", p) for scale, p in some]
    return sorted(found, key=lambda contrast: (contrast.claim, not contrast.primary))


@cache
def post_hoc(budget: str) -> list[Contrast]:
    """What was added beside C1 in the autoencoder, for the reader: it decides nothing."""
    primary = [one for one in contrasts(budget) if one.primary and one.task == "autoencoder"]
    last: dict[str, Measure] = {"hoyer": "last_hoyer", "hoyer_live": "last_hoyer_live"}
    return [one._replace(primary=False, post_hoc=SOUND) for one in primary] + [
        one._replace(primary=False, post_hoc=LAST, measure=last[one.measure]) for one in primary
    ]


def rows_of(record: Record, scale: str, gradient: str, p: PChoice) -> dict[float, list[Row]]:
    """The rows of one dial by rising q; the q's that have none are there with an empty list."""
    twos = Setting("sparseout", 2.0)
    found: dict[float, list[Row]] = {}
    for q in record.grid.q:
        setting = twos if q == 2 else Setting("sparseout", q, scale, gradient)
        value = record.chosen.get(twos if p == "common" else setting) if isinstance(p, str) else Value("p", p)
        found[q] = [
            row
            for row in record.rows
            if (row.run.setting, row.run.value) == (setting, value) and row.run.role != "tuning"
        ]
    return found


def curve_of(rows: Mapping[float, Sequence[Row]], measure: Measure) -> Curve:
    """One measure of the rows by q and seed."""
    return {q: {row.run.seed: getattr(row, measure) for row in some} for q, some in rows.items()}


def evaluate(contrast: Contrast, record: Record | None) -> ContrastResult:
    """One contrast by the protocol's rule."""
    if record is None:
        return judge(contrast, {})
    rows = rows_of(record, contrast.scale, contrast.gradient, contrast.p)
    if contrast.post_hoc == LAST and not any(math.isfinite(row.last_hoyer) for some in rows.values() for row in some):
        return judge(contrast, {})._replace(why="not in these results")
    if contrast.post_hoc == SOUND:
        lost = tuple(q for q, some in rows.items() if collapsed(some))
        found = judge(contrast, curve_of({q: rows[q] for q in rows if q not in lost}, contrast.measure))
        return found._replace(left_out=tuple(sorted(found.left_out + lost)))
    return judge(contrast, curve_of(rows, contrast.measure))


def collapsed(rows: Iterable[Row]) -> bool:
    """Whether more than COLLAPSED of the test samples have no active unit in any of the seeds of a setting."""
    return any(row.undefined > COLLAPSED for row in rows)


def alive(record: Record | None, contrast: Contrast) -> bool:
    """Whether no unit is dead in any run of a contrast: live units are then all units."""
    rows = rows_of(record, contrast.scale, contrast.gradient, contrast.p) if record else {}
    return any(rows.values()) and all(row.dead == 0 for some in rows.values() for row in some)


def judge(contrast: Contrast, curve: Curve) -> ContrastResult:
    """The verdict on a curve, and the numbers behind it."""
    # A measure that is undefined at some q takes that q out for all seeds; a metric that is not finite is a failure.
    lost = [q for q, values in curve.items() if any(math.isnan(value) for value in values.values())]
    left_out = tuple(lost) if contrast.measure != "metric" else ()
    kept = {q: values for q, values in curve.items() if q not in left_out}
    qs = tuple(sorted(kept))
    seeds = [
        seed for seed in SEEDS if qs and all(math.isfinite(values.get(seed, math.nan)) for values in kept.values())
    ]
    if len(qs) < 2 or not seeds:
        empty = Interval(math.nan, math.nan, 0)
        some = any(kept.values())
        why = f"0 of {LEAST_SEEDS} seeds have a value at every q" if some else "no runs yet"
        return ContrastResult(contrast, "undecided", why, empty, math.nan, empty, math.nan, qs, left_out)
    lines = [[kept[q][seed] for q in qs] for seed in seeds]
    slopes = t_interval([slope(qs, line) for line in lines])
    differences = [(line[-1] - line[0]) / (line[0] if contrast.relative else 1.0) for line in lines]
    ends = t_interval(differences)
    means = [sum(values) / len(seeds) for values in zip(*lines, strict=True)]
    span = (max(means) - min(means)) / (means[0] if contrast.relative else 1.0)
    word, why = _decide(contrast, len(seeds), len(qs), slopes, ends, span)
    return ContrastResult(contrast, word, why, slopes, effect_size(differences), ends, span, qs, left_out)


def _decide(
    contrast: Contrast, seeds: int, qs: int, slopes: Interval, ends: Interval, span: float
) -> tuple[Verdict, str]:
    if seeds < LEAST_SEEDS:
        return "undecided", f"{seeds} of {LEAST_SEEDS} seeds have a value at every q"
    if qs < LEAST_Q:
        return "undecided", f"the measure is defined at {qs} q's"
    if contrast.margin is not None and equivalent(ends, contrast.margin) and span <= contrast.margin:
        return "no effect", ""
    if sign := direction(slopes):
        return ("supported" if sign == contrast.side else "contradicted"), ""
    return "undecided", "the interval of the slope includes 0"


def both(contrast_results: Iterable[ContrastResult]) -> Verdict:
    """The word that all units and live units share."""
    words = {one.verdict for one in contrast_results}
    return words.pop() if len(words) == 1 else "undecided"


class Identity(NamedTuple):
    """C4: how many pairs of q = 2 and Dropout there are, and how many agree to the last bit."""

    verdict: Verdict
    pairs: int
    same: int


def identity(records: Iterable[Record]) -> Identity:
    """Compare every Dropout run with the run of q = 2 of the same task, p and seed."""
    pairs = same = 0
    exact = True
    for record in records:
        twos = {(row.run.value, row.run.seed): row for row in record.rows if row.run.setting.q == 2}
        for row in record.rows:
            other = twos.get((row.run.value, row.run.seed))
            if row.run.setting.method == "dropout" and other is not None:
                pairs += 1
                same += row.digest == other.digest
                exact &= row.device == other.device == "cpu"
    if not pairs or not exact:
        return Identity("undecided", pairs, same)
    return Identity("supported" if same == pairs else "contradicted", pairs, same)


def none_is_best(record: Record) -> bool | None:
    """Whether "none" beats every q at matched noise on validation data; None where there is nothing to compare."""
    none = [row.valid for row in record.rows if row.run.setting.method == "none" and row.run.role != "tuning"]
    rows = rows_of(record, "matched", "detached", "own" if record.grid.tuned else 0.5)
    others = [[row.valid for row in some] for some in rows.values()]
    if not none or not all(others):
        return None
    return all(sum(none) / len(none) < sum(some) / len(some) for some in others)


def warned(record: Record) -> list[tuple[Row, float]]:
    """Rows in which more than UNDEFINED of the samples have no defined measure."""
    return [(row, row.undefined) for row in record.rows if row.undefined > UNDEFINED]
