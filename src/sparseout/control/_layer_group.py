"""Sites that share a knob: what was measured of them, and where that moves the knob."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseout._utils.revival import MeasuredUnits
from sparseout.control._knob_protocol import Knob
from sparseout.control._law import TRIAL_STEP, TRIAL_UPDATES, Axis, Law, Swing, response, smooth, trial_side
from sparseout.control._measure_specs import Goal
from sparseout.control._measurement import Measurement, Source
from sparseout.control._reach import STALL_WINDOW, Reach

EMA_WEIGHT = 0.25  # the part of a change of the error that an update takes in
RESPONDS = 0.1  # the change of the measure at once over all of a knob's range from which on it counts
IDLE_UPDATES = 5  # updates without a pass, until that is reported

# What a state has of a group: the key, the attribute, and what it is in states without it. The keys with None were in
# the first version, whose only knob was q.
_OWN: dict[str, tuple[str, Any]] = {
    "q": ("value", None),
    "measured": ("measured", None),
    "error": ("error", None),
    "problem": ("problem", None),
    "warned": ("problem_warned", None),
    "idle": ("idle", 0),
    "other": ("other", None),
    "expected": ("expected", False),
    "smoothed": ("smoothed", None),
    "offset": ("offset", None),
    "trials": ("trials", TRIAL_UPDATES),
    "response": ("response", 0.0),
    "responds": ("responds", False),
    "drift": ("drift", 0.0),
}
_REACH: dict[str, tuple[str, Any]] = {
    "told": ("message", None),
    "updates": ("updates", None),
    "at_bound": ("at_bound", None),
    "why": ("why", ""),
    "off_side": ("off_side", 0),
    "stalled_windows": ("stalled_windows", 0),
}


@dataclass
class LayerGroup:
    """Sites that share a knob and a target."""

    knob: Knob
    axis: Axis
    goal: Goal
    mode: str | None
    value: float  # of the knob
    trials: int = 0  # updates of the trial so far
    measured: float | None = None  # what is to meet the target, at the last update
    expected: bool = False  # whether that is evaluation's by the last offset, and was not itself measured
    other: float | None = None  # what was measured last in the mode in which the target is not to be met
    error: float | None = None  # smoothed, at the last update
    smoothed: float | None = None  # the same of training alone
    offset: float | None = None  # of the error in evaluation from that in training, when last observed; without a mode
    trial_errors: list[float] = field(default_factory=list)
    responds: bool = False  # whether the trial found a response at once
    response: float = 0.0  # of the error to the knob, at once
    drift: float = 0.0  # the average step of the knob on its natural scale
    swing: Swing = field(default_factory=Swing)
    problem: str = ""  # why some of the activations measured last have no value
    problem_warned: bool = False
    idle: int = 0  # updates since the last pass
    called: set[str] = field(default_factory=set)  # sites with a pass so far
    reach: Reach = field(init=False)

    def __post_init__(self) -> None:
        self.reach = Reach(self.goal, self.knob.name, self.axis)

    @classmethod
    def start(
        cls, knob: Knob, goal: Goal, mode: str | None, bounds: tuple[float, float] | None, trial: bool
    ) -> LayerGroup:
        """The group at the knob's present value, within the bounds; without a `trial` where the gain is given."""
        low, high = map(float, knob.bounds if bounds is None else bounds)
        axis = Axis(knob.scale, (low, high), knob.raises_sparsity)
        return cls(knob, axis, goal, mode, min(max(float(knob.get()), low), high), 0 if trial else TRIAL_UPDATES)

    @property
    def sites(self) -> list[str]:
        """The names of the modules that are measured."""
        return list(self.knob.sites)

    @property
    def names(self) -> str:
        """Its sites, as sentences name them."""
        return listed(self.sites)

    def update(
        self, training: Mapping[Source, Measurement], evaluation: Mapping[Source, Measurement], law: Law
    ) -> list[str]:
        """Move the knob by what was measured since the last update. Returns what there is to warn of."""
        measurements, others = (evaluation, training) if self.mode == "eval" else (training, evaluation)
        if not measurements:
            self.idle += 1
            self._note_other(others)
            return []
        self.idle = 0
        self.called |= {name for name, _ in measurements}
        warnings = self._check(measurements)
        valid = {source: value for source, value in measurements.items() if not value.problem}
        if not valid:
            self.measured = None
            self._note_other(others)
            return warnings
        self.reach.count({source: value.active for source, value in valid.items()})
        raw = self._target_error(_mean(valid), others)
        self.reach.recent.append(math.nan if self.measured is None else self.measured)
        error = smooth(self.error, raw, EMA_WEIGHT)
        change = 0.0 if self.error is None else error - self.error
        before, self.error = self.value, error
        self._move(law, error, change)
        message = self.reach.judge(law, self.axis.x(self.value), error, self.value != before, self.responds)
        return warnings + [f"{self.names}: {message}"] * bool(message)

    def apply(self) -> None:
        """Give the knob the group's value."""
        self.knob.set(self.value)

    def take_dead(self) -> dict[MeasuredUnits, set[int]]:
        """The units that were dead in a window that has ended since the last call, where the knob acts in training."""
        dead, self.reach.dead = self.reach.dead, {}
        if self.responds:
            return {}
        return {MeasuredUnits(name, self.knob.sites[name], units): indices for (name, units), indices in dead.items()}

    def report(self) -> str:
        """A sentence: the knob, what is measured, and what is wrong."""
        train = self.mode == "train" or (self.mode is None and self.offset is None)
        mode, other = ("training", "evaluation") if train else ("evaluation", "training")
        value = "not measured" if self.measured is None else f"{self.measured:.3f}"
        if self.measured is not None:
            value += f"{' expected' if self.expected else ''} in {mode}"
        if self.other is not None:
            value += f" ({self.other:.3f} in {other})"
        knob = f"{self.knob.name} = {self.value:{'.3g' if self.axis.scale == 'log' else '.3f'}}"
        sentence = f"{self.names}: {knob}, {self.goal.measure} {value}, target {self.goal.target:g}"
        silent = [name for name in self.sites if name not in self.called] if self.called else []
        uncalled = f"no pass so far of {listed(silent)}" if silent else ""
        idle = f"no pass in the last {self.idle} updates" if self.idle >= IDLE_UPDATES else ""
        return "; ".join(filter(None, (sentence, idle, uncalled, self.problem, self.reach.message)))

    def state(self) -> dict[str, Any]:
        """The state that :meth:`load` goes on from."""
        reach = self.reach
        return (
            {key: getattr(self, name) for key, (name, _) in _OWN.items()}
            | {key: getattr(reach, name) for key, (name, _) in _REACH.items()}
            | {
                "target": self.goal.target,
                "called": sorted(self.called),
                "trial_errors": list(self.trial_errors),
                "swing": [self.swing.side, self.swing.turns, self.swing.age],
                "active": {source: value.clone() for source, value in reach.active.items()},
                "recent": list(reach.recent),
                "told_warned": reach.message_warned,
                "near_bound": reach.near_bound,
            }
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; with another target, from its value of the knob."""
        reach = self.reach
        for keys, owner in ((_OWN, self), (_REACH, reach)):
            for key, (name, default) in keys.items():
                setattr(owner, name, state.get(key, default))
        self.called = set(state.get("called", self.sites))
        self.trial_errors = list(state.get("trial_errors", ()))
        self.swing.side, self.swing.turns, self.swing.age = state.get("swing", (0, 0, 0))
        reach.active = {source: value.to("cpu", copy=True) for source, value in state["active"].items()}
        reach.recent = deque(state.get("recent", ()), maxlen=reach.recent.maxlen)
        reach.message_warned = state.get("told_warned", bool(reach.message))
        reach.at_bound = reach.updates if reach.at_bound is True else int(reach.at_bound)
        reach.near_bound = state.get("near_bound", reach.at_bound)
        if state["target"] != self.goal.target:
            self.error, self.smoothed, self.drift = None, None, 0.0
            reach.restart()

    def _target_error(self, value: float, others: Mapping[Source, Measurement]) -> float:
        """The error of what is to meet the target, which was measured as `value`, or without a mode in training."""
        error = self.goal.error(value)
        if self.trials < TRIAL_UPDATES:
            self.trial_errors.append(error)
        if self.mode is not None:
            self.measured = _finite(value)
            self._note_other(others)
            return error
        self.smoothed = smooth(self.smoothed, error, EMA_WEIGHT)
        evaluated = _mean({source: value for source, value in others.items() if not value.problem})
        self.expected = False
        if math.isfinite(evaluated):
            self.measured, self.other = evaluated, _finite(value)
            self.offset = self.goal.error(evaluated) - self.smoothed
            return self.offset + self.smoothed
        if self.offset is None:
            self.measured = _finite(value)
            return error
        self.other, self.expected = _finite(value), True
        self.measured = None if self.other is None else self.goal.value(error + self.offset)
        return error + self.offset

    def _move(self, law: Law, error: float, change: float) -> None:
        """Move the knob by the law; in the first updates back and forth beside, to see what responds at once."""
        low, high = law.ends
        step = TRIAL_STEP * (high - low)
        first = self.trial_errors[0] if self.trial_errors else 0.0
        x = self.axis.x(self.value) - (step * trial_side(self.trials, first) if self.trials else 0.0)
        if self.trials >= TRIAL_UPDATES or not step:
            before, x = x, law.next(x, error, change, self.response, self.drift)
            self.drift = law.drift(self.drift, x - before, error)
            if self.swing.update(x - before, law.max_step):
                self.response += 1 / law.gain(self.response)  # half the gain
        else:
            self.trials += 1
            # Until it is known, as if the measure went through all of its range with the knob, at once.
            x = law.next(x, error, change, 1 / (high - low))
            x = min(max(x, low + step), high - step) + step * trial_side(self.trials, first)
            if self.trials == TRIAL_UPDATES:
                self.response, self.trial_errors = response(self.trial_errors, step), []
                self.responds = self.response * (high - low) > RESPONDS
        self.value = self.axis.value(x)
        self.apply()

    def _note_other(self, measurements: Mapping[Source, Measurement]) -> None:
        """Keep what was measured in the mode in which the target is not to be met."""
        value = _mean(measurements)
        self.other = value if math.isfinite(value) else self.other

    def _check(self, measurements: Mapping[Source, Measurement]) -> list[str]:
        where = {"input": "inputs", "output": "outputs"}
        problems = {
            name or "the model": f"{where[self.knob.sites[name]]} {value.problem}"
            for (name, _), value in measurements.items()
            if value.problem
        }
        head = f"{self.knob.name} is not moved by"
        self.problem = "; ".join(f"{head} {name}: its {why}" for name, why in problems.items())
        if not self.problem or self.problem_warned:
            return []
        self.problem_warned = True
        return [self.problem]


def _mean(measurements: Mapping[Source, Measurement]) -> float:
    known = [measurement.value for measurement in measurements.values() if math.isfinite(measurement.value)]
    return sum(known) / len(known) if known else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def idle_messages(groups: Sequence[LayerGroup], mode: str | None, every: int) -> list[str]:
    """Warnings about groups that have seen no pass."""
    training, knob = mode != "eval", groups[0].knob.name
    measured, other = ("training", "evaluation") if training else ("evaluation", "training")
    limit = IDLE_UPDATES if training else STALL_WINDOW  # some evaluate once in an epoch
    idle = [group for group in groups if group.idle == limit and (training or not group.called)]
    seen = f"was seen in {limit * every} steps"
    if len(idle) == len(groups):
        return [f"no {measured} pass {seen}, so {knob} does not move: is the model in {other} mode?"]
    question = f"is it called, and in {measured} mode?"
    return [f"no {measured} pass of {group.names} {seen}, so its {knob} does not move: {question}" for group in idle]


def listed(names: Iterable[str]) -> str:
    """Names of modules, as sentences have them."""
    return ", ".join(name or "the model" for name in names)
