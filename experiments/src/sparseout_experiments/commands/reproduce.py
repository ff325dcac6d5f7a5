"""The commands `reproduce control|targets|alternatives`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from sparseout._utils.validation import expected
from sparseout_experiments.commands.common import FAILED, INTERRUPTED, count, fail, progress_bar, wrote
from sparseout_experiments.training import files

if TYPE_CHECKING:
    from sparseout_experiments.studies.control import Progress

app = typer.Typer(
    help="Repeat a study of this project, from its runs to its page.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The data sets of the study, and the folders in which a copy of the hub has them.
_SETS = {"mnist": "mnist", "cifar10": "cifar10", "wikitext-2": "wikitext-2-v1"}
Name = TypeVar("Name", bound=str)
# What all have.
Workers = Annotated[str, typer.Option(metavar="N", help="Processes, each of one thread.")]
Work = Annotated[str, typer.Option(metavar="FOLDER", help="Where the runs go.")]
Results = Annotated[str, typer.Option(metavar="FOLDER", help="Where the files of results go.")]
Render = Annotated[bool, typer.Option("--render", help="Run nothing: the page from the results.")]


@app.command()
def control(
    budget: Annotated[str, typer.Option(metavar="small|gpu|full", help="How large: docs/protocol.md.")] = "small",
    only: Annotated[str, typer.Option(metavar="LIST", help="Of autoencoder, image, language.")] = "",
    data: Annotated[
        str, typer.Option(metavar="FOLDER", help=f"Holds {', '.join(_SETS.values())}; the hub's data, if not given.")
    ] = "",
    workers: Workers = "2",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to train.")] = "auto",
    work: Work = "runs/control",
    results: Results = "results",
    page: Annotated[str, typer.Option(metavar="FILE", help="The page that is made.")] = "docs/results.md",
    render: Render = False,
) -> None:
    """Does q control sparsity, and at what cost? Trains every run of the protocol and writes results and page.

    The budget small takes about two hours on two processor cores. What was interrupted goes on when the same command
    is started again.
    """
    from sparseout_experiments.studies import control as study

    tasks = _chosen(only, study.TASKS)
    if budget not in study.BUDGETS:
        fail(expected("--budget", f"one of {', '.join(study.BUDGETS)}", repr(budget)))
    if device not in ("auto", "cpu", "cuda"):
        fail(expected("--device", "auto, cpu or cuda", repr(device)))
    sources = {name: str(Path(data) / folder) for name, folder in _SETS.items()} if data else {}
    if missing := [folder for folder in sources.values() if not Path(folder).is_dir()]:
        fail(expected("--data", f"a folder that holds {', '.join(_SETS.values())}", f"{data!r}, without {missing[0]}"))
    number = count("--workers", workers)
    with _prepared(results, page, None if render else work, "control") as written, _stopping():
        if render:
            study.render(*written)
        else:
            with progress_bar() as bar:
                row = bar.add_task("", total=None, count="", now="")

                def watch(progress: "Progress") -> None:
                    left = "" if math.isnan(progress.left) else f"{progress.left / 60:.0f} min left, "
                    now = f"{left}{progress.run.task}: {progress.run.key} {progress.status}"
                    bar.update(
                        row,
                        completed=progress.done,
                        total=progress.total,
                        count=f"run {progress.done}/{progress.total}",
                        now=now,
                    )

                study.reproduce(
                    budget,
                    written[0],
                    Path(work),
                    written[1],
                    number,
                    tasks,
                    watch,
                    sources=sources,
                    common={"device": device},
                )
    wrote(Console(), [written[1], *sorted(written[0].glob("control-*.json"))])


@app.command()
def targets(
    only: Annotated[str, typer.Option(metavar="LIST", help="Of autoencoder, language.")] = "",
    workers: Workers = "2",
    work: Work = "runs/targets",
    results: Results = "results",
    page: Annotated[str, typer.Option(metavar="FILE", help="The page that is made.")] = "docs/targets.md",
    render: Render = False,
) -> None:
    """Does the controller meet its targets? Trains at fixed q's, then to targets in the range that these reach.

    Takes about 15 minutes on two cores and needs no download. What was interrupted goes on when the same
    command is started again.
    """
    from sparseout_experiments.studies import targets as study

    names = _chosen(only, tuple(study.TASKS))
    number = count("--workers", workers)
    with _prepared(results, page, None if render else work, "targets") as written, _stopping(), _counting() as watch:
        if render:
            study.render(*written)
        else:
            study.reproduce(written[0], Path(work), written[1], number, names, watch)
    wrote(Console(), [written[1], *sorted(written[0].glob("targets-*.json"))])


@app.command()
def alternatives(
    budget: Annotated[str, typer.Option(metavar="small|full", help="How large.")] = "small",
    only: Annotated[str, typer.Option(metavar="LIST", help="Of digits, mnist.")] = "",
    data: Annotated[str, typer.Option(metavar="FOLDER", help="Holds mnist; the hub's data, if not given.")] = "",
    workers: Workers = "2",
    work: Work = "runs/alternatives",
    results: Results = "results",
    page: Annotated[str, typer.Option(metavar="FILE", help="The page that is filled.")] = "docs/comparison.md",
    render: Render = False,
) -> None:
    """Which method buys sparsity at the smallest error? Trains autoencoders with each, over its own knob.

    The budget small takes half an hour on two processor cores. What was interrupted goes on when the same command is
    started again.
    """
    from sparseout_experiments.studies import alternatives as study

    if budget not in study.BUDGETS:
        fail(expected("--budget", f"one of {', '.join(study.BUDGETS)}", repr(budget)))
    names = _chosen(only, tuple(study.BUDGETS[budget]))
    if data and not Path(data, "mnist").is_dir():
        fail(expected("--data", "a folder that holds mnist", repr(data)))
    number = count("--workers", workers)
    prepared = _prepared(results, page, None if render else work, "alternatives")
    with prepared as written, _stopping(), _counting() as watch:
        if render:
            study.render(*written)
        else:
            sources = {"mnist": str(Path(data) / "mnist")} if data else {}
            study.reproduce(budget, written[0], Path(work), written[1], number, names, watch, sources=sources)
    wrote(Console(), [written[1], *sorted(written[0].glob("alternatives-*.json"))])


@contextmanager
def _counting() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar that counts runs."""
    with progress_bar() as bar:
        row = bar.add_task("", total=None, count="", now="")

        def watch(done: int, total: int, now: str) -> None:
            bar.update(row, completed=done, total=total, count=f"run {done}/{total}", now=now)

        yield watch


def _chosen(only: str, names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Of the names those that a list has; all, if it is empty."""
    given = only.split(",") if only else []
    if unknown := [name for name in given if name not in names]:
        fail(expected("--only", f"a list of {', '.join(names)}", repr(unknown[0])))
    return tuple(name for name in names if not given or name in given)


@contextmanager
def _prepared(results: str, page: str, work: str | None, study: str) -> Iterator[tuple[Path, Path]]:
    """The folder of results and the page, once everything that is to be written can be.

    Without a `work` folder the page is made from results alone: then there must be some.
    """
    if work is None and not any(Path(results).glob(f"{study}-*.json")):
        fail(expected("--results", f"a folder with results of `sparseout reproduce {study}`", repr(results)))
    try:
        with files.prepared(Path(results), Path(page).parent, *([] if work is None else [Path(work)])):
            yield Path(results), Path(page)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror})")


@contextmanager
def _stopping() -> Iterator[None]:
    """Turn what ends a study into a sentence."""
    from sparseout_experiments.studies.control import StudyStopped

    try:
        yield
    except ValueError as error:  # a bad budget, or a file that holds no results
        fail(str(error))
    except StudyStopped as error:
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}); the runs are kept", FAILED)
    except KeyboardInterrupt:
        fail("interrupted: the runs that are finished are kept; the same command goes on from there", INTERRUPTED)
