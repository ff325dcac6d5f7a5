"""The control law: q after one update, from the error of the sparsity."""

from typing import NamedTuple


class Law(NamedTuple):
    r"""A proportional-integral law in velocity form, for an error e that is positive where activations are too sparse.

    .. math::
        q_{t+1} = \mathrm{clip}\Bigl(q_t + \mathrm{clip}\bigl(
            K (e_t - e_{t-1} + [\,|e_t| > d\,]\, e_t / T),\, -s/2,\, s\bigr),\, l,\, h\Bigr)

    with K `proportional_gain`, T `integral_time` in updates, d `deadband`, s `max_step` and (l, h) `bounds`.
    """

    proportional_gain: float
    integral_time: float
    deadband: float
    max_step: float
    bounds: tuple[float, float]

    def next_q(self, q: float, error: float, change: float) -> float:
        """q_{t+1} from q_t, e_t and e_t - e_{t-1}."""
        integral = error / self.integral_time if abs(error) > self.deadband else 0.0
        step = self.proportional_gain * (change + integral)
        step = min(max(step, -self.max_step / 2), self.max_step)  # down half as fast: killed units do not come back
        low, high = self.bounds
        return min(max(q + step, low), high)


def smooth(previous: float | None, value: float, weight: float) -> float:
    """An exponential moving average: previous + weight (value - previous), which begins at the first value."""
    return value if previous is None else previous + weight * (value - previous)
