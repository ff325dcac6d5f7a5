"""Pages that are made from results: Markdown templates with numbers filled in, or parts of a page between markers."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine.statistics import Interval
from sparseout_experiments.training import atomic_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RUNS = "<!-- made from {} runs -->"
_WHOLE = ("|", "!", "#", "<")  # begin lines of tables, pictures, headings and comments, which stay as they are


def rendered(package: str, template: str, **values: Any) -> str:
    """A Markdown template that lies in a package, with `values` filled in.

    Sentences stand in the template, numbers come through its filters, which give a dash for what is undefined: `fixed`,
    `percent`, `interval`, `short` (as with `:g`), `listed` and `range` of several numbers. `one_line` joins lines, and
    `cell` makes any text fit a table. A name without a value is an error.
    """
    return wrapped(_environment(package).get_template(template).render(values))


def html(package: str, template: str, **values: Any) -> str:
    """A page in HTML from a template that lies in a package; `values` are escaped."""
    return _environment(package, autoescape=True).get_template(template).render(values)


@cache  # and with it the compiled templates
def _environment(package: str, autoescape: bool = False) -> Environment:
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader(package, ""), autoescape=autoescape, **options)
    environment.filters |= {"fixed": fixed, "percent": percent, "interval": interval, "short": "{:g}".format}
    environment.filters |= {"listed": listed, "range": spread, "one_line": _one_line, "cell": _cell}
    return environment


def fixed(value: float | None, digits: int, signed: bool = False) -> str:
    """A number with so many digits after the point; what rounds to 0 has no minus."""
    return "-" if value is None or math.isnan(value) else f"{value:{'+' if signed else ''}z.{digits}f}"


def percent(value: float | Interval | None, digits: int = 0, signed: bool = False) -> str:
    """A fraction, or an interval of it, as a percentage."""
    if isinstance(value, Interval):
        half = "" if math.isnan(value.half) else f" ± {100 * value.half:.{digits}f}%"
        return percent(value.mean, digits, signed) + half
    return "-" if value is None or math.isnan(value) else f"{100 * value:{'+' if signed else ''}.{digits}f}%"


def interval(value: Interval, digits: int, signed: bool = False) -> str:
    """A mean and half the width of its interval."""
    half = "" if math.isnan(value.half) else f" ± {value.half:.{digits}f}"
    return fixed(value.mean, digits, signed) + half


def listed(values: Iterable[float]) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{value:g}" for value in values)


def spread(values: Iterable[float], digits: int | None = None, times: float = 1) -> str:
    """The least and the largest of numbers, each times a factor."""
    ends = sorted(times * value for value in values)
    shown = (
        [f"{value:g}" if digits is None else fixed(value, digits) for value in (ends[0], ends[-1])] if ends else ["-"]
    )
    return " to ".join(dict.fromkeys(shown))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;")


def wrapped(text: str) -> str:
    """Markdown with its prose in lines of 120 characters; tables, pictures and headings stay as they are."""
    blocks: list[str] = []  # paragraphs, and lines that stand for themselves
    prose = False
    for line in map(str.strip, text.splitlines()):
        whole = not line or line.startswith(_WHOLE)
        if prose and not whole and not line.startswith("- "):
            blocks[-1] += f" {line}"
        elif line or blocks[-1:] not in ([], [""]):  # one blank line is enough
            blocks.append(line)
        prose = not whole
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    for index, block in enumerate(blocks):
        if not block.startswith(_WHOLE):
            indent = "  " if block.startswith("- ") else ""
            blocks[index] = textwrap.fill(block, 120, subsequent_indent=indent, **options)
    return "\n".join(blocks).rstrip() + "\n"


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


def write(page: Path, text: str, runs: int) -> None:
    """Write a page that begins with its title, unless `check` objects."""
    check(page, text.partition("\n")[0], runs)
    atomic_files.write(page, f"{text.rstrip()}\n\n{_RUNS.format(runs)}\n")


def write_images(page: Path, figures: Mapping[str, "Figure"]) -> list[Path]:
    """Write figures as PNG to the folder `images` beside a page; return where."""
    from sparseout_experiments.studies.engine import style  # matplotlib takes a second to import

    images = {page.parent / "images" / f"{name}.png": style.png(figure) for name, figure in figures.items()}
    (page.parent / "images").mkdir(parents=True, exist_ok=True)
    for path, content in images.items():
        atomic_files.write(path, content)
    return list(images)


def made_with(environments: Iterable[Mapping[str, Any]], gpu: bool = False) -> str:
    """Versions and devices of runs; revisions that differ in nothing else stand together.

    Where runs were not to take a `gpu`, one beside the processor was not used.
    """
    revisions: dict[str, set[str]] = {}
    for environment in environments:
        machine = (environment.get("gpu") if gpu else None) or environment.get("processor") or "an unnamed processor"
        of_machine = revisions.setdefault(f"PyTorch {environment.get('torch')} on {machine}", set())
        of_machine |= {str(environment["revision"])} if environment.get("revision") else set()
    return " and with ".join(
        name + (f" (revision{'s' if len(known) > 1 else ''} {', '.join(sorted(known))})" if known else "")
        for name, known in sorted(revisions.items())
    )


_BLOCK = re.compile(r"(<!-- begin: ([a-z-]+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def parts(text: str) -> dict[str, str]:
    """The generated parts of a page, by name."""
    return {match[2]: match[3] for match in _BLOCK.finditer(text)}


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A page whose generated parts, each from `<!-- begin: NAME -->` to `<!-- end: NAME -->`, are put in anew.

    Raises ValueError where it has no place for one of them.
    """
    if missing := [name for name in blocks if name not in parts(text)]:
        wanted = f"one with <!-- begin: {missing[0]} --> and <!-- end: {missing[0]} -->"
        raise ValueError(expected("--page", wanted, "one without"))

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n{blocks[found[2]].strip()}\n\n{found[4]}" if found[2] in blocks else found[0]

    return _BLOCK.sub(made, text)
