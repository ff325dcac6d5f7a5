"""The study of alternatives: every method over its own hyperparameter, on the same autoencoders."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sparseout_experiments.message import expected
from sparseout_experiments.studies.alternatives import grid
from sparseout_experiments.studies.alternatives.grid import BUDGETS, METHODS, WITHOUT_KNOB
from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.plots import points
from sparseout_experiments.studies.engine.statistics import holm, p_value, t_interval
from sparseout_experiments.studies.engine.study import Request, Study
from sparseout_experiments.studies.engine.style import COLOURS, style
from sparseout_experiments.training import atomic_files

SIGNIFICANT = 0.05
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8)  # of sparsity, at which errors are compared
MEASURES = {"hoyer": "all units", "hoyer_live": "live units"}
_NUMBERS = ("mse", *MEASURES, "dead", "undefined", "density", "best_epoch", "seconds")  # of a run
_LOOKS = {
    "none": (COLOURS["ink"], "*"),
    "dropout": ("#8a8f98", "o"),
    "gaussian": ("#56b4e9", "v"),
    "sparseout": (COLOURS["second"], "o"),
    "bridgeout": ("#009e73", "s"),
    "shakeout": ("#cc79a7", "^"),
    "penalty": (COLOURS["first"], "D"),
    "l1_warmup": ("#e69f00", "d"),
    "kwinners": ("#7a5195", "P"),
    "statistical_topk": ("#8c510a", "X"),
    "relu2": ("#4d9221", "p"),
}
TITLES = {"digits": "Digits (8 x 8)", "mnist": "MNIST"}


class Alternatives(Study):
    """Every method on every data set; a page has a part for each data set."""

    name, kind, tasks, budgets = "alternatives", "sparseout alternatives", tuple(TITLES), tuple(BUDGETS)
    ledger = Ledger

    def plan(self, request: Request, ledger: Ledger[str]) -> dict[str, Job]:
        return grid.plan(request.budget, request.names, request.work, request.sources)

    def check(self, request: Request, results: Path, page: Path) -> None:
        """Raise ValueError for a page that has no place for these results."""
        _text(page, request.names)

    def runs_of(self, request: Request, record: Mapping[str, Any]) -> Iterator[tuple[str, Job, dict[str, Any]]]:
        """Those that have all measures."""
        rows = {(row["method"], row["setting"], row["seed"]): row for row in record["rows"]}
        for name, job in grid.plan(request.budget, [record["data"]], request.work, request.sources).items():
            if row := rows.get(tuple(grid.identity(job.options).values())):
                made = {"config": record["config"], "environment": record["environments"][row["environment"]]}
                yield name, job, {number: row[number] for number in _NUMBERS} | made

    def save(self, request: Request, ledger: Ledger[str], results: Path) -> None:
        for name in request.names:
            jobs = grid.plan(request.budget, [name], request.work, request.sources)
            of_data = {run: ledger.results[run] for run in jobs}
            environments = files.distinct(result["environment"] for result in of_data.values())
            content = {
                "kind": self.kind,
                "budget": request.budget,
                "data": name,
                "config": files.shared([result["config"] for result in of_data.values()]),
                "methods": {
                    name: {"knob": method.knob, "fixed": dict(method.fixed)} for name, method in METHODS.items()
                },
                "environments": environments,
                "rows": [_row(jobs[run], result, environments) for run, result in of_data.items()],
            }
            files.save(self.path(results, name, request.budget), content)

    def render(self, results: Path, page: Path) -> None:
        """Fill the page from the files of results.

        Raises ValueError where there are none, for a file that holds something else, and for a page without marks.
        """
        records = files.present(self.load_all(results), results, self.name)
        text = _text(page, records)
        parts, drawn = {}, {}
        with style(), files.shown(results, self.kind):
            for name, record in records.items():
                frame = frame_of(record)
                parts[f"alternatives-{name}"] = pages.rendered(__package__, "part.md.j2", **summary(record, frame))
                drawn[f"alternatives-{name}"] = price(frame)
                drawn[f"alternatives-{name}-density"] = density(frame)
            pages.write_images(page, drawn)
        atomic_files.write(page, pages.filled(text, parts))


STUDY = Alternatives()


def _text(page: Path, data: Iterable[str]) -> str:
    """The text of a page that has places for the results on these data. Raises ValueError."""
    if not page.is_file():
        raise ValueError(expected("--page", "a file that is there, whose marked parts are filled in", repr(str(page))))
    text = page.read_text(encoding="utf-8")
    pages.filled(text, {f"alternatives-{name}": "" for name in data})
    return text


def frame_of(record: Mapping[str, Any]) -> pd.DataFrame:
    """The runs of a record; what is undefined is nan."""
    return pd.DataFrame(record["rows"]).astype(dict.fromkeys(("setting", "mse", *MEASURES, "density"), float))


def errors_at(level: float, runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The error at a sparsity: a row a method, a column a seed.

    It lies on the straight line between the two settings around that sparsity, and is nan outside of all.
    """
    known = runs.dropna(subset=[measure, "mse"]).sort_values(measure)
    errors = pd.DataFrame(index=list(dict.fromkeys(runs["method"])), columns=sorted(set(runs["seed"])), dtype=float)
    for (method, seed), group in known.groupby(["method", "seed"]):
        errors.loc[method, seed] = np.interp(level, group[measure], group["mse"], math.nan, math.nan)
    return errors


def reached(errors: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Of the errors at a sparsity, the methods with a knob that reach it with every seed that they ran with."""
    ran = runs.groupby("method")["seed"].nunique()
    errors = errors.drop(index=WITHOUT_KNOB, errors="ignore")
    return errors[errors.notna().sum(axis=1) == ran[errors.index]]


def against_least(runs: pd.DataFrame) -> dict[tuple[str, float], dict[str, float]]:
    """By measure and level, the method of least mean error, and the others with the p-value of their difference.

    Differences are taken within seeds, of methods that reach the level with every seed that any has; p-values are
    corrected by Holm for all of them, over both measures.
    """
    p_values: dict[tuple[str, float], dict[str, float]] = {}
    for measure, level in itertools.product(MEASURES, LEVELS):
        errors = errors_at(level, runs, measure).drop(index=WITHOUT_KNOB, errors="ignore").dropna()
        least = errors.loc[errors.mean(axis=1).idxmin()] if len(errors) else None
        p_values[measure, level] = {str(method): p_value(list(row - least)) for method, row in errors.iterrows()}
    others = [(key, name) for key, methods in p_values.items() for name, p in methods.items() if p < 1]
    for (key, name), p in zip(others, holm([p_values[key][name] for key, name in others]), strict=True):
        p_values[key][name] = p
    return p_values


def summary(record: dict[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
    """What the page shows of a data set."""
    name, config, p_values = record["data"], record["config"], against_least(runs)
    tables = []
    for measure, units in MEASURES.items():
        rows: dict[str, list[dict[str, Any]]] = {}
        for level in LEVELS:
            errors = errors_at(level, runs, measure)
            means = reached(errors, runs)
            for method in errors.index.drop(WITHOUT_KNOB, errors="ignore"):
                # where not every seed reaches the level there is no mean
                error = t_interval(1000 * means.loc[method] if method in means.index else [])
                least = p_values[measure, level].get(str(method), 0.0) > SIGNIFICANT
                rows.setdefault(str(method), []).append({"error": error, "least": least})
        tables.append({"units": units, "rows": rows})
    return study.summary(record | {"task": name}, runs, TITLES) | {
        "config": config,
        "made_with": [
            # one revision for all needs no names beside it
            {
                "what": pages.made_with([environment]),
                "methods": list(dict.fromkeys(made["method"])),
                "seeds": made["seed"].nunique(),
            }
            for number, environment in enumerate(record["environments"])
            if len(made := runs[runs["environment"] == number])
        ],
        "samples": config.get("test_size") or {"digits": 450, "mnist": 10_000}[name],
        "levels": LEVELS,
        "tables": tables,
        "settings": [
            {
                "method": method,
                "setting": "" if setting != setting else f"{record['methods'][method]['knob']} = {setting:g}",
                "hoyer": t_interval(group["hoyer"]),
                "hoyer_live": t_interval(group["hoyer_live"]),
                "error": t_interval(1000 * group["mse"]),
                **group[["density", "dead", "undefined", "seconds"]].mean(),
            }
            for (method, setting), group in runs.groupby(["method", "setting"], sort=False, dropna=False)
        ],
    }


def _row(job: Job, result: dict[str, Any], environments: list[dict[str, Any]]) -> dict[str, Any]:
    if "mse" not in result:  # it is not from a file
        result = result | {
            "mse": result["test"]["mse"],
            **result["mean"],
            "density": result["sparsity"]["code"]["density"],
        }
    numbers = {name: result[name] for name in _NUMBERS}
    return grid.identity(job.options) | numbers | {"environment": environments.index(result["environment"])}


def price(runs: pd.DataFrame) -> Figure:
    """Error against sparsity, a panel a measure, a line a method, a point a setting."""
    figure = Figure((9.2, 4.6), layout="constrained")
    for axes, (measure, units) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items(), strict=True):
        _draw(axes, runs, measure)
        axes.set_xlabel(f"Hoyer sparsity, {units}")
        axes.label_outer()
    return _finished(figure)


def density(runs: pd.DataFrame) -> Figure:
    """Error against density, a line a method, a point a setting."""
    figure = Figure((6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    _draw(axes, runs, "density")
    axes.set_xlabel("density: the fraction of units that are not 0")
    return _finished(figure)


def _draw(axes: Axes, runs: pd.DataFrame, measure: str) -> None:
    for method, (colour, marker) in _LOOKS.items():
        settings = [group for _, group in runs[runs["method"] == method].groupby("setting", dropna=False)]
        if settings:
            points(
                axes,
                [t_interval(list(group[measure])) for group in settings],
                [t_interval(list(1000 * group["mse"])) for group in settings],
                color=colour, marker=marker, markersize=9 if method == "none" else 5.5, linewidth=1.3, elinewidth=0.8,
                label=method,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finished(figure: Figure) -> Figure:
    first = figure.axes[0]
    first.set_ylabel("test MSE x 1000")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
