"""The runs of the study: fixed values of every knob, then targets inside the range of sparsity that these reach."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseout_experiments.studies.engine.cluster import Job

PARTS = (0.25, 0.5, 0.75)  # of the range


@dataclass(frozen=True)
class Knob:
    """Knob of a controller: its fixed values, which show its range, and where runs to targets start."""

    title: str
    values: tuple[float, ...]
    start: float


KNOBS = {
    "q": Knob("q of Sparseout", (1.0, 1.5, 2.0, 2.5, 3.0, 4.0), 2.5),
    "p": Knob("p of Sparseout, q = 1.5", (0.05, 0.2, 0.4, 0.6, 0.8, 0.9), 0.5),
    "strength": Knob("strength of an L1 penalty", (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 1e-3),
    "k": Knob("k of k-winners", (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), 0.5),
    "threshold": Knob("a threshold in units of the row's rms, a user-defined knob", (0.0, 0.5, 1.0, 1.5, 2.0), 0.5),
}


@dataclass(frozen=True)
class Task:
    """A network to train, its knobs, and the measures whose targets are set."""

    title: str
    knobs: tuple[str, ...]
    measures: tuple[str, ...]
    steps: int
    every: int  # steps between updates of the controller
    batch: int
    rate: float  # of Adam
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of knobs, where not the controller's

    @property
    def fixed_seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that show a range."""
        return self.seeds[: len(self.seeds) // 2]


TASKS = {
    "autoencoder": Task("Autoencoder on digits", tuple(KNOBS), ("hoyer", "density"), 1000, 5, 32, 1e-3),
    "classifier": Task("ReLU classifier on digits", tuple(KNOBS), ("hoyer", "density"), 1000, 5, 32, 1e-3),
    "short": Task("Autoencoder on digits, a short training", ("q",), ("hoyer", "density"), 400, 2, 32, 1e-3),
    "language": Task(
        "LSTM language model on Python's help texts",
        ("q", "p", "strength"),
        ("hoyer",),
        1500,
        10,
        20,
        5e-3,
        (0, 1, 2),
        {"p": (0.01, 0.8)},  # above 0.8 activations become denser again as p rises
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: at a fixed value of a knob, or to a target in a part of the range."""

    task: str
    knob: str
    seed: int
    value: float | None = None
    measure: str | None = None
    part: float | None = None
    target: float | None = None

    def __str__(self) -> str:
        return f"{self.task}: {self.key}"

    @property
    def key(self) -> str:
        what = f"{self.value:g}" if self.measure is None else f"{self.measure} {self.target:g}"
        return f"{self.knob} {what} seed={self.seed}"

    def job(self, work: Path) -> Job:
        options = {name: getattr(self, name) for name in ("knob", "seed", "value", "measure", "target")}
        return Job(self.task, options, work / self.task / self.key.replace(" ", "_"))


Results = Mapping[Run, Mapping[str, Any]]


def runs(names: Sequence[str], results: Results) -> list[Run]:
    """The runs at fixed values, and of each knob for which `results` has all of these, the runs to targets."""
    planned = []
    for name in names:
        for knob in TASKS[name].knobs:
            fixed = fixed_runs(name, knob)
            planned += fixed
            if all(run in results for run in fixed):
                planned += controlled_runs(name, knob, results)
    return planned


def fixed_runs(name: str, knob: str) -> list[Run]:
    """The runs of a knob at fixed values."""
    return [Run(name, knob, seed, value=value) for seed in TASKS[name].fixed_seeds for value in KNOBS[knob].values]


def controlled_runs(name: str, knob: str, results: Results) -> Iterator[Run]:
    """The runs of a knob to targets, at parts of the range from the least to the greatest mean over seeds."""
    for measure in TASKS[name].measures:
        low, high = reach(fixed_runs(name, knob), measure, results)
        for part in PARTS:
            target = round(low + part * (high - low), 3)
            for seed in TASKS[name].seeds:
                yield Run(name, knob, seed, measure=measure, part=part, target=target)


def reach(fixed: Sequence[Run], measure: str, results: Results) -> tuple[float, float]:
    """The measure at the values that give least and most of it, means over seeds."""
    of_value: dict[float | None, list[float]] = {}
    for run in fixed:
        of_value.setdefault(run.value, []).append(results[run][measure])
    means = [sum(values) / len(values) for values in of_value.values()]
    return min(means), max(means)


def count(name: str) -> int:
    """Number of runs of a task."""
    task = TASKS[name]
    fixed = sum(len(KNOBS[knob].values) for knob in task.knobs)
    return len(task.fixed_seeds) * fixed + len(task.seeds) * len(task.knobs) * len(task.measures) * len(PARTS)
