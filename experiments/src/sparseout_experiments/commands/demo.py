"""The command `demo`."""

import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field
from rich.console import Console

from sparseout_experiments.cli import importing
from sparseout_experiments.commands.common import FAILED, INTERRUPTED, counting, fail, reading
from sparseout_experiments.demo import EPOCHS, Gradient, Options, Scale, earlier, plan
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, Folder, Positive, Probability, Requirement, reader
from sparseout_experiments.training import atomic_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseout_experiments.demo.training import Look
    from sparseout_experiments.studies.engine.cluster import Job

_Exponent = Annotated[
    float, Field(ge=0, allow_inf_nan=False), Requirement("finite numbers >= 0, separated by commas", "LIST")
]
_Scales = Annotated[
    Literal["paper", "matched", "both"] | Positive,
    Requirement("paper, matched, both or a finite number > 0", "paper|matched|both|NUMBER"),
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
        before, whole = earlier(out)
    except ValueError as error:
        fail(str(error))
    try:
        with atomic_files.prepared(out):
            _run(options, out, before, whole)
    except OSError as error:
        fail(expected("--out", "a folder that can be written", f"{str(out)!r} ({error.strerror})"))


def _run(options: Options, folder: Path, before: int, whole: bool) -> None:
    started = time.perf_counter()
    with TemporaryDirectory() as work:
        jobs = plan(options, Path(work))
        looks = _watch(jobs)

        from sparseout_experiments.demo import payoff, report  # matplotlib takes a second to import

        count, total = len(looks), len(jobs)
        finished = f"{count} of {total} runs were finished"
        if not count or (count < total and (whole or count < before)):
            stays = f"; the report in {folder}, of {before} runs, stays" if count else ", and nothing was written"
            fail(f"interrupted: {finished}{stays}", INTERRUPTED)
        known = {run: look for run, look in looks.items() if look is not None}
        try:
            results = report.gathered(options, jobs, known, shlex.join(["sparseout", *sys.argv[1:]]))
            worth = payoff.measure(results, known)
            results.more["demo"]["seconds"] = round(time.perf_counter() - started, 2)
            written = report.write(folder, options, results, known, worth)
        except OSError as error:
            fail(f"the report could not be written to {folder} ({error.strerror})", FAILED)
        except KeyboardInterrupt:
            fail("interrupted while the report was being written", INTERRUPTED)
    report.show(Console(), options, results, written, worth)
    if count < total:
        fail(f"interrupted: {finished}, and they are what the report shows", INTERRUPTED)


def _watch(jobs: "Mapping[str, Job]") -> "dict[str, Look | None]":
    """Run everything under a progress bar, by folder; an interrupt keeps what is finished."""
    with importing():
        from sparseout_experiments.demo.training import run_all

    looks: dict[str, Look | None] = {}
    with suppress(KeyboardInterrupt), counting("run", len(jobs), now="reading the digits") as show:
        runs = run_all(jobs, lambda name, done: show(len(looks), done, name))
        for job, look in zip(jobs.values(), runs, strict=True):
            looks[str(job.folder)] = look
    return looks
