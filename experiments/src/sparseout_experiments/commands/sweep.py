"""The commands `sweep TASK` and `report`: every combination of options, on a cluster, and the page of what came out."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparseout_experiments.commands.common import (
    FAILED,
    SCHEDULER,
    about,
    command_line,
    counting_runs,
    ending,
    fail,
    reading,
    reading_list,
    wrote,
)
from sparseout_experiments.commands.help import add, group
from sparseout_experiments.commands.run import flag_name
from sparseout_experiments.config import FILE, options_of
from sparseout_experiments.message import expected
from sparseout_experiments.option_types import Count, Folder
from sparseout_experiments.options import TASKS
from sparseout_experiments.training import atomic_files

if TYPE_CHECKING:
    from sparseout_experiments.studies.engine.cluster import Job

app = group("Train every combination of options with several seeds, and write a page about them.")


def _options(task: str) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """The options of a task's command: one of a run takes a list."""
    option = typer.Option
    yield "out", (Path | None, option(**reading(Folder), help=f"[default: runs/sweep-{task}]"), None)
    yield "seeds", (Any, option(**reading(Count), help="Seeds of each setting, from 0 on."), 5)
    yield "workers", (Any, option(**reading(Count), help="Runs at a time."), os.cpu_count() or 1)
    yield "scheduler", (str | None, SCHEDULER, None)
    yield "dry_run", (bool, option("--dry-run", help="Print the plan and train nothing."), False)
    for name, entry in options_of(task).items():
        if name != "seed":
            common = reading_list(entry.type) | {"show_default": False, "help": entry.help}
            yield name, (Any, option(flag_name(name), rich_help_panel=entry.group, **common), None)


def _sweep(
    task: str, out: Path | None, seeds: int, workers: int, scheduler: str | None, dry_run: bool, **options: Any
) -> None:
    out, given = out or Path("runs") / f"sweep-{task}", {k: v for k, v in options.items() if v is not None}
    from sparseout_experiments.studies.engine import report as page
    from sparseout_experiments.studies.engine import sweep

    console = Console()
    with ending():
        jobs = sweep.grid(task, given, seeds, out, flag_name)
        if dry_run:
            _show_plan(jobs, seeds, workers, console)
            return
        page.check(out)
    with ending(), atomic_files.prepared(out):
        try:
            with ending(), counting_runs() as show:
                sweep.perform(jobs, out, workers, scheduler, command_line(), show)
        finally:
            _write([out], out, console)


for _task in TASKS:
    _help = f"{TASKS[_task].__doc__}\n\nOptions of a run take a list of values, separated by commas."
    add(app, _task, partial(_sweep, _task), _help, dict(_options(_task)))


def _show_plan(jobs: "Mapping[str, Job]", seeds: int, workers: int, console: Console) -> None:
    from sparseout_experiments.studies.engine.jobs import Ledger, look, time_left

    ledger: Ledger[str] = Ledger()
    look(ledger, lambda: jobs)
    settings = len({name.rpartition("seed=")[0] for name in jobs})
    for name in jobs:
        console.print(name, highlight=False, markup=False, soft_wrap=True)
    ended = len(ledger.results) + len(ledger.failures)
    plan = f"{len(jobs)} runs: {settings} settings with {seeds} seeds each; {ended} have ended."
    left = about(time_left(ledger, jobs, len(jobs), workers), workers)
    console.print(f"{plan} {left}", highlight=False, soft_wrap=True)


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            **reading(Folder) | {"metavar": "FOLDER...", "autocompletion": None},
            help="Of a run, of a sweep, or of several.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(**reading(Folder), help="Where it goes. [default: the first]")] = None,
) -> None:
    """Write the page of runs that there are: report.html, sweep.csv and table.tex.

    It also writes report.json, a small file which, given in place of folders, makes all of it again without the runs.
    """
    if len(folders) == 1 and folders[0].is_file():
        _write(folders, out or folders[0].parent, Console())
        return
    if missing := [folder for folder in folders if not folder.is_dir()]:
        fail(expected("FOLDER", "a folder of runs", repr(str(missing[0]))))
    if not _write(folders, out or folders[0], Console()):
        fail(expected("FOLDER", "a folder of runs", ", ".join(map(str, folders))))


def _write(folders: list[Path], out: Path, console: Console) -> bool:
    """Write the page, if there is anything to show."""
    from sparseout_experiments.studies.engine import frame, sweep
    from sparseout_experiments.studies.engine import report as page
    from sparseout_experiments.training.run_folder import RunError

    try:
        if folders[0].is_file():
            runs = frame.load(folders[0])
        else:
            planned, command = sweep.plan_of(folders)
            runs = frame.read(folders, planned, command)
    except RunError as error:
        fail(str(error), FAILED)
    except ValueError as error:
        if folders[0].is_file() or any(path for folder in folders for path in folder.rglob(FILE)):
            fail(str(error))
        return False
    try:
        wrote(console, page.write(runs, out))
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror})", FAILED)
    return True
