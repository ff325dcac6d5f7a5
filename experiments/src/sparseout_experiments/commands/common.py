"""What the commands share: reading values, progress, and how they fail."""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparseout_experiments.cli import INTERRUPTED as INTERRUPTED  # one of the statuses
from sparseout_experiments.message import show_message
from sparseout_experiments.option_types import choices, reader, requirement

if TYPE_CHECKING:
    from sparseout_experiments.studies.engine.jobs import Progress as Runs

USAGE, FAILED = 2, 1
SCHEDULER = typer.Option(metavar="ADDRESS", help="A Dask scheduler, instead of workers of this machine.")
_EVERY = 30.0  # seconds between the lines of progress that stand in for a bar where there is no terminal


def progress_bar(shown: bool = True, estimated: bool = True) -> Progress:
    """Progress on standard error: a bar with `count` before it and `now` behind, or without a terminal lines.

    The time left is estimated from the work done so far, or left to `now`.
    """
    return _Progress(
        TextColumn("{task.fields[count]}"),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        *([TextColumn("left"), TimeRemainingColumn(compact=True)] if estimated else []),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=math.inf,
        disable=not shown,
        estimated=estimated,
    )


@contextmanager
def counting(noun: str, total: int, done: int = 0, now: str = "") -> Iterator[Callable[[int, float, str], None]]:
    """A bar of cases, runs or parts; it is told how many are done, what share of the next, and what that is."""
    with progress_bar() as bar:
        row = bar.add_task("", total=total, count="", now="")

        def show(done: int, share: float, now: str) -> None:
            bar.update(row, completed=done + share, count=f"{noun} {min(done + 1, total)}/{total}", now=now)

        show(done, 0.0, now)
        yield show


@contextmanager
def counting_runs() -> Iterator[Callable[["Runs"], None]]:
    """A bar of runs: how many have ended, run and failed, how long it takes, and which has ended last."""
    with progress_bar(estimated=False) as bar:
        row = bar.add_task("", total=None, count="", now="starting workers")

        def show(runs: "Runs") -> None:
            parts = [f"{runs.running} running", f"{runs.failed} failed" if runs.failed else ""]
            parts += ["" if math.isnan(runs.left) else f"{_clock(runs.left)} left", runs.now]
            now = ", ".join(part for part in parts if part)
            bar.update(row, completed=runs.done, total=runs.total, count=f"run {runs.done}/{runs.total}", now=now)

        yield show


def about(seconds: float, workers: int) -> str:
    """How long runs will take, in a sentence."""
    if math.isnan(seconds):
        return "How long they take is known when the first has finished."
    return f"About {_clock(seconds)} (hours, minutes, seconds) are left with {workers} at a time."


@contextmanager
def ending() -> Iterator[None]:
    """Turn what ends runs before they are done into a sentence."""
    from sparseout_experiments.studies.engine.cluster import ClusterError
    from sparseout_experiments.studies.engine.jobs import StudyStopped

    try:
        yield
    except ValueError as error:  # a bad plan, a page that is another, or a file that holds no results
        fail(str(error))
    except (StudyStopped, ClusterError) as error:
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}); runs that have ended are kept", FAILED)
    except KeyboardInterrupt:
        fail("interrupted: runs that have ended are kept, and the same command goes on", INTERRUPTED)


class _Progress(Progress):
    """A bar that is a line now and then where there is no terminal, as in a log."""

    def __init__(self, *columns: Any, estimated: bool, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._estimated = estimated
        self._lines = not self.disable and not self.console.is_terminal
        self.disable = self.disable or self._lines
        self._last = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        now = time.monotonic()
        if self._lines and now - self._last >= _EVERY:
            self._last, task = now, self.tasks[task_id]
            parts = [_clock(task.elapsed or 0.0), task.fields["count"], task.fields["now"]]
            if self._estimated and (left := task.time_remaining) is not None:
                parts.append(f"{_clock(left)} left")
            show_message("  ".join(part for part in parts if part))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def wrote(console: Console, paths: Sequence[Path]) -> None:
    """Say what was written."""
    console.print("Wrote " + ", ".join(map(str, paths)), highlight=False, markup=False, soft_wrap=True)


def reading(type_: Any, read: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """How `typer.Option` reads one of `option_types`, shows it and completes it; `read` may read a text of several."""
    read = read or reader(type_)

    def parse(text: Any) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise typer.BadParameter(f"expected to be {error}") from None

    names = choices(type_)
    metavar = requirement(type_).metavar
    return {
        "parser": parse,
        "metavar": metavar if len(metavar) < 30 else "NAME",
        "autocompletion": (lambda: list(names)) if names else None,
    }


def reading_list(type_: Any) -> dict[str, Any]:
    """`reading` of several values with commas between them, each once."""
    read = reader(type_)
    options = reading(type_, lambda text: list({repr(value): value for value in map(read, text.split(","))}.values()))
    return options | {"metavar": f"{options['metavar']},..."}


def command_line() -> str:
    """The command as it was given, to repeat it."""
    return shlex.join(["sparseout", *sys.argv[1:]])


def fail(sentence: str, status: int = USAGE) -> NoReturn:
    """End with a sentence and a status."""
    show_message(sentence, last=True)
    raise typer.Exit(status)
