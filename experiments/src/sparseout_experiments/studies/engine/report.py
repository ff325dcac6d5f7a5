"""The page of a run, of a sweep or of several: one HTML file that needs nothing else, and what goes with it."""

import html
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.frame import Results, mean, save
from sparseout_experiments.studies.engine.style import CYCLE, image, style
from sparseout_experiments.training import atomic_files

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
SHOWN = 24  # settings that one plot shows
LONGEST = 40  # characters of a name in a plot
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "star": "*", "cross": "P"}


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html``, what it is made from, a CSV, a LaTeX table and the figures; return their paths."""
    atomic_files.prepare(folder)
    settings = results.settings()
    paths = [folder / name for name in ("report.html", "report.json", "sweep.csv", "table.tex")]
    atomic_files.write(paths[0], page(results, settings))
    save(results, paths[1])
    atomic_files.write(paths[2], results.frame.to_csv(index=False))
    atomic_files.write(paths[3], latex(results, settings))
    if settings["metric"].notna().any():
        with style(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # it draws a box
            figure = draw(results, settings)
            for suffix in ("svg", "png"):
                paths.append(folder / f"sparsity.{suffix}")
                atomic_files.write(paths[-1], image(figure, suffix, dpi=200))
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
        rows=frame.astype(object).where(frame.notna(), None).to_dict("records"),
        settings=settings.astype(object).where(settings.notna(), None).to_dict("records"),
        plots=_plots(results, settings),
        csv=frame.to_csv(index=False),
        plotly=get_plotlyjs(),
        shown=_shown,
        dumps=_dumps,
    )


def pareto(settings: pd.DataFrame) -> pd.Series:
    """Whether no other setting has both a lower metric and a higher Hoyer, or one of them and the other equal."""
    known = settings["metric"].notna() & settings["hoyer"].notna()
    points = settings[known]

    def beaten(row: Any) -> bool:
        better = (points["metric"] <= row["metric"]) & (points["hoyer"] >= row["hoyer"])
        return bool((better & ((points["metric"] < row["metric"]) | (points["hoyer"] > row["hoyer"]))).any())

    return known & ~settings.apply(beaten, axis=1)


def draw(results: Results, settings: pd.DataFrame) -> Figure:
    """Metric against sparsity, a point a setting."""
    metric, unit = results.metric
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    front = settings[pareto(settings)].sort_values("hoyer")
    axes.plot(front["hoyer"], front["metric"], color="0.6", linewidth=1, label="Pareto front", zorder=0)
    for index, (name, group) in enumerate(_families(results, settings)):
        style: dict[str, Any] = {
            "color": CYCLE[index % len(CYCLE)],
            "marker": _MARKERS.get(SYMBOLS[index % len(SYMBOLS)], "o"),
        }
        errors: dict[str, Any] = {"xerr": group["hoyer_half"].fillna(0), "yerr": group["metric_half"].fillna(0)}
        label = html.unescape(name).replace("$", r"\$")
        axes.errorbar(
            group["hoyer"],
            group["metric"],
            **errors,
            **style,
            linestyle="",
            capsize=2,
            label=label,
        )
    axes.set(xlabel="Hoyer sparsity in evaluation", ylabel=f"{metric} on test data{_in(unit)}")
    axes.legend(fontsize="small")
    return figure


def latex(results: Results, settings: pd.DataFrame) -> str:
    """The settings as a table of LaTeX (booktabs)."""
    metric, unit = results.metric
    heads = [*results.swept, "seeds", f"{metric}{_in(unit)}", "Hoyer", "dead"]
    lines = ["\\begin{tabular}{" + "l" * len(results.swept) + "r" * 4 + "}", "\\toprule"]
    lines += [" & ".join(map(_tex, heads)) + " \\\\", "\\midrule"]
    for row in settings.to_dict("records"):
        values = [_tex(_shown(row[name])) for name in results.swept] + [str(row["seeds"])]
        for name in ("metric", "hoyer", "dead"):
            half = row[f"{name}_half"]
            exact = f"{row[name]:.4g}" if row[name] == row[name] else "--"
            values.append(exact if math.isnan(half) else f"${exact} \\pm {half:.2g}$")
        lines.append(" & ".join(values) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in str(text))


def _in(unit: str) -> str:
    return f" ({unit.strip()})" if unit.strip() else ""


def _shown(value: Any) -> str:
    """A cell of a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _dumps(value: Any) -> str:
    """JSON that may stand in a script: no tag can end it, and what is no number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(value), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
    plots = []
    for option in results.swept:
        families = _families(results, settings, option)
        traces = []
        for column, axis in (("metric", ""), ("hoyer", "2")):
            for index, (name, group) in enumerate(families):
                rows = group[group[option].notna()]
                if rows.empty:
                    continue
                numeric = _is_numeric(results.swept[option])
                rows = rows.sort_values(option) if numeric else rows
                traces.append(
                    _trace(index, name, rows[option] if numeric else rows[option].map(_shown).map(_short), rows[column])
                    | {"error_y": _error(rows[f"{column}_half"]), "xaxis": f"x{axis}", "yaxis": f"y{axis}"}
                    | {"showlegend": not axis and len(families) > 1, "legendgroup": name, "mode": "lines+markers"}
                )
        layout = {
            "grid": {"rows": 1, "columns": 2, "pattern": "independent"},
            "xaxis": {"title": {"text": option}},
            "xaxis2": {"title": {"text": option}},
            "yaxis": {"title": {"text": label}},
            "yaxis2": {"title": {"text": "Hoyer sparsity"}},
        }
        text = "Means over seeds with 95% intervals: the metric (left) and the sparsity (right)."
        plots.append({"heading": f"Against {option}", "text": text, "traces": traces, "layout": layout, "wide": True})
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
    layout = {"xaxis": {"title": {"text": "Hoyer sparsity in evaluation"}}, "yaxis": {"title": {"text": label}}}
    text = "A point a setting; lower and further right is better. On the line are those that no other beats in both."
    plots.append(
        {"heading": "Metric against sparsity", "text": text, "traces": traces, "layout": layout, "wide": False}
    )
    return [*plots, *_layer_plot(results, settings), *_curve_plot(results, settings, label)]


def _trace(index: int, name: str, x: Any, y: Any) -> dict[str, Any]:
    dash = ("solid", "dash", "dot")[index // len(CYCLE) % 3]
    marker = {"color": CYCLE[index % len(CYCLE)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8}
    return {
        "x": list(x),
        "y": list(y),
        "name": name,
        "marker": marker,
        "line": {"color": marker["color"], "dash": dash},
    }


def _error(half: pd.Series) -> dict[str, Any]:
    return {"type": "data", "array": [0 if math.isnan(value) else value for value in half], "thickness": 1}


def _by_setting(results: Results, settings: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The settings, each by its name, with its runs."""
    names = list(results.swept)
    rows = settings.head(SHOWN).to_dict("records")
    return [(_label(names, tuple(row[name] for name in names)), row["runs"]) for row in rows]


def _layer_plot(results: Results, settings: pd.DataFrame) -> list[dict[str, Any]]:
    modules = list(dict.fromkeys(module for layers in results.layers.values() for module in layers))
    traces = []
    for index, (name, runs) in enumerate(_by_setting(results, settings)):
        means = [mean([results.layers[run].get(module, {}).get("hoyer") for run in runs]) for module in modules]
        if any(value is not None for value in means):
            traces.append(_trace(index, name, modules, means) | {"mode": "lines+markers"})
    if not traces or len(modules) < 2:  # the sparsity of a single one is in every other plot
        return []
    layout = {"xaxis": {"title": {"text": "where"}, "type": "category"}, "yaxis": {"title": {"text": "Hoyer sparsity"}}}
    text = "Hoyer sparsity in evaluation of what the next layer reads, means over seeds."
    return [{"heading": "Layer by layer", "text": text, "traces": traces, "layout": layout, "wide": False}]


def _curve_plot(results: Results, settings: pd.DataFrame, label: str) -> list[dict[str, Any]]:
    traces = []
    for index, (name, runs) in enumerate(_by_setting(results, settings)):
        curves = [results.curves[run] for run in runs if results.curves[run]]
        epochs = sorted({line["epoch"] for curve in curves for line in curve})
        means = [mean([line["metric"] for curve in curves for line in curve if line["epoch"] == e]) for e in epochs]
        if epochs:
            traces.append(_trace(index, name, epochs, means) | {"mode": "lines"})
    if not traces:
        return []
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": label.replace("test", "validation")}}}
    text = "On validation data after every epoch, means over the seeds that got so far."
    return [{"heading": "Training", "text": text, "traces": traces, "layout": layout, "wide": False}]
