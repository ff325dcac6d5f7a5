"""Table of outcomes by module: outcome, name, text; modules whose names differ only in numbers share a line."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

ROOT = "(the model itself)"  # how the empty dotted name is shown


def outcome_rows(outcome: str, entries: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Rows of one outcome from texts by dotted name: ``h.*.drop (2x)`` stands for two names with equal texts."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, text in entries.items():
        groups[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name), text].append(name)
    return [
        (outcome, (names[0] or ROOT) if len(names) == 1 else f"{pattern} ({len(names)}x)", text)
        for (pattern, text), names in groups.items()
    ]


def aligned(rows: Sequence[tuple[str, str, str]]) -> str:
    """The rows as text, in columns."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)
