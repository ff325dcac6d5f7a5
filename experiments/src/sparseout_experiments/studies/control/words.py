"""Tables and sentences of the page of results, every number of them computed from the records."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from sparseout_experiments.studies.control.analysis import (
    POST_HOC,
    QUESTIONS,
    SOUND,
    UNDEFINED,
    Answer,
    Place,
    Question,
    alive,
    answer,
    both,
    collapsed,
    identity,
    rows_of,
    warned,
)
from sparseout_experiments.studies.control.collect import Record, Row
from sparseout_experiments.studies.control.describe import listed
from sparseout_experiments.studies.control.figures import mean
from sparseout_experiments.studies.control.grid import GRIDS, Setting, Task, settings
from sparseout_experiments.studies.engine.statistics import Interval

CLAIMS = {
    "C1": "Sparsity falls as q rises",
    "C2": "Image classification prefers denser activations",
    "C3": "Language modelling prefers sparser activations",
    "C4": "q = 2 is Dropout",
}
_NUMBER = re.compile(r"\d+(?:,\d\d\d)*(?:\.\d+)?")
_KINDS = 3  # of warnings are shown, the most frequent
_DIGITS = {"mse": 5, "error": 4, "perplexity": 2}


def answers(records: Sequence[Record], questions: Sequence[Question] = QUESTIONS) -> list[Answer]:
    """Every contrast of the protocol, or others."""
    by_task = {record.task: record for record in records}
    return [answer(question, by_task.get(question.task)) for question in questions]


def verdicts(records: Sequence[Record]) -> list[str]:
    """The table of the four claims."""
    found = [one for one in answers(records) if one.question.primary]
    lines = ["| claim | verdict | what it rests on |", "|---|---|---|"]
    c1 = [one for one in found if one.question.claim == "C1"]
    lost = listed(collapsed_q(records, c1[0].question))
    beside = f"; q = {lost}: collapsed networks, see below" if lost else ""
    lines.append(f"| C1 {CLAIMS['C1']} | **{both(c1)}** | {pair(c1)}{beside} |")
    for one in found:
        if one.question.claim != "C1":
            claim = one.question.claim
            lines.append(f"| {claim} {CLAIMS[claim]} | **{one.word}** | {rests(one)} |")
    word, pairs, same = identity(records)
    lines.append(f"| C4 {CLAIMS['C4']} | **{word}** | {same} of {pairs} pairs of runs agree to the last bit |")
    return lines


def collapsed_q(records: Sequence[Record], asked: Question) -> tuple[float, ...]:
    """The q's of a contrast whose networks collapsed."""
    return tuple(
        q
        for record in records
        if record.task == asked.task
        for q, some in rows_of(record, asked.scale, asked.gradient, asked.place).items()
        if collapsed(some)
    )


def pair(some: Sequence[Answer]) -> str:
    """What two contrasts over all and over live units rest on, with their words where these differ."""
    if all(math.isnan(one.slope.mean) for one in some):
        return some[0].why
    apart = len({one.word for one in some}) > 1
    return "; ".join(
        f"{_units(one.question)}: {one.word + ', ' if apart else ''}{rests(one, short=place > 0)}"
        for place, one in enumerate(some)
    )


def rests(one: Answer, *, short: bool = False) -> str:
    """The numbers that decided a contrast: for "no effect" the difference and the span, else the slope."""
    if math.isnan(one.slope.mean):
        return one.why
    digits = _slope_digits(one.question)
    if one.word == "no effect":
        what = "" if short else "largest q minus smallest "
        says = f"{what}{ends(one)}, means span {_span(one)}, margin {_margin(one.question)}"
    else:
        what = "" if short else f"slope of {_name(one.question)} "
        says = f"{what}{interval(one.slope, digits, signed=True)}{'' if short else ' per unit of q'}"
    if one.left_out and one.question.post_hoc != SOUND:
        says += f", without q = {listed(one.left_out)} (measure undefined)"
    return says + (f" ({one.why})" if one.why else "")


def secondary(records: Sequence[Record]) -> list[str]:
    """How the secondary contrasts came out, counted."""
    found: dict[str, Counter[str]] = {}
    for one, _ in _listed(records, QUESTIONS):
        if not one.question.primary and one.slope.n:
            found.setdefault(f"{one.question.claim}, {one.question.task}", Counter())[one.word] += 1
    return [
        f"- Secondary contrasts of {name}: {', '.join(f'{count} {word}' for word, count in words.most_common())}."
        for name, words in found.items()
    ]


def contrasts(records: Sequence[Record]) -> list[str]:
    """The table of every contrast, the primary ones and those that were added later marked."""
    lines = [
        "| claim | network | contrast | slope over q | largest q minus smallest | span of means | margin | n | word |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    count = sum(question.claim == "C1" and question.primary for question in QUESTIONS)
    for one, what in _listed(records, [*QUESTIONS[:count], *POST_HOC, *QUESTIONS[count:]]):
        asked = one.question
        numbers = "- | - | -"
        if not math.isnan(one.slope.mean):
            slope = interval(one.slope, _slope_digits(asked), signed=True)
            numbers = f"{slope} | {ends(one)} | {_span(one)}"
        mark = "**primary**: " if asked.primary else "*post hoc*: " if asked.post_hoc else ""
        word = f"{one.word} ({one.why})" if one.why else one.word
        lines.append(
            f"| {asked.claim} | {asked.task} | {mark}{what} | {numbers} | {_margin(asked)} | {one.slope.n} | {word} |"
        )
    return lines


def _listed(records: Sequence[Record], questions: Sequence[Question]) -> list[tuple[Answer, str]]:
    """Contrasts with their names; where no unit is dead, that over live units is that over all and is not repeated."""
    by_task = {record.task: record for record in records}
    found = []
    for one in answers(records, questions):
        asked = one.question
        same = asked.measure != "metric" and alive(by_task.get(asked.task), asked)
        if not (same and asked.measure.endswith("_live")):
            what = _asked(asked)
            found.append((one, what.replace("all units", "all = live units") if same else what))
    return found


def _asked(asked: Question) -> str:
    units = "" if asked.measure == "metric" else f", {_units(asked)}"
    place = f"p = {asked.place:g}" if isinstance(asked.place, float) else f"{asked.place} p"
    scale = "matched noise" if asked.scale == "matched" else "paper's scale"
    gradient = f", {asked.gradient}" if len(GRIDS[asked.task].gradients) > 1 else ""
    post_hoc = f", {asked.post_hoc}" if asked.post_hoc else ""
    return f"{_name(asked)}{units}, {scale}{gradient}, {place}{post_hoc}"


def _name(asked: Question) -> str:
    return GRIDS[asked.task].metric if asked.measure == "metric" else "Hoyer"


def _units(asked: Question) -> str:
    return "live units" if asked.measure.endswith("_live") else "all units"


def ends(one: Answer) -> str:
    """The difference between the largest and the smallest q."""
    asked = one.question
    return percent(one.ends) if asked.relative else interval(one.ends, _slope_digits(asked), signed=True)


def _span(one: Answer) -> str:
    return f"{100 * one.span:.2f}%" if one.question.relative else f"{one.span:.{_slope_digits(one.question)}f}"


def _margin(asked: Question) -> str:
    return "-" if asked.margin is None else f"{100 * asked.margin:g}%" if asked.relative else f"{asked.margin:g}"


def table(record: Record) -> list[str]:
    """Every setting of a task, over its seeds."""
    metric = GRIDS[record.task].metric
    lines = [
        f"| setting | value | n | {metric} (test) | {metric} (validation) | Hoyer | live units | dead units | "
        "samples without active unit | best epochs |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    digits = _DIGITS[metric]
    for setting, value, rows in _groups(record):
        cells = [interval(mean(rows, name), digits) for name in ("metric", "valid")]
        cells += [interval(mean(rows, name), 3) for name in ("hoyer", "hoyer_live")]
        cells += [f"{100 * mean(rows, 'dead').mean:.1f}%", _empty(rows), epochs(rows)]
        lines.append(f"| {setting.name} | {value} | {len(rows)} | {' | '.join(cells)} |")
    return lines


def _empty(rows: Sequence[Row]) -> str:
    """The mean share of samples without an active unit, and whether that makes the setting a collapsed one."""
    most = max(row.undefined for row in rows)
    said = f"{100 * mean(rows, 'undefined').mean:.1f}%"
    return f"{said}, at most {100 * most:.1f}%: **collapsed**" if collapsed(rows) else said


def epochs(rows: Sequence[Row]) -> str:
    """From which epochs the tested weights are."""
    found = sorted({row.best_epoch for row in rows if row.best_epoch is not None})
    return "-" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


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
        rows = warned(record)
        if rows:
            names = sorted({row.run.setting.name for row, _ in rows})
            said.append(
                f"{record.task}: in {len(rows)} runs more than {100 * UNDEFINED:g}% of the test samples have no active "
                f"unit and so no sparsity, at most {100 * max(share for _, share in rows):.1f}% ({', '.join(names)})."
            )
        kinds: dict[str, list[str]] = {}
        for warning in (warning for row in record.rows for warning in row.warnings):
            kinds.setdefault(_NUMBER.sub("", warning), []).append(warning)
        often = sorted(kinds.values(), key=len, reverse=True)
        said += [f"{record.task}: {len(some)} runs warn: {_merged(some)}" for some in often[:_KINDS]]
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
    said = f"{100 * found.mean:+.2f}%"
    return said if math.isnan(found.half) else f"{said} ± {100 * found.half:.2f}%"


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


def _merged(warnings: Sequence[str]) -> str:
    """One sentence for warnings that differ in their numbers alone, with the range of each number."""
    columns = zip(*(_NUMBER.findall(warning) for warning in warnings), strict=True)
    ends = iter([(min(column, key=_number), max(column, key=_number)) for column in columns])
    return _NUMBER.sub(lambda _: " to ".join(dict.fromkeys(next(ends))), warnings[0])


def _number(text: str) -> float:
    return float(text.replace(",", ""))
