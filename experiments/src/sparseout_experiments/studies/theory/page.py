"""The page: prose of its own, in which what stands between markers is made from the results."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.theory import figures
from sparseout_experiments.studies.theory.statements import SAMPLES, Check
from sparseout_experiments.training import atomic_files

Record = Mapping[str, Any]

_STATEMENTS = {
    "moments": "Every central moment of the noise is of the order of p",
    "gaussian": "Gaussian: E[loss] = loss + R, for q = 0 to 3 and p = 0.25, 0.5",
    "marginals": "Exact marginals of the other families",
    "monte-carlo": f"The library's noise gives these, {SAMPLES:,} draws, q = 0 to 3, p = 0.25",
    "order-3": "The remainder is of third order in the amplitude, q = 0 to 3",
    "order-4": "It is of fourth order at p = 0.5, and where A''' = 0",
    "small-p": "It is not small in p, q = 1",
    "dropout": "q = 2 is the penalty of Dropout",
    "count": "q = 0 counts non-zeros",
    "exact": "\"exact\" follows loss + R in features, weights and bias",
    "detached": "\"detached\" multiplies the direct term by 2/q and nothing else",
    "no-loss": "Unless q = 2 it is the gradient of no loss",
    "fixed-weights": "With fixed weights it is that of one for the Gaussian alone",
    "rescaling": "R changes when layers are rescaled",
    "no-force": "\"detached\" has no force along the rescaling",
    "force": "\"exact\" has",
    "matched": "With scale=\"matched\" R does not change, and \"exact\" still pushes",
    "escape": "Networks of two layers obey that",
    "equivalence": "Training under the noise is training under the penalty; must be nearer than q + 0.1",
    "equivalence-detached": "Under \"detached\", weights fixed, the penalty is (2/q) R",
    "moved": "Dropped units are moved, not zeroed",
    "tails": "Slopes have tails of exponent 2/(2 - q)",
}  # fmt: skip

_ALTS = {
    "penalty": "What the noise adds to the loss against q, for three families: R, exact value and estimates",
    "remainder": "Distance of R from the exact value against the amplitude, and their ratio against p",
    "balls": "Contours of L_q balls, and the force on a feature against its size",
    "path": "Twelve features of one digit against q: the smaller q, the fewer are left",
    "training": "Features learned under the noise against those learned under the penalty: they lie on the diagonal",
    "rescaling": "Balance of two layers and size of the features during training under both gradients",
}


def write(record: Record, checks: Sequence[Check], page: Path) -> list[Path]:
    """Draw the figures, fill in the page's blocks, and return what was written."""
    text = read(page)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    written = [page]
    for name, content in figures.draw(record).items():
        written.append(images / f"theory-{name}.png")
        atomic_files.write(written[-1], content)
    atomic_files.write(page, fill(text, record, checks))
    return written


def read(page: Path) -> str:
    """The text of a page; where there is none, one of blocks without prose.

    Raises ValueError for a page without our blocks, or with one that is none of ours or does not end.
    """
    if not page.exists():
        return blank()
    text = page.read_text(encoding="utf-8")
    begun, whole = re.findall(r"<!-- begin: (.*?) -->", text), pages.places(text)
    wanted = "a page with blocks of sparseout theory, from <!-- begin: NAME --> to <!-- end: NAME -->"
    if not begun:
        raise ValueError(expected("--page", wanted, f"{str(page)!r}, which has none"))
    if wrong := [name for name in begun if name not in BLOCKS or name not in whole]:
        raise ValueError(expected("--page", wanted, f"{str(page)!r}, with {wrong[0]!r}"))
    return text


def blank() -> str:
    """The page without its prose."""
    blocks = (f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in BLOCKS)
    return "# The theory, checked\n\n" + "\n".join(blocks)


def fill(text: str, record: Record, checks: Sequence[Check]) -> str:
    """The text with all that stands between its markers made anew."""
    return pages.filled(text, {name: BLOCKS[name](record, checks) for name in pages.places(text)})


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.2g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def _range(check: Check) -> str:
    if check.most == float("inf"):
        return f"≥ {_number(check.least)}" if check.least else ""
    if check.least == check.most:
        return f"= {_number(check.most)}"
    return f"{_number(check.least)} to {_number(check.most)}" if check.least else f"≤ {_number(check.most)}"


def _summary(record: Record, checks: Sequence[Check]) -> str:
    holding = sum(check.holds for check in checks)
    made = pages.made_with([(record["environment"], True)])[0]
    return pages.wrapped(f"{holding} of {len(checks)} checks hold. Made with {made}.")


def _table(record: Record, checks: Sequence[Check]) -> str:
    lines = ["| statement | measured | value | must be | holds |", "|---|---|--:|--:|---|"]
    order = list(_STATEMENTS)
    before = ""
    for check in sorted(checks, key=lambda check: order.index(check.statement)):
        title = _STATEMENTS[check.statement] if check.statement != before else ""
        before = check.statement
        of = check.of.replace("|", "\\|")
        value, holds = _number(check.measured), "yes" if check.holds else "**no**"
        lines.append(f"| {title} | {of} | {value} | {_range(check)} | {holds} |")
    return "\n".join(lines)


def _training(record: Record, checks: Sequence[Check]) -> str:
    lines = [
        "| q | gradient | penalty | distance | to q + 0.1 | Hoyer, noise | Hoyer, penalty | largest gradient |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for one in record["equivalence"]:
        penalty = "R" if one["gradient"] == "exact" else "(2/q) R"
        noise, wanted = one["hoyer"]["noise"], one["hoyer"]["penalty"]
        lines.append(
            f"| {one['q']:g} | {one['gradient']} | {penalty} | {one['distance']:.4f} | {one['near']:.4f} "
            f"| {noise:.3f} | {wanted:.3f} | {one['largest_gradient']:.1f} |"
        )
    return "\n".join(lines)


def _rescaling(record: Record, checks: Sequence[Check]) -> str:
    lines = [
        "| q | gradient | weight decay | balance at the end | predicted | features, rms | R | loss |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in record["rescaling"]:
        last = one["rows"][-1]
        settled = (2 - one["q"]) * last["penalty"] / one["decay"] if one["decay"] else last["predicted"]
        predicted = "0" if one["gradient"] == "detached" else f"{settled:.1f}"
        lines.append(
            f"| {one['q']:g} | {one['gradient']} | {one['decay']:g} | {last['balance']:.1f} | {predicted} "
            f"| {last['rms']:.2f} | {last['penalty']:.2f} | {last['loss']:.2f} |"
        )
    return "\n".join(lines)


def _figure(name: str) -> Callable[[Record, Sequence[Check]], str]:
    return lambda record, checks: f"![{_ALTS[name]}](images/theory-{name}.png)"


BLOCKS: dict[str, Callable[[Record, Sequence[Check]], str]] = {
    "summary": _summary,
    "statements": _table,
    "training": _training,
    "rescaling": _rescaling,
    **{f"figure-{name}": _figure(name) for name in figures.FIGURES},
}
