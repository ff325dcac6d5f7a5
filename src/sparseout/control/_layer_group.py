"""Layers that share a q: what was measured of them, and why their target is out of reach, if it is."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseout.control._input_hook import Measurement, Source
from sparseout.control._law import Law, smooth
from sparseout.control._measure_specs import SCALES
from sparseout.layers import Sparseout

EMA_WEIGHT = 0.25  # the part of a change of the error that an update takes in
STALL_WINDOW = 50  # updates over which units are counted as dead, and after which a bound that holds q is reported
MET_WINDOW = 10  # updates over which a target that was out of reach has to be met
IDLE_UPDATES = 5  # updates without a pass, until that is reported
STANDARD_ERRORS = 3  # that the mean of a noisy error has to be from 0 to count

# Of a group in a state: the key, and the attribute. The keys are those of the first version.
_STATE = {
    "target": "target",
    "q": "q",
    "measured": "measured",
    "error": "error",
    "told": "message",
    "problem": "problem",
    "warned": "problem_warned",
    "updates": "updates",
    "at_bound": "at_bound",
}


@dataclass
class LayerGroup:
    """Layers that share a q and a target."""

    layers: dict[str, Sparseout]
    measure: str
    target: float
    q: float
    mode: str = "train"
    measured: float | None = None
    other: float | None = None  # what was measured last in the other mode
    error: float | None = None  # smoothed, at the last update
    message: str = ""  # why the target is out of reach
    message_warned: bool = False
    problem: str = ""  # why some of the inputs measured last have no value
    problem_warned: bool = False
    idle: int = 0  # updates since the last pass
    called: set[str] = field(default_factory=set)  # layers with a pass so far
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=STALL_WINDOW))  # what was measured
    why: str = ""  # the target is out of reach, as the last windows have it
    off_side: int = 0  # on which side of it the measure is then: 1 too sparse, -1 too dense
    stalled_windows: int = 0  # in a row, in which q was close to a bound more often than not, and nothing changed
    # of the window so far
    updates: int = 0
    at_bound: int = 0  # updates at a bound that the error pushes q against
    near_bound: int = 0  # or close to it
    active: dict[Source, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """Its layers, as sentences name them."""
        return _listed(self.layers)

    def update(self, measurements: Mapping[Source, Measurement], law: Law) -> list[str]:
        """Move q by what was measured since the last update. Returns what there is to warn of."""
        if not measurements:
            self.idle += 1
            return []
        self.idle = 0
        self.called |= {name for name, _ in measurements}
        warnings = self._check_inputs(measurements)
        valid = {source: value for source, value in measurements.items() if not value.problem}
        if not valid:
            self.measured = None
            return warnings
        for source, value in valid.items():
            self.active[source] = self.active[source] + value.active if source in self.active else value.active
        known = [value.value for value in valid.values() if math.isfinite(value.value)]
        self.measured = sum(known) / len(known) if known else None
        self.recent.append(math.nan if self.measured is None else self.measured)
        error = smooth(self.error, self._error(self.recent[-1]), EMA_WEIGHT)
        change = 0.0 if self.error is None else error - self.error
        before, self.error, self.q = self.q, error, law.next_q(self.q, error, change)
        self.apply_q()
        return warnings + self._judge(before, law)

    def note_other(self, measurements: Iterable[Measurement]) -> None:
        """Keep what was measured in the mode in which the target is not to be met."""
        known = [measurement.value for measurement in measurements if math.isfinite(measurement.value)]
        self.other = sum(known) / len(known) if known else self.other

    def apply_q(self) -> None:
        """Give the layers the group's q, in their tensors."""
        for layer in self.layers.values():
            if isinstance(layer.q, Tensor):
                with torch.no_grad():
                    layer.q.fill_(self.q)
            else:  # somebody has set a number
                layer.q = q_tensor(self.q, torch.device("cpu"))

    def report(self) -> str:
        """A sentence: q, what is measured, and what is wrong."""
        value = "not measured" if self.measured is None else f"{self.measured:.3f}"
        if self.other is not None:
            value += f" ({self.other:.3f} in {'evaluation' if self.mode == 'train' else 'training'})"
        sentence = f"{self.names}: q = {self.q:.3f}, {self.measure} {value}, target {self.target:g}"
        silent = [name for name in self.layers if name not in self.called] if self.called else []
        uncalled = f"no pass so far of {_listed(silent)}" if silent else ""
        idle = f"no pass in the last {self.idle} updates" if self.idle >= IDLE_UPDATES else ""
        return "; ".join(filter(None, (sentence, idle, uncalled, self.problem, self.message)))

    def state(self) -> dict[str, Any]:
        """The state that :meth:`load` goes on from."""
        return {key: getattr(self, name) for key, name in _STATE.items()} | {
            "active": {source: value.clone() for source, value in self.active.items()},
            "recent": list(self.recent),
            "told_warned": self.message_warned,
            "idle": self.idle,
            "other": self.other,
            "called": sorted(self.called),
            "why": self.why,
            "off_side": self.off_side,
            "near_bound": self.near_bound,
            "stalled_windows": self.stalled_windows,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; with another target, from its q."""
        for key, name in _STATE.items():
            if name != "target":
                setattr(self, name, state[key])
        self.active = {source: value.to("cpu", copy=True) for source, value in state["active"].items()}
        # States of the first version have no more than the above.
        self.recent = deque(state.get("recent", ()), maxlen=STALL_WINDOW)
        self.message_warned = state.get("told_warned", bool(self.message))
        self.other = state.get("other")
        self.idle, self.called = state.get("idle", 0), set(state.get("called", self.layers))
        self.why, self.off_side = state.get("why", ""), state.get("off_side", 0)
        self.at_bound = self.updates if self.at_bound is True else int(self.at_bound)
        self.near_bound = state.get("near_bound", self.at_bound)
        self.stalled_windows = state.get("stalled_windows", 0)
        if state["target"] != self.target:
            self.error, self.message, self.message_warned, self.why, self.off_side = None, "", False, "", 0
            self.updates, self.at_bound, self.near_bound, self.stalled_windows, self.active = 0, 0, 0, 0, {}
            self.recent.clear()

    def _check_inputs(self, measurements: Mapping[Source, Measurement]) -> list[str]:
        problems = {name or "the model": value.problem for (name, _), value in measurements.items() if value.problem}
        self.problem = "; ".join(f"q is not moved by {name}: its inputs {why}" for name, why in problems.items())
        if not self.problem or self.problem_warned:
            return []
        self.problem_warned = True
        return [self.problem]

    def _error(self, value: float) -> float:
        """The excess of sparsity over the target. Without an active unit in any sample, NaN, it is 1."""
        spec = SCALES[self.measure]
        return 1.0 if math.isnan(value) else spec.sign * (spec.scale(value) - spec.scale(self.target))

    def _judge(self, before: float, law: Law) -> list[str]:
        """Set or withdraw `message`. Returns it where that is to be a warning."""
        assert self.error is not None
        low, high = law.bounds
        near = min(law.max_step, (high - low) / 10)  # noise in what is measured moves q off a bound now and then
        side = -1 if self.q <= low + near else 1 if self.q >= high - near else 0
        if side * self.error > law.deadband:
            self.near_bound += 1
            self.at_bound += before == self.q and self.q in law.bounds
        self.updates += 1
        if self.updates == STALL_WINDOW:
            self._close_window(side, law)
        if not self._is_off(self.off_side, law.deadband):
            self.off_side, self.why = 0, ""
        if not self.why or self.message:
            self.message = self.message if self.why else ""
            return []
        known = [value for value in self.recent if math.isfinite(value)]
        closest = f"the closest value is {sum(known) / len(known):.3f}" if known else "no sample has an active unit"
        self.message = f"the target {self.target:g} of {self.measure} is out of reach: {self.why}; {closest}"
        if self.message_warned:
            return []
        self.message_warned = True
        return [f"{self.names}: {self.message}"]

    def _close_window(self, side: int, law: Law) -> None:
        """Decide why the target is out of reach, if it is."""
        stalled = self.near_bound >= STALL_WINDOW / 2 and self._is_stalled(side, law)
        self.stalled_windows = self.stalled_windows + 1 if stalled else 0
        live = [(active.numel(), int((active > 0).sum())) for active in self.active.values()]
        units = sum(total for total, _ in live)
        killed = f"{units - sum(alive for _, alive in live)} of {units} units are dead, which no q brings back"
        bound = f"its {'lower' if side < 0 else 'upper'} bound, {law.bounds[side > 0]:g}, for {STALL_WINDOW} updates"
        if self._is_ruled_out(live, law):
            self.off_side, self.why = 1, killed
        elif self.at_bound == STALL_WINDOW or self.stalled_windows >= 2:
            self.off_side = side
            self.why = f"q has been {'at' if self.at_bound == STALL_WINDOW else 'close to'} {bound}"
            self.why += "" if killed.startswith("0") or side < 0 else f", and {killed}"
        elif not self.near_bound or self.off_side != side:
            self.off_side, self.why = 0, ""
        self.updates, self.near_bound, self.at_bound, self.active = 0, 0, 0, {}

    def _is_ruled_out(self, live: Iterable[tuple[int, int]], law: Law) -> bool:
        """Whether no code in which no more units are live, (units, live ones) a source, is as dense as the target."""
        spec = SCALES[self.measure]
        densest = [spec.extreme(units, alive) for units, alive in live if alive]
        if not densest:
            return True
        limit = sum(densest) / len(densest)
        return spec.sign * (spec.scale(limit) - spec.scale(self.target)) > law.deadband

    def _is_stalled(self, side: int, law: Law) -> bool:
        """Whether the error has been on that side over the window, and gets no smaller."""
        errors = [side * self._error(value) for value in self.recent]
        half = len(errors) // 2
        (first, first_variance), (last, last_variance) = (
            _mean_and_variance(errors[:half]),
            _mean_and_variance(errors[half:]),
        )
        noise = STANDARD_ERRORS * math.sqrt((first_variance + last_variance) / half)
        return min(first, last) > law.deadband + noise and first - last <= law.deadband + noise

    def _is_off(self, side: int, deadband: float) -> bool:
        """Whether the error has been on that side over the last updates, by more than dead-band and noise."""
        errors = [side * self._error(value) for value in self.recent][-MET_WINDOW:]
        mean, variance = _mean_and_variance(errors)
        return mean > deadband + STANDARD_ERRORS * math.sqrt(variance / len(errors))


def _mean_and_variance(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def q_tensor(value: float, device: torch.device) -> Tensor:
    """A tensor for q: fp32 on that device, whatever the defaults are, and no inference tensor."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name or "the model" for name in names)
