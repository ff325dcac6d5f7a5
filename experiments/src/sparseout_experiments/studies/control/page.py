"""The page of results as Markdown: figures, verdicts, limits, tables; for whatever part of the study is there."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from sparseout_experiments.studies.control import brief, describe, figures, limits, words
from sparseout_experiments.studies.control.analysis import LEAST_SEEDS
from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.grid import GRIDS, TITLE
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.training import atomic_files

_HEAD = (
    TITLE,
    "",
    "Does q control sparsity, and at what cost? [protocol.md](protocol.md) fixes what was run and what the verdicts "
    "mean. `sparseout reproduce control` makes this page from the files in `results/`; no "
    "number on it was typed.",
    "",
)
_CAPTIONS = {
    "dial": "**What q does.** Hoyer sparsity of the code against q (test data, evaluation mode, mean over seeds with "
    "95% intervals). Grey: without noise, and with Dropout of the same p.",
    "price": "**What it costs.** Reconstruction error against *measured* sparsity. Down is better, right is sparser; "
    "along a line q rises from right to left.",
    "dead": "**How many units are dead.** Units that fire for none of {samples}: they add to Hoyer over all units, not "
    "to that over live ones. {by_samples}",
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
    "small": "This budget can decide C1 and C4, for these networks. It cannot settle C2 and C3: networks are trained "
    "briefly on subsets, an under-fitted network does best with no noise or with the weaker one, and test sets are "
    "small. Their verdicts hold for this budget alone.",
    "gpu": "Networks and schedules are smaller than the paper's: the verdicts on C2 and C3 hold for this budget alone.",
    "full": "Options other than p are the networks' usual ones and were not tuned for any q.",
}


def write(records: Sequence[Record], page: Path) -> None:
    """Write the page and its figures, which lie in a folder `images` beside it."""
    runs = sum(len(record.rows) + len(record.failures) for record in records)
    pages.check(page, TITLE, runs)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = list(_HEAD)
    for budget, group in itertools.groupby(records, key=lambda record: record.budget):
        lines += _section(budget, list(group), images, page)
    pages.write(page, pages.wrapped("\n".join(lines)), runs)


def _section(budget: str, records: list[Record], images: Path, page: Path) -> list[str]:
    lines = [f"## Budget `{budget}`", "", _what(records), ""]
    lines += ["### Verdicts", "", *words.verdicts(records), "", _LIMITS[budget], "", *brief.notes(records), ""]
    if said := brief.in_short(records):
        lines += ["### In short", "", *(f"- {sentence}" for sentence in said), ""]
    for record in records:
        drawn = figures.draw(record)
        if not drawn:
            continue
        title = describe.title(record.task, record.data)
        lines += [f"### {title}", ""]
        for name, content in drawn.items():
            path = images / f"control-{budget}-{record.task}-{name}.png"
            atomic_files.write(path, content)
            caption = (
                _CAPTIONS[name]
                .format(
                    metric=GRIDS[record.task].metric,
                    samples=describe.samples(record),
                    by_samples=brief.by_samples(record),
                )
                .rstrip()
            )
            if name == "overview" and brief.nothing_dead(record):
                caption += " No unit is dead in any run, so live units are all units."
            caption += " Drawn by `sparseout reproduce control --render`."
            lines += [
                f"![{title}. {brief.picture(record, name)}]({os.path.relpath(path, page.parent)})",
                "",
                caption,
                "",
            ]
    lines += ["### Warnings and secondary contrasts", "", *words.secondary(records)]
    lines += [f"- {sentence}" for sentence in words.cautions(records)]
    lines += words.failures(records) or ["- No run failed."]
    lines += ["", "### Limits", ""]
    lines += [f"- {sentence}" for sentence in limits.limits(records)]
    lines += ["", "### What the next larger budget would settle", "", _NEXT[budget], "", *words.undecided(records), ""]
    lines += ["### Every contrast", "", _explained(), "", *words.contrast_table(records), ""]
    for record in records:
        lines += [f"### {describe.title(record.task, record.data)}: every setting", "", *words.table(record), ""]
        if GRIDS[record.task].tuned:
            lines += [*words.tuning(record), ""]
    return lines


def _what(records: Sequence[Record]) -> str:
    finished = sum(len(record.rows) for record in records)
    planned = sum(record.planned for record in records)
    failed = sum(len(record.failures) for record in records)
    return (
        f"{finished} of {planned} runs finished, {failed} failed; {words.hours(records):.1f} hours of running, one "
        f"after the other. Made with {' and with '.join(_places(records))}."
    )


def _places(records: Sequence[Record]) -> list[str]:
    return pages.made_with(
        (one, record.config.get("device") == "cpu") for record in records for one in record.environments
    )


def _explained() -> str:
    return (
        "± is half of a 95% t interval over seeds; n is the number of seeds with a value at every q, of which a "
        f"verdict takes {LEAST_SEEDS}. Slopes are per unit of q; the span is between the largest and the smallest "
        "mean. Own p is what tuning chose for each q, common p what it chose for q = 2; where all q's chose the same, "
        "the two are the same runs. Only the primary contrasts decide a claim; no level is corrected for their "
        "number. *Post hoc* contrasts were added after data had been seen (see Changes in the protocol) and decide "
        "nothing."
    )
