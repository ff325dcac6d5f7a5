"""The commands. Values are read here and not by typer, so that all bad ones get the same kind of sentence."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparseout import __version__
from sparseout.errors import expected
from sparseout.experiments import files
from sparseout.experiments.cli import tell
from sparseout.experiments.demo import EPOCHS, Gradient, Options, Run, Scale, Setting, plan, run_all

if TYPE_CHECKING:
    from sparseout.experiments.bench.cases import Case
    from sparseout.experiments.bench.store import Record

USAGE, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    help="Experiments with Sparseout, a Dropout whose exponent q sets how sparse activations become.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(args: Sequence[str] | None) -> int:
    """Run a command and return its exit status."""
    try:
        status = app(args, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        tell("interrupted")
        return INTERRUPTED
    except Exception as error:
        # what typer raises for an unknown option or command; the class has no public name
        if not hasattr(error, "format_message"):
            raise
        tell(error.format_message())
        return USAGE
    return status if isinstance(status, int) else 0


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"sparseout {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
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
        p=_number("--p", p, "a number >= 0 and < 1", lambda value: 0 <= value < 1),
        seeds=_count("--seeds", seeds),
        gradient=_gradient(gradient),
        scales=_scales(scale),
        epochs=_count("--epochs", epochs),
    )
    folder = Path(out)
    try:
        files.prepare(folder)
    except OSError as error:
        _fail(expected("--out", "a folder that can be written", f"{out!r} ({error.strerror})"))

    total, started = len(plan(options)), time.perf_counter()
    runs = _watch(options, total)
    finished = f"{len(runs)} of {total} runs were finished"
    if not runs:
        _fail(f"interrupted: {finished}, and nothing was written", INTERRUPTED)

    from sparseout.experiments import report  # matplotlib takes a second to import

    try:
        written = report.write(folder, options, runs, time.perf_counter() - started)
    except OSError as error:
        _fail(f"the report could not be written to {folder} ({error.strerror})", FAILED)
    except KeyboardInterrupt:
        _fail("interrupted while the report was being written", INTERRUPTED)
    report.show(Console(), options, runs, written)
    if len(runs) < total:
        _fail(f"interrupted: {finished}, and they are what the report shows", INTERRUPTED)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="A GPU where there is one, if not given.")] = "",
    only: Annotated[str, typer.Option(metavar="operation|model", help="Measure one half.")] = "",
    render: Annotated[bool, typer.Option("--render", help="Measure nothing: page and plots from the rows.")] = False,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where rows, page and plots go.")] = "bench",
) -> None:
    """Measure time and memory of Sparseout, of what does the same, and of whole models, against Dropout.

    On two processor cores it takes some four minutes, or one with --quick. Writes the rows as JSON under the device's
    name after every case, and at the end bench.md and a plot for every device in the folder. A run that was
    interrupted goes on when it is started again.
    """
    from sparseout.experiments.bench import cases, store
    from sparseout.experiments.bench import render as rendering

    folder, console = Path(out), Console()
    device = _device(device)
    if only not in ("", "operation", "model"):
        _fail(expected("--only", "operation or model", repr(only)))
    if not out:
        _fail(expected("--out", "the name of a folder", repr(out)))
    if render and not any(folder.glob("*.json")):
        _fail(expected("--out", "a folder with rows of sparseout bench", repr(out)))
    try:
        files.prepare(folder)
        if render:
            _wrote(console, rendering.write(folder))
            return
        todo = cases.cases(device, quick, only)
        rendering.read(folder)  # what cannot be read is to be known before the work, not after it
        record = store.resume(folder, _environment(device, quick), todo, cases.cases(device, quick))
        interrupted = _measure(record, todo, folder)
        finished = f"{len(todo) - len(record.missing)} of {len(todo)} cases were finished"
        if interrupted and len(record.missing) == len(todo):
            _fail(f"interrupted: {finished}, and nothing was written", INTERRUPTED)
        written = rendering.write(folder)
    except OSError as error:
        _fail(expected("--out", "a folder that can be written", f"{out!r} ({error.strerror})"))
    except store.NotRows as error:
        _fail(str(error), FAILED)
    rendering.show(console, record)
    _wrote(console, [folder / f"{record.slug}.json", *written])
    if interrupted:
        _fail(f"interrupted: {finished}; the same command goes on from there", INTERRUPTED)


def _environment(device: str, quick: bool) -> dict[str, Any]:
    from sparseout.experiments.bench import store

    try:
        return store.environment(device, quick)
    except (ValueError, RuntimeError) as error:  # of sparseout.backend, about SPARSEOUT_BACKEND
        _fail(str(error))


def _wrote(console: Console, paths: Sequence[Path]) -> None:
    console.print("Wrote " + ", ".join(map(str, paths)), highlight=False, markup=False, soft_wrap=True)


def _device(text: str) -> str:
    there = torch.cuda.is_available()
    if text not in ("", "cpu", "cuda"):
        _fail(expected("--device", "cpu or cuda", repr(text)))
    if text == "cuda" and not there:
        _fail(expected("--device", "cpu, since torch finds no CUDA device", repr(text)))
    return text or ("cuda" if there else "cpu")


def _measure(record: "Record", todo: "Sequence[Case]", folder: Path) -> bool:
    """Measure under a progress bar; return whether it was interrupted, which keeps what is finished."""
    from sparseout.experiments.bench import store

    done = len(todo) - len(record.missing)
    progress = _progress()
    try:
        with progress:
            task = progress.add_task("", total=len(todo), completed=done, count=f"case {done + 1}/{len(todo)}", now="")

            def on_run(case: "Case", peer: str, share: float) -> None:
                place = len(todo) - len(record.missing)
                now = f"{case.key}: {peer}"
                progress.update(task, completed=place + share, count=f"case {place + 1}/{len(todo)}", now=now)

            store.run(record, todo, folder, on_run)
    except KeyboardInterrupt:
        return True
    return False


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.fields[count]}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _watch(options: Options, total: int) -> list[Run]:
    """Run everything under a progress bar; an interrupt keeps what is finished."""
    from sparseout.experiments.data import digits

    runs: list[Run] = []
    progress = _progress()
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
    return tuple(sorted({_number("--q", part, wanted, lambda value: 0 <= value < math.inf) for part in parts}))


def _scales(text: str) -> tuple[Scale, ...]:
    named: dict[str, tuple[Scale, ...]] = {
        "paper": ("paper",),
        "matched": ("matched",),
        "both": Options.scales,
    }
    if text in named:
        return named[text]
    wanted = "paper, matched, both or a finite number > 0"
    return (_number("--scale", text, wanted, lambda value: 0 < value < math.inf),)


def _gradient(text: str) -> Gradient:
    named: dict[str, Gradient] = {"detached": "detached", "exact": "exact"}
    if text not in named:
        _fail(expected("--gradient", "detached or exact", repr(text)))
    return named[text]


def _count(option: str, text: str) -> int:
    return int(_number(option, text, "a whole number >= 1", lambda value: value >= 1 and value % 1 == 0))


def _number(option: str, text: str, wanted: str, holds: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        _fail(expected(option, wanted, repr(text)))
    return value


def _fail(sentence: str, status: int = USAGE) -> NoReturn:
    tell(sentence)
    raise typer.Exit(status)
