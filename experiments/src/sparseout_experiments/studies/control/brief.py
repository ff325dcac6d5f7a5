"""The notes below the verdicts, and the study in short; every number is computed."""

import math
from collections.abc import Callable, Sequence

from sparseout_experiments.studies.control import words
from sparseout_experiments.studies.control.analysis import (
    COLLAPSED,
    CONTRASTS,
    LAST,
    POST_HOC,
    SOUND,
    Measure,
    PChoice,
    alive,
    both,
    collapsed,
    curve_of,
    none_is_best,
    rows_of,
)
from sparseout_experiments.studies.control.collect import Record, Row
from sparseout_experiments.studies.control.describe import NETWORKS, listed, samples
from sparseout_experiments.studies.control.figures import mean, plain_rows
from sparseout_experiments.studies.control.grid import GRIDS
from sparseout_experiments.studies.engine.statistics import Interval, direction, t_interval

Rows = dict[float, list[Row]]
_DIGITS = {"mse": 4, "error": 3, "perplexity": 1, "hoyer": 3, "hoyer_live": 3}
_COMPARED: tuple[tuple[str, Measure, int], ...] = (
    ("Hoyer", "hoyer", _DIGITS["hoyer"]),
    ("error", "metric", _DIGITS["mse"]),
)
_PLACES: tuple[PChoice, PChoice] = ("own", "common")
_SCALES = {"matched": "matched noise", "paper": "the paper's scale"}
_METRICS = {"mse": "reconstruction error (MSE)", "error": "classification error", "perplexity": "perplexity"}


def notes(records: Sequence[Record]) -> list[str]:
    """Notes on the verdicts: missing runs, other networks, collapse, sensitivity, under-fitting."""
    said = [
        f"- **{record.task}: {record.missing} of {record.planned} runs are not there yet.**"
        for record in records
        if record.missing > 0
    ]
    said += _elsewhere(records)
    for record in records:
        if record.task == "autoencoder":
            said += _collapse(record) + _sensitivity(record)
    for record in records:
        if none_is_best(record):
            metric = GRIDS[record.task].metric
            text = f"- {record.task}: without any noise the {metric} on validation data is better than at every q at "
            if record.task == "autoencoder":
                said.append(text + "matched noise. What is shown is control and what it costs, not a gain.")
            else:
                said.append(
                    text + "matched noise. The network gains nothing from noise at this budget, so the direction of "
                    "the trend says little about the claim as it was meant."
                )
    return said


def _elsewhere(records: Sequence[Record]) -> list[str]:
    """C1 in the networks that do not decide it."""
    wanted = ("C1", "hoyer", "matched")
    found = [
        f"{words.network(result)}: {result.verdict}, {words.evidence(result)}"
        for result in words.contrast_results(records)
        if result.contrast[0:1] + result.contrast[2:4] == wanted and result.contrast.task != "autoencoder"
        if result.slope.n
    ]
    if not found:
        return []
    return [
        f"- **C1 is about the autoencoder.** In the other networks, at matched noise and one p: {'; '.join(found)}."
    ]


def _collapse(record: Record) -> list[str]:
    """The q's of C1's contrast whose networks collapsed."""
    contrast = next(one for one in CONTRASTS if one.primary and one.claim == "C1")
    rows = rows_of(record, contrast.scale, contrast.gradient, contrast.p)
    lost = {q: some for q, some in rows.items() if collapsed(some)}
    if not lost:
        return []
    every = [row for some in lost.values() for row in some]
    emptiest = max(record.rows, key=lambda row: row.undefined)
    where = f"{emptiest.run.setting.name}, p = {emptiest.run.value.value:g}" if emptiest.run.value else ""
    others = "; ".join(
        f"at p = {p:g} " + (f"q = {listed(some)} alone" if some else "no q")
        for p in GRIDS[record.task].p
        if p != contrast.p
        for some in [tuple(q for q, of in rows_of(record, "matched", "detached", p).items() if collapsed(of))]
    )
    return [
        f"- **C1 rests partly on collapsed networks**: at p = {contrast.p:g} and "
        f"q = {' or '.join(f'{q:g}' for q in lost)}, "
        f"{_between(every)} of the test samples (from seed to seed) have no active unit at all; a setting is called "
        f"collapsed if that is more than {100 * COLLAPSED:g}% in any seed ({others}). Its Hoyer is a mean over the "
        f"samples that are left. The error there is {_range(every)}. For comparison: in the emptiest of all runs "
        f"({where}) {100 * emptiest.undefined:.1f}% of the samples have no active unit, so that nearly all get the "
        f"same reconstruction, and the error is {emptiest.metric:.{_DIGITS['mse']}f}. Figures show collapsed "
        "settings as hollow markers."
    ]


def _sensitivity(record: Record) -> list[str]:
    """The contrasts beside C1 that were added when its data had been seen."""
    said = []
    contrast = next(one for one in CONTRASTS if one.primary and one.claim == "C1")
    rows = rows_of(record, contrast.scale, contrast.gradient, contrast.p)
    best = words.epochs([row for some in rows.values() for row in some])
    for kind, what in ((SOUND, "C1 over the q's that are not collapsed"), (LAST, f"C1 {LAST}")):
        some = words.contrast_results([record], [contrast for contrast in POST_HOC if contrast.post_hoc == kind])
        if kind == SOUND and not some[0].left_out:
            continue
        over = f" (q = {listed(some[0].q)})" if kind == SOUND and some[0].q else ""
        more = f" What is tested otherwise is the best epoch on validation data, here {best}." if kind == LAST else ""
        said.append(f"- *Post hoc*, {what}{over}: {both(some)}; {words.pair(some)}. It decides nothing.{more}")
    return said


def in_short(records: Sequence[Record]) -> list[str]:
    """At most six items: sparsity, what it costs, the two scales, the two gradients, and both in the other networks."""
    by_task = {record.task: record for record in records}
    said = []
    if "autoencoder" in by_task:
        record = by_task["autoencoder"]
        said += [_dial(record), _price(record), _scales(record), _gradients(record)]
    others = [record for record in records if GRIDS[record.task].margin is not None]
    said += [_dials(others), _others(others)]
    return [sentence for sentence in said if sentence]


def _dial(record: Record) -> str:
    parts = []
    for p in reversed(GRIDS[record.task].p):
        rows = rows_of(record, "matched", "detached", p)
        if _whole(rows):
            live = path(rows, "hoyer_live", bare=True)
            parts.append(f"at p = {p:g} Hoyer over all units {path(rows, 'hoyer')}, over live units {live}")
    if not parts:
        return ""
    return (
        f"**q and sparsity**: in the autoencoder, with matched noise and the detached gradient, {'; '.join(parts)}"
        f"{_none(record, 'hoyer')}."
    )


def _dials(records: Sequence[Record]) -> str:
    parts = [
        f"in the {NETWORKS[record.task]} it {path(rows, 'hoyer')}"
        for record in records
        if _whole(rows := rows_of(record, "matched", "detached", "common"))
    ]
    return f"**Hoyer in the other networks**, with matched noise at one p: {'; '.join(parts)}." if parts else ""


def _price(record: Record) -> str:
    parts = []
    for p in reversed(GRIDS[record.task].p):
        rows = rows_of(record, "matched", "detached", p)
        if _whole(rows):
            parts.append(
                f"at p = {p:g} it {path(rows, 'metric')}, with {_mean(rows[2.0], 'metric')} at q = 2 (Dropout)"
            )
    if not parts:
        return ""
    return f"**Its price** is the {_METRICS['mse']}: {'; '.join(parts)}{_none(record, 'metric')}."


def _scales(record: Record) -> str:
    p = max(GRIDS[record.task].p)
    ours, theirs = (rows_of(record, scale, "detached", p) for scale in ("matched", "paper"))
    if not _whole(ours) or not _whole(theirs):
        return ""
    q = max(ours)
    apart = ", ".join(
        f"{name} {words.interval(_apart(theirs, measure, q, q, ours), digits, signed=True)}"
        for name, measure, digits in _COMPARED
    )
    return (
        f"**Scales**: at {_SCALES['paper']} (p = {p:g}, detached) Hoyer {path(theirs, 'hoyer')} and the error "
        f"{path(theirs, 'metric')}; at q = {q:g} that differs from matched noise by: {apart}."
    )


def _gradients(record: Record) -> str:
    p = max(GRIDS[record.task].p)
    detached, exact = (rows_of(record, "matched", gradient, p) for gradient in ("detached", "exact"))
    if not _whole(detached) or not _whole(exact):
        return ""
    low, high = min(exact), max(exact)

    def moved(rows: Rows) -> float:
        return abs(mean(rows[high], "hoyer").mean - mean(rows[low], "hoyer").mean)

    return (
        f"**Gradients**: with the exact one (p = {p:g}, matched noise) Hoyer {path(exact, 'hoyer')} and the error "
        f"{path(exact, 'metric')}; between the extreme q's Hoyer moves by {moved(exact):.2f}, and by "
        f"{moved(detached):.2f} with the detached one."
    )


def _others(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        metric = _METRICS[GRIDS[record.task].metric]
        own, common = (rows_of(record, "matched", "detached", p) for p in _PLACES)
        if _whole(own):
            said = f"the {metric} of the {NETWORKS[record.task]} {_moved(record, own, 'own')}"
            if own != common and _whole(common):
                said += f", and at the p of q = 2 it {_moved(record, common, 'common')}"
            parts.append(said + _none(record, "metric"))
    return f"**Images and words**: with matched noise, each q at its own p, {'; '.join(parts)}." if parts else ""


def _moved(record: Record, rows: Rows, p: PChoice) -> str:
    """The change of a metric with q, the difference within seeds, and the verdict."""
    wanted = (record.task, "metric", "matched", p)
    contrast = next(one for one in CONTRASTS if (one.task, one.measure, one.scale, one.p) == wanted)
    (found,) = words.contrast_results([record], [contrast])
    verdict = found.verdict if contrast.primary else f"secondary: {found.verdict}"
    return f"{path(rows, 'metric')}; the difference within seeds is {words.ends(found)} ({verdict})"


def path(rows: Rows, measure: Measure, *, bare: bool = False) -> str:
    """The values of a measure from the smallest q to the largest, through the smallest that is not collapsed.

    A lowest metric between the ends is named too. `bare` are the numbers alone, where the q's have been named.
    """
    name = GRIDS[next(iter(rows.values()))[0].run.task].metric if measure == "metric" else measure
    means = {q: mean(some, measure).mean for q, some in rows.items()}
    sound = [q for q in rows if not collapsed(rows[q])]
    low, high = min(rows), max(rows)
    way = [low, *(q for q in sound[:1] if low not in sound and q != high), high]
    stops = [
        f"{word} {means[q]:.{_DIGITS[name]}f}"
        + ("" if bare else f" at q = {q:g}{'' if q in sound else ' (collapsed)'}")
        for word, q in zip(("from", "through", "to") if len(way) > 2 else ("from", "to"), way, strict=True)
    ]
    if bare:
        return " ".join(stops)
    change = _apart(rows, measure, high, low)
    trends = {-1: "falls", 1: "rises", 0: "has no clear trend,"}
    verb = "goes" if math.isnan(change.half) else trends[direction(change)]
    least = min(means, key=means.__getitem__)
    between = measure == "metric" and all(direction(_apart(rows, measure, least, q)) < 0 for q in (low, high))
    lowest = f", with the lowest, {means[least]:.{_DIGITS[name]}f}, at q = {least:g}" if between else ""
    return f"{verb} {' '.join(stops)}{lowest}"


def picture(record: Record, name: str) -> str:
    """A figure in words, as its alternative text."""
    if name == "overview":
        metric = GRIDS[record.task].metric
        parts = [
            f"{'Hoyer' if measure == 'hoyer' else metric.capitalize()} at {_SCALES[scale]} {path(rows, measure)}"
            for measure, scale, p in _SEEN
            if _whole(rows := rows_of(record, scale, "detached", p))
        ]
        start = f"Three panels: Hoyer sparsity against q, {metric} against q, and {metric} against Hoyer sparsity."
        return " ".join([start, *(f"{part}." for part in parts)])
    parts = []
    for gradient in GRIDS[record.task].gradients:
        for p in reversed(GRIDS[record.task].p):
            rows = rows_of(record, "matched", gradient, p)
            if _whole(rows):
                parts.append(f"p = {p:g}, {gradient}: {_PICTURES[name](rows)}.")
    count = len(GRIDS[record.task].gradients) * len(GRIDS[record.task].p)
    start = f"{_NAMES[name]}: {count} panels, each with a line for {' and one for '.join(_SCALES.values())}."
    return " ".join([start, "As q rises, at matched noise:", *parts])


def _dying(rows: Rows) -> str:
    low, high = (f"{100 * mean(rows[q], 'dead').mean:.0f}% at q = {q:g}" for q in (min(rows), max(rows)))
    return f"dead units from {low} to {high}"


def by_samples(record: Record) -> str:
    """The shares of dead units over two numbers of samples; empty where only one is known."""
    rows = [
        row
        for some in rows_of(record, "matched", "detached", max(GRIDS[record.task].p)).values()
        for row in some
        if row.run.setting.q == 2 and math.isfinite(row.last_dead)
    ]
    if not rows:
        return ""
    few, many = (f"{100 * mean(rows, name).mean:.0f}%" for name in ("last_dead", "dead"))
    return (
        f"The share depends on the number of samples: at q = 2, p = {max(GRIDS[record.task].p):g}, it is {few} over "
        f"{samples(record, 'valid')} (after the last epoch) and {many} over {samples(record)}."
    )


_SEEN: tuple[tuple[Measure, str, PChoice], ...] = (
    ("hoyer", "matched", "common"), ("metric", "matched", "own"), ("metric", "paper", "own"),
)  # fmt: skip
_NAMES = {"dial": "Hoyer sparsity against q", "price": "Error against Hoyer sparsity", "dead": "Dead units against q"}
_PICTURES: dict[str, Callable[[Rows], str]] = {
    "dial": lambda rows: f"Hoyer {path(rows, 'hoyer')}",
    "price": lambda rows: f"the error {path(rows, 'metric')}, Hoyer {path(rows, 'hoyer', bare=True)}",
    "dead": _dying,
}


def nothing_dead(record: Record) -> bool:
    """Whether live units are all units in every contrast of a task."""
    return all(alive(record, one) for one in CONTRASTS if one.task == record.task and one.measure != "metric")


def _whole(rows: Rows) -> bool:
    """Whether there are rows at every q, with a metric and a measure."""
    return all(rows.values()) and all(math.isfinite(mean(some, "hoyer").mean) for some in rows.values())


def _apart(rows: Rows, measure: Measure, q: float, other_q: float, others: Rows | None = None) -> Interval:
    """The difference within seeds between two q's, or to another dial."""
    first, second = curve_of(rows, measure)[q], curve_of(others or rows, measure)[other_q]
    return t_interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def _none(record: Record, measure: str) -> str:
    rows = plain_rows(record, "none", "own")
    return f"; without noise it is {_mean(rows, measure)}" if rows else ""


def _mean(rows: Sequence[Row], measure: str) -> str:
    name = GRIDS[rows[0].run.task].metric if measure == "metric" else measure
    return f"{mean(rows, measure).mean:.{_DIGITS[name]}f}"


def _between(rows: Sequence[Row]) -> str:
    values = [100 * row.undefined for row in rows]
    return f"{min(values):.0f}% to {max(values):.0f}%"


def _range(rows: Sequence[Row]) -> str:
    values = [row.metric for row in rows]
    digits = _DIGITS[GRIDS[rows[0].run.task].metric]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
