"""Presentation of files of rows: a page from its template, a picture for every device, and ratios for the terminal."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from sparseout_experiments.bench import plot, store
from sparseout_experiments.bench.cases import BUSY, count, size
from sparseout_experiments.bench.measure import Row
from sparseout_experiments.bench.store import Record, grouped
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.results import shown
from sparseout_experiments.training import atomic_files

PAGE = "bench.md"
_PHASES = ("forward", "backward", "both")
_TITLES = {
    "operation": "{}: time over F.dropout's",
    "busy": "{}, busy: time over F.dropout's",
    "model": "A training step: time over nn.Dropout's",
    "alternatives": "A linear layer: time over that with nn.Dropout",
}


def write(folder: Path) -> list[Path]:
    """Write the page of all files of rows in `folder`, and a picture for each; return their paths.

    Raises NotRows where a file cannot be read.
    """
    records = read(folder)
    with shown(folder, store.KIND, store.NotRows):
        pictures = {picture_path(record, folder): plot.picture(record) for record in records}
        text = page(records, str(folder))
    for path, picture in pictures.items():
        atomic_files.write(path, picture)
    atomic_files.write(folder / PAGE, text)
    return [folder / PAGE, *pictures]


def picture_path(record: Record, folder: Path = Path()) -> Path:
    """The picture of a record, beside its rows."""
    return record.path(folder).with_suffix(".png")


def read(folder: Path) -> list[Record]:
    """Every file of rows in `folder`. Raises NotRows where a JSON file holds something else."""
    return [store.load(path) for path in sorted(folder.glob("*.json"))]


def page(records: Sequence[Record], folder: str) -> str:
    """The page with a section for every device."""
    tables = {"grouped": grouped, "overview": _overview, "detail": _detail, "layouts": _layouts, "details": _details}
    texts = {"heading": heading, "size": size, "count": count, "failures": _failures, "picture_path": picture_path}
    return pages.rendered(__package__, "page.md.j2", records=records, folder=folder, **tables, **texts)


def show(console: Console, record: Record) -> None:
    """Print the ratios alone: a table for every dtype, one for the models and one for the layers."""
    for section, title in _TITLES.items():
        for dtype, rows in grouped(record.rows)[section].items():
            table = Table(title=title.format(dtype), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            columns, *lines = _pivot(rows, _ratio, short=True)
            table.add_column("", no_wrap=True)
            for column in columns[1:]:
                table.add_column(column, justify="right", vertical="bottom")
            for line in lines:
                table.add_row(*line)
            console.print(table)


def heading(row: Row, short: bool = False) -> str:
    """The heading of the column in which a row stands."""
    if row["section"] == "alternatives":
        return f"{row['width']} x {row['width']}"
    if row["section"] == "model":
        model = row["model"].split(",")[0] if short else row["model"]
        return f"{model}, {row['mode']}{BUSY if row.get('busy') else ''}"
    if row["threads"]:
        return f"{size(row['elements'])}, {count(row['threads'], 'thread')}"
    return size(row["elements"]) + (", host" if row["clock"] == "wall" else "")


def _pivot(rows: Sequence[Row], cell: Callable[[Row], str], short: bool = False) -> list[list[str]]:
    """Lines of cells with implementations down and cases across, the headings first."""
    columns = dict.fromkeys(heading(row, short) for row in rows)
    cells = {(row["implementation"], heading(row, short)): cell(row) for row in rows}
    names = dict.fromkeys(row["implementation"] for row in rows)
    return [["", *columns], *([name, *(cells.get((name, column), "") for column in columns)] for name in names)]


def _overview(rows: Sequence[Row]) -> str:
    return _markdown(_pivot(rows, _summary))


def _summary(row: Row) -> str:
    if row["section"] == "operation":
        return _cell(row, "both", spread=False)
    peak = row.get("peak_bytes")
    return _cell(row, "step") + ("" if peak is None else f" {peak / 1e6:,.0f} MB")


def _layouts(rows: Iterable[Row]) -> str:
    lines = [
        [f"{row['implementation']}, {row['layout']}", *(_cell(row, phase) for phase in _PHASES)]
        for row in rows
        if "failed" not in row
    ]
    return _markdown([["", *_PHASES], *lines])


def _details(rows: Iterable[Row]) -> list[list[Row]]:
    """Of each dtype the rows of the largest case, where that was measured beside a copy."""
    largest = []
    for vectors in grouped(rows)["operation"].values():
        case = max(vectors, key=lambda row: (row["elements"], row["threads"] or 0))["case"]
        largest.append([row for row in vectors if row["case"] == case and "failed" not in row])
    return [measured for measured in largest if measured and "of_copy_bandwidth" in measured[0]]


def _detail(rows: Sequence[Row]) -> str:
    lines = [["", *_PHASES, "of copy speed, in the same order", "peak bytes", "kept bytes"]]
    for row in rows:
        shares = " ".join(f"{row['of_copy_bandwidth'][phase]:.0%}" for phase in _PHASES)
        kept = _per_element(row["kept_bytes"], row) + (" + input" if row["kept_input_bytes"] else "")
        cells = [_cell(row, phase) for phase in _PHASES]
        lines.append([row["implementation"], *cells, shares, _per_element(row["peak_bytes"], row), kept])
    return _markdown(lines)


def _failures(rows: Iterable[Row]) -> dict[tuple[str, str], list[str]]:
    """The cases in which an implementation failed for a reason."""
    failures: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "failed" in row:
            failures.setdefault((row["implementation"], row["failed"]), []).append(row["case"])
    return failures


def _cell(row: Row, phase: str, spread: bool = True) -> str:
    if "failed" in row:
        return "failed"
    time = f"({duration(row['seconds'][phase]['median'])})"
    if row["ratio"] is None:
        return time
    ratio = row["ratio"][phase]
    limits = f" [{number(ratio['low'])}-{number(ratio['high'])}]" if spread and ratio["high"] > ratio["low"] else ""
    return f"**{number(ratio['median'])}**{limits} {time}"


def _ratio(row: Row) -> str:
    return number(row["ratio"].get("both", row["ratio"].get("step"))["median"]) if row.get("ratio") else "-"


def _per_element(value: int | None, row: Row) -> str:
    return "?" if value is None else f"{round(value / row['elements'], 2):g}"


def number(ratio: float) -> str:
    """Three figures, or two below 1: no more are sure."""
    return f"{ratio:.0f}" if ratio >= 99.95 else f"{ratio:.1f}" if ratio >= 9.995 else f"{ratio:.2f}"


def duration(seconds: float) -> str:
    """Three figures and no power of ten."""
    value, unit = (1e3 * seconds, "ms") if seconds >= 1e-4 else (1e6 * seconds, "µs")
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f} {unit}"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    headings, *rows = lines
    rule = ["---"] + ["--:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *rows])
