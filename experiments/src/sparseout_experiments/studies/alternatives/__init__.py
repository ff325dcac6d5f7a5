"""The study of alternatives: every method over its own hyperparameter, on the same autoencoders."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sparseout_experiments.message import expected
from sparseout_experiments.studies.alternatives.comparison import (
    LEVELS,
    MEASURES,
    SIGNIFICANT,
    against_least,
    errors_at,
    reached,
)
from sparseout_experiments.studies.alternatives.grid import BUDGETS, METHODS, WITHOUT_KNOB, Run, runs
from sparseout_experiments.studies.engine import pages, study
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.jobs import Ledger
from sparseout_experiments.studies.engine.plots import points
from sparseout_experiments.studies.engine.statistics import t_interval
from sparseout_experiments.studies.engine.study import Request, Study
from sparseout_experiments.studies.engine.style import COLOURS, style
from sparseout_experiments.training import atomic_files

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

    def plan(self, request: Request, ledger: Ledger[Run]) -> dict[Run, Job]:
        return {run: self.job(run, request) for run in runs(request.budget, request.names)}

    def job(self, run: Run, request: Request) -> Job:
        return run.job(request.work, request.sources)

    def check(self, request: Request, results: Path, page: Path) -> None:
        """Raise ValueError for a page that has no place for these results."""
        _text(page, request.names)

    def runs_of(self, request: Request, record: Mapping[str, Any]) -> dict[Run, dict[str, Any]]:
        """Those that have all measures."""
        rows = {(row["method"], row["setting"], row["seed"]): row for row in record["rows"]}
        return {
            run: {name: row[name] for name in _NUMBERS}
            | {"config": record["config"], "environment": record["environments"][row["environment"]]}
            for run in runs(request.budget, [record["data"]])
            if (row := rows.get((run.method, run.setting, run.seed))) is not None
        }

    def save(self, request: Request, ledger: Ledger[Run], results: Path) -> None:
        for name in request.names:
            of_data = {run: ledger.results[run] for run in runs(request.budget, [name])}
            environments = files.distinct(result["environment"] for result in of_data.values())
            content = {
                "budget": request.budget,
                "data": name,
                "config": files.shared([result["config"] for result in of_data.values()]),
                "methods": {
                    name: {"knob": method.knob, "fixed": dict(method.fixed)} for name, method in METHODS.items()
                },
                "environments": environments,
                "rows": [_row(run, result, environments) for run, result in of_data.items()],
            }
            self.store(results, content, name, request.budget)

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


def summary(record: Mapping[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
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
    return study.summary(record, runs) | {
        "data": name,
        "title": TITLES[name],
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


def _row(run: Run, result: dict[str, Any], environments: list[dict[str, Any]]) -> dict[str, Any]:
    if "mse" not in result:  # it is not from a file
        result = result | {
            "mse": result["test"]["mse"],
            **result["mean"],
            "density": result["sparsity"]["code"]["density"],
        }
    identity = {"method": run.method, "setting": run.setting, "seed": run.seed}
    numbers = {name: result[name] for name in _NUMBERS}
    return identity | numbers | {"environment": environments.index(result["environment"])}


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
