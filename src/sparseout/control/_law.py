"""The control law: where a knob is after one update, from the error of the sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

# The law's constants, as fractions of a knob's range where they are of its unit.
GAIN = 12.0  # the largest proportional gain, in ranges per unit of error
MAX_STEP = 1 / 30
TRIAL_STEP = 0.02  # by which a knob is moved back and forth in the first updates, to see what responds at once
TRIAL_UPDATES = 8
LEAST_TIME = 3.0  # integral time where the measure responds at once: that of the moving average of the error
TRIAL_ERRORS = 2  # standard errors that a response has to be from 0 to count
DRIFT_TIME = 40  # updates over which steps are averaged into the drift
OPPOSED_DRIFT_TIME = 10  # the same while the drift moves the knob away from the target: it is out of date
MAX_DRIFT = 1 / 4  # of the largest step

NATURAL: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (float, float),
    "log": (math.log, math.exp),
    "logit": (lambda p: math.log(p / (1 - p)), lambda x: 1 / (1 + math.exp(-x))),
}


class Axis(NamedTuple):
    """A knob's natural scale, turned such that activations become denser as x rises."""

    scale: str
    bounds: tuple[float, float]  # of the value
    raises_sparsity: bool

    def x(self, value: float) -> float:
        """The position of a value."""
        natural = NATURAL[self.scale][0](value)
        return -natural if self.raises_sparsity else natural

    def value(self, x: float) -> float:
        """The value at a position; beyond an end, and at it, the bound itself, without rounding."""
        sparsest, densest = self.bounds[:: -1 if self.raises_sparsity else 1]
        low, high = self.ends
        if not low < x < high:
            return sparsest if x <= low else densest
        value: float = NATURAL[self.scale][1](-x if self.raises_sparsity else x)
        return min(max(value, self.bounds[0]), self.bounds[1])

    @property
    def ends(self) -> tuple[float, float]:
        """The positions of the bounds: that of the sparsest value, that of the densest."""
        low, high = sorted(map(self.x, self.bounds))
        return low, high

    def bound(self, side: int) -> str:
        """The bound on a side, 1 for the densest value, as sentences name it: "lower bound, 1"."""
        upper = (side > 0) != self.raises_sparsity
        return f"{'upper' if upper else 'lower'} bound, {self.bounds[upper]:g}"


class Law(NamedTuple):
    r"""A proportional-integral law in velocity form, for an error e that is positive where activations are too sparse.

    .. math::
        x_{t+1} &= \mathrm{clip}(x_t + \mathrm{clip}(K (e_t - e_{t-1}) + i_t + v_t, -s_t, s), l, h) \\
        i_t &= [\,|e_t| > d\,]\, K e_t / T', \qquad s_t = s / 2 \text{ if } i_t < -s / 2 \text{, else } s \\
        1 / K &= 1 / K_{\max} + r, \qquad T' = \max(T K / K_{\max}, 3) \\
        v_{t+1} &= \mathrm{clip}(v_t + (x_{t+1} - x_t - v_t) / T_v, -s / 4, s / 4), \\
        T_v &= 10 \text{ if } v_t e_t < 0 \text{, else } 40

    with x the knob's position on its natural scale, with which activations become denser, (l, h) `ends`,
    :math:`K_{\max}` `largest_gain`, T `integral_time` in updates, d `deadband` and s `max_step`. r is the `response`:
    by how much the measure falls at once for a unit of x; 0 where the knob acts through training. Far from the target
    the way to sparser activations is taken at most half as fast as that to denser ones, since units that die do not
    come back; near it both are alike, so that noise in the measure moves the knob neither way. v, the `drift`, is the
    average step, which is what a knob needs that has to move all the time; where it moves the knob away from the target
    it is averaged over fewer steps, since by then it is out of date.
    """

    largest_gain: float
    integral_time: float
    deadband: float
    max_step: float
    ends: tuple[float, float]

    @classmethod
    def over(
        cls,
        ends: tuple[float, float],
        gain: float | None,
        integral_time: float,
        deadband: float,
        max_step: float | None,
    ) -> Law:
        """The law between these ends; where gain and max_step are None, they are in proportion to the range."""
        low, high = ends
        gain = GAIN * (high - low) if gain is None else gain
        return cls(gain, integral_time, deadband, MAX_STEP * (high - low) if max_step is None else max_step, ends)

    def gain(self, response: float) -> float:
        """The gain K."""
        return self.largest_gain / (1 + self.largest_gain * response)

    def next(self, x: float, error: float, change: float, response: float = 0.0, drift: float = 0.0) -> float:
        """x_{t+1} from x_t, e_t, e_t - e_{t-1}, r and v_t."""
        gain, share = self.gain(response), 1 / (1 + self.largest_gain * response)  # largest_gain is 0 at equal bounds
        time = max(self.integral_time * share, min(LEAST_TIME, self.integral_time))
        integral = gain * error / time if abs(error) > self.deadband else 0.0
        fastest = self.max_step / (2 if integral < -self.max_step / 2 else 1)
        return _clip(x + _clip(gain * change + integral + drift, -fastest, self.max_step), *self.ends)

    def drift(self, drift: float, step: float, error: float) -> float:
        """v_{t+1} from v_t, x_{t+1} - x_t and e_t."""
        largest = MAX_DRIFT * self.max_step
        time = OPPOSED_DRIFT_TIME if drift * error < 0 else DRIFT_TIME
        return _clip(drift + (step - drift) / time, -largest, largest)


class Swing:
    """Detects a gain that is too large: steps back and forth, each more than half of the largest.

    The measure may respond at once at one value of a knob and not at another, and be noisier at one time than at
    another; then what the trial found does not hold.
    """

    def __init__(self) -> None:
        self.side, self.turns, self.age = 0, 0, 0

    def update(self, step: float, largest: float) -> bool:
        """Take in a step; whether it was the third turn within a dozen updates, after which counting begins anew."""
        side = 0 if abs(step) < largest / 2 else 1 if step > 0 else -1
        self.turns += side * self.side < 0
        self.side = side or self.side
        self.age = self.age + 1 if self.turns else 0
        too_large = self.turns >= 3
        if too_large or self.age >= 12:
            self.turns = self.age = 0
        return too_large


def smooth(previous: float | None, value: float, weight: float) -> float:
    """An exponential moving average: previous + weight (value - previous), which begins at the first value."""
    return value if previous is None else previous + weight * (value - previous)


def trial_side(update: int, error: float) -> int:
    """The side of x after this update of the trial, the first being 1: back and forth by a step, and back.

    Begins on the side that the first `error` asks for.
    """
    return 0 if update >= TRIAL_UPDATES else (1 if update % 2 else -1) * (1 if error > 0 else -1)


def response(errors: Sequence[float], step: float) -> float:
    """The fall of the error for a unit of x, at once, from the errors of the trial, x moved back and forth by `step`.

    Differences of neighbours, averaged such that a drift of the error cancels, less two standard errors; 0 at least.
    """
    signs = [trial_side(update, errors[0]) for update in range(1, len(errors))]
    falls = [
        sign * (after - before) / (2 * step)
        for sign, (before, after) in zip(signs, pairwise(errors[1:]), strict=False)  # the last is the one that ends it
    ]
    pairs = [(fall + following) / 2 for fall, following in pairwise(falls)]
    mean = sum(pairs) / len(pairs)
    variance: float = sum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1)
    return max(0.0, mean - TRIAL_ERRORS * math.sqrt(variance / len(pairs)))


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
