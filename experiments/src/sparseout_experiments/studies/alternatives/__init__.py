"""The study of alternatives: every method over its own hyperparameter, on the same autoencoders."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparseout_experiments.message import expected
from sparseout_experiments.studies.alternatives.page import check, write
from sparseout_experiments.studies.control import collect
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine import sweep
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Train
from sparseout_experiments.studies.engine.jobs import StudyStopped, train

__all__ = ["BUDGETS", "KIND", "METHODS", "Method", "StudyStopped", "load_all", "render", "reproduce"]

KIND = "sparseout alternatives"
SEEDS = (0, 1, 2, 3, 4)


class Method(NamedTuple):
    """One method: its knob, the settings of it, and what else it is given."""

    knob: str
    settings: tuple[float, ...]
    fixed: Mapping[str, Any] = {}


_P = (0.1, 0.2, 0.35, 0.5, 0.7)
# Methods of two knobs have a p that was chosen among 0.02 to 0.2 on validation data of seed 100, not one of SEEDS.
METHODS = {
    "none": Method("", (math.nan,)),
    "dropout": Method("p", _P),
    "gaussian": Method("p", _P),
    "sparseout": Method("q", (0.25, 0.5, 1.0, 1.5, 2.0, 3.0), {"p": 0.05, "scale": "matched"}),
    "bridgeout": Method("q", (0.5, 1.0, 1.5, 2.0, 3.0), {"p": 0.05}),
    "shakeout": Method("c", (0.0, 0.01, 0.03, 0.1, 0.3), {"p": 0.05}),
    "penalty": Method("strength", (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), {"q": 1.0}),
    "kwinners": Method("k", (0.05, 0.1, 0.2, 0.4, 0.6), {"boost": 1.0}),
}
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
class _Run:
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
        """Its name among the runs on its data set."""
        knob = "" if self.setting is None else f" {METHODS[self.method].knob}={self.setting:g}"
        return f"{self.method}{knob} seed={self.seed}"

    def job(self, work: Path, sources: Mapping[str, str]) -> Job:
        """As options of `sparseout run autoencoder`, and a folder."""
        method, common = METHODS[self.method], dict(BUDGETS[self.budget][self.data])
        per_example = common.pop("per_example")
        options = {**common, **method.fixed, "method": self.method, "seed": self.seed}
        options["data"] = sources.get(self.data, options["data"])
        if self.method == "bridgeout":
            options["per_example"] = per_example
        if self.setting is not None:
            options[method.knob] = self.setting
        return Job("autoencoder", options, work / self.budget / self.data / self.key.replace(" ", "_"))


def plan(budget: str, data: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[_Run]:
    """Every run, seed by seed, so that what is interrupted has compared all methods on the seeds it did."""
    return [
        _Run(budget, one, name, None if math.isnan(setting) else setting, seed)
        for one in data
        for seed in seeds
        for name, method in METHODS.items()
        for setting in method.settings
    ]


def reproduce(
    budget: str,
    results: Path,
    work: Path,
    page: Path,
    workers: int = 2,
    data: Sequence[str] = ("digits", "mnist"),
    on_progress: Callable[[int, int, str], None] | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    seeds: Sequence[int] = SEEDS,
    scheduler: str | None = None,
    train: Train = train,
) -> None:
    """Run what is missing, write a file of results for each data set, and fill the page.

    Args:
        budget: "small" or "full".
        results: folder of the files of results.
        work: folder of the runs.
        page: the Markdown file whose generated parts are filled in; figures go to `images` beside it.
        workers: processes at a time, one thread each.
        data: which data sets.
        on_progress: is told how many runs of how many are done, and what was started last.
        sources: a folder or hub id to take for a data set.
        seeds: how often each setting is trained.
        scheduler: the address of a Dask scheduler, instead of workers of this machine.
        train: trains one run.

    Raises:
        StudyStopped: where it cannot go on, in one sentence; what is finished is kept.
    """
    check(page, data)
    wanted = plan(budget, data, seeds)
    jobs = {run: run.job(work, sources or {}) for run in wanted}
    found: dict[_Run, dict[str, Any]] = {}

    def report(run: _Run) -> None:
        if on_progress is not None:
            on_progress(len(found), len(wanted), str(run))

    with Cluster(workers, train, scheduler) as cluster:
        sweep.run_all(cluster, jobs, found, report)
    for one in data:
        mine = {run: found[run] for run in wanted if run.data == one}
        files.save(_path(results, budget, one), _head(budget, one, mine) | {"rows": list(_rows(mine))})
    render(results, page)


def render(results: Path, page: Path) -> None:
    """Fill the page from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page without marks.
    """
    records = load_all(results)
    if not records:
        raise ValueError(
            expected("--results", "a folder with results of `sparseout reproduce alternatives`", repr(str(results)))
        )
    write(records, page)


def load_all(results: Path) -> dict[str, dict[str, Any]]:
    """The results of every data set, of the largest budget that a folder has. Raises ValueError for a bad file."""
    paths = [(data, _path(results, budget, data)) for budget, sets in BUDGETS.items() for data in sets]
    return {data: files.load(path, KIND) for data, path in paths if path.exists()}


def _path(results: Path, budget: str, data: str) -> Path:
    return results / f"alternatives-{budget}-{data}.json"


_MEASURES = ("hoyer", "hoyer_live", "dead", "undefined")


def _head(budget: str, data: str, found: Mapping[_Run, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "kind": KIND,
        "budget": budget,
        "data": data,
        "config": collect.shared([result["config"] for result in found.values()]),
        "methods": {name: {"knob": method.knob, "fixed": dict(method.fixed)} for name, method in METHODS.items()},
        "environments": collect.distinct([result["environment"] for result in found.values()]),
    }


def _rows(found: Mapping[_Run, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for run, result in found.items():
        yield {
            "method": run.method,
            "setting": run.setting,
            "seed": run.seed,
            "mse": result["test"]["mse"],
            **{name: result["mean"][name] for name in _MEASURES},
            "best_epoch": result["best_epoch"],
            "seconds": result["seconds"],
        }
