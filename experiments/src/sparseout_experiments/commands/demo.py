"""The command `demo`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sparseout_experiments.cli import importing
from sparseout_experiments.commands.common import (
    INTERRUPTED,
    command_line,
    counting,
    fail,
    reading,
    reading_list,
    wrote,
)
from sparseout_experiments.demo import Gradient, Options, Scale, plan, run
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, Folder, NonNegative, Positive, Probability, Requirement
from sparseout_experiments.training import atomic_files

_Scales = Annotated[
    Literal["paper", "matched", "both"] | Positive,
    Requirement("paper, matched, both or a finite number > 0", "paper|matched|both|NUMBER"),
]


_LEGEND = (
    "Means over {} seeds ± half a 95% t interval, on test digits. Live: over the units that fire for at least one of "
    "them; dead: units that fire for none."
)


def demo(
    q: Annotated[
        list[Any] | None,
        typer.Option(**reading_list(NonNegative), help="Exponents. [default: 1,1.5,2,2.5,3]"),
    ] = None,
    p: Annotated[float, typer.Option(**reading(Probability), help="Drop probability.")] = 0.5,
    seeds: Annotated[int, typer.Option(**reading(Count), help="How many seeds.")] = 3,
    gradient: Annotated[Any, typer.Option(**reading(Gradient), help="Slope of the noise.")] = "detached",
    scale: Annotated[
        Any,
        typer.Option(
            **reading(_Scales),
            help="Strength of the noise: the paper's, the power of Dropout's, or a unit of the activations.",
        ),
    ] = "both",
    out: Annotated[Path, typer.Option(**reading(Folder), help="Where the report goes.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(**reading(Count), help="Epochs a run.")] = Options.epochs,
) -> None:
    """Turn the dial: train autoencoders on handwritten digits at several q and report how sparse they become.

    Takes about a minute and needs no download. Writes demo.png, and the page and files of a sweep: `sparseout sweep
    autoencoder` has more to sweep over.
    """
    scales: tuple[Scale, ...] = Options.scales if scale == "both" else (scale,)
    exponents = tuple(sorted({exponent for several in q for exponent in several})) if q else Options.q
    options = Options(q=exponents, p=p, seeds=seeds, gradient=gradient, scales=scales, epochs=epochs)
    try:
        with atomic_files.prepared(out):
            _run(options, out)
    except OSError as error:
        fail(expected("--out", "a folder that can be written", f"{str(out)!r} ({error.strerror})"))
    except KeyboardInterrupt:
        fail("interrupted, and nothing was written", INTERRUPTED)


def _run(options: Options, folder: Path) -> None:
    with importing():
        from sparseout_experiments.demo import figures, report
        from sparseout_experiments.studies.engine import report as page

    try:
        page.check(folder, "demo.png")
    except ValueError as error:
        fail(str(error))
    with TemporaryDirectory() as work:
        jobs = plan(options, Path(work))
        with counting("run", len(jobs), now="reading the digits") as show:
            results = run(jobs, command_line(), lambda done, name: show(done, 0.0, name))
    rows, console = report.settings(results), Console()
    picture, written = figures.picture(rows, options.scales), page.write(results, folder)
    atomic_files.write(folder / "demo.png", picture)  # after the report, which says that it is ours
    console.print(report.table(rows))
    for text in (_LEGEND.format(options.seeds), *(report.verdict(results, scale) for scale in options.scales)):
        console.print(text + "\n" * bool(text), highlight=False)
    wrote(console, [folder / "demo.png", *written])
