"""The command `theory`."""

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparseout_experiments.commands.common import FAILED, INTERRUPTED, counting, fail, reading, wrote
from sparseout_experiments.option_types import File, Folder
from sparseout_experiments.training import atomic_files


def theory(
    results: Annotated[Path, typer.Option(**reading(Folder), help="Where the file of results goes.")] = Path("results"),
    page: Annotated[Path, typer.Option(**reading(File), help="The page whose blocks are filled in.")] = Path(
        "docs/theory.md"
    ),
    render: Annotated[bool, typer.Option("--render", help="Compute nothing: the page from the results.")] = False,
) -> None:
    """Check every statement of the theory: closed forms, exact marginals and Monte-Carlo estimates side by side.

    Takes about a minute on one processor core. Writes theory.json, the table and the figures of the page; a
    page that is not there is made without its prose. Fails if a statement does not hold.
    """
    from sparseout_experiments.studies import theory as checking
    from sparseout_experiments.studies.engine.results import shown

    try:
        with atomic_files.prepared(results, page.parent):
            checking.check_page(page)
            if not render:
                _compute(results)
            record = checking.load(results)
            with shown(checking.path_of(results), checking.KIND):
                written, checks = checking.render(record, page), checking.checks_of(record)
    except OSError as error:
        fail(f"{error.filename} cannot be read or written ({error.strerror})", FAILED)
    except ValueError as error:  # no results, or a page without our blocks
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted while the page was being made; with --render it is made from the results", INTERRUPTED)
    wrote(Console(), [checking.path_of(results), *written])
    if failed := [check for check in checks if not check.holds]:
        for check in failed:
            typer.echo(f"{check.of}: {check.measured:.4g} is not in [{check.least:.4g}, {check.most:.4g}]")
        fail(f"{len(failed)} of {len(checks)} checks do not hold", FAILED)
    typer.echo(f"All {len(checks)} checks hold.")


def _compute(folder: Path) -> None:
    """Compute everything under a progress bar."""
    from sparseout_experiments.studies import theory as checking

    done = itertools.count()
    try:
        with counting("part", checking.PARTS) as show:
            checking.run(folder, lambda now: show(next(done), 0.0, now))
    except KeyboardInterrupt:
        fail("interrupted, and nothing was written", INTERRUPTED)
