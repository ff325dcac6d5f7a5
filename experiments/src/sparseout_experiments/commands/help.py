"""Commands whose help has whole names, options in groups, and the rest of the line for the sentence.

Help, completion and what is wrong with a command line come before anything is imported that takes seconds.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparseout_experiments.cli import importing

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """A command whose options stand in the groups that `rich_help_panel` names."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, once torch is there."""
        with importing():
            import sparseout  # noqa: F401
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Group(TyperGroup):
    """Commands in the order in which they were added, each with its whole first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            first = {name: (command.help or "").split("\n\n")[0] for name, command in commands if command}
            formatter.write_dl([(name, " ".join(text.split())) for name, text in first.items()])


def group(help: str, **options: Any) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(help=help, cls=Group, context_settings=CONTEXT, rich_markup_mode=None, **options)


def add(
    app: typer.Typer, name: str, run: Callable[..., None], help: str, options: Mapping[str, tuple[Any, Any, Any]]
) -> None:
    """Add a command with options from a table: of each the type, `typer.Option` and the default."""

    def command(**given: Any) -> None:
        run(**given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type_, option])
        for name, (type_, option, default) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    app.command(name, help=help, cls=Command, context_settings=CONTEXT)(command)
