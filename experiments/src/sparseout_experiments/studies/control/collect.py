"""From folders of runs to a ledger, to one small file a task, and back."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.grid import ALWAYS, BUDGETS, GRIDS, Grid, Run, Setting, Task, Value
from sparseout_experiments.studies.engine import jobs
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.training import run_folder

_NO_VALUE = Value(None, None)  # type: ignore[arg-type]
_SITE = ("hoyer", "hoyer_live", "gini", "dead_units", "units")
_RUN = ("method", "q", "scale", "gradient", "option", "value", "seed", "role")
_LAST = ("hoyer", "hoyer_live", "dead")
_NUMBERS = ("metric", "valid", *_LAST, "undefined", *(f"last_{name}" for name in _LAST), "seconds")
_OTHER_COLUMNS = ("best_epoch", "digest", "device", "warnings", "curve")


class Ledger(jobs.OwnLedger[Run]):
    """Ledger of the study: ended runs, what tuning chose, and what there is to run.

    The options of the study alone count: a default that changed since is no other run.
    """

    def note(self, name: Run, job: Job) -> bool:
        """As the base's; the result also gets its curve, and the measures after the last epoch."""
        ended = super().note(name, job)
        if name in self.results:
            self.results[name] |= _epochs(job.folder, self.results[name]["epochs"])
        return ended

    def chosen(self, budget: str, task: Task) -> dict[Setting, Value]:
        """The values that tuning chose, as far as its trials are done."""
        metric = GRIDS[task].metric
        scores = [(run, _score(result, metric)) for run, result in self.results.items() if run.task == task]
        scores += [(run, math.inf) for run in self.failures if run.task == task]
        return grid.choose(budget, task, scores)

    def plan(self, budget: str, task: Task) -> list[Run]:
        first = grid.first(budget, task)
        tuned = all(run in self.results or run in self.failures for run in first)
        return first + (grid.second(budget, task, self.chosen(budget, task)) if tuned else [])


@dataclass(frozen=True, eq=False)
class Record:
    """One task at one budget.

    Its frame has a row a run that has ended: `run`, and what its file calls it by; `setting`, a name; `status`,
    "finished" or "failed", and `reason`; the metric on test data, and `valid`; the measures on test data, and as
    `last_...` after the last epoch on validation data, nan where undefined; `best_epoch`, which the test is of; and if
    it was kept `curve`, the losses of every epoch, in training and on validation data.
    """

    budget: str
    task: Task
    planned: int
    chosen: dict[Setting, Value]
    frame: pd.DataFrame
    environments: list[dict[str, Any]]
    data: str
    config: dict[str, Any]  # the options on which all runs agree

    @cached_property
    def finished(self) -> pd.DataFrame:
        return self.frame[self.frame["status"] == "finished"]

    @cached_property
    def analysed(self) -> pd.DataFrame:
        """Those of them that are no trial of tuning."""
        return self.finished[self.finished["role"] != "tuning"]

    @cached_property
    def failed(self) -> pd.DataFrame:
        return self.frame[self.frame["status"] == "failed"]

    @property
    def missing(self) -> int:
        return self.planned - len(self.frame)

    @property
    def grid(self) -> Grid:
        return grid.grid_of(self.budget, self.task)

    @property
    def complete(self) -> "Record":
        """Without the seeds of which runs are still to come: means over the others compare the same seeds."""
        plan = grid.first(self.budget, self.task) + grid.second(self.budget, self.task, self.chosen)
        begun = {run.seed for run in set(plan) - set(self.frame["run"])}
        return replace(self, frame=self.frame[~self.frame["seed"].isin(begun)])

    @property
    def options(self) -> dict[str, Any]:
        """The options that its runs had, and the budget's where these are not known."""
        return ALWAYS[self.task] | BUDGETS[self.budget][self.task] | self.config

    def samples(self, part: str = "test") -> int | None:
        """Over how many samples sparsity and dead units were measured; None: over all there are."""
        from sparseout_experiments.tasks import image, language  # which import torch

        measured = {"image": image.MEASURED[part], "language": language.MEASURED, "transformer": language.MEASURED}
        return measured.get(self.task, self.options.get(f"{part}_size"))


KIND = "sparseout control study"


def path_of(results: Path, budget: str, task: Task) -> Path:
    """The file of a task."""
    return results / f"control-{budget}-{task}.json"


def save(results: Path, budget: str, task: Task, ledger: Ledger) -> Path:
    """Write what is known of a task, unless nothing is, or the file that is there knows of more runs."""
    path = path_of(results, budget, task)
    plan = ledger.plan(budget, task)
    known = sum(run in ledger for run in plan)
    before = load(path) if path.exists() else None
    if known < (len(before.frame) if before else 1):
        return path
    finished = [(run, ledger.results[run]) for run in plan if run in ledger.results]
    reasons = ledger.failures | ledger.lost
    content = {
        "kind": KIND,
        "budget": budget,
        "task": task,
        "planned": max(len(plan), grid.count(budget, task)[0]),
        "data": ALWAYS[task]["data"],
        "config": files.shared([result["config"] for _, result in finished]),
        "environments": files.distinct(each for _, result in finished for each in _environments(result)),
        "rows": [_identity(run) | _numbers(run, result) for run, result in finished],
        "failed": [_identity(run) | {"reason": reasons[run]} for run in plan if run in reasons],
        "chosen": [setting._asdict() | value._asdict() for setting, value in ledger.chosen(budget, task).items()],
    }
    files.save(path, content)
    return path


def load(path: Path) -> Record:
    """A record from its file. Raises ValueError where the file holds something else."""
    content = files.load(path, KIND)
    with files.shown(path, KIND):
        return record_of(content)


def record_of(content: Mapping[str, Any]) -> Record:
    """A record from what its file holds."""
    return Record(
        **{name: content[name] for name in ("budget", "task", "planned", "environments", "data", "config")},
        chosen={_setting_of(entry): Value(entry["option"], entry["value"]) for entry in content["chosen"]},
        frame=_frame_of(content["task"], content["rows"], content["failed"]),
    )


def load_all(results: Path) -> list[Record]:
    """Every record in a folder, the largest budget first."""
    paths = (path_of(results, budget, task) for budget in reversed(BUDGETS) for task in grid.TASKS)
    return [load(path) for path in paths if path.exists()]


def _identity(run: Run) -> dict[str, Any]:
    value = (run.value or _NO_VALUE)._asdict()
    return run.setting._asdict() | value | {"seed": run.seed, "role": run.role}


def _environments(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environment of a run; of one that is from a file, where any of that file's were."""
    environments: list[dict[str, Any]] = result.get("environments", [result.get("environment", {})])
    return environments


def _numbers(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    if "digest" in result:  # it is from a file
        return {name: value for name, value in result.items() if name not in ("config", "environments")}
    same = {name: result[name] for name in ("train_loss", "valid", "test", "sparsity", "mean")}
    return {
        "valid": result["valid"],
        "test": result["test"],
        "mean": result["mean"],
        "sites": {
            site: {name: values[name] for name in _SITE if name in values}
            for site, values in result["sparsity"].items()
        },
        **{name: result[name] for name in ("train_loss", "epochs", "best_epoch", "steps", "stopped_by", "seconds")},
        "last": result.get("last"),
        **({"curve": result["curve"]} if "curve" in result else {}),
        "device": _device(result),
        "warnings": result["warnings"],
        # of every metric and measure to the last bit: two runs agree in all of them or their digests differ
        "digest": hashlib.sha256(json.dumps(run_folder.plain(same)).encode()).hexdigest()[:16],
    }


def _setting_of(entry: Mapping[str, Any]) -> Setting:
    return Setting(entry["method"], entry["q"], entry["scale"], entry["gradient"])


def _frame_of(task: Task, rows: Iterable[Mapping[str, Any]], failed: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    metric = GRIDS[task].metric
    table = []
    for entry in (*rows, *failed):
        value = None if entry["option"] is None else Value(entry["option"], entry["value"])
        run = Run(task, _setting_of(entry), value, entry["seed"], entry["role"])
        row = {name: entry[name] for name in _RUN} | {"run": run, "setting": run.setting.name}
        if "reason" in entry:
            table.append(row | {"status": "failed", "reason": entry["reason"]})
            continue
        row |= {"status": "finished", "metric": entry["test"][metric], "valid": entry["valid"][metric]}
        row |= {name: entry["mean"][name] for name in (*_LAST, "undefined")}
        row |= {f"last_{name}": (entry["last"] or {}).get(name) for name in _LAST}
        table.append(row | {"seconds": entry["seconds"]} | {name: entry.get(name) for name in _OTHER_COLUMNS})
    columns = ("run", "setting", *_RUN, "status", "reason", *_NUMBERS, *_OTHER_COLUMNS)
    return pd.DataFrame(table, columns=columns).astype(dict.fromkeys(("q", "value", *_NUMBERS), float))


def _device(result: Mapping[str, Any]) -> str:
    """The device of a run: a GPU that the run was told to leave alone was not used."""
    told = result["config"].get("device", "auto")
    return "gpu" if told != "cpu" and result.get("environment", {}).get("gpu") else "cpu"


def _epochs(folder: Path, epochs: int) -> dict[str, Any]:
    """Measures on validation data after the last epoch, which need not be the one tested, and the losses of all."""
    lines = run_folder.metrics(folder)
    if not lines or lines[-1].get("epoch") != epochs or "mean" not in lines[-1]:
        return {"last": None}  # a run whose curve was tidied away is a result all the same
    last = {"last": lines[-1]["mean"]}
    try:
        return last | {"curve": [[line["train_loss"], line["valid"]["loss"]] for line in lines]}
    except LookupError:  # of a task that has no loss beside its metric
        return last


def _score(result: Mapping[str, Any], metric: str) -> float:
    value = result["valid"][metric]
    return math.inf if value is None or not math.isfinite(value) else float(value)
