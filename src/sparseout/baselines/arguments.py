"""Checks that the baselines share."""

import math
import numbers
from collections.abc import Callable
from typing import Any

from sparseout._utils.validation import expected, kind


def number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> float:
    """The value as a float. Raises: TypeError if it is no number, ValueError if it is not as wanted."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(expected(name, wanted, kind(value)))
    if not holds(float(value)):
        raise ValueError(expected(name, wanted, value))
    return float(value)


def probability(value: Any) -> float:
    """p, of which p / (1 - p) must be finite."""
    return number("p", value, "a number >= 0 and < 1", lambda p: 0 <= p < 1)


def at_least_0(name: str, value: Any) -> float:
    """A finite number that is not negative."""
    return number(name, value, "a finite number >= 0", lambda number: 0 <= number < math.inf)


def above_0(name: str, value: Any) -> float:
    """A finite positive number."""
    return number(name, value, "a finite number > 0", lambda number: 0 < number < math.inf)
