"""The commands `reproduce control|targets|alternatives`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from sparseout_experiments.commands.common import FAILED, INTERRUPTED, SCHEDULER, fail, progress_bar, reading, wrote
from sparseout_experiments.commands.help import CONTEXT, Command, Group
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, File, Folder
from sparseout_experiments.training import atomic_files

if TYPE_CHECKING:
    from sparseout_experiments.studies.control import Progress

app = typer.Typer(
    help="Repeat a study of this project, from its runs to its page.",
    cls=Group,
    context_settings=CONTEXT,
    rich_markup_mode=None,
)
# The data sets of the study, and the folders in which a copy of the hub has them.
_SETS = {"mnist": "mnist", "cifar10": "cifar10", "wikitext-2": "wikitext-2-v1"}
Name = TypeVar("Name", bound=str)
# What all have.
Workers = Annotated[int, typer.Option(**reading(Count), help="Processes, each of one thread.")]
Scheduler = Annotated[str | None, SCHEDULER]
Work = Annotated[Path, typer.Option(**reading(Folder), help="Where the runs go.")]
Results = Annotated[Path, typer.Option(**reading(Folder), help="Where the files of results go.")]
Page = Annotated[Path, typer.Option(**reading(File), help="The page that is made.")]
Render = Annotated[bool, typer.Option("--render", help="Run nothing: the page from the results.")]


@app.command(cls=Command, context_settings=CONTEXT)
def control(
    budget: Annotated[
        Any, typer.Option(**reading(Literal["small", "gpu", "full"]), help="How large: docs/protocol.md.")
    ] = "small",
    only: Annotated[str, typer.Option(metavar="LIST", help="Of autoencoder, image, language.")] = "",
    data: Annotated[
        Any,
        typer.Option(**reading(Folder), help=f"Holds {', '.join(_SETS.values())}. [default: they come from the hub]"),
    ] = None,
    workers: Workers = 2,
    scheduler: Scheduler = None,
    device: Annotated[Any, typer.Option(**reading(Literal["auto", "cpu", "cuda"]), help="Where to train.")] = "auto",
    work: Work = Path("runs/control"),
    results: Results = Path("results"),
    page: Page = Path("docs/results.md"),
    render: Render = False,
) -> None:
    """Does q control sparsity, and at what cost? Trains every run of the protocol and writes results and page.

    The budget small takes about two hours on two processor cores. What was interrupted goes on when the same command
    is started again.
    """
    from sparseout_experiments.studies import control as study

    tasks = _chosen(only, study.TASKS)
    sources = {name: str(data / folder) for name, folder in _SETS.items()} if data else {}
    if missing := [folder for folder in sources.values() if not Path(folder).is_dir()]:
        fail(
            expected(
                "--data", f"a folder that holds {', '.join(_SETS.values())}", f"{str(data)!r}, without {missing[0]}"
            )
        )
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
                    work,
                    written[1],
                    workers,
                    tasks,
                    watch,
                    sources=sources,
                    common={"device": device},
                    scheduler=scheduler,
                )
    wrote(Console(), [written[1], *sorted(written[0].glob("control-*.json"))])


@app.command(cls=Command, context_settings=CONTEXT)
def targets(
    only: Annotated[str, typer.Option(metavar="LIST", help="Of autoencoder, language.")] = "",
    workers: Workers = 2,
    scheduler: Scheduler = None,
    work: Work = Path("runs/targets"),
    results: Results = Path("results"),
    page: Page = Path("docs/targets.md"),
    render: Render = False,
) -> None:
    """Does the controller meet its targets? Trains at fixed q's, then to targets in the range that these reach.

    Takes about 15 minutes on two cores and needs no download. What was interrupted goes on when the same
    command is started again.
    """
    from sparseout_experiments.studies import targets as study

    names = _chosen(only, tuple(study.TASKS))
    with _prepared(results, page, None if render else work, "targets") as written, _stopping(), _counting() as watch:
        if render:
            study.render(*written)
        else:
            study.reproduce(written[0], work, written[1], workers, names, watch, scheduler=scheduler)
    wrote(Console(), [written[1], *sorted(written[0].glob("targets-*.json"))])


@app.command(cls=Command, context_settings=CONTEXT)
def alternatives(
    budget: Annotated[Any, typer.Option(**reading(Literal["small", "full"]), help="How large.")] = "small",
    only: Annotated[str, typer.Option(metavar="LIST", help="Of digits, mnist.")] = "",
    data: Annotated[Any, typer.Option(**reading(Folder), help="Holds mnist. [default: it comes from the hub]")] = None,
    workers: Workers = 2,
    scheduler: Scheduler = None,
    work: Work = Path("runs/alternatives"),
    results: Results = Path("results"),
    page: Page = Path("docs/comparison.md"),
    render: Render = False,
) -> None:
    """Which method buys sparsity at the smallest error? Trains autoencoders with each, over its own knob.

    The budget small takes half an hour on two processor cores. What was interrupted goes on when the same command is
    started again.
    """
    from sparseout_experiments.studies import alternatives as study

    names = _chosen(only, tuple(study.BUDGETS[budget]))
    if data and not (data / "mnist").is_dir():
        fail(expected("--data", "a folder that holds mnist", repr(str(data))))
    prepared = _prepared(results, page, None if render else work, "alternatives")
    with prepared as written, _stopping(), _counting() as watch:
        if render:
            study.render(*written)
        else:
            sources = {"mnist": str(data / "mnist")} if data else {}
            options: dict[str, Any] = {"sources": sources, "scheduler": scheduler}
            study.reproduce(budget, written[0], work, written[1], workers, names, watch, **options)
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
def _prepared(results: Path, page: Path, work: Path | None, study: str) -> Iterator[tuple[Path, Path]]:
    """The folder of results and the page, once everything that is to be written can be.

    Without a `work` folder the page is made from results alone: then there must be some.
    """
    if work is None and not any(results.glob(f"{study}-*.json")):
        fail(expected("--results", f"a folder with results of `sparseout reproduce {study}`", repr(str(results))))
    try:
        with atomic_files.prepared(results, page.parent, *([] if work is None else [work])):
            yield results, page
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror})")


@contextmanager
def _stopping() -> Iterator[None]:
    """Turn what ends a study into a sentence."""
    from sparseout_experiments.studies.control import StudyStopped
    from sparseout_experiments.studies.engine.cluster import ClusterError

    try:
        yield
    except ValueError as error:  # a bad budget, or a file that holds no results
        fail(str(error))
    except (StudyStopped, ClusterError) as error:
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}); the runs are kept", FAILED)
    except KeyboardInterrupt:
        fail("interrupted: the runs that are finished are kept; the same command goes on from there", INTERRUPTED)
