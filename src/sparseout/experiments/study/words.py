"""Tables and sentences of the page of results, every number of them computed from the records."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from sparseout.experiments.statistics import Interval
from sparseout.experiments.study.analysis import (
    QUESTIONS,
    UNDEFINED,
    Answer,
    Place,
    Question,
    answer,
    both,
    identity,
    none_is_best,
    warned,
)
from sparseout.experiments.study.collect import Record, Row
from sparseout.experiments.study.describe import listed
from sparseout.experiments.study.figures import mean
from sparseout.experiments.study.grid import GRIDS, Setting, Task, settings

CLAIMS = {
    "C1": "Sparsity falls as q rises",
    "C2": "Image classification prefers denser activations",
    "C3": "Language modelling prefers sparser activations",
    "C4": "q = 2 is Dropout",
}
_DIGITS = {"mse": 5, "error": 4, "perplexity": 2}
_MEASURES = {"hoyer": "Hoyer, all units", "hoyer_live": "Hoyer, live units", "metric": "metric"}


def answers(records: Sequence[Record]) -> list[Answer]:
    """Every contrast of the protocol."""
    by_task = {record.task: record for record in records}
    return [answer(question, by_task.get(question.task)) for question in QUESTIONS]


def verdicts(records: Sequence[Record]) -> list[str]:
    """The table of the four claims."""
    found = [one for one in answers(records) if one.question.primary]
    lines = ["| claim | verdict | what it rests on |", "|---|---|---|"]
    c1 = [one for one in found if one.question.claim == "C1"]
    rests = "; ".join(f"{_MEASURES[one.question.measure].split(', ')[1]}: {_rests(one)}" for one in c1)
    lines.append(f"| C1 {CLAIMS['C1']} | **{both(c1)}** | {c1[0].question.task}; {rests} |")
    for one in found:
        if one.question.claim != "C1":
            claim = one.question.claim
            lines.append(f"| {claim} {CLAIMS[claim]} | **{one.word}** | {_rests(one)} |")
    word, pairs, same = identity(records)
    lines.append(f"| C4 {CLAIMS['C4']} | **{word}** | {same} of {pairs} pairs of runs agree to the last bit |")
    return lines


def short(records: Sequence[Record]) -> str:
    """The words of the four claims in one line."""
    cells = (line.strip("| ").split(" | ")[:2] for line in verdicts(records)[2:])
    return " · ".join(f"{claim}: {word}" for claim, word in cells) + "."


def secondary(records: Sequence[Record]) -> list[str]:
    """How the secondary contrasts came out, counted."""
    found: dict[str, Counter[str]] = {}
    for one in answers(records):
        if not one.question.primary and one.slope.n:
            found.setdefault(f"{one.question.claim}, {one.question.task}", Counter())[one.word] += 1
    return [
        f"- Secondary contrasts of {name}: {', '.join(f'{count} {word}' for word, count in words.most_common())}."
        for name, words in found.items()
    ]


def _rests(one: Answer) -> str:
    if math.isnan(one.slope.mean):
        return one.why
    digits = _slope_digits(one.question)
    says = f"slope over q {interval(one.slope, digits, signed=True)} a unit of q, {one.slope.n} seeds"
    if one.left_out:
        says += f", without q = {listed(one.left_out)} (measure undefined)"
    return says + (f" ({one.why})" if one.why else "")


def contrasts(records: Sequence[Record]) -> list[str]:
    """The table of every contrast, the primary ones marked."""
    lines = [
        "| claim | network | contrast | slope over q | largest q minus smallest | margin | n | word |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for one in answers(records):
        asked = one.question
        if math.isnan(one.slope.mean):
            numbers = "- | -"
        else:
            ends = percent(one.ends) if asked.relative else interval(one.ends, _slope_digits(asked), signed=True)
            numbers = f"{interval(one.slope, _slope_digits(asked), signed=True)} | {ends}"
        margin = "-" if asked.margin is None else f"{100 * asked.margin:g}%" if asked.relative else f"{asked.margin:g}"
        mark = "**primary**: " if asked.primary else ""
        word = f"{one.word} ({one.why})" if one.why else one.word
        lines.append(
            f"| {asked.claim} | {asked.task} | {mark}{_asked(asked)} | {numbers} | {margin} | {one.slope.n} | {word} |"
        )
    return lines


def _asked(asked: Question) -> str:
    measure = GRIDS[asked.task].metric if asked.measure == "metric" else _MEASURES[asked.measure]
    place = f"p = {asked.place:g}" if isinstance(asked.place, float) else f"{asked.place} p"
    scale = "matched noise" if asked.scale == "matched" else "paper's scale"
    gradient = f", {asked.gradient}" if len(GRIDS[asked.task].gradients) > 1 else ""
    return f"{measure}, {scale}{gradient}, {place}"


def table(record: Record) -> list[str]:
    """Every setting of a task, over its seeds."""
    metric = GRIDS[record.task].metric
    lines = [
        f"| setting | value | n | {metric} (test) | {metric} (validation) | Hoyer | live units | dead | undefined |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    digits = _DIGITS[metric]
    for setting, value, rows in _groups(record):
        cells = [interval(mean(rows, name), digits) for name in ("metric", "valid")]
        cells += [interval(mean(rows, name), 3) for name in ("hoyer", "hoyer_live")]
        cells += [f"{100 * mean(rows, name).mean:.1f}%" for name in ("dead", "undefined")]
        lines.append(f"| {setting.name} | {value} | {len(rows)} | {' | '.join(cells)} |")
    return lines


def tuning(record: Record) -> list[str]:
    """The trials of tuning and what they chose."""
    metric = GRIDS[record.task].metric
    lines = [f"| setting | trials: {metric} on validation data | chosen |", "|---|---|---|"]
    for setting in settings(record.task):
        tried = [
            row for row in record.rows if row.run.setting == setting and row.run.role == "tuning" and row.run.value
        ]
        chosen = record.chosen.get(setting)
        if tried:
            said = "; ".join(f"{_value(row)}: {row.valid:.{_DIGITS[metric]}f}" for row in tried)
            lines.append(f"| {setting.name} | {said} | {'-' if chosen is None else f'{chosen.value:g}'} |")
    return lines


def failures(records: Sequence[Record]) -> list[str]:
    """What did not finish, one line a setting and reason."""
    found = Counter(
        (record.task, one.run.setting.name, "" if one.run.value is None else f"{one.run.value.value:g}", one.reason)
        for record in records
        for one in record.failures
    )
    return [
        f"- {task}, {name}{f', {value}' if value else ''}: {count} run{'s' if count > 1 else ''} failed: {reason}"
        for (task, name, value, reason), count in found.items()
    ]


def cautions(records: Sequence[Record]) -> list[str]:
    """What the protocol wants said beside the verdicts, where it holds."""
    said = []
    for record in records:
        if record.missing:
            said.append(f"**{record.task}: {record.missing} of {record.planned} runs are not there yet.**")
        best = none_is_best(record)
        if best and record.task != "autoencoder":
            said.append(
                f"{record.task}: without any noise the {GRIDS[record.task].metric} on validation data is better than "
                "at every q at matched noise. The network gains nothing from noise at this budget, so the direction of "
                "the trend says little about the claim as it was meant."
            )
        elif best:
            said.append(
                "autoencoder: the error is lowest without any noise; its figures show a dial and its price, not a gain."
            )
        rows = warned(record)
        if rows:
            names = sorted({row.run.setting.name for row, _ in rows})
            said.append(
                f"{record.task}: in {len(rows)} runs more than {100 * UNDEFINED:g}% of the test samples have no active "
                f"unit and so no sparsity, at most {100 * max(share for _, share in rows):.1f}% ({', '.join(names)})."
            )
        warnings = Counter(_kind(warning) for row in record.rows for warning in row.warnings)
        said += [f"{record.task}: {count} runs warn: {warning}" for warning, count in warnings.most_common(3)]
        lowest = [
            setting.name for setting, value in record.chosen.items() if _lowest(record.task, setting, value.value)
        ]
        noisy = [setting for setting in record.chosen if setting.method != "none"]
        if noisy and 2 * len(lowest) > len(noisy):
            said.append(
                f"{record.task}: {len(lowest)} of {len(noisy)} settings chose the smaller p that was tried; the grid "
                "of p may be too high."
            )
    return said


def undecided(records: Sequence[Record]) -> list[str]:
    """The primary contrasts that have no word yet, and how wide their intervals are."""
    found = []
    for one in answers(records):
        asked = one.question
        if not asked.primary or one.word != "undecided" or math.isnan(one.ends.half):
            continue
        width = f"{100 * one.ends.half:.2g}%" if asked.relative else f"{one.ends.half:.2g}"
        if asked.margin is not None and one.ends.half > asked.margin:
            margin = f"{100 * asked.margin:g}%" if asked.relative else f"{asked.margin:g}"
            times = one.ends.half / asked.margin
            found.append(
                f"- {asked.claim} ({_asked(asked)}): the difference between the extreme q's is known to ± {width}, the "
                f"margin is {margin}. At the same spread of seeds it would take about {times**2:.0f} times as many "
                "seeds, or test data and training that vary less."
            )
        else:
            found.append(f"- {asked.claim} ({_asked(asked)}): {one.why}; half width ± {width}.")
    return found


def interval(found: Interval, digits: int, signed: bool = False) -> str:
    """A mean and half its interval; a dash where undefined."""
    if math.isnan(found.mean):
        return "-"
    text = f"{found.mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(found.half) else f"{text} ± {found.half:.{digits}f}"


def percent(found: Interval) -> str:
    """A relative difference."""
    return f"{100 * found.mean:+.2f}% ± {100 * found.half:.2f}%"


def hours(records: Iterable[Record]) -> float:
    """The time that the runs took, one after the other."""
    return sum(row.seconds for record in records for row in record.rows) / 3600


def _groups(record: Record) -> list[tuple[Setting, str, list[Row]]]:
    groups: dict[tuple[Setting, str], list[Row]] = {}
    for row in record.rows:
        if row.run.role != "tuning":
            note = ", p of q = 2" if row.run.role == "common" else ""
            groups.setdefault((row.run.setting, _value(row) + note), []).append(row)
    methods = ("none", "dropout", "sparseout")

    def order(key: tuple[Setting, str]) -> tuple[int, str, str, str, float]:
        setting, value = key
        return methods.index(setting.method), setting.scale or "", setting.gradient or "", value, setting.q or 0.0

    return [(*key, groups[key]) for key in sorted(groups, key=order)]


def _value(row: Row) -> str:
    value = row.run.value
    return "" if value is None else f"{value.option.replace('_', ' ')} = {value.value:g}"


def _slope_digits(asked: Question) -> int:
    return _DIGITS[GRIDS[asked.task].metric] if asked.measure == "metric" else 4


def _lowest(task: Task, setting: Setting, value: float) -> bool:
    place: Place = min(GRIDS[task].p)
    return setting.method != "none" and value == place


def _kind(warning: str) -> str:
    """A warning without its numbers, so that runs that say the same are counted together."""
    return re.sub(r"[+-]?\d[\d.,]*", "x", warning)
