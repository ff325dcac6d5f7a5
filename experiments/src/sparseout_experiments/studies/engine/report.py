"""The page of a run, of a sweep or of several: one HTML file that needs nothing else, and what goes with it."""

import html
import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.express as px
from plotly.offline import get_plotlyjs

from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.frame import Results, load, plain, save
from sparseout_experiments.studies.engine.style import COLOURS, CYCLE, DARK
from sparseout_experiments.studies.engine.sweep import PLAN
from sparseout_experiments.training import atomic_files, run_folder

FILES = ("report.json", "report.html", "sweep.csv", "table.tex")

SHOWN = 24  # settings that one plot shows
LONGEST = 40  # characters of a name in a plot
_LOOK = {  # seven symbols and eight colours: 56 series that differ
    "symbol_sequence": ("circle", "square", "diamond", "triangle-up", "x", "star", "cross"),
    "color_discrete_sequence": CYCLE,
    "color": "name",
    "symbol": "name",
    "template": "none",
}


def check(folder: Path, *others: str) -> None:
    """Raise ValueError for a folder with files called as ours, or as `others`, that no command of ours has written."""
    there = [name for name in (*FILES, *others) if os.path.lexists(folder / name)]
    if not there or any((folder / name).exists() for name in (PLAN, run_folder.CONFIG)):
        return
    try:
        load(folder / FILES[0])
    except ValueError:
        got = f"{str(folder)!r}, whose {there[0]} is not of a report"
        raise ValueError(expected("--out", "a folder without it, or that of a report", got)) from None


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html``, what it is made from, a CSV and a LaTeX table; return their paths.

    Raises ValueError as `check` does.
    """
    check(folder)
    atomic_files.prepare(folder)
    settings = results.settings()
    kept, *paths = (folder / name for name in FILES)
    contents = [page(results, settings), results.frame.to_csv(index=False), latex(results, settings)]
    save(results, kept)  # first: it says that the others are ours
    for path, content in zip(paths, contents, strict=True):
        atomic_files.write(path, content)
    return [*paths, kept]


def page(results: Results, settings: pd.DataFrame | None = None) -> str:
    """The page as HTML."""
    settings = results.settings() if settings is None else settings
    frame = results.frame
    metric, unit = results.metric
    columns = ["run", "status", *results.swept, "seed", "metric", "valid", "hoyer", "density", "dead", "seconds"]
    statuses = frame["status"].value_counts()
    return pages.html(
        __package__,
        "report.html.j2",
        title=f"{results.task}: {'sweep over ' + ', '.join(results.swept) if results.swept else 'one setting'}",
        task=results.task,
        swept=results.swept,
        common=results.common,
        command=results.command,
        environments=results.environments,
        metric=metric,
        unit=unit,
        total=len(frame),
        counts={status: int(statuses.get(status, 0)) for status in ("finished", "failed", "unfinished", "planned")},
        failures=frame[frame["status"] == "failed"][["run", "reason"]].to_dict("records"),
        columns=[name for name in dict.fromkeys(columns) if name in frame],
        rows=plain(frame).to_dict("records"),
        settings=plain(settings).to_dict("records"),
        plots=_plots(results, settings),
        csv=frame.to_csv(index=False),
        plotly=get_plotlyjs(),
        shown=_shown,
        light=COLOURS,
        dark=DARK,
    )


def pareto(settings: pd.DataFrame) -> pd.Series:
    """Whether no other setting has both a lower metric and a higher Hoyer, or one of them and the other equal."""
    known = settings["metric"].notna() & settings["hoyer"].notna()
    points = settings[known]

    def beaten(row: Any) -> bool:
        better = (points["metric"] <= row["metric"]) & (points["hoyer"] >= row["hoyer"])
        return bool((better & ((points["metric"] < row["metric"]) | (points["hoyer"] > row["hoyer"]))).any())

    return known & ~settings.apply(beaten, axis=1)


def latex(results: Results, settings: pd.DataFrame) -> str:
    """The settings as a table of LaTeX (booktabs)."""
    metric, unit = results.metric
    heads = {"metric": f"{metric}{_in(unit)}", "hoyer": "Hoyer", "dead": "dead"}
    table = settings[[*results.swept, "seeds"]].map(_shown)
    for name, head in heads.items():
        table[head] = list(map(_tex_interval, settings[name], settings[f"{name}_half"]))
    styler = table.style.hide().format_index(escape="latex", axis=1).format(escape="latex", subset=list(results.swept))
    text: str = styler.to_latex(hrules=True, column_format="l" * len(results.swept) + "r" * 4)
    return text


def _tex_interval(mean: float, half: float) -> str:
    text = "--" if math.isnan(mean) else f"{mean:.4g}"
    return text if math.isnan(half) else rf"${text} \pm {half:.2g}$"


def _in(unit: str) -> str:
    return f" ({unit.strip()})" if unit.strip() else ""


def _shown(value: Any) -> str:
    """A cell of a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plots(results: Results, settings: pd.DataFrame) -> list[dict[str, Any]]:
    """The plots of the page, as Plotly takes them, each with a heading and a sentence."""
    metric, unit = results.metric
    labels = {"name": "", "metric": f"{metric} on test data{_in(unit)}", "hoyer": "Hoyer sparsity in evaluation"}
    known = settings.fillna(dict.fromkeys(("metric_half", "hoyer_half"), 0.0))
    plots = []
    for option, values in results.swept.items():
        rows, numeric = _named(known, [name for name in results.swept if name != option]), _is_numeric(values)
        rows = rows[rows[option].notna()]
        rows = rows.sort_values(option) if numeric else rows.assign(**{option: rows[option].map(_shown).map(_short)})
        for name in ("metric", "hoyer"):
            figure = px.line(rows, option, name, error_y=f"{name}_half", markers=True, labels=labels, **_LOOK)
            figure.update_xaxes(type=None if numeric else "category")
            plots.append(_plot(f"Against {option}", f"{labels[name]}, means over seeds with 95% intervals.", figure))
    families = [name for name, values in results.swept.items() if not _is_numeric(values)]
    rows = _named(known, families).assign(setting=_names(known, list(results.swept)))
    errors = {"error_x": "hoyer_half", "error_y": "metric_half"}
    figure = px.scatter(rows, "hoyer", "metric", **errors, hover_name="setting", labels=labels, **_LOOK)
    front = settings[pareto(settings)].sort_values("hoyer")
    look = {"mode": "lines", "name": "Pareto front", "line_color": "#999999", "hoverinfo": "skip"}
    figure.add_scatter(x=front["hoyer"], y=front["metric"], **look)
    text = "A point a setting; lower and further right is better. On the line are those that no other beats in both."
    plots.append(_plot("Metric against sparsity", text, figure))
    layers = {
        run: [(module, measures.get("hoyer")) for module, measures in of_run.items()]
        for run, of_run in results.layers.items()
    }
    curves = {run: [(line["epoch"], line["metric"]) for line in curve] for run, curve in results.curves.items()}
    if any(len(of_run) > 1 for of_run in layers.values()):  # the sparsity of a single one is in every other plot
        figure = px.line(_means(results, settings, layers), "x", "y", markers=True, labels={"x": "where"}, **_LOOK)
        figure.update_layout(xaxis_type="category", yaxis_title=labels["hoyer"])
        plots.append(_plot("Layer by layer", "Of what the next layer reads, means over seeds.", figure))
    figure = px.line(_means(results, settings, curves), "x", "y", labels={"x": "epoch"}, **_LOOK)
    figure.update_layout(yaxis_title=labels["metric"].replace("test", "validation"))
    plots.append(_plot("Training", "After every epoch, means over the seeds that got so far.", figure))
    return [plot for plot in plots if plot["traces"]]


def _plot(heading: str, text: str, figure: Any) -> dict[str, Any]:
    figure.update_layout(showlegend=len(figure.data) > 1, legend_title=None)
    drawn = json.loads(figure.to_json())
    return {"heading": heading, "text": text, "traces": drawn["data"], "layout": drawn["layout"]}


def _means(
    results: Results, settings: pd.DataFrame, of_runs: Mapping[str, Iterable[tuple[Hashable, float | None]]]
) -> pd.DataFrame:
    """At every x of the runs of a setting, the mean over those that have a value there."""
    named = _named(settings.head(SHOWN), list(results.swept)).to_dict("records")
    points = [(row["name"], x, y) for row in named for run in row["runs"] for x, y in of_runs[run] if y is not None]
    frame = pd.DataFrame(points, columns=["name", "x", "y"])
    return frame.groupby(["name", "x"], sort=False, as_index=False).mean()


def _named(settings: pd.DataFrame, options: Sequence[str]) -> pd.DataFrame:
    """The settings with a name by these options, of no more names than a plot shows."""
    named = settings.assign(name=_names(settings, options))
    return named[named["name"].isin(named["name"].unique()[:SHOWN])]


def _names(settings: pd.DataFrame, options: Sequence[str]) -> list[str]:
    """Names for a plot, escaped since Plotly reads a few tags; short, as its legend is, unless two would be alike."""
    names = []
    for row in settings.to_dict("records"):
        given = [(name, row[name]) for name in options if row[name] is not None and row[name] == row[name]]
        values = [_shown(value) if name == "method" else f"{name} = {_shown(value)}" for name, value in given]
        names.append(", ".join(values) or (f"no {', '.join(options)}" if options else "all settings"))
    short = list(map(_short, names))
    return short if len(set(short)) == len(set(names)) else [html.escape(name, quote=False) for name in names]


def _short(text: str) -> str:
    return html.escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}…{text[-8:]}", quote=False)


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)
