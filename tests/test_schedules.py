"""Schedules of q."""

import math
from itertools import pairwise

import pytest

from sparseout.control.schedules import cosine, linear, warmup


@pytest.mark.parametrize("schedule", [linear, cosine, warmup])
def test_from_start_to_stop_without_turning(schedule) -> None:
    values = [schedule(step / 50, 2.5, 1.5) for step in range(51)]
    assert (values[0], values[-1]) == (2.5, 1.5)
    assert all(after <= before for before, after in pairwise(values))


def test_shapes() -> None:
    assert linear(0.3, 1.0, 2.0) == pytest.approx(1.3)
    assert cosine(0.3, 1.0, 2.0) == pytest.approx(1.5 - 0.5 * math.cos(0.3 * math.pi))
    assert warmup(0.05, 1.0, 2.0) == pytest.approx(1.5)
    assert warmup(0.5, 1.0, 2.0, over=0.4) == 2.0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((1.1, 2.0, 1.0), ValueError, r"`progress` to be a number in \[0, 1\], but got 1.1"),
        ((0.1, -2.0, 1.0), ValueError, "`start` to be a finite number >= 0, but got -2.0"),
        ((0.1, 2.0, math.inf), ValueError, "`stop` to be a finite number >= 0, but got inf"),
        ((True, 2.0, 1.0), TypeError, r"`progress` to be a number in \[0, 1\], but got True"),
    ],
)
def test_bad_arguments(arguments, error, says) -> None:
    for schedule in (linear, cosine, warmup):
        with pytest.raises(error, match=f"^expected {says}$"):
            schedule(*arguments)
