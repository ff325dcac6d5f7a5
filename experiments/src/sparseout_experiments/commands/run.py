"""The commands `run autoencoder`, `run image` and `run language`: their options are those of `options`."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from sparseout_experiments.commands.common import FAILED, INTERRUPTED, fail, progress_bar, reading
from sparseout_experiments.commands.help import add, group
from sparseout_experiments.config import FILE, of_folder, options_of, read, record, resolve, task_of, without_unused
from sparseout_experiments.message import expected, show_message
from sparseout_experiments.option_types import File, Flag, Folder
from sparseout_experiments.options import TASKS, Config

if TYPE_CHECKING:
    from sparseout_experiments.training.loop import OnProgress
    from sparseout_experiments.training.loop import Progress as Report

app = group("Train one network of the paper, measure how sparse it became, and write it all into a folder.")


def flag_name(name: str) -> str:
    """How the command line calls an option."""
    return "--" + name.replace("_", "-")


@app.callback(invoke_without_command=True)
def _resumed(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(**reading(Folder), help="Folder of the run to go on with.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, of whichever task.")] = False,
) -> None:
    if context.invoked_subcommand is not None:
        if resume or out:
            fail("expected `--resume` and `--out` to stand behind the task, but got them before it")
    elif resume and out:
        if not (out / FILE).exists():
            fail(expected("--out", f"the folder of a run, with a {FILE}", repr(str(out))))
        _run(None, out=out, resume=True)
    elif resume:
        fail(expected("--out", "the folder of the run to go on with", "none"))
    elif out:
        fail("expected a task before `--out`, or `--resume` beside it, but got neither")
    else:
        context.fail("Missing command.")


def _options(task: str) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """The options of a task's command, one for every field of its configuration; None stands for "not given"."""
    option = typer.Option
    out = "Folder of the run. [default: below runs/, named after the options]"
    config = "Options in TOML, as in a run's config.toml; those given here override them."
    resume = "Go on with the run in the folder, with the options it was started with."
    yield "out", (Path | None, option(**reading(Folder), help=out), None)
    yield "config", (Path | None, option(**reading(File), help=config), None)
    yield "resume", (bool, option("--resume", help=resume), False)
    for name, entry in options_of(task).items():
        flag, default = flag_name(name), entry.default
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        help = entry.help if shown is None else f"{entry.help} [default: {shown}]"
        common: dict[str, Any] = {"help": help, "show_default": False, "rich_help_panel": entry.group}
        if entry.type == Flag:
            yield name, (bool | None, option(f"{flag}/--no-{flag[2:]}", **common), None)
        else:
            yield name, (Any, option(flag, **reading(entry.type), **common), None)


def _run(task: str | None, *, out: Path | None, resume: bool, config: Path | None = None, **options: Any) -> None:
    """Train; without a task that of the folder that is resumed."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        values: dict[str, Any] = {}
        if resume and out and (out / FILE).exists():
            task, values = of_folder(out, task)
        assert task is not None
        for over in (read(config, task, flag_name) if config else {}, given):
            if "method" in over:  # what was said before is for any method: what this one has no use for is dropped
                values = without_unused(values, over["method"])
            values |= over
        chosen = resolve(task, values, flag_name)
    except ValueError as error:
        fail(str(error))

    from sparseout_experiments.data.hub import DataError
    from sparseout_experiments.training import loop as train  # Accelerate takes seconds to import
    from sparseout_experiments.training import run_folder

    folder = out or Path("runs") / _name(chosen)
    if resume and not (folder / FILE).exists() and _is_main():
        show_message(f"there is no run in {folder} to resume: it starts now")
    try:
        with _progress(task) as on_progress:
            result = train.perform(chosen, folder, on_progress, resume=resume)
    except (ValueError, DataError) as error:
        fail(_as_flag(error))
    except (run_folder.RunError, run_folder.RunFailed) as error:
        fail(_as_flag(error), FAILED)
    except (MemoryError, RuntimeError) as error:
        import torch

        cpu = ("allocate memory", "Storage size calculation overflowed")  # it has no exception of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(text in str(error) for text in cpu):
            raise
        fail("out of memory: make the network or the batch smaller", FAILED)
    except KeyboardInterrupt:
        kept = "--resume goes on with the run" if (folder / FILE).exists() else "nothing was written"
        fail(f"interrupted: {kept}", INTERRUPTED)
    if _is_main():
        show(Console(), result, folder)


for _task in TASKS:
    add(app, _task, partial(_run, _task), str(TASKS[_task].__doc__), dict(_options(_task)))


def _as_flag(error: Exception) -> str:
    """What an error says, with the option that it names as the command line calls it."""
    return re.sub(r"^expected `(\w+)`", lambda match: f"expected `{flag_name(match[1])}`", str(error))


def _name(config: Config) -> str:
    """The folder of a run that was given none: its task, its noise, its seed, and what else is not as usual."""
    task = task_of(config)
    parts = [task, config.method]
    parts += [f"{name}{getattr(config, name):g}" for name in "qp" if name in config.arguments()]
    parts += [f"seed{config.seed}"]
    usual, chosen = (record(options) for options in (resolve(task, {"method": config.method}), config))
    changed = {name: value for name, value in chosen.items() if value != usual[name] and name not in _NAMED}
    parts += [f"{name}-{Path(value).name if name == 'data' else value}" for name, value in changed.items()]
    return "-".join(parts)


def _is_main() -> bool:
    """Whether this is the process that speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _progress(task: str) -> Iterator["OnProgress"]:
    """A progress bar with the numbers that matter."""
    from sparseout_experiments.tasks import shown_as

    metric, times, unit = shown_as(task)
    with progress_bar(_is_main()) as bar:
        row = bar.add_task("", total=1.0, count="", now="reading the data")

        def on_progress(progress: "Report") -> None:
            if progress.note:
                bar.console.print(progress.note, markup=False, highlight=False, soft_wrap=True)
            now = [f"loss {progress.loss:.4g}"]
            if progress.metric is not None and progress.hoyer is not None and progress.dead is not None:
                now += [f"{metric} {times * progress.metric:.4g}{unit}", f"Hoyer {progress.hoyer:.2f}"]
                now += [f"dead {progress.dead:.0%}"]
            epoch = f"epoch {min(progress.epoch + 1, progress.epochs)}/{progress.epochs}"
            bar.update(row, completed=progress.done, count=epoch, now="  ".join(now))

        yield on_progress


# What the folder's name says anyway, or what does not change the numbers.
_NAMED = ("method", "q", "p", "seed", "device", "checkpoint_minutes", "track")
MISSED = 0.02  # of Hoyer, from which on the command says so


def show(console: Console, result: dict[str, Any], folder: Path) -> None:
    """What came out: the metric, every measure of every module, what to be wary of."""
    from sparseout_experiments.tasks import shown_as
    from sparseout_experiments.training.run_folder import MEASURES

    metric, times, unit = shown_as(result["task"])
    headings = ("Hoyer", "live", "Gini", "Treves\nRolls", "density", "kurt.", "dead", "undef.")
    columns = (Column(heading, justify="right") for heading in headings)
    table = Table("test data", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for module, measures in result["sparsity"].items():
        values = ["-" if (value := measures[name]) is None else f"{value:.3f}" for name in MEASURES]
        shares = [measures["dead_units"] / measures["units"], measures["undefined_rows"] / measures["rows"]]
        table.add_row(module, *values, *(f"{share:.1%}" for share in shares))
    console.print(table)
    rows = [f"{measures['rows']:,.0f}" for measures in result["sparsity"].values()]
    over = " to ".join(dict.fromkeys((rows[0], rows[-1]))) if rows else "0"
    console.print(f"Dead: active in none of {over} rows; fewer rows have more dead units.\n", highlight=False)
    test, valid = (_number(result[part][metric], times, unit=unit) for part in ("test", "valid"))
    summary = f"{metric} {test} on test data ({valid} on validation data)"
    if "error_as_trained" in result["test"]:
        summary += f"; {_number(result['test']['error_as_trained'], times, unit=unit)} with batch norm as trained"
    summary += f"; epoch {result['best_epoch']} of {result['epochs']}, {result['steps']} steps, "
    lines = [f"{summary}{result['seconds']:.0f} s" + ", ended by its budget" * (result["stopped_by"] == "budget")]
    if "control" in result:
        control = result["control"]
        hoyer = math.nan if control["hoyer"] is None else control["hoyer"]
        knob = next(name for name in ("q", "p", "strength", "k") if name in control)
        at = f"at {knob} = {_number(control[knob], form='.3g')}"
        met = f"Hoyer {hoyer:.3f} in training, where the target is {control['target']:g}, {at}"
        least, most = (_number(control[f"noise_{end}"], form=".2f") for end in ("least", "most"))
        power = f"{least} to {most} of Dropout's"
        noise = f"; power of the noise {power}" if knob in ("q", "p") else ""
        lines.append(f"{met}; means over the last tenth{noise}")
        missed = hoyer - control["target"]
        if not abs(missed) <= MISSED and not any("out of reach" in warning for warning in result["warnings"]):
            late = "training ended before it was met: give it more --epochs"
            lines.append(f"Note: the target is missed by {missed:+.3f}; {late}.")
    for line in (*lines, *(f"Note: {warning}." for warning in result["warnings"]), f"Wrote {folder}/result.json"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _number(value: float | None, times: float = 1.0, form: str = ".4g", unit: str = "") -> str:
    """A number of a result, in which what is not finite is null."""
    return "-" if value is None else format(times * value, form) + unit
