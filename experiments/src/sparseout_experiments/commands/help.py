"""The layout of help texts: whole names, options in groups, and the rest of the line for the sentence.

Help, completion and what is wrong with a command line come before anything is imported that takes seconds.
"""

from typing import Any

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
        """Write the options, group by group."""
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
        """Write the commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first(command.help or "")) for name, command in commands if command])


def _first(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())
