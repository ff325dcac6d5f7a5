import math

import numpy as np
import pytest
from scipy import stats
from sparseout_experiments.studies.engine.statistics import (
    Interval,
    direction,
    equivalent,
    holm,
    p_value,
    paired,
    slope,
    slope_interval,
    t_interval,
)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_t_interval_is_scipys(n: int, level: float) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = t_interval(values.tolist(), level)
    assert (found.low, found.mean, found.high) == pytest.approx((low, values.mean(), high))
    assert found.n == n


def test_one_value_has_a_mean_and_no_interval() -> None:
    found = t_interval([0.25])
    assert found.mean == 0.25
    assert math.isnan(found.half)


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_has_neither(values: list[float]) -> None:
    found = t_interval(values)
    assert math.isnan(found.mean)
    assert math.isnan(found.half)
    assert found.n == 0


def test_undefined_values_are_left_out() -> None:
    assert t_interval([1.0, math.nan, 2.0, math.inf]) == t_interval([1.0, 2.0])


def test_slope_is_scipys() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 7))
    assert slope(x.tolist(), y.tolist()) == pytest.approx(stats.linregress(x, y).slope)


def test_slope_interval_repeats_over_curves() -> None:
    x = [1.0, 2.0, 4.0]
    curves = np.random.default_rng(1).normal(size=(5, 3))
    slopes = [stats.linregress(x, curve).slope for curve in curves]
    assert slope_interval(x, curves.tolist()) == pytest.approx(t_interval(slopes))


def test_equivalent_takes_the_whole_interval() -> None:
    assert equivalent(Interval(0.001, 0.0015, 5), 0.003)
    assert not equivalent(Interval(0.001, 0.0025, 5), 0.003)
    assert not equivalent(Interval(-0.001, 0.0025, 5), 0.003)
    assert not equivalent(Interval(0.0, math.nan, 1), 0.003)


def test_p_values_and_their_correction_are_the_textbooks() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.6]
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert [p_value(same) for same in ([1.0, 1.0], [0.0, 0.0], [3.0])] == [0, 1, 1]
    # Holm (1979): the least of m is multiplied by m, the next by m - 1, and none falls below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("mean", "sign"), [(2.0, 1), (-2.0, -1), (0.5, 0), (1.0, 0), (math.nan, 0)])
def test_a_direction_is_that_of_a_whole_interval(mean: float, sign: int) -> None:
    assert direction(Interval(mean, 1.0, 5)) == sign


def test_a_paired_difference_is_scipys_within_the_seeds_that_both_have() -> None:
    first = {0: 1.0, 1: 1.3, 2: 0.9, 3: 1.6, 7: 100.0}
    second = {3: 1.1, 2: 0.7, 1: 1.2, 0: 0.6, 8: -100.0}
    values = np.array([first[seed] - second[seed] for seed in range(4)])
    found = paired(first, second)
    wanted = stats.ttest_rel([first[seed] for seed in range(4)], [second[seed] for seed in range(4)])
    low, high = wanted.confidence_interval()
    assert (found.interval.low, found.interval.high, found.p) == pytest.approx((low, high, wanted.pvalue))
    assert found.effect == pytest.approx(values.mean() / values.std(ddof=1))
    assert found.interval.n == 4
    same = paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})
    assert (same.interval.half, same.p) == (0, 0)
    assert math.isnan(same.effect)
    assert paired({0: 1.0}, {1: 1.0}).interval.n == 0
