"""The verdicts, by the rules of docs/protocol.md."""

import math
from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple

from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.dial import Curve, Dial, PChoice, cached_dial
from sparseout_experiments.studies.control.grid import BUDGETS, DIGITS, GRIDS, HOYER_MARGIN, SEEDS, Task, grid_of
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

LEAST_SEEDS = 5
LEAST_Q = 3
UNDEFINED = 0.01  # of the samples may have no measure before the page warns


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
    merged: bool = False  # whether it stands for that over live units too, as no unit is dead

    @property
    def units(self) -> str:
        """The units that its measure is of; of the metric there are none."""
        if self.merged:
            return "all = live units"
        if self.contrast.measure == "metric":
            return ""
        return "live units" if self.contrast.measure.endswith("_live") else "all units"

    @property
    def digits(self) -> int:
        """How many its numbers get after the point."""
        return DIGITS[GRIDS[self.contrast.task].metric] if self.contrast.measure == "metric" else 4


Claim = Literal["C2", "C3"]
CLAIMS: dict[Task, Claim] = {"image": "C2", "language": "C3", "transformer": "C3"}  # of the metric
UNITS: tuple[Measure, ...] = ("hoyer", "hoyer_live")
SOUND = "without collapsed q's"
LAST = "at the last epoch, validation data"


@cache
def contrasts(budget: str) -> list[Contrast]:
    """The contrasts of a budget, by claim, the primary ones first."""
    of_budget: list[Contrast] = []
    whole = "autoencoder" in BUDGETS[budget]  # C1 is read there, and where it is not run, in the networks that are
    if whole:
        grid = grid_of(budget, "autoencoder")
        of_budget = [
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
        dials = [(scale, p) for scale, p in choices if scale in grid_of(budget, task).scales]
        of_budget += [
            Contrast("C1", task, measure, scale, "detached", p, primary=not whole)
            for scale, p in dials
            for measure in UNITS
        ]
        of_budget.append(Contrast(claim, task, "metric", "matched", "detached", "own", primary=True))
        of_budget += [Contrast(claim, task, "metric", scale, "detached", p) for scale, p in dials]
    return sorted(of_budget, key=lambda contrast: (contrast.claim, not contrast.primary))


@cache
def post_hoc(budget: str) -> list[Contrast]:
    """Contrasts added beside C1 in the autoencoder, for the reader: they decide nothing."""
    primary = [c._replace(primary=False) for c in contrasts(budget) if c.primary and c.task == "autoencoder"]
    last: dict[str, Measure] = {"hoyer": "last_hoyer", "hoyer_live": "last_hoyer_live"}
    sound = [contrast._replace(post_hoc=SOUND) for contrast in primary]
    return sound + [contrast._replace(post_hoc=LAST, measure=last[contrast.measure]) for contrast in primary]


def dial_of(contrast: Contrast, record: Record) -> Dial:
    """The runs that a contrast compares."""
    return cached_dial(record, contrast.scale, contrast.gradient, contrast.p)


def evaluate(contrast: Contrast, record: Record | None) -> ContrastResult:
    """One contrast by the protocol's rule."""
    if record is None:
        return judge(contrast, {})
    dial = dial_of(contrast, record)
    if contrast.post_hoc == LAST and dial.rows["last_hoyer"].isna().all():
        return judge(contrast, {})._replace(why="not in these results")
    collapsed = dial.collapsed if contrast.post_hoc == SOUND else ()
    result = judge(contrast, {q: values for q, values in dial.curve(contrast.measure).items() if q not in collapsed})
    return result._replace(left_out=tuple(sorted(result.left_out + collapsed)))


def alive(record: Record | None, contrast: Contrast) -> bool:
    """Whether no unit is dead in any run of a contrast: live units are then all units."""
    dead = [] if record is None else list(dial_of(contrast, record).rows["dead"])
    return len(dead) > 0 and not any(dead)


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
        why = f"0 of {LEAST_SEEDS} seeds have a value at every q" if any(kept.values()) else "no runs yet"
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
    words = {result.verdict for result in contrast_results}
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
        rows = record.finished
        both = rows[rows["method"] == "dropout"].merge(rows[rows["q"] == 2], on=["value", "seed"])
        pairs += len(both)
        same += int((both["digest_x"] == both["digest_y"]).sum())
        exact &= bool((both[["device_x", "device_y"]] == "cpu").all(axis=None))
    if not pairs or not exact:
        return Identity("undecided", pairs, same)
    return Identity("supported" if same == pairs else "contradicted", pairs, same)


def none_is_best(record: Record) -> bool | None:
    """Whether "none" beats every q at matched noise on validation data; None where there is nothing to compare."""
    rows, dial = record.analysed, cached_dial(record, "matched", "detached", "own" if record.grid.tuned else 0.5)
    none, others = rows[rows["method"] == "none"], [dial.of(q) for q in dial.q]
    if none.empty or any(runs.empty for runs in others):
        return None
    return all(none["valid"].to_numpy().mean() < runs["valid"].to_numpy().mean() for runs in others)
