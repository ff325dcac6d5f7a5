"""Tables and sentences of the page of results, every number of them computed from the records."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from sparseout_experiments.studies.control.analysis import (
    CONTRASTS,
    POST_HOC,
    SOUND,
    UNDEFINED,
    Contrast,
    ContrastResult,
    PChoice,
    alive,
    both,
    collapsed,
    evaluate,
    identity,
    rows_of,
    warned,
)
from sparseout_experiments.studies.control.collect import Record, Row
from sparseout_experiments.studies.control.describe import NETWORKS, listed, samples
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


def contrast_results(records: Sequence[Record], contrasts: Sequence[Contrast] = CONTRASTS) -> list[ContrastResult]:
    """Every contrast of the protocol, or others."""
    by_task = {record.task: record for record in records}
    return [evaluate(contrast, by_task.get(contrast.task)) for contrast in contrasts]


def verdicts(records: Sequence[Record]) -> list[str]:
    """The table of the four claims."""
    found = [result for result in contrast_results(records) if result.contrast.primary]
    lines = ["| claim | verdict | evidence |", "|---|---|---|"]
    c1 = [result for result in found if result.contrast.claim == "C1"]
    lost = listed(collapsed_q(records, c1[0].contrast))
    note = f"; q = {lost}: collapsed networks, see below" if lost else ""
    lines.append(f"| C1 {CLAIMS['C1']} | **{both(c1)}** | in the {network(c1[0])}, {pair(c1)}{note} |")
    for result in found:
        if result.contrast.claim != "C1":
            claim = result.contrast.claim
            said = f"in the {network(result)}, {evidence(result)}"
            lines.append(f"| {claim} {CLAIMS[claim]} | **{result.verdict}** | {said} |")
    verdict, pairs, same = identity(records)
    lines.append(f"| C4 {CLAIMS['C4']} | **{verdict}** | {same} of {pairs} pairs of runs agree to the last bit |")
    return lines


def network(result: ContrastResult) -> str:
    """The network that a contrast is about."""
    return NETWORKS[result.contrast.task]


def collapsed_q(records: Sequence[Record], contrast: Contrast) -> tuple[float, ...]:
    """The q's of a contrast whose networks collapsed."""
    return tuple(
        q
        for record in records
        if record.task == contrast.task
        for q, some in rows_of(record, contrast.scale, contrast.gradient, contrast.p).items()
        if collapsed(some)
    )


def pair(some: Sequence[ContrastResult]) -> str:
    """The evidence of two contrasts, over all and over live units, with their verdicts where these differ."""
    if all(math.isnan(result.slope.mean) for result in some):
        return some[0].why
    apart = len({result.verdict for result in some}) > 1
    return "; ".join(
        f"{_units(result.contrast)}: {result.verdict + ', ' if apart else ''}{evidence(result, short=index > 0)}"
        for index, result in enumerate(some)
    )


def evidence(result: ContrastResult, *, short: bool = False) -> str:
    """The numbers that decided a contrast: for "no effect" the difference and the span, else the slope."""
    if math.isnan(result.slope.mean):
        return result.why
    digits = _slope_digits(result.contrast)
    if result.verdict == "no effect":
        what = "" if short else "largest q minus smallest "
        says = f"{what}{ends(result)}, means span {_span(result)}, margin {_margin(result.contrast)}"
    else:
        what = "" if short else f"slope of {_name(result.contrast)} "
        says = f"{what}{interval(result.slope, digits, signed=True)}{'' if short else ' per unit of q'}"
    if result.left_out and result.contrast.post_hoc != SOUND:
        says += f", without q = {listed(result.left_out)} (measure undefined)"
    return says + (f" ({result.why})" if result.why else "")


def secondary(records: Sequence[Record]) -> list[str]:
    """Counts of the verdicts on secondary contrasts."""
    found: dict[str, Counter[str]] = {}
    for result, _ in _listed(records, CONTRASTS):
        if not result.contrast.primary and result.slope.n:
            found.setdefault(f"{result.contrast.claim}, {result.contrast.task}", Counter())[result.verdict] += 1
    return [
        f"- Secondary contrasts of {name}: {', '.join(f'{count} {verdict}' for verdict, count in some.most_common())}."
        for name, some in found.items()
    ]


def contrast_table(records: Sequence[Record]) -> list[str]:
    """The table of every contrast, the primary ones and those that were added later marked."""
    headings = "claim, network, contrast, slope over q, largest q minus smallest, span of means, margin, n, verdict"
    lines = [f"| {headings.replace(', ', ' | ')} |", "|---|---|---|--:|--:|--:|--:|--:|---|"]
    count = sum(contrast.claim == "C1" and contrast.primary for contrast in CONTRASTS)
    for result, what in _listed(records, [*CONTRASTS[:count], *POST_HOC, *CONTRASTS[count:]]):
        contrast = result.contrast
        numbers = "- | - | -"
        if not math.isnan(result.slope.mean):
            slope = interval(result.slope, _slope_digits(contrast), signed=True)
            numbers = f"{slope} | {ends(result)} | {_span(result)}"
        mark = "**primary**: " if contrast.primary else "*post hoc*: " if contrast.post_hoc else ""
        verdict = f"{result.verdict} ({result.why})" if result.why else result.verdict
        cells = (contrast.claim, contrast.task, mark + what, numbers, _margin(contrast), f"{result.slope.n}", verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _listed(records: Sequence[Record], contrasts: Sequence[Contrast]) -> list[tuple[ContrastResult, str]]:
    """Contrasts with their names; where no unit is dead, that over live units is that over all and is not repeated."""
    by_task = {record.task: record for record in records}
    found = []
    for result in contrast_results(records, contrasts):
        contrast = result.contrast
        same = contrast.measure != "metric" and alive(by_task.get(contrast.task), contrast)
        if not (same and contrast.measure.endswith("_live")):
            what = _described(contrast)
            found.append((result, what.replace("all units", "all = live units") if same else what))
    return found


def _described(contrast: Contrast) -> str:
    units = "" if contrast.measure == "metric" else f", {_units(contrast)}"
    p = f"p = {contrast.p:g}" if isinstance(contrast.p, float) else f"{contrast.p} p"
    scale = "matched noise" if contrast.scale == "matched" else "paper's scale"
    gradient = f", {contrast.gradient}" if len(GRIDS[contrast.task].gradients) > 1 else ""
    post_hoc = f", {contrast.post_hoc}" if contrast.post_hoc else ""
    return f"{_name(contrast)}{units}, {scale}{gradient}, {p}{post_hoc}"


def _name(contrast: Contrast) -> str:
    return GRIDS[contrast.task].metric if contrast.measure == "metric" else "Hoyer"


def _units(contrast: Contrast) -> str:
    return "live units" if contrast.measure.endswith("_live") else "all units"


def ends(result: ContrastResult) -> str:
    """The difference between the largest and the smallest q."""
    contrast = result.contrast
    return percent(result.ends) if contrast.relative else interval(result.ends, _slope_digits(contrast), signed=True)


def _span(result: ContrastResult) -> str:
    return (
        f"{100 * result.span:.2f}%" if result.contrast.relative else f"{result.span:.{_slope_digits(result.contrast)}f}"
    )


def _margin(contrast: Contrast) -> str:
    return (
        "-"
        if contrast.margin is None
        else f"{100 * contrast.margin:g}%"
        if contrast.relative
        else f"{contrast.margin:g}"
    )


def table(record: Record) -> list[str]:
    """Every setting of a task, over its seeds."""
    metric = GRIDS[record.task].metric
    lines = [
        f"| setting | value | n | {metric} (test) | {metric} (validation) | Hoyer | live units | dead units, over "
        f"{samples(record)} | samples without active unit | best epochs |",
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
    """The epochs after which the tested weights were taken."""
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
    """Failed runs, one line a setting and reason."""
    found = Counter(
        (
            record.task,
            result.run.setting.name,
            "" if result.run.value is None else f"{result.run.value.value:g}",
            result.reason,
        )
        for record in records
        for result in record.failures
    )
    return [
        f"- {task}, {name}{f', {value}' if value else ''}: {count} run{'s' if count > 1 else ''} failed: {reason}"
        for (task, name, value, reason), count in found.items()
    ]


def cautions(records: Sequence[Record]) -> list[str]:
    """Warnings that the protocol wants beside the verdicts."""
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
        for some in often[:_KINDS]:
            over = f" (over {samples(record)})" if "are dead:" in some[0] else ""  # in older results
            said.append(f"{record.task}: {len(some)} runs warn: {_merged(some)}{over}")
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
    """The primary contrasts that are undecided, and how wide their intervals are."""
    found = []
    for result in contrast_results(records):
        contrast = result.contrast
        if not contrast.primary or result.verdict != "undecided" or math.isnan(result.ends.half):
            continue
        width = f"{100 * result.ends.half:.2g}%" if contrast.relative else f"{result.ends.half:.2g}"
        if contrast.margin is not None and result.ends.half > contrast.margin:
            margin = f"{100 * contrast.margin:g}%" if contrast.relative else f"{contrast.margin:g}"
            times = result.ends.half / contrast.margin
            found.append(
                f"- {contrast.claim} ({_described(contrast)}): the difference between the extreme q's is known to ± "
                f"{width}, the margin is {margin}. At the same spread of seeds it would take about "
                f"{times**2:.0f} times as many seeds, or test data and training that vary less."
            )
        else:
            found.append(f"- {contrast.claim} ({_described(contrast)}): {result.why}; half width ± {width}.")
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


def _slope_digits(contrast: Contrast) -> int:
    return _DIGITS[GRIDS[contrast.task].metric] if contrast.measure == "metric" else 4


def _lowest(task: Task, setting: Setting, value: float) -> bool:
    p: PChoice = min(GRIDS[task].p)
    return setting.method != "none" and value == p


def _merged(warnings: Sequence[str]) -> str:
    """One sentence for warnings that differ in their numbers alone, with the range of each number."""
    columns = zip(*(_NUMBER.findall(warning) for warning in warnings), strict=True)
    ends = iter([(min(column, key=_number), max(column, key=_number)) for column in columns])
    return _NUMBER.sub(lambda _: " to ".join(dict.fromkeys(next(ends))), warnings[0])


def _number(text: str) -> float:
    return float(text.replace(",", ""))
