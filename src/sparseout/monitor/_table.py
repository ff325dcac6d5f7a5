"""Table of a sparsity report: one line for a module and a mode, or for each axis of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

WIDTH = 120
STACK = 3  # from this many modules on, names that differ in one number are shown as a group
_SHORT = {"input": "in", "output": "out", "population": "pop", "lifetime": "life"}
Record = Mapping[str, Any]


def table(records: Sequence[Record], axes: bool) -> list[str]:
    """The lines: names left, numbers right; with `axes` the lifetime axis too."""
    measures = measures_of(records)
    columns = {name[:8]: name for name in measures} | {
        "live": "hoyer_live",
        "rows": "rows",
        "undef": "undefined_rows",
        "units": "units",
        "dead": "dead_units",
        "on": "always_on_units",
        "noise": "noise",
    }
    labels = ["tensor", "mode", *(["axis"] if axes else [])]
    shown = [record for record in records if axes or record["axis"] == "population"]
    lines = [["at", "mode", *labels[2:], *columns]]
    lines += [[str(_SHORT.get(r[k], r[k])) for k in labels] + [_cell(r, k) for k in columns.values()] for r in shown]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        "  ".join(
            cell.ljust(width) if index < len(labels) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    order = _grouped(shown)
    single = list(dict.fromkeys(heading for heading, member, _ in order if not member))
    names = dict(zip(single, shortened(single, max(12, WIDTH - sum(widths) - 2 * len(widths))), strict=True))
    wide = max(len(name) for name in ["module", *names.values(), *(member for _, member, _ in order)])
    out = [f"{'module'.ljust(wide)}  {cells[0]}".rstrip()]
    before = ""
    for heading, member, index in order:
        if member and heading != before:
            out.append(heading)
        before = heading
        out.append(f"{(member or names[heading]).ljust(wide)}  {cells[1 + index]}".rstrip())
    return out


def measures_of(records: Sequence[Record]) -> list[str]:
    """The measures that records have, in their order."""
    keys = list(records[0]) if records else []
    return keys[keys.index("of_steps") + 1 : keys.index("hoyer_live")] if keys else []


def shortened(names: Sequence[str], room: int) -> list[str]:
    """Names cut to `room` characters where that leaves those that differ different: in the middle, or at both ends."""
    for head in sorted(range(room), key=lambda head: abs(head - room // 3)):
        tail = room - 1 - head
        cut = [name if len(name) <= room else name[:head] + "…" + name[len(name) - tail :] for name in names]
        if len(set(cut)) == len(set(names)):
            return cut
    long = [name for name in names if len(name) > room]
    start, end = (len(commonprefix(ends)) for ends in (long, [name[::-1] for name in long]))  # noqa: RUF071 letters
    spare = room - 2 - max((len(name) - end - start for name in long), default=room)
    if spare < 0:
        return list(names)
    start, end = start - spare // 2, end - (spare - spare // 2)
    return [name if len(name) <= room else f"…{name[start : len(name) - end]}…" for name in names]


def _grouped(records: Sequence[Record]) -> list[tuple[str, str, int]]:
    """For every line its heading, its name below that ("" without a group), and its index in `records`.

    A group is modules with the same hook point and number of units whose names differ in one number: a stack of layers.
    """
    all_measured = dict.fromkeys((r["module"], r["tensor"], r["units"]) for r in records)
    sizes = Counter(pattern for measured in all_measured for pattern, _ in _patterns(*measured))
    chosen = {measured: max(_patterns(*measured), key=lambda p: sizes[p[0]], default=None) for measured in all_measured}
    members = Counter(choice[0] for choice in chosen.values() if choice)
    groups: dict[Any, list[tuple[str, str, int]]] = {}
    for index, record in enumerate(records):
        measured = (record["module"], record["tensor"], record["units"])
        choice = chosen[measured]
        if choice and members[choice[0]] >= STACK:
            groups.setdefault(choice[0], []).append((choice[0][0], f"  {choice[1]}", index))
        else:
            groups.setdefault(index, []).append((measured[0] or "(model)", "", index))
    return [line for group in groups.values() for line in group]


def _patterns(name: str, tensor: str, units: int) -> list[tuple[tuple[str, str, int], str]]:
    parts = name.split(".")
    return [
        ((".".join([*parts[:index], "*", *parts[index + 1 :]]), tensor, units), part)
        for index, part in enumerate(parts)
        if part.isdecimal() and len(parts) > 1
    ]


def _cell(record: Record, key: str) -> str:
    value = record[key]
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.3f}" if math.isnan(value) or abs(value) < 1000 else f"{value:.2e}"
    return f"{text} ±{record['noise_error']:.3f}" if key == "noise" else text
