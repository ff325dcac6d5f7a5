"""The commands, and the one sentence in which each ends that cannot be carried out."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from sparseout_experiments.cli import importing
from sparseout_experiments.commands import bench, demo, reproduce, run, sweep, theory
from sparseout_experiments.commands.common import INTERRUPTED, USAGE
from sparseout_experiments.commands.help import CONTEXT, Command, group
from sparseout_experiments.message import show_message

app = group(
    "Experiments with Sparseout, a Dropout whose exponent q sets how sparse activations become.",
    pretty_exceptions_enable=False,
)


def invoke(args: Sequence[str] | None) -> int:
    """Run a command and return its exit status."""
    try:
        status = app(args, prog_name="sparseout", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        show_message("interrupted", last=True)
        return INTERRUPTED
    except Exception as error:
        # what typer raises for an unknown option or command; the class has no public name
        if not hasattr(error, "format_message"):
            raise
        show_message(_usage(error), last=True)
        return USAGE
    return status if isinstance(status, int) else 0


def _usage(error: Any) -> str:
    """Error about a command line: what is wrong, what there is instead, and where to read on."""
    sentence, context = error.format_message().strip().rstrip("."), error.ctx
    if isinstance(error, typer.BadParameter) and error.message.startswith("expected") and error.param is not None:
        name = error.param.opts[0] if error.param.param_type_name == "option" else str(error.param.metavar).rstrip(".")
        return f"expected `{name}`{error.message.removeprefix('expected')}"
    if context is None:
        return f"{sentence}."
    if close := getattr(error, "possibilities", None):  # typer finds --foo close to --out
        near = get_close_matches(error.option_name, close, n=2, cutoff=0.75)
        sentence = sentence.partition(" (Possible")[0] + (f" (did you mean {' or '.join(near)}?)" if near else "")
    sentence = re.sub(r"\.? Did you mean (.+)\?$", r" (did you mean \1?)", sentence)
    if sentence in ("", "Missing command"):
        sentence = f"`{context.command_path}` needs a command"
    if "command" in sentence and hasattr(context.command, "list_commands"):
        sentence += f". The commands are {', '.join(context.command.list_commands(context))}"
    return f"{sentence}; `{context.command_path} --help` tells more."


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        with importing():
            from sparseout import __version__

        typer.echo(f"sparseout {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (demo.demo, bench.bench, theory.theory):
    app.command(cls=Command, context_settings=CONTEXT)(_command)
app.add_typer(run.app, name="run")
app.add_typer(sweep.app, name="sweep")
app.command("report", cls=Command, context_settings=CONTEXT)(sweep.report)
app.add_typer(reproduce.app, name="reproduce")
