"""The runs of the study: every method over its own hyperparameter, on the same autoencoders."""

import itertools
from collections.abc import Iterable, Mapping
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


def plan(budget: str, data: Iterable[str], work: Path, sources: Mapping[str, str]) -> dict[str, Job]:
    """Every run, seed by seed, so that what is interrupted has compared all methods on the seeds it did."""
    jobs = {}
    for dataset, seed, (name, method) in itertools.product(data, SEEDS, METHODS.items()):
        given = {**BUDGETS[budget][dataset], **method.fixed, "method": name, "seed": seed}
        given["data"] = sources.get(dataset, given["data"])
        if name != "bridgeout":
            del given["per_example"]
        for setting in method.settings:
            knob = "" if setting is None else f" {method.knob}={setting:g}"
            key = f"{name}{knob} seed={seed}"
            options = given if setting is None else given | {method.knob: setting}
            jobs[f"{dataset}: {key}"] = Job("autoencoder", options, work / budget / dataset / key.replace(" ", "_"))
    return jobs


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    """Method, setting and seed of a run."""
    method = options["method"]
    return {"method": method, "setting": options.get(METHODS[method].knob), "seed": options["seed"]}
