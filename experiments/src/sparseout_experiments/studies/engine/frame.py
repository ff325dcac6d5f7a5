"""Results of runs as a DataFrame: a row a run, with its options, its metric, its sparsity, and how it ended."""

import itertools
import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
from pydantic import ConfigDict, TypeAdapter, create_model

from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.jobs import TECHNICAL
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.tasks import shown_as
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.run_folder import MEASURES

KIND = "sparseout report"
POINTS = 50  # of a run's training that a file keeps
NUMBERS = ("metric", "valid", *MEASURES, "dead", "undefined")  # of a run, that have a mean over seeds
_Number = float | None
# A run in a file, beside its options, and an epoch of it. Older files lack some of the numbers.
_Row = create_model(
    "_Row",
    run=(str, ...),
    status=(Literal["finished", "failed", "unfinished", "planned"], ...),
    reason=(str, ...),
    **dict.fromkeys((*NUMBERS, "seconds"), (_Number, None)),  # type: ignore[call-overload]
)
_Epoch = create_model("_Epoch", epoch=(int, ...), metric=(_Number, ...), hoyer=(_Number, ...))


@dataclass
class Results:
    """Runs that are looked at together.

    Args:
        task: what was trained.
        metric: the metric's name, and its unit: what it is multiplied by, or a percent sign.
        frame: a row a run: its options, ``run`` (its folder), ``status``, ``reason`` (of a failure), ``metric`` (on
            test data, in the unit it is read in), ``valid``, the measures (means over modules), ``dead``,
            ``undefined`` (the fraction of rows without a measure), ``seconds``.
        swept: the options that differ between runs, with their values; the seed is none of them.
        common: the options that do not.
        layers: per run, {module: measures}.
        curves: per run, a record an epoch: ``epoch``, ``metric``, ``hoyer``.
        environments: what the runs were made with.
        command: the command that repeats them, if it is known.
    """

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True)
    task: str
    metric: tuple[str, str]
    frame: pd.DataFrame
    swept: dict[str, list[Any]]
    common: dict[str, Any]
    layers: dict[str, dict[str, dict[str, _Number]]]
    curves: dict[str, list[dict[str, Any]]]
    environments: list[dict[str, Any]]
    command: str

    def settings(self, by: Sequence[str] | None = None) -> pd.DataFrame:
        """A row a setting, over its seeds: means, half of their intervals, and the runs.

        Args:
            by: the options that tell settings apart; None: all that differ.
        """
        names, rows = list(self.swept if by is None else by), []
        groups = self.frame.groupby(names, dropna=False, sort=False) if names else [((), self.frame)]
        for key, group in groups:
            row: dict[str, Any] = dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
            done = group[group["status"] == "finished"]
            for name in NUMBERS:
                interval = t_interval([float(value) for value in done[name].dropna()] if name in done else [])
                row |= {name: interval.mean, f"{name}_half": interval.half}
            row |= {"seeds": len(done), "failed": int((group["status"] == "failed").sum()), "runs": list(group["run"])}
            rows.append(row)
        return pd.DataFrame(rows)


def read(folders: Sequence[Path], planned: Iterable[Mapping[str, Any]] = (), command: str = "") -> Results:
    """The results in the folders of runs, or in folders that hold such folders.

    Args:
        folders: each a run's, or one with runs at any depth.
        planned: options of runs that there may not be yet, each with ``run``, its folder.
        command: what repeats them.

    Raises:
        ValueError: if there is no run, or runs of several tasks.
        RunError: for a folder whose files are not those of a run.
    """
    paths = {path.parent for folder in folders for path in sorted(folder.rglob(run_folder.CONFIG))}
    wanted = {Path(entry["run"]): {k: v for k, v in entry.items() if k != "run"} for entry in planned}
    if not paths and not wanted:
        raise ValueError(expected("folder", "the folder of a run or of runs", ", ".join(map(str, folders))))
    records = [_read(path, wanted.get(path)) for path in [*wanted, *sorted(paths - wanted.keys())]]
    tasks = {record["options"].get("task") for record in records}
    if len(tasks) > 1:
        raise ValueError(expected("folder", "runs of one task", ", ".join(sorted(map(str, tasks)))))
    options = [record["options"] for record in records]
    names = list(dict.fromkeys(name for entry in options for name in entry if name not in ("task", "seed")))
    # None is what a method has no use for, and no value of its own
    values = {name: files.distinct(entry[name] for entry in options if entry.get(name) is not None) for name in names}
    swept = {name: used for name, used in values.items() if len(used) > 1 and name not in TECHNICAL}
    task = tasks.pop()
    metric, _, unit = shown_as(task)
    return Results(
        task=task,
        metric=(metric, unit),
        frame=pd.DataFrame([{**record["options"], **record["row"]} for record in records]),
        swept=swept,
        common={name: used[0] for name, used in values.items() if len(used) == 1},
        layers={record["row"]["run"]: record["layers"] for record in records},
        curves={record["row"]["run"]: record["curve"] for record in records},
        environments=files.distinct(record["environment"] for record in records if record["environment"]),
        command=command,
    )


def _read(folder: Path, planned: Mapping[str, Any] | None) -> dict[str, Any]:
    """One run as its folder shows it. Raises RunError where a file in it is something else."""
    try:
        return _run(folder, planned)
    except (*run_folder.UNREADABLE, ImportError) as error:
        name = type(error).__name__
        raise run_folder.RunError(
            f"the files in {folder} are not those of a run ({name}): give another folder, or move it away"
        ) from None


def _run(folder: Path, planned: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(folder), "status": "planned", "reason": ""}
    row |= dict.fromkeys((*NUMBERS, "seconds"))
    options, layers, environment = dict(planned or {}), {}, None
    if (folder / run_folder.CONFIG).exists():
        options = options or tomllib.loads((folder / run_folder.CONFIG).read_text(encoding="utf-8"))
        row["status"] = "unfinished"
    if (folder / run_folder.FAILURE).exists():
        failure = run_folder.read_json(folder / run_folder.FAILURE)
        row |= {"status": "failed", "reason": str(failure["reason"])}
    elif (folder / run_folder.RESULT).exists():
        result = run_folder.read_json(folder / run_folder.RESULT, run_folder.Result)
        metric, times, _ = shown_as(result["task"])
        options, layers, environment = result["config"], result["sparsity"], result["environment"]
        row |= {"status": "finished", "seconds": result["seconds"]}
        row |= {name: result["mean"][name] for name in ("dead", "undefined")}
        row |= {"metric": _times(result["test"][metric], times), "valid": _times(result["valid"][metric], times)}
        row |= {name: mean([values[name] for values in layers.values()]) for name in MEASURES}
    metric, times, _ = shown_as(options["task"])
    curve = [
        {"epoch": line["epoch"], "metric": _times(line["valid"][metric], times), "hoyer": line["mean"]["hoyer"]}
        for line in run_folder.metrics(folder)
    ]
    return {"row": row, "options": options, "layers": layers, "environment": environment, "curve": curve}


def save(results: Results, path: Path) -> None:
    """Write all that a page shows into one small file; of long trainings some evenly spaced epochs."""
    frame = plain(results.frame)
    base = os.path.commonpath([Path(run).parent for run in frame["run"]])
    names = {run: os.path.relpath(run, base) for run in frame["run"]}
    frame["run"] = frame["run"].map(names)
    varying = [name for name in frame if frame[name].map(repr).nunique() > 1 or name in ("run", "status", "reason")]
    content = {"kind": KIND, **{name: value for name, value in vars(results).items() if name != "frame"}}
    content["fixed"] = {name: frame[name].iloc[0] for name in frame if name not in varying}
    content["runs"] = frame[varying].to_dict("records")
    content["layers"] = {names[run]: files.short(layers) for run, layers in results.layers.items()}
    content["curves"] = {names[run]: files.short(files.thinned(curve, POINTS)) for run, curve in results.curves.items()}
    files.save(path, content)


def load(path: Path) -> Results:
    """The results in such a file. Raises ValueError for one that is none."""
    content = files.load(path, KIND)
    try:
        fixed, runs = content.pop("fixed"), content.pop("runs")
        rows = [{**fixed, **run} for run in runs]
        names = {_Row.model_validate(row).run for row in rows}
        metric = tuple(content.pop("metric"))
        results = Results(metric=metric, frame=pd.DataFrame(rows), **{n: v for n, v in content.items() if n != "kind"})
        TypeAdapter(Results).validate_python(vars(results))
        for epoch in itertools.chain.from_iterable(results.curves.values()):
            _Epoch.model_validate(epoch)
        if not names or not names >= results.layers.keys() | results.curves.keys():
            raise ValueError("a run is missing")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete file of {KIND}") from error
    return results


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with None for what is missing."""
    return frame.astype(object).where(frame.notna(), None)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known and finite; None if there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None
