"""The page of results as Markdown: figures, verdicts, limits, tables; for whatever part of the study is there."""

import itertools
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from sparseout.experiments import files
from sparseout.experiments.study import describe, figures, words
from sparseout.experiments.study.analysis import LEAST_SEEDS
from sparseout.experiments.study.collect import Record
from sparseout.experiments.study.grid import GRIDS

_CAPTIONS = {
    "dial": "Hoyer sparsity of the code against q (test data, evaluation mode, mean over seeds with 95% intervals). "
    "Grey: without noise, and with Dropout of the same p.",
    "price": "What it costs: reconstruction error against *measured* sparsity. Down is better, right is sparser.",
    "dead": "Units that fire for no test image. Where they are many, Hoyer over all units is mostly a count of them.",
    "overview": "Left: sparsity against q, at matched noise all q's at one p. Middle and right: the {metric} against q "
    "and against *measured* sparsity, each setting at its own p. Bars are 95% intervals over seeds; runs of one seed "
    "share weights and batches, so that the contrasts below, taken within seeds, can be sharper than the bars.",
}
_NEXT = {
    "small": "`--budget gpu` trains larger networks on all of MNIST, CIFAR-10 and WikiText-2, and tests on all test "
    "data. It can say whether the trends of error and perplexity are those of a network that needs regularisation, and "
    "shrinks the part of the intervals that comes from small test sets. It does not train the paper's own networks.",
    "gpu": "`--budget full` runs the paper's kinds of networks and schedules. It can say whether C2 and C3 hold where "
    "they were claimed.",
    "full": "This is the largest budget; what is undecided here needs more seeds.",
}
_LIMITS = {
    "small": "Networks are trained briefly on subsets, and a network that under-fits prefers no noise: what is said of "
    "error and perplexity is said of this budget alone. What is said of the dial (C1, C4) is said of these networks.",
    "gpu": "Networks and schedules are smaller than the paper's.",
    "full": "Options other than p are the networks' usual ones and were not tuned for any q.",
}
_SHARED = (
    "p was tuned on one seed out of two values.",
    "Noise acts after the second ReLU of a residual block; the code published with the paper has it before the norm.",
    "Hoyer depends on the number of units: networks of different width are not to be compared by it.",
)


def write(records: Sequence[Record], page: Path) -> None:
    """Write the page and its figures, which lie in a folder `images` beside it."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = _head(records)
    for budget, group in itertools.groupby(records, key=lambda record: record.budget):
        lines += _section(budget, list(group), images, page)
    files.write(page, "\n".join(_wrapped(lines)).rstrip() + "\n")


def _head(records: Sequence[Record]) -> list[str]:
    lines = [
        "# Results of the control study",
        "",
        "Does q control sparsity, and at what cost? What was run and what the words of the verdicts mean is fixed in "
        "[protocol.md](protocol.md). `sparseout reproduce control` makes this page from the files in `results/`; no "
        "number on it was typed.",
        "",
    ]
    return lines if records else [*lines, "No run has finished yet."]


def _section(budget: str, records: list[Record], images: Path, page: Path) -> list[str]:
    lines = [f"## Budget `{budget}`", "", words.short(records), "", _what(records), ""]
    for record in records:
        drawn = figures.draw(record)
        if not drawn:
            continue
        lines += [f"### {describe.title(record.task)}", ""]
        for name, content in drawn.items():
            path = images / f"control-{budget}-{record.task}-{name}.png"
            files.write(path, content)
            caption = _CAPTIONS[name].format(metric=GRIDS[record.task].metric)
            lines += [
                f"![{describe.title(record.task)}: {name}]({os.path.relpath(path, page.parent)})",
                "",
                caption,
                "",
            ]
    lines += ["### Verdicts", "", *words.verdicts(records), "", *words.secondary(records), ""]
    lines += [f"- {sentence}" for sentence in words.cautions(records)]
    failed = words.failures(records)
    lines += ["", *failed, ""] if failed else ["", "No run failed.", ""]
    lines += ["### Limits", "", _LIMITS[budget], ""]
    lines += [f"- {record.task}: {describe.sizes(record.task, budget)}; {_network(record)}" for record in records]
    lines += [f"- {sentence}" for sentence in _SHARED]
    lines += ["", "### What the next larger budget would settle", "", _NEXT[budget], "", *words.undecided(records), ""]
    lines += ["### Every contrast", "", _explained(), "", *words.contrasts(records), ""]
    for record in records:
        lines += [f"### {describe.title(record.task)}: every setting", "", *words.table(record), ""]
        if GRIDS[record.task].tuned:
            lines += [*words.tuning(record), ""]
    return lines


def _what(records: Sequence[Record]) -> str:
    finished = sum(len(record.rows) for record in records)
    planned = sum(record.planned for record in records)
    failed = sum(len(record.failures) for record in records)
    places = sorted({_place(environment) for record in records for environment in record.environments})
    return (
        f"{finished} of {planned} runs finished, {failed} failed; {words.hours(records):.1f} hours of running, one "
        f"after the other. Made with {' and with '.join(places)}."
    )


def _place(environment: dict[str, object]) -> str:
    machine = environment.get("gpu") or environment.get("processor") or "an unnamed processor"
    revision = environment.get("revision")
    return f"PyTorch {environment.get('torch')} on {machine}" + (f", revision {revision}" if revision else "")


def _network(record: Record) -> str:
    return describe.network(record.task, record.budget)


def _explained() -> str:
    return (
        "± is half of a 95% t interval over seeds; n is the number of seeds with a value at every q, of which a "
        f"verdict takes {LEAST_SEEDS}. Only the primary contrasts decide a claim; no level is corrected for their "
        "number."
    )


def _wrapped(lines: Sequence[str]) -> list[str]:
    """Prose in lines of 120 characters; tables, pictures and headings as they are."""
    found: list[str] = []
    for line in lines:
        whole = not line or line[0] in "|!#<"
        indent = "  " if line.startswith("- ") else ""
        found += [line] if whole else textwrap.wrap(line, 120, subsequent_indent=indent, break_long_words=False)
    return found
