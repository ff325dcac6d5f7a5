"""The command `bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sparseout_experiments.commands.common import FAILED, INTERRUPTED, counting, fail, reading, wrote
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Folder
from sparseout_experiments.training import atomic_files

if TYPE_CHECKING:
    from sparseout_experiments.bench.cases import Case
    from sparseout_experiments.bench.store import Record


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    device: Annotated[
        Any, typer.Option(**reading(Literal["cpu", "cuda"]), help="Where. [default: a GPU where there is one]")
    ] = None,
    only: Annotated[
        Any, typer.Option(**reading(Literal["operation", "model", "alternatives"]), help="Measure one part.")
    ] = None,
    render: Annotated[bool, typer.Option("--render", help="Measure nothing: page and pictures from the rows.")] = False,
    out: Annotated[Path, typer.Option(**reading(Folder), help="Where rows, page and pictures go.")] = Path("bench"),
) -> None:
    """Measure time and memory of Sparseout, of what does the same, and of whole models, against Dropout.

    On two processor cores it takes some ten minutes, or one with --quick. Writes the rows as JSON under the device's
    name after every case, and at the end bench.md with those of every device in the folder, and a picture of each.
    Cases that the file has are not measured again: a run that was interrupted goes on when it is started again.
    """
    import torch

    from sparseout_experiments.bench import cases, page, store

    folder, console = out, Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        fail(expected("--device", "cpu, since torch finds no CUDA device", repr(device)))
    if render and not any(folder.glob("*.json")):
        fail(expected("--out", "a folder with rows of sparseout bench", repr(str(out))))
    try:
        with atomic_files.prepared(folder):
            if render:
                wrote(console, page.write(folder))
                return
            todo = cases.cases(device, quick, only or "")
            page.read(folder)  # what cannot be read is to be known before the work, not after it
            try:
                environment = store.environment(device, quick)
            except (ValueError, RuntimeError) as error:  # of sparseout.backend, about SPARSEOUT_BACKEND
                fail(str(error))
            record = store.begun(folder, environment)
            _measure(record, todo, folder)
            written = page.write(folder)
    except OSError as error:
        fail(expected("--out", "a folder that can be written", f"{str(out)!r} ({error.strerror})"))
    except store.NotRows as error:
        fail(str(error), FAILED)
    page.show(console, record)
    wrote(console, [record.path(folder), *written])


def _measure(record: "Record", todo: "Sequence[Case]", folder: Path) -> None:
    """Measure under a progress bar; an interrupt keeps what is finished."""
    from sparseout_experiments.bench import store

    def done() -> int:
        return sum(case.key in record.cases for case in todo)

    try:
        with counting("case", len(todo), done()) as show:

            def on_run(case: "Case", implementation: str, share: float) -> None:
                show(done(), share, f"{case.key}: {implementation}")

            store.run(record, todo, folder, on_run)
    except KeyboardInterrupt:
        fail(f"interrupted: {done()} of {len(todo)} cases were finished; the same command goes on", INTERRUPTED)
