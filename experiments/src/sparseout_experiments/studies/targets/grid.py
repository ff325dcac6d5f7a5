"""The runs of the study: at fixed values of q, then to targets inside the range of sparsity that these reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseout_experiments.studies.engine.cluster import Job

START = 2.5  # q at the beginning of a run to a target


@dataclass(frozen=True)
class Task:
    """A network to train, the values and targets of its runs, and their seeds."""

    task: str
    title: str
    options: Mapping[str, Any]
    qs: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    parts: tuple[float, ...] = (0.25, 0.5, 0.75)  # of the range
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def runs(self) -> int:
        """How many there are."""
        return len(self.seeds) * (len(self.qs) + len(self.parts))


TASKS = {
    "autoencoder": Task(
        "autoencoder",
        "Autoencoder on digits",
        {"data": "digits", "units": 256, "p": 0.4, "batch": 32, "epochs": 60, "device": "cpu"},
    ),
    "language": Task(
        "language",
        "LSTM language model on Python's help texts",
        {
            "data": "topics", "words": 1000, "train_size": 20_000, "valid_size": 4_000, "test_size": 4_000,
            "units": 64, "embedding": 64, "p": 0.4, "batch": 20, "bptt": 20, "lr": 5e-3, "epochs": 30, "device": "cpu",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: at a fixed q, which is the bounds' only value, or to a target in a part of the range."""

    name: str
    seed: int
    q: float | None = None
    part: float | None = None
    target: float = 0.5

    def __str__(self) -> str:
        return f"{self.name}: {self.key}"

    @property
    def key(self) -> str:
        """Its name among the runs of its task."""
        return f"q={self.q:g} seed={self.seed}" if self.part is None else f"target={self.target:g} seed={self.seed}"

    def job(self, task: Task, work: Path) -> Job:
        """As options of `sparseout run`, and a folder."""
        fixed = {} if self.q is None else {"q_min": self.q, "q_max": self.q}
        start = START if self.q is None else self.q
        options = {**task.options, "seed": self.seed, "target_sparsity": self.target, "q": start, **fixed}
        return Job(task.task, options, work / self.name / self.key.replace(" ", "_"))


Results = Mapping[Run, Mapping[str, Any]]


def runs(names: Sequence[str], results: Results) -> list[Run]:
    """The runs at fixed q's, and of each task for which `results` has all of these, the runs to targets."""
    found = [Run(name, seed, q=q) for name in names for seed in TASKS[name].seeds for q in TASKS[name].qs]
    for name in names:
        if all(run in results for run in found if run.name == name):
            low, high = reach(name, TASKS[name], results)
            aims = [(part, round(low + part * (high - low), 3)) for part in TASKS[name].parts]
            found += [Run(name, seed, part=part, target=aim) for part, aim in aims for seed in TASKS[name].seeds]
    return found


def reach(name: str, task: Task, results: Results) -> tuple[float, float]:
    """Hoyer at the q's that give least and most of it, means over seeds."""
    means = [
        sum(results[Run(name, seed, q=q)]["control"]["hoyer"] for seed in task.seeds) / len(task.seeds) for q in task.qs
    ]
    return min(means), max(means)
