"""Page, pictures and what the terminal shows, made from files of rows alone."""

from pathlib import Path

from rich.console import Console

from sparseout_experiments.bench import plot, store, table
from sparseout_experiments.training import atomic_files

PAGE = "bench.md"


def write(folder: Path) -> list[Path]:
    """Write the page and a picture for every file of rows in `folder`; return their paths.

    Raises NotRows where there is none, or one cannot be read.
    """
    records = [record for record in read(folder) if record.rows]
    if not records:
        raise store.NotRows(f"{folder} holds no rows of {store.KIND}")
    pictures = [folder / f"{record.slug}.png" for record in records]
    for path, record in zip(pictures, records, strict=True):
        atomic_files.write(path, plot.picture(record))
    atomic_files.write(folder / PAGE, table.page(records, str(folder)))
    return [folder / PAGE, *pictures]


def read(folder: Path) -> list[store.Record]:
    """Every file of rows in `folder`. Raises NotRows where a JSON file holds something else."""
    return [store.load(path) for path in sorted(folder.glob("*.json"))]


def show(console: Console, record: store.Record) -> None:
    """The ratios of one device."""
    for one in table.terminal(record):
        console.print(one)
