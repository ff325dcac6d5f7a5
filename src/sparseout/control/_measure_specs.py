"""Measures as the controller sees them: their scale, sign and range."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sparseout._utils.validation import expected, type_name


class Scale(NamedTuple):
    """Scale and sign of a measure in control: with these it rises with sparsity by about as much as others."""

    sign: int
    high: float  # targets are below, and above `low`
    low: float
    extreme: Callable[[float, float], float]  # the densest value of n units of which m are live
    scale: Callable[[float], float] = float
    unscale: Callable[[float], float] = float


SCALES = {
    "hoyer": Scale(1, 1, 0, lambda n, m: (n**0.5 - m**0.5) / (n**0.5 - 1)),
    "hoyer_live": Scale(1, 1, 0, lambda n, m: 0.0),
    "gini": Scale(1, 1, 0, lambda n, m: 1 - m / n),
    "treves_rolls": Scale(-1, 1, 0, lambda n, m: m / n),
    "sparsity": Scale(1, 1, 0, lambda n, m: 1 - m / n),
    "density": Scale(-1, 1, 0, lambda n, m: m / n),
    "kurtosis": Scale(1, math.inf, 1, lambda n, m: n / m, lambda value: math.log(value) / 4, lambda x: math.exp(4 * x)),
}


def scale_of(measure: Any) -> Scale:
    """The scale and sign of `measure`."""
    wanted = f"one of {', '.join(SCALES)}"
    if not isinstance(measure, str):
        raise TypeError(expected("measure", wanted, type_name(measure)))
    if measure not in SCALES:
        raise ValueError(expected("measure", wanted, repr(measure)))
    return SCALES[measure]


class Goal(NamedTuple):
    """A measure and its target."""

    measure: str
    target: float

    def error(self, value: float) -> float:
        """The excess of sparsity over the target. Without an active unit in any sample, NaN, it is 1."""
        spec = SCALES[self.measure]
        return 1.0 if math.isnan(value) else spec.sign * (spec.scale(value) - spec.scale(self.target))

    def value(self, error: float) -> float:
        """The value of the measure that has this error."""
        spec = SCALES[self.measure]
        return spec.unscale(spec.sign * error + spec.scale(self.target))

    def least_error(self, live: Iterable[tuple[int, int]]) -> float:
        """The error of the densest code in which no more units are live: (units, live ones) of each source."""
        densest = [SCALES[self.measure].extreme(units, alive) for units, alive in live if alive]
        return self.error(sum(densest) / len(densest) if densest else math.nan)
