"""Blocks, lines and checks of pages that are made from results."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseout._utils.validation import expected
from sparseout_experiments.training import atomic_files

_RUNS = "<!-- made from {} runs -->"


def wrapped(lines: Sequence[str]) -> str:
    """A page: prose in lines of 120 characters; tables, pictures and headings as they are."""
    found: list[str] = []
    for line in lines:
        whole = not line or line[0] in "|!#<"
        indent = "  " if line.startswith("- ") else ""
        found += [line] if whole else textwrap.wrap(line, 120, subsequent_indent=indent, break_long_words=False)
    return "\n".join(found).rstrip() + "\n"


def check(page: Path, title: str, runs: int | None = None) -> None:
    """Raise ValueError where replacing a page would lose something: it has another title, or was made from more runs.

    Without `runs` the title alone is looked at, before there are any.
    """
    if not page.exists():
        return
    text = page.read_text(encoding="utf-8")
    if text.partition("\n")[0] != title:
        raise ValueError(expected("--page", f"a new file, or one that begins with {title!r}", repr(str(page))))
    before = re.search(_RUNS.format(r"(\d+)"), text)
    if before and runs is not None and runs < int(before[1]):
        wanted = f"a new file, as there are results of {runs} runs"
        raise ValueError(expected("--page", wanted, f"{str(page)!r}, which was made from {before[1]}"))


def write(page: Path, lines: Sequence[str], runs: int) -> None:
    """Write a page that begins with its title, unless `check` objects."""
    check(page, lines[0], runs)
    atomic_files.write(page, wrapped([*lines, "", _RUNS.format(runs)]))


def made_with(environments: Iterable[tuple[Mapping[str, Any], bool]]) -> list[str]:
    """Versions and devices of runs; revisions that differ in nothing else stand together.

    Of each environment it is told whether the runs were to take the processor: a GPU beside it was not used then.
    """
    found: dict[str, set[str]] = {}
    for one, processor in environments:
        machine = (None if processor else one.get("gpu")) or one.get("processor") or "an unnamed processor"
        revisions = found.setdefault(f"PyTorch {one.get('torch')} on {machine}", set())
        revisions |= {str(one["revision"])} if one.get("revision") else set()
    return [
        name + (f" (revision{'s' if len(some) > 1 else ''} {', '.join(sorted(some))})" if some else "")
        for name, some in sorted(found.items())
    ]


_BLOCK = re.compile(r"(<!-- begin: ([a-z-]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def places(text: str) -> list[str]:
    """The names of a page's generated parts."""
    return [found[1] for found in _BLOCK.findall(text)]


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A page whose generated parts, each from `<!-- begin: NAME -->` to `<!-- end: NAME -->`, are put in anew.

    Raises ValueError where it has no place for one of them.
    """
    if missing := [name for name in blocks if name not in places(text)]:
        wanted = f"one with <!-- begin: {missing[0]} --> and <!-- end: {missing[0]} -->"
        raise ValueError(expected("--page", wanted, "one without"))

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n{blocks[found[2]].strip()}\n\n{found[3]}" if found[2] in blocks else found[0]

    return _BLOCK.sub(made, text)
