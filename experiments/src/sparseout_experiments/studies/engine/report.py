"""The page of a run, of a sweep or of several: one HTML file that needs nothing else, and what goes with it."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.frame import Results, mean, plain, save
from sparseout_experiments.studies.engine.style import COLOURS, CYCLE, DARK
from sparseout_experiments.training import atomic_files, run_folder

SHOWN = 24  # settings that one plot shows
LONGEST = 40  # characters of a name in a plot
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html``, what it is made from, a CSV and a LaTeX table; return their paths."""
    atomic_files.prepare(folder)
    settings = results.settings()
    paths = [folder / name for name in ("report.html", "report.json", "sweep.csv", "table.tex")]
    atomic_files.write(paths[0], page(results, settings))
    save(results, paths[1])
    atomic_files.write(paths[2], results.frame.to_csv(index=False))
    atomic_files.write(paths[3], latex(results, settings))
    return paths


def page(results: Results, settings: pd.DataFrame | None = None) -> str:
    """The page as HTML."""
    from plotly.offline import get_plotlyjs

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
        plots=run_folder.plain(_plots(results, settings)),
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


def _families(results: Results, settings: pd.DataFrame, without: str | None = None) -> list[tuple[str, pd.DataFrame]]:
    """The settings by the options that are no numbers, or, for a plot against one option, by all others."""
    names = [name for name in results.swept if name != without]
    if without is None:
        names = [name for name in names if not _is_numeric(results.swept[name])]
    if not names:
        return [(results.task, settings)]
    groups = settings.groupby(names, dropna=False, sort=False)
    return [(_label(names, key), group) for key, group in list(groups)[:SHOWN]]


def _label(names: Sequence[str], key: Any) -> str:
    values = key if isinstance(key, tuple) else (key,)
    pairs = [(n, v) for n, v in zip(names, values, strict=True) if v == v and v is not None]
    text = ", ".join(_shown(v) if n == "method" else f"{n} = {_shown(v)}" for n, v in pairs)
    return _short(text or f"no {', '.join(names)}")


def _short(text: str) -> str:
    """A name in a plot: Plotly reads a few tags, and draws a legend as wide as its longest text."""
    return html.escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}…{text[-8:]}", quote=False)


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)


def _plots(results: Results, settings: pd.DataFrame) -> list[dict[str, Any]]:
    """The plots of the page, as Plotly takes them, each with a heading and a sentence."""
    metric, unit = results.metric
    label = f"{metric} on test data{_in(unit)}"
    layers = {
        run: {module: measures.get("hoyer") for module, measures in of_run.items()}
        for run, of_run in results.layers.items()
    }
    curves = {run: {line["epoch"]: line["metric"] for line in curve} for run, curve in results.curves.items()}
    modules = list(dict.fromkeys(module for of_run in layers.values() for module in of_run))
    epochs = sorted({epoch for of_run in curves.values() for epoch in of_run})
    plots = [_option_plot(results, settings, option, label) for option in results.swept]
    plots.append(_front_plot(results, settings, label))
    if len(modules) > 1:  # the sparsity of a single one is in every other plot
        text = "Hoyer sparsity in evaluation of what the next layer reads, means over seeds."
        traces = _means(results, settings, layers, modules, "lines+markers")
        plots.append(_plot("Layer by layer", text, traces, "where", "Hoyer sparsity", categories=True))
    text = "On validation data after every epoch, means over the seeds that got so far."
    traces = _means(results, settings, curves, epochs, "lines")
    plots.append(_plot("Training", text, traces, "epoch", label.replace("test", "validation")))
    return [plot for plot in plots if plot["traces"]]


def _plot(
    heading: str, text: str, traces: list[dict[str, Any]], x: str, y: str, categories: bool = False
) -> dict[str, Any]:
    layout: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    if categories:
        layout["xaxis"]["type"] = "category"
    return {"heading": heading, "text": text, "traces": traces, "layout": layout, "wide": False}


def _option_plot(results: Results, settings: pd.DataFrame, option: str, label: str) -> dict[str, Any]:
    """Metric and sparsity side by side against one option, a line for each setting of the others."""
    families, traces = _families(results, settings, option), []
    numeric = _is_numeric(results.swept[option])
    for column, axis in (("metric", ""), ("hoyer", "2")):
        for index, (name, group) in enumerate(families):
            rows = group[group[option].notna()]
            if rows.empty:
                continue
            rows = rows.sort_values(option) if numeric else rows
            traces.append(
                _trace(index, name, rows[option] if numeric else rows[option].map(_shown).map(_short), rows[column])
                | {"error_y": _error(rows[f"{column}_half"]), "xaxis": f"x{axis}", "yaxis": f"y{axis}"}
                | {"showlegend": not axis and len(families) > 1, "legendgroup": name}
            )
    text = "Means over seeds with 95% intervals: the metric (left) and the sparsity (right)."
    plot = _plot(f"Against {option}", text, traces, option, label)
    plot["layout"] |= {
        "grid": {"rows": 1, "columns": 2, "pattern": "independent"},
        "xaxis2": {"title": {"text": option}},
        "yaxis2": {"title": {"text": "Hoyer sparsity"}},
    }
    return plot | {"wide": True}


def _front_plot(results: Results, settings: pd.DataFrame, label: str) -> dict[str, Any]:
    """Metric against sparsity, a point a setting."""
    front = settings[pareto(settings)].sort_values("hoyer")
    traces = [
        {"x": list(front["hoyer"]), "y": list(front["metric"]), "mode": "lines", "name": "Pareto front"}
        | {"line": {"color": "#999999", "width": 1.5}, "hoverinfo": "skip"}
    ]
    for index, (name, group) in enumerate(_families(results, settings)):
        names = [_label(list(results.swept), tuple(row[n] for n in results.swept)) for row in group.to_dict("records")]
        traces.append(
            _trace(index, name, group["hoyer"], group["metric"])
            | {"error_x": _error(group["hoyer_half"]), "error_y": _error(group["metric_half"])}
            | {"mode": "markers", "text": names, "hovertemplate": "%{text}<br>Hoyer %{x:.3f}, %{y:.4g}<extra></extra>"}
        )
    text = "A point a setting; lower and further right is better. On the line are those that no other beats in both."
    return _plot("Metric against sparsity", text, traces, "Hoyer sparsity in evaluation", label)


def _trace(index: int, name: str, x: Any, y: Any) -> dict[str, Any]:
    colour, dash = CYCLE[index % len(CYCLE)], ("solid", "dash", "dot")[index // len(CYCLE) % 3]
    marker = {"color": colour, "symbol": _MARKERS[index % len(_MARKERS)], "size": 8}
    line = {"color": colour, "dash": dash}
    return {"x": list(x), "y": list(y), "name": name, "mode": "lines+markers", "marker": marker, "line": line}


def _error(half: pd.Series) -> dict[str, Any]:
    return {"type": "data", "array": list(half.fillna(0)), "thickness": 1}


def _means(
    results: Results,
    settings: pd.DataFrame,
    of_runs: Mapping[str, Mapping[Any, float | None]],
    xs: list[Any],
    mode: str,
) -> list[dict[str, Any]]:
    """A line for each setting: at every x the mean over its runs that have a value there."""
    names, traces = list(results.swept), []
    for index, row in enumerate(settings.head(SHOWN).to_dict("records")):
        runs = [of_runs[run] for run in row["runs"]]
        means = {x: mean([run.get(x) for run in runs]) for x in xs if any(x in run for run in runs)}
        if any(value is not None for value in means.values()):
            label = _label(names, tuple(row[name] for name in names))
            traces.append(_trace(index, label, means, means.values()) | {"mode": mode})
    return traces
