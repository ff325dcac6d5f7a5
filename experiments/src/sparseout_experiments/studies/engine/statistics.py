"""Statistics over seeds: t intervals, slopes, paired differences with effect sizes, Holm's correction."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from scipy.special import stdtr, stdtrit  # Student's t and its quantile; scipy.stats takes a second to import

if TYPE_CHECKING:
    import pandas as pd


class Interval(NamedTuple):
    """An estimate and half the width of its interval; `half` is nan where one value gives no interval."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def times(self, factor: float) -> "Interval":
        return Interval(factor * self.mean, factor * self.half, self.n)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of `values` with a two-sided t interval. Values that are not finite are left out."""
    kept = [value for value in values if math.isfinite(value)]
    n = len(kept)
    mean = sum(kept) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, n)
    return Interval(mean, float(stdtrit(n - 1, (1 + level) / 2)) * deviation(kept) / math.sqrt(n), n)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; nan for fewer than two finite values."""
    kept = [value for value in values if math.isfinite(value)]
    return statistics.stdev(kept) if len(kept) > 1 else math.nan


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the least-squares line through the points (x, y)."""
    return statistics.linear_regression(x, y).slope


def slope_interval(x: Sequence[float], curves: Sequence[Sequence[float]], level: float = 0.95) -> Interval:
    """The mean slope of several curves over the same x, one curve a seed, with a t interval over the seeds.

    The points of one curve share weights and batches, so curves and not points are what repeats.
    """
    return t_interval([slope(x, curve) for curve in curves], level)


def direction(interval: Interval) -> int:
    """The sign that a whole interval has, or 0."""
    return (interval.low > 0) - (interval.high < 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for their number (Holm 1979)."""
    n, largest = len(p_values), 0.0
    corrected = [0.0] * n
    for rank, index in enumerate(sorted(range(n), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (n - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def p_value(values: Sequence[float]) -> float:
    """Of the two-sided t test that the mean of `values` is 0; 0 or 1 where they do not vary."""
    interval = t_interval(values)
    spread = deviation(values)
    if not spread > 0:
        return float(interval.n < 2 or interval.mean == 0)
    return 2 * float(stdtr(interval.n - 1, -abs(interval.mean) * math.sqrt(interval.n) / spread))


class Difference(NamedTuple):
    """A difference within pairs: its interval, the p-value of "none", and Cohen's d_z, in deviations of the pairs."""

    interval: Interval
    p: float
    effect: float


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """First minus second, within the seeds that both have: runs of one seed share weights and batches."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return Difference(t_interval(differences), p_value(differences), effect_size(differences))


def within_seeds(first: "pd.DataFrame", second: "pd.DataFrame", name: str) -> Difference:
    """`paired` of one column of two frames, each with a row a seed."""
    return paired(*(dict(zip(rows["seed"], rows[name], strict=True)) for rows in (first, second)))


def effect_size(differences: Sequence[float]) -> float:
    """Cohen's d_z: the mean of differences within pairs in units of their standard deviation; nan if they are equal."""
    spread = deviation(differences)
    return t_interval(differences).mean / spread if spread > 0 else math.nan


def equivalent(difference: Interval, margin: float) -> bool:
    """Whether the whole interval lies inside [-margin, margin]: what is left is too small to matter.

    With a 95% interval this is stricter than two one-sided tests at 5%, for which 90% would do (Schuirmann 1987).
    """
    return -margin <= difference.low and difference.high <= margin
