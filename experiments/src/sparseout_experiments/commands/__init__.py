"""The commands. Values are read here and not by typer, so that all bad ones get the same kind of sentence."""

from collections.abc import Sequence
from typing import Annotated

import typer

from sparseout import __version__
from sparseout_experiments.cli import tell
from sparseout_experiments.commands import bench, demo, reproduce, run, theory
from sparseout_experiments.commands.common import INTERRUPTED, USAGE

app = typer.Typer(
    help="Experiments with Sparseout, a Dropout whose exponent q sets how sparse activations become.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def invoke(args: Sequence[str] | None) -> int:
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


app.command()(demo.demo)
app.command()(bench.bench)
app.command()(theory.theory)
app.add_typer(run.app, name="run")
app.add_typer(reproduce.app, name="reproduce")
