"""The command `demo`."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparseout._utils.validation import expected
from sparseout_experiments.commands.common import FAILED, INTERRUPTED, count, fail, number, progress_bar
from sparseout_experiments.demo import EPOCHS, Gradient, Options, Run, Scale, Setting, earlier, plan, run_all
from sparseout_experiments.training import files


def demo(
    q: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help="Exponents, comma separated or repeated: 1,1.5,2,2.5,3 if not given."),
    ] = None,
    p: Annotated[str, typer.Option(metavar="NUMBER", help="Drop probability.")] = "0.5",
    seeds: Annotated[str, typer.Option(metavar="N", help="How many seeds.")] = "3",
    gradient: Annotated[str, typer.Option(metavar="detached|exact", help="Slope of the noise.")] = "detached",
    scale: Annotated[
        str,
        typer.Option(
            metavar="paper|matched|both|NUMBER",
            help="Strength of the noise: the paper's, the power of Dropout's, or a unit of the activations.",
        ),
    ] = "both",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the report goes.")] = "demo",
    epochs: Annotated[str, typer.Option(metavar="N", help="Epochs a run.")] = str(EPOCHS),
) -> None:
    """Turn the dial: train autoencoders on handwritten digits at several q and report how sparse they become.

    Takes about a minute and needs no download. Writes report.html, results.json and demo.png.
    """
    options = Options(
        q=_exponents(q) if q else Options.q,
        p=number("--p", p, "a number >= 0 and < 1", lambda value: 0 <= value < 1),
        seeds=count("--seeds", seeds),
        gradient=_gradient(gradient),
        scales=_scales(scale),
        epochs=count("--epochs", epochs),
    )
    folder = Path(out)
    try:
        try:
            before, whole = earlier(folder)
        except ValueError as error:
            fail(str(error))
        with files.prepared(folder):
            _run(options, folder, before, whole)
    except OSError as error:
        fail(expected("--out", "a folder that can be written", f"{out!r} ({error.strerror})"))


def _run(options: Options, folder: Path, before: int, whole: bool) -> None:
    total, started = len(plan(options)), time.perf_counter()
    runs = _watch(options, total)
    finished = f"{len(runs)} of {total} runs were finished"
    if not runs or (len(runs) < total and (whole or len(runs) < before)):
        stays = f"; the report in {folder}, of {before} runs, stays" if runs else ", and nothing was written"
        fail(f"interrupted: {finished}{stays}", INTERRUPTED)

    from sparseout_experiments.demo import report  # matplotlib takes a second to import

    try:
        written = report.write(folder, options, runs, time.perf_counter() - started)
    except OSError as error:
        fail(f"the report could not be written to {folder} ({error.strerror})", FAILED)
    except KeyboardInterrupt:
        fail("interrupted while the report was being written", INTERRUPTED)
    report.show(Console(), options, runs, written)
    if len(runs) < total:
        fail(f"interrupted: {finished}, and they are what the report shows", INTERRUPTED)


def _watch(options: Options, total: int) -> list[Run]:
    """Run everything under a progress bar; an interrupt keeps what is finished."""
    from sparseout_experiments.data import digits

    runs: list[Run] = []
    progress = progress_bar()
    try:
        with progress:
            task = progress.add_task("", total=total * options.epochs, count=f"run 1/{total}", now="reading the digits")
            last = ""

            def on_epoch(setting: Setting, seed: int) -> None:
                progress.update(task, advance=1, now=f"{setting}, seed {seed}{last}")

            for run in run_all(options, digits(), on_epoch):
                runs.append(run)
                last = f", last Hoyer {run.hoyer:.2f}"
                progress.update(task, count=f"run {min(len(runs) + 1, total)}/{total}")
    except KeyboardInterrupt:
        pass
    return runs


def _exponents(texts: Sequence[str]) -> tuple[float, ...]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    wanted = "finite numbers >= 0, separated by commas"
    return tuple(sorted({number("--q", part, wanted, lambda value: 0 <= value < math.inf) for part in parts}))


def _scales(text: str) -> tuple[Scale, ...]:
    named: dict[str, tuple[Scale, ...]] = {
        "paper": ("paper",),
        "matched": ("matched",),
        "both": Options.scales,
    }
    if text in named:
        return named[text]
    wanted = "paper, matched, both or a finite number > 0"
    return (number("--scale", text, wanted, lambda value: 0 < value < math.inf),)


def _gradient(text: str) -> Gradient:
    named: dict[str, Gradient] = {"detached": "detached", "exact": "exact"}
    if text not in named:
        fail(expected("--gradient", "detached or exact", repr(text)))
    return named[text]
