"""What pages made from results share."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def wrapped(lines: Sequence[str]) -> str:
    """A page: prose in lines of 120 characters; tables, pictures and headings as they are."""
    found: list[str] = []
    for line in lines:
        whole = not line or line[0] in "|!#<"
        indent = "  " if line.startswith("- ") else ""
        found += [line] if whole else textwrap.wrap(line, 120, subsequent_indent=indent, break_long_words=False)
    return "\n".join(found).rstrip() + "\n"


def made_with(environments: Iterable[tuple[Mapping[str, Any], bool]]) -> list[str]:
    """What runs were made with; revisions that differ in nothing else stand together.

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


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A page with its generated parts, each between `<!-- NAME -->` and `<!-- end -->`, put in anew.

    Raises ValueError where a page has no such place.
    """
    for name, content in blocks.items():
        begin = f"<!-- {name} -->\n"
        before, found, rest = text.partition(begin)
        _, end, after = rest.partition("<!-- end -->")
        if not found or not end:
            raise ValueError(f"the page has no place between `<!-- {name} -->` and `<!-- end -->`")
        text = f"{before}{begin}\n{content.strip()}\n\n{end}{after}"
    return text
