"""Rewrites the tables of cost in README.md and docs/comparison.md, from the rows in benchmarks/results.

    sparseout bench --device cpu --out benchmarks/results   # measures for ten minutes, writes rows, page and plot
    python tools/benchmark_tables.py                        # README.md and docs/comparison.md

Where there are files of several processors, the one measured last counts.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sparseout_experiments.bench import page
from sparseout_experiments.bench.measure import Row
from sparseout_experiments.bench.page import number
from sparseout_experiments.bench.store import Record

ROOT = Path(__file__).resolve().parents[1]
M = 2**20
COLUMNS = {  # of README's table: elements, threads, busy
    "64 elements": (64, 1, False),
    "16,384": (2**14, 1, False),
    "1M": (M, 1, False),
    "10M": (10 * M, 1, False),
    "1M, 2 threads": (M, 2, False),
    "10M, 2 threads": (10 * M, 2, False),
    "1M, 2 threads, busy": (M, 2, True),
}
IMPLEMENTATIONS = (
    "F.dropout",
    "Sparseout q=1.5",
    "Sparseout q=1.3",
    "Sparseout q=1.5 matched",
    "Sparseout q=1.5 exact",
    "published formula",
    "plain formula, compiled",
)
STEPS = {  # of the table in docs/comparison.md
    "linear 64": "Linear 64 x 64, batch 64",
    "linear 256": "Linear 256 x 256, batch 64",
    "linear 1024": "Linear 1024 x 1024, batch 64",
    "Wide-ResNet": "WRN-16-2, batch 16, eager",
}
METHODS = (
    "nn.Dropout",
    "no dropout",
    "Sparseout q=1.5",
    "Gaussian dropout",
    "L1 penalty",
    "k-winners, a tenth",
    "Shakeout",
    "Bridgeout, per batch",
    "Bridgeout, per example",
)


def newest() -> Record:
    """The rows of a CPU that were measured last."""
    records = [
        record
        for record in page.read(ROOT / "benchmarks/results")
        if record.environment["device"]["type"] == "cpu" and not record.quick
    ]
    return max(records, key=lambda record: max(row["date"] for row in record.rows))


def cost(record: Record) -> str:
    """The paragraph and the table of README.md."""
    cells = {
        ((row["elements"], row["threads"], row.get("busy", False)), row["implementation"]): _ratio(row, "both")
        for row in record.rows
        if row["section"] == "operation" and row["layout"] == "vector" and row["dtype"] == "fp32"
    }
    busy = "busy: while one other process per core runs at full load; "
    paragraph = (
        "Forward and backward of fp32, as multiples of `F.dropout`'s time in the same run (M is 2^20 elements; one "
        f"thread unless said; {busy}{record.environment['device']['name']}); `make bench` measures yours:"
    )
    lines = ([name, *(cells.get((key, name), "") for key in COLUMNS.values())] for name in IMPLEMENTATIONS)
    return f"{textwrap.fill(paragraph, 120)}\n\n{_table(COLUMNS, lines)}\n\n"


def alternatives(record: Record) -> str:
    """The table of docs/comparison.md."""
    rows = {(row["case"], row["implementation"]): row for row in record.rows}

    def line(name: str) -> list[str]:
        linear = [_ratio(rows[case, name], "step") for case in list(STEPS.values())[:3]]
        memory = f"{rows[STEPS['linear 1024'], name]['peak_bytes'] / 1e6:.0f}"
        return [name, *linear, memory, _ratio(rows[STEPS["Wide-ResNet"], name], "step")]

    headings = ["linear 64", "linear 256", "linear 1024", "its memory, MB", "Wide-ResNet"]
    return _table(headings, map(line, METHODS)) + "\n\n"


def _ratio(row: Row, phase: str) -> str:
    ratio = row["ratio"][phase]["median"]
    return f"{ratio:.0f}" if ratio >= 10 else number(ratio)


def _table(headings: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    headings = ["", *headings]
    rule = "|---|" + "--:|" * (len(headings) - 1)
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join(["| " + " | ".join(headings)[1:] + " |", rule, *text])


def rewrite(path: Path, start: str, end: str, text: str) -> None:
    """Replace what lies between two pieces of text in a file."""
    old = path.read_text(encoding="utf-8")
    begin = old.index(start) + len(start)
    path.write_text(old[:begin] + text + old[old.index(end, begin) :], encoding="utf-8")


TABLES: list[tuple[str, str, str, Callable[[Record], str]]] = [
    ("README.md", "## What it costs\n\n", '"Matched" is a `scale`', cost),
    ("docs/comparison.md", "and peak memory at width 1024:\n\n", "In these steps Sparseout takes", alternatives),
]


def main() -> None:
    """Rewrite both files."""
    record = newest()
    device, backend = record.environment["device"]["name"], record.environment["backend"]["name"]
    for name, start, end, write in TABLES:
        rewrite(ROOT / name, start, end, write(record))
        print(f"{name}: rows of {device}, backend {backend}")


if __name__ == "__main__":
    main()
