"""The theory of docs/theory.md as numbers: check every statement, train what is to be trained, and fill in the page."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.theory import curves, statements, training
from sparseout_experiments.studies.theory.statements import Check
from sparseout_experiments.training import atomic_files
from sparseout_experiments.training.environment import environment, one_thread

KIND = "sparseout theory"
PARTS = len(statements.GROUPS) + 2 + len(training.TRAINED) * len(training.GRADIENTS) + len(training.KINDS)

Record = dict[str, Any]
OnProgress = Callable[[str], None]


def run(results: Path, on_progress: OnProgress, *, steps: int = training.STEPS, long: int = training.LONG) -> Record:
    """Check, train and write the file of results; `on_progress` hears the name of each part, `PARTS` times in all."""
    with one_thread():
        checks: list[Check] = []
        for name, group in statements.GROUPS.items():
            on_progress(name)
            checks += group()
        on_progress("curves")
        record: Record = {
            "environment": environment(),
            "penalties": curves.penalties(),
            "remainders": curves.remainders(),
            "ratios": curves.ratios(),
        }
        on_progress("the path of learned features")
        record["path"] = training.path(steps // 2)
        record["equivalence"] = []
        for q in training.TRAINED:
            for gradient in training.GRADIENTS:
                on_progress(f"training under the noise, q = {q:g}, {gradient}")
                record["equivalence"].append(training.equivalence(q, gradient, steps))
        record["rescaling"] = []
        for kind in training.KINDS:
            on_progress(f"rescaling, q = {kind.q:g}, {kind.gradient}")
            record["rescaling"].append(training.rescaling(kind, long))
    checks += statements.of_training(record)
    record["checks"] = [check._asdict() for check in checks]
    files.save(path_of(results), {"kind": KIND, **files.short(record)})
    return record


def path_of(results: Path) -> Path:
    """The file of results."""
    return results / "theory.json"


def load(results: Path) -> Record:
    """What the file of results holds. Raises ValueError where there is none, or it holds something else."""
    return files.load(path_of(results), KIND)


def checks_of(record: Record) -> list[Check]:
    """The checks of a record, in whose file an open end and a measurement that is no number are null."""
    nulls: Record = {"most": math.inf, "measured": math.nan}
    return [
        Check(**{name: nulls[name] if value is None else value for name, value in entry.items()})
        for entry in record["checks"]
    ]


def check_page(page: Path) -> str | None:
    """The text of a page; None where there is none. Raises ValueError for a page without blocks to fill in."""
    if not page.exists():
        return None
    text = page.read_text(encoding="utf-8")
    if not pages.parts(text):
        wanted = "a page with blocks of sparseout theory, from <!-- begin: NAME --> to <!-- end: NAME -->"
        raise ValueError(expected("--page", wanted, repr(str(page))))
    return text


def filled(text: str | None, record: Record, checks: Sequence[Check]) -> str:
    """A page whose blocks are made anew; where there is no text, blocks without prose."""
    made = pages.rendered(
        __package__,
        "page.md.j2",
        **record | {"checks": checks},
        made_with=pages.made_with([record["environment"]]),
        samples=statements.SAMPLES,
        infinity=math.inf,
        number=_number,
    )
    if text is None:
        return made
    there = pages.parts(text)
    return pages.filled(text, {name: part for name, part in pages.parts(made).items() if name in there})


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.2g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def render(record: Record, page: Path) -> list[Path]:
    """Fill in the page and draw its figures, which lie in a folder `images` beside it; return what was written."""
    from sparseout_experiments.studies.engine.style import style  # matplotlib takes a second to import
    from sparseout_experiments.studies.theory.figures import FIGURES

    text = filled(check_page(page), record, checks_of(record))
    with style():
        images = pages.write_images(page, {f"theory-{name}": draw(record) for name, draw in FIGURES.items()})
    atomic_files.write(page, text)
    return [page, *images]
