"""The report of the demonstration: numbers, a page, a picture, and the end of its output in the terminal."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sparseout_experiments.config import record, resolve
from sparseout_experiments.demo import BINS, HIGHEST, LOWEST, RESULTS, Options, ended, figures, payoff
from sparseout_experiments.demo.figures import group_name, row_name
from sparseout_experiments.demo.payoff import Payoff
from sparseout_experiments.demo.summary import Row, caveats, notes, scale_name, summarise, verdict
from sparseout_experiments.demo.training import Look, digits, mean_error
from sparseout_experiments.studies.engine import frame, pages
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.training import atomic_files
from sparseout_experiments.training.environment import environment

# Measures with their heading, its unit, the digits that are shown, and what they are multiplied by.
COLUMNS = {
    "hoyer": ("Hoyer", "", 3, 1),
    "hoyer_live": ("Hoyer", "live", 3, 1),
    "gini": ("Gini", "", 3, 1),
    "dead": ("Dead", "%", 1, 100),
    "metric": ("MSE", "x1000", 2, 1),
}


def gathered(options: Options, jobs: Mapping[str, Job], looks: Mapping[str, Look], command: str) -> Results:
    """Everything a reader needs to check the claims, from the folders of the runs."""
    planned = [record(resolve(job.task, job.options)) | {"run": str(job.folder)} for job in jobs.values()]
    results = frame.read(sorted({job.folder.parent for job in jobs.values()}), planned, command)
    results.more["demo"] = {
        "verdict": verdict(results, options.scales),
        "histogram": {"of": "log10 of the non-zero activations", "from": LOWEST, "to": HIGHEST, "bins": BINS},
        "histograms": {Path(run).name: look.histogram for run, look in looks.items()},
    }
    return results


def write(
    folder: Path, options: Options, results: Results, looks: Mapping[str, Look], worth: Payoff | None = None
) -> list[Path]:
    """Write results.json, which `sparseout report` reads too, demo.png and report.html; return their paths.

    `worth` is what the last act found, if there was one.
    """
    results.more["demo"]["payoff"] = None if worth is None else worth.record()
    rows = summarise(results)
    paths = [folder / name for name in (RESULTS, "demo.png", "report.html")]
    frame.save(results, paths[0])
    atomic_files.write(paths[1], figures.picture(rows, options.scales))
    atomic_files.write(paths[2], page(options, results, looks, worth))
    return paths


class Strip(NamedTuple):
    """One row of Figure 4: a name, reconstructions and, unless they are the originals, filters."""

    name: str
    reconstructions: str
    filters: str | None


def page(options: Options, results: Results, looks: Mapping[str, Look], worth: Payoff | None = None) -> str:
    """The HTML of the report."""
    rows, blind_error = summarise(results), mean_error()
    drawn = figures.svgs(rows, options.scales, looks)
    return pages.html(
        __package__,
        "demo.html.j2",
        options=options,
        demo=results.more["demo"],
        ended=ended(results),
        planned=len(results.frame),
        units=results.common["units"],
        samples=len(digits().test),
        environment=environment("scikit-learn"),
        blind_error=blind_error,
        figures={name: Markup(svg) for name, svg in drawn.items()},  # our own drawings: not escaped
        strips=_strips(options, rows, looks),
        strips_scale=scale_name(options.scales[-1]),
        columns=COLUMNS,
        groups=[(name, list(group)) for name, group in groupby(rows, key=lambda row: group_name(row["scale"]))],
        row_name=row_name,
        cell=cell,
        payoff=payoff,
        worth=worth,
        notes=[*caveats(rows, blind_error), *notes(results, rows, options.scales, len(digits().test))],
    )


def _strips(options: Options, rows: Sequence[Row], looks: Mapping[str, Look]) -> list[Strip]:
    """Pictures of the first seed at the last of the scales, which is the matched one by default."""
    strips = [Strip("original", figures.digits(digits().test[:10]), None)]
    for row in sorted(rows, key=lambda row: row["method"]):  # "none" before "sparseout"
        look = looks.get(row["runs"][0])
        if look and (row["method"] == "none" or row["scale"] == options.scales[-1]):
            strips.append(Strip(row_name(row), figures.digits(look.reconstructions), figures.filters(look.filters)))
    return strips


def cell(row: Row, measure: str) -> tuple[str, str]:
    """A mean and half the width of its interval, as text."""
    *_, decimals, times = COLUMNS[measure]
    mean, half = (
        "-" if math.isnan(value) else f"{value * times:.{decimals}f}"
        for value in (row[measure], row[f"{measure}_half"])
    )
    return mean, half if half == "-" else f"±{half}"


def table(rows: Sequence[Row]) -> Table:
    """The numbers for a terminal of 80 columns: intervals for sparsity and error."""
    columns = (Column(f"{heading} {unit}".strip(), justify="right") for heading, unit, *_ in COLUMNS.values())
    shown = Table("", *columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name, group in groupby(rows, key=lambda row: group_name(row["scale"])):
        shown.add_section()
        shown.add_row(Text(name, style="bold"))
        for row in group:
            cells = {measure: cell(row, measure)[: 1 if measure in ("gini", "dead") else 2] for measure in COLUMNS}
            shown.add_row(f"  {row_name(row)}", *map(" ".join, cells.values()))
    return shown


def show(
    console: Console, options: Options, results: Results, written: Sequence[Path], worth: Payoff | None = None
) -> None:
    """The end of the run: table, verdict, caveats, and where to read on."""
    rows = summarise(results)
    console.print(table(rows))
    console.print(
        f"Means over {options.seeds} seeds ± half a 95% t interval, on {len(digits().test)} test digits. Live: over "
        "the units that fire for at least one of them; dead: units that fire for none.\n",
        highlight=False,
    )
    console.print(f"[bold]{results.more['demo']['verdict']}[/bold]\n", highlight=False)
    for sentence in caveats(rows, mean_error()):
        console.print(sentence + "\n", highlight=False, markup=False)
    if worth is not None:
        console.print(payoff.terminal(worth))
        console.print(payoff.sentence(worth) + "\n", highlight=False, markup=False)
    console.print("Wrote " + ", ".join(map(str, written)), highlight=False, markup=False, soft_wrap=True)
