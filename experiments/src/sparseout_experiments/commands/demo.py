"""The command `demo`."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import Field
from rich.console import Console

from sparseout_experiments.cli import importing
from sparseout_experiments.commands.common import FAILED, INTERRUPTED, fail, progress_bar, reading
from sparseout_experiments.demo import EPOCHS, Gradient, Options, Run, Scale, Setting, earlier, plan
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, Folder, Positive, Probability, Wanted, reader
from sparseout_experiments.training import atomic_files

_Exponent = Annotated[
    float, Field(ge=0, allow_inf_nan=False), Wanted("finite numbers >= 0, separated by commas", "LIST")
]
_Scales = Annotated[
    Literal["paper", "matched", "both"] | Positive,
    Wanted("paper, matched, both or a finite number > 0", "paper|matched|both|NUMBER"),
]


def _exponents(text: str) -> list[float]:
    return [reader(_Exponent)(part.strip()) for part in text.split(",")]


def demo(
    q: Annotated[
        list[Any] | None,
        typer.Option(**reading(_Exponent, _exponents), help="Exponents. [default: 1,1.5,2,2.5,3]"),
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
    epochs: Annotated[int, typer.Option(**reading(Count), help="Epochs a run.")] = EPOCHS,
) -> None:
    """Turn the dial: train autoencoders on handwritten digits at several q and report how sparse they become.

    Takes about a minute and needs no download. Writes report.html, results.json and demo.png.
    """
    scales: tuple[Scale, ...] = Options.scales if scale == "both" else (scale,)
    exponents = tuple(sorted({exponent for several in q for exponent in several})) if q else Options.q
    options = Options(q=exponents, p=p, seeds=seeds, gradient=gradient, scales=scales, epochs=epochs)
    try:
        try:
            before, whole = earlier(out)
        except ValueError as error:
            fail(str(error))
        with atomic_files.prepared(out):
            _run(options, out, before, whole)
    except OSError as error:
        fail(expected("--out", "a folder that can be written", f"{str(out)!r} ({error.strerror})"))


def _run(options: Options, folder: Path, before: int, whole: bool) -> None:
    total, started = len(plan(options)), time.perf_counter()
    runs = _watch(options, total)
    finished = f"{len(runs)} of {total} runs were finished"
    if not runs or (len(runs) < total and (whole or len(runs) < before)):
        stays = f"; the report in {folder}, of {before} runs, stays" if runs else ", and nothing was written"
        fail(f"interrupted: {finished}{stays}", INTERRUPTED)

    from sparseout_experiments.demo import payoff, report  # matplotlib takes a second to import

    try:
        worth = payoff.measure(runs)
        written = report.write(folder, options, runs, time.perf_counter() - started, worth)
    except OSError as error:
        fail(f"the report could not be written to {folder} ({error.strerror})", FAILED)
    except KeyboardInterrupt:
        fail("interrupted while the report was being written", INTERRUPTED)
    report.show(Console(), options, runs, written, worth)
    if len(runs) < total:
        fail(f"interrupted: {finished}, and they are what the report shows", INTERRUPTED)


def _watch(options: Options, total: int) -> list[Run]:
    """Run everything under a progress bar; an interrupt keeps what is finished."""
    with importing():
        from sparseout_experiments.demo.training import run_all

    runs: list[Run] = []
    progress = progress_bar()
    try:
        with progress:
            task = progress.add_task("", total=total, count=f"run 1/{total}", now="reading the digits")
            last = ""

            def on_progress(setting: Setting, seed: int, done: float) -> None:
                progress.update(task, completed=len(runs) + done, now=f"{setting}, seed {seed}{last}")

            for run in run_all(options, on_progress):
                runs.append(run)
                last = f", last Hoyer {run.hoyer:.2f}"
                progress.update(task, count=f"run {min(len(runs) + 1, total)}/{total}")
    except KeyboardInterrupt:
        pass
    return runs
