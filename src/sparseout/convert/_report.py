"""Report of a conversion, as data and as a table."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

ROOT = "(the model itself)"  # how the empty dotted name is shown


@dataclass(frozen=True)
class ConversionReport:
    """Report of a conversion: what changed, was skipped or could not be reached, and why, by dotted name.

    Printed, it is a table in which layers that differ only in numbers of their names share one line: ``h.*.drop``.

    Args:
        changed: name -> (what was there, what is there now).
        skipped: name -> why a dropout layer was not converted.
        unreached: name of a module -> dropout inside it that cannot be reached by converting layers, and why.

    Example:
        >>> from torch import nn
        >>> import sparseout
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.AlphaDropout(0.2))
        >>> print(sparseout.convert_dropout_(model, q=1.5))
        changed  1  Dropout(p=0.1, inplace=False) -> Sparseout(p=0.1, q=1.5)
        skipped  2  AlphaDropout keeps the mean and variance of SELU units, which Sparseout does not
    """

    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            *_rows("changed", {name: " -> ".join(pair) for name, pair in self.changed.items()}),
            *_rows("skipped", self.skipped),
            *_rows("unreached", self.unreached),
        ]
        if not self.changed:
            rows.append(("changed", "nothing", "no layer to change" if not self.skipped else "all layers were skipped"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)


def _rows(outcome: str, entries: dict[str, str]) -> list[tuple[str, str, str]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, text in entries.items():
        groups[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name), text].append(name)
    return [
        (outcome, (names[0] or ROOT) if len(names) == 1 else f"{pattern} ({len(names)}x)", text)
        for (pattern, text), names in groups.items()
    ]
