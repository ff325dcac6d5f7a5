"""Whether a target is out of reach, and why."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sparseout.control._law import Axis, Law
from sparseout.control._measure_specs import Goal
from sparseout.control._measurement import Source

STALL_WINDOW = 50  # updates over which units are counted as dead, and after which a bound that holds a knob is reported
MET_WINDOW = 10  # updates over which a target that was out of reach has to be met
STANDARD_ERRORS = 3  # that the mean of a noisy error has to be from 0 to count


@dataclass
class Reach:
    """Windows of updates, and what they say of a goal."""

    goal: Goal
    knob: str
    axis: Axis
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=STALL_WINDOW))  # what was measured
    message: str = ""  # why the target is out of reach
    message_warned: bool = False
    why: str = ""  # the target is out of reach, as the last windows have it
    off_side: int = 0  # on which side of it the measure is then: 1 too sparse, -1 too dense
    stalled_windows: int = 0  # in a row, in which the knob was mostly close to a bound, and nothing changed
    dead: dict[Source, set[int]] = field(default_factory=dict)  # units that were, in the last window
    # of the window so far
    updates: int = 0
    at_bound: int = 0  # updates at a bound that the error pushes the knob against
    near_bound: int = 0  # or close to it
    active: dict[Source, Tensor] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget all but what was warned of: the target is another."""
        self.message, self.message_warned, self.why, self.off_side = "", False, "", 0
        self.updates, self.at_bound, self.near_bound, self.stalled_windows, self.active = 0, 0, 0, 0, {}
        self.recent.clear()

    def count(self, active: Mapping[Source, Tensor]) -> None:
        """Add in how many samples each unit was active."""
        for source, value in active.items():
            self.active[source] = self.active[source] + value if source in self.active else value

    def judge(self, law: Law, x: float, error: float, moved: bool, responds: bool) -> str:
        """Set or withdraw `message` after an update. Returns it where that is to be a warning.

        Args:
            law: the law, whose `ends` bound x.
            x: where the knob is.
            error: smoothed.
            moved: whether the update moved the knob.
            responds: whether the measure responds at once; then units are not dead for good.
        """
        low, high = law.ends
        near = min(law.max_step, (high - low) / 10)  # noise in what is measured moves a knob off a bound now and then
        side = -1 if x <= low + near else 1 if x >= high - near else 0
        if side * error > law.deadband:
            self.near_bound += 1
            self.at_bound += not moved and x in (low, high)
        self.updates += 1
        if self.updates == STALL_WINDOW:
            self._close_window(side, law, responds)
        if not self._is_off(self.off_side, law.deadband):
            self.off_side, self.why = 0, ""
        if not self.why or self.message:
            self.message = self.message if self.why else ""
            return ""
        finite = [value for value in self.recent if math.isfinite(value)]
        closest = f"the closest value is {sum(finite) / len(finite):.3f}" if finite else "no sample has an active unit"
        self.message = f"the target {self.goal.target:g} of {self.goal.measure} is out of reach: {self.why}; {closest}"
        if self.message_warned:
            return ""
        self.message_warned = True
        return self.message

    def _close_window(self, side: int, law: Law, responds: bool) -> None:
        """Decide why the target is out of reach, if it is."""
        stalled = self.near_bound >= STALL_WINDOW / 2 and self._is_stalled(side, law.deadband)
        self.stalled_windows = self.stalled_windows + 1 if stalled else 0
        live = [(active.numel(), int((active > 0).sum())) for active in self.active.values()]
        units = sum(total for total, _ in live)
        dead = 0 if responds else units - sum(alive for _, alive in live)
        killed = f"{dead} of {units} units are dead, which no {self.knob} brings back"
        if dead and self.goal.least_error(live) > law.deadband:
            self.off_side, self.why = 1, killed
        elif self.at_bound == STALL_WINDOW or self.stalled_windows >= 2:
            self.off_side = side
            how = "at" if self.at_bound == STALL_WINDOW else "close to"
            self.why = f"{self.knob} has been {how} its {self.axis.bound(side)}, for {STALL_WINDOW} updates"
            self.why += f", and {killed}" if dead and side > 0 else ""
        elif not self.near_bound or self.off_side != side:
            self.off_side, self.why = 0, ""
        self.dead = {source: set((count == 0).nonzero().flatten().tolist()) for source, count in self.active.items()}
        self.updates, self.near_bound, self.at_bound, self.active = 0, 0, 0, {}

    def _is_stalled(self, side: int, deadband: float) -> bool:
        """Whether the error has been on that side over the window, and gets no smaller."""
        errors = [side * self.goal.error(value) for value in self.recent]
        half = len(errors) // 2
        (first, first_variance), (last, last_variance) = map(_mean_and_variance, (errors[:half], errors[half:]))
        noise = STANDARD_ERRORS * math.sqrt((first_variance + last_variance) / half)
        return min(first, last) > deadband + noise and first - last <= deadband + noise

    def _is_off(self, side: int, deadband: float) -> bool:
        """Whether the error has been on that side over the last updates, by more than dead-band and noise."""
        errors = [side * self.goal.error(value) for value in self.recent][-MET_WINDOW:]
        mean, variance = _mean_and_variance(errors)
        return mean > deadband + STANDARD_ERRORS * math.sqrt(variance / len(errors))


def _mean_and_variance(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)
