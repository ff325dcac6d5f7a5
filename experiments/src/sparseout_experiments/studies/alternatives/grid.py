"""The runs of the study: every method over its own hyperparameter, on the same autoencoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparseout_experiments.studies.engine.cluster import Job

SEEDS = (0, 1, 2, 3, 4)


class Method(NamedTuple):
    """One method: its knob, the settings of it (None where it has none), and what else it is given."""

    knob: str
    settings: tuple[float | None, ...]
    fixed: Mapping[str, Any] = {}


_P = (0.1, 0.2, 0.35, 0.5, 0.7)
_STRENGTHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
_K = (0.05, 0.1, 0.2, 0.4, 0.6)
# Methods of two knobs have a p that was chosen among 0.02 to 0.2 on validation data of seed 100, not one of SEEDS.
METHODS = {
    "none": Method("", (None,)),
    "dropout": Method("p", _P),
    "gaussian": Method("p", _P),
    "sparseout": Method("q", (0.25, 0.5, 1.0, 1.5, 2.0, 3.0), {"p": 0.05, "scale": "matched"}),
    "bridgeout": Method("q", (0.5, 1.0, 1.5, 2.0, 3.0), {"p": 0.05}),
    "shakeout": Method("c", (0.0, 0.01, 0.03, 0.1, 0.3), {"p": 0.05}),
    "penalty": Method("strength", _STRENGTHS, {"q": 1.0}),
    "l1_warmup": Method("strength", _STRENGTHS, {"warmup": 0.05}),
    "kwinners": Method("k", _K, {"boost": 1.0}),
    "statistical_topk": Method("k", _K),
    "relu2": Method("", (None,)),
}
WITHOUT_KNOB = [name for name, method in METHODS.items() if not method.knob]  # one point, no curve to interpolate
_DIGITS = {"data": "digits", "units": 256, "batch": 32, "device": "cpu"}
_MNIST = {"data": "mnist", "units": 256, "batch": 128, "device": "cpu"}
# Noise for each example of an autoencoder on MNIST takes 100 MB and minutes a run: only the larger budget has it.
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "digits": _DIGITS | {"epochs": 40, "per_example": True},
        "mnist": _MNIST
        | {"epochs": 14, "train_size": 10_000, "valid_size": 1_000, "test_size": 10_000, "per_example": False},
    },
    "full": {
        "digits": _DIGITS | {"epochs": 200, "per_example": True},
        "mnist": _MNIST | {"epochs": 50, "valid_size": 6_000, "per_example": True},
    },
}


@dataclass(frozen=True)
class Run:
    """One training."""

    budget: str
    data: str
    method: str
    setting: float | None
    seed: int

    def __str__(self) -> str:
        return f"{self.data}: {self.key}"

    @property
    def key(self) -> str:
        knob = "" if self.setting is None else f" {METHODS[self.method].knob}={self.setting:g}"
        return f"{self.method}{knob} seed={self.seed}"

    def job(self, work: Path, sources: Mapping[str, str]) -> Job:
        method, common = METHODS[self.method], dict(BUDGETS[self.budget][self.data])
        per_example = common.pop("per_example")
        options = {**common, **method.fixed, "method": self.method, "seed": self.seed}
        options["data"] = sources.get(self.data, options["data"])
        if self.method == "bridgeout":
            options["per_example"] = per_example
        if self.setting is not None:
            options[method.knob] = self.setting
        return Job("autoencoder", options, work / self.budget / self.data / self.key.replace(" ", "_"))


def runs(budget: str, data: Sequence[str]) -> list[Run]:
    """Every run, seed by seed, so that what is interrupted has compared all methods on the seeds it did."""
    return [
        Run(budget, dataset, name, setting, seed)
        for dataset in data
        for seed in SEEDS
        for name, method in METHODS.items()
        for setting in method.settings
    ]
