"""Report of a conversion, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparseout._utils.outcome_table import aligned, outcome_rows


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
            *outcome_rows("changed", {name: " -> ".join(pair) for name, pair in self.changed.items()}),
            *outcome_rows("skipped", self.skipped),
            *outcome_rows("unreached", self.unreached),
        ]
        if not self.changed:
            rows.append(("changed", "nothing", "no layer to change" if not self.skipped else "all layers were skipped"))
        return aligned(rows)
