"""The page: one HTML file that holds everything it shows."""

from collections.abc import Sequence
from importlib.resources import files as resources
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparseout_experiments.demo import Options, figures, payoff, pictures
from sparseout_experiments.demo.summary import Row, caveats, notes, scale_name
from sparseout_experiments.demo.table import HEADINGS, lines, row_name
from sparseout_experiments.demo.training import digits, mean_error


class Strip(NamedTuple):
    """One row of Figure 4: a name, reconstructions and, unless they are the originals, filters."""

    name: str
    reconstructions: str
    filters: str | None


def page(options: Options, rows: Sequence[Row], results: dict[str, Any], worth: payoff.Payoff | None = None) -> str:
    """The HTML of the report."""
    source = resources(__package__).joinpath("demo.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    blind_error = mean_error()
    table = [(group, list(members)) for group, members in groupby(lines(rows), key=lambda line: line.group)]
    return template.render(
        options=options,
        results=results,
        units=results["protocol"]["options"]["units"],
        blind_error=1000 * blind_error,
        sparsity=Markup(figures.sparsity(rows, options.scales)),  # our own drawings: not escaped
        cost=Markup(figures.cost(rows, options.scales)),
        activations=Markup(figures.activations(rows, options.scales)),
        strips=_strips(options, rows),
        strips_scale=scale_name(options.scales[-1]),
        headings=HEADINGS,
        table=table,
        payoff=payoff,
        worth=worth,
        notes=[*caveats(rows, blind_error), *notes(options, rows)],
    )


def _strips(options: Options, rows: Sequence[Row]) -> list[Strip]:
    """Pictures of the first seed at the last of the scales, which is the matched one by default."""
    found = [Strip("original", pictures.digits(digits().test[:10]), None)]
    for row in sorted(rows, key=lambda row: row.setting.method):  # "none" before "sparseout"
        shown = row.runs[0].pictures
        wanted = row.setting.method == "none" or row.setting.scale == options.scales[-1]
        if wanted and shown is not None:
            found.append(
                Strip(
                    row_name(row.setting),
                    pictures.digits(shown.reconstructions),
                    pictures.filters(shown.filters),
                )
            )
    return found
