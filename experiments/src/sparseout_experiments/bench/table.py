"""The rows as tables: Markdown for a page, and a short one for a terminal of 80 columns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from sparseout_experiments.bench.cases import BUSY, count, size
from sparseout_experiments.bench.measure import Row
from sparseout_experiments.bench.store import Record

_PHASES = ("forward", "backward", "both")
_BASELINES = {"operation": "F.dropout", "model": "the step with nn.Dropout"}

HOW_TO_READ = """\
Figures are multiples of what torch's own Dropout takes: **1 is as fast as Dropout, 2 takes twice as long**; the time \
itself is beside them in brackets. In every round each implementation runs once, in a new order; a figure is the \
median over rounds of the ratio within the round, and square brackets, where there are any, hold its quantiles at 10 \
and 90%. M is 2^20 elements, p = 0.5, \
and an empty cell was not measured. "Plain formula" is x + sign(x)|x|^(q/2) xi in plain torch at q = 1.5; "published \
formula" restates the operations of the code published with the paper, at q = 1.5; rows of Sparseout say q, and have \
the default scale and gradient unless they name others ("exact" is the gradient's, "as tensor" q's)."""

_DETAIL = """\
"Of copy speed" is the least time an implementation could take, moving each operand once at the speed at which \
`tensor.copy_` copies the same tensor to one that exists, over the time it took: forward 2 streams of the input's \
size, backward 3, both 5. Memory is in bytes for one element of the input: the peak of a forward and backward above \
what was held before, results included; and what is kept from forward to backward. "+ input" means that the \
input is kept too, for which something else may have a use anyway."""

_NO_CUDA = """\
**Rows from a GPU are missing**: no CUDA device was at hand. On a machine with one, this adds them: \
`sparseout bench --device cuda --out {folder}`."""

_CACHES = {
    "cpu": "Times are wall-clock, with caches warm. The column of 64 elements is what any call costs at least.",
    "cuda": """\
Times are the device's, by CUDA events, with caches emptied before every sample and the host queueing ahead; those of \
64 elements under "host" are wall-clock, what any call costs the host at least. Steps of models are wall-clock.""",
}


def page(records: Sequence[Record], folder: str) -> str:
    """The page with a section for every device."""
    parts = ["# What Sparseout costs", HOW_TO_READ]
    if not any(record.environment["device"]["type"] == "cuda" for record in records):
        parts.append(_NO_CUDA.format(folder=folder))
    for record in records:
        parts += _device(record)
    return "\n\n".join(parts) + "\n"


def _device(record: Record) -> Iterator[str]:
    here, rows = record.environment, record.rows
    dates = sorted({row["date"] for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    backend = here["backend"]
    yield f"## {here['device']['name']}" + (" (quick run)" if record.quick else "")
    yield (
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with {versions}. Sparseout's code "
        f"{here['source']}, backend {backend['name']}" + (f" ({backend['reason']})." if backend["reason"] else ".")
    )
    if record.missing:
        yield f"Interrupted: {count(len(record.missing), 'case')} of {len(record.planned)} not measured yet."
    yield f"![Time of each implementation as a multiple of Dropout's]({record.slug}.png)"
    yield "Time of each implementation as a multiple of Dropout's. Drawn by `sparseout bench --render`."
    for dtype, group in vectors(rows).items():
        yield f"### The operation, {dtype}: forward and backward together"
        yield _grid(group, operation_column, "both")
    for dtype, group in vectors(rows, busy=True).items():
        yield f"### The operation, {dtype}, on a busy machine: forward and backward together"
        yield "For each core another process was running that does nothing but use one."
        yield _grid(group, operation_column, "both")
    largest = [max(group, key=_extent)["case"] for group in vectors(rows).values()]
    details = [table for case in largest for table in _detail([row for row in rows if row["case"] == case])]
    yield from [*details, _DETAIL] if details else []
    layouts = [row for row in rows if row["section"] == "operation" and row["layout"] != "vector"]
    if layouts:
        yield "### Channel masks and layouts"
        yield _markdown(
            ("", *_PHASES),
            (
                [f"{row['implementation']}, {row['layout']}", *(_cell(row, phase, True) for phase in _PHASES)]
                for row in layouts
                if "failed" not in row
            ),
        )
        yield _sizes(layouts)
    models = [row for row in rows if row["section"] == "model"]
    if models:
        yield "### A training step"
        yield _grid(models, model_column, "step", memory=True)
        yield (
            "Forward, loss, backward and a step of SGD, against the same step with nn.Dropout; then the peak of memory "
            "above what was held before the step. Wide residual networks take images of 32 x 32 in channels_last, "
            "LSTM models have a vocabulary of 10,000 words; "
            + ("they are small so that a processor can run them." if here["device"]["type"] == "cpu" else "")
            + ("the former run in bf16 autocast." if here["device"]["type"] == "cuda" else "")
        )
    layers = [row for row in rows if row["section"] == "alternatives"]
    if layers:
        yield "### The alternatives, beside one linear layer"
        yield _grid(layers, layer_column, "step", memory=True)
        yield (
            f"ReLU, the method, and a linear layer of so many inputs and outputs on {layers[0]['batch']} rows, fp32"
            + (f", {count(layers[0]['threads'], 'thread')}" if layers[0]["threads"] else "")
            + ": forward and backward to the input and the weights, against the same with nn.Dropout; then the peak of "
            "memory above what was held before. Bridgeout (q = 1.5) and Shakeout act on the weights of the layer; "
            "Bridgeout draws its noise for every row or once a batch."
        )
    yield "\n".join(f"- {note}" for note in [_CACHES[here["device"]["type"]], *_failures(rows)])


def vectors(rows: Iterable[Row], busy: bool = False) -> dict[str, list[Row]]:
    """Rows of the operation on vectors, by dtype, with other processes using the cores or without."""
    by_dtype: dict[str, list[Row]] = {}
    for row in rows:
        if row["section"] == "operation" and row["layout"] == "vector" and row.get("busy", False) == busy:
            by_dtype.setdefault(row["dtype"], []).append(row)
    return by_dtype


def operation_column(row: Row) -> str:
    """The heading of a column."""
    if row["threads"]:
        return f"{size(row['elements'])}, {count(row['threads'], 'thread')}"
    return size(row["elements"]) + (", host" if row["clock"] == "wall" else "")


def model_column(row: Row) -> str:
    """The heading of a column."""
    return f"{row['model']}, {row['mode']}" + (BUSY if row.get("busy") else "")


def layer_column(row: Row) -> str:
    """The heading of a column."""
    return f"{row['width']} x {row['width']}"


def _extent(row: Row) -> tuple[int, int]:
    return row["elements"], row["threads"] or 0


def _sizes(rows: Sequence[Row]) -> str:
    first = rows[0]
    threads = f", {count(first['threads'], 'thread')}" if first["threads"] else ""
    return (
        f"Each against F.dropout or F.dropout2d on the same input: {first['dtype']}{threads}, and "
        f"{size(first['elements'])} elements where no shape is given."
    )


def _grid(rows: Sequence[Row], column: Any, phase: str, memory: bool = False) -> str:
    """Implementations down, cases across."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    cells = {(row["implementation"], column(row)): _cell(row, phase, memory) + _peak(row, memory) for row in rows}
    implementations = dict.fromkeys(row["implementation"] for row in rows)
    return _markdown(
        ("", *columns),
        (
            [implementation, *(cells.get((implementation, name), "") for name in columns)]
            for implementation in implementations
        ),
    )


def _detail(rows: Sequence[Row]) -> Iterator[str]:
    measured = [row for row in rows if "failed" not in row]
    if not measured or "of_copy_bandwidth" not in measured[0]:
        return
    first = measured[0]
    yield f"### The operation in detail: {first['dtype']}, {operation_column(first)}"
    each = first["input_bytes"] // first["elements"]
    yield f"The input has {each} bytes an element; copying it ran at {first['copy_bytes_per_second'] / 1e9:.0f} GB/s."
    headings = ("", *_PHASES, "of copy speed, in the same order", "peak bytes", "kept bytes")
    yield _markdown(
        headings,
        (
            [
                row["implementation"],
                *(_cell(row, phase, True) for phase in _PHASES),
                " ".join(f"{row['of_copy_bandwidth'][phase]:.0%}" for phase in _PHASES),
                _per_element(row["peak_bytes"], row),
                _per_element(row["kept_bytes"], row) + (" + input" if row["kept_input_bytes"] else ""),
            ]
            for row in measured
        ),
    )


def _failures(rows: Sequence[Row]) -> list[str]:
    failures: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "failed" in row:
            failures.setdefault((row["implementation"], row["failed"]), []).append(row["case"])
    return [
        f"{implementation} failed in {'; '.join(cases)}: {reason}"
        for (implementation, reason), cases in failures.items()
    ]


def _cell(row: Row, phase: str, spread: bool) -> str:
    if "failed" in row:
        return "failed"
    time = f"({duration(row['seconds'][phase]['median'])})"
    if row["ratio"] is None:
        return time
    ratio = row["ratio"][phase]
    limits = f" [{number(ratio['low'])}-{number(ratio['high'])}]" if spread and ratio["high"] > ratio["low"] else ""
    return f"**{number(ratio['median'])}**{limits} {time}"


def _peak(row: Row, wanted: bool) -> str:
    peak = row.get("peak_bytes") if wanted else None
    return "" if peak is None else f" {peak / 1e6:,.0f} MB"


def _per_element(value: int | None, row: Row) -> str:
    return "?" if value is None else f"{round(value / row['elements'], 2):g}"


def number(ratio: float) -> str:
    """Three figures, or two below 1: no more are sure."""
    return f"{ratio:.0f}" if ratio >= 99.95 else f"{ratio:.1f}" if ratio >= 9.995 else f"{ratio:.2f}"


def duration(seconds: float) -> str:
    """Three figures and no power of ten."""
    value, unit = (1e3 * seconds, "ms") if seconds >= 1e-4 else (1e6 * seconds, "µs")
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f} {unit}"


def _markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *lines])


def terminal(record: Record) -> Iterator[Table]:
    """Ratios alone: a table for every dtype and one for the models."""
    groups: dict[str, tuple[list[Row], Any, str]] = {
        f"{dtype}: time over F.dropout's": (rows, operation_column, "both")
        for dtype, rows in vectors(record.rows).items()
    }
    for dtype, busy_rows in vectors(record.rows, busy=True).items():
        groups[f"{dtype}, busy: time over F.dropout's"] = (busy_rows, operation_column, "both")
    models = [row for row in record.rows if row["section"] == "model"]
    if models:
        groups["A training step: time over nn.Dropout's"] = (
            models,
            lambda row: f"{row['model'].split(',')[0]}, {row['mode']}" + (BUSY if row.get("busy") else ""),
            "step",
        )
    layers = [row for row in record.rows if row["section"] == "alternatives"]
    if layers:
        groups["A linear layer: time over that with nn.Dropout"] = (layers, layer_column, "step")
    for title, (rows, column, phase) in groups.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        columns = list(dict.fromkeys(column(row) for row in rows))
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", vertical="bottom")
        ratios: Mapping[tuple[str, str], str] = {
            (row["implementation"], column(row)): number(row["ratio"][phase]["median"]) if row.get("ratio") else "-"
            for row in rows
        }
        for implementation in dict.fromkeys(row["implementation"] for row in rows):
            table.add_row(implementation, *(ratios.get((implementation, name), "") for name in columns))
        yield table
