"""The page of results: the numbers that its template, results.md.j2, fills in."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sparseout_experiments.studies.control import analysis, figures
from sparseout_experiments.studies.control.analysis import Contrast, ContrastResult, PChoice, contrasts, post_hoc
from sparseout_experiments.studies.control.collect import Record, Row, options, samples
from sparseout_experiments.studies.control.grid import (
    ALWAYS,
    BUDGETS,
    GRIDS,
    SEEDS,
    TITLE,
    TUNING_SEED,
    Setting,
    count,
    grid_of,
    settings,
)
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.statistics import Interval, direction, paired

_NUMBER = re.compile(r"\d+(?:,\d\d\d)*(?:\.\d+)?")
_KINDS = 3  # of warnings are shown, the most frequent
_DIGITS = {"mse": 5, "error": 4, "perplexity": 2}
_TRENDS = {-1: "falls", 1: "rises", 0: "has no clear trend"}


def write(records: Sequence[Record], page: Path) -> None:
    """Write the page and its figures, which lie in a folder `images` beside it."""
    runs = sum(len(record.rows) + len(record.failures) for record in records)
    pages.check(page, TITLE, runs)
    sections = [
        Section(budget, [Task(record) for record in some])
        for budget, some in itertools.groupby(records, key=lambda record: record.budget)
    ]
    for section in sections:
        section.images = _drawn(page, section.budget, figures.draw_together([task.complete for task in section.tasks]))
        for task in section.tasks:
            task.images = _drawn(page, f"{section.budget}-{task.record.task}", figures.draw(task.complete))
    pages.write(page, text(sections), runs)


def _drawn(page: Path, name: str, drawn: Mapping[str, bytes]) -> dict[str, str]:
    """Write the figures of a section or task, and say where each lies."""
    written = pages.write_images(page, {f"control-{name}-{figure}": content for figure, content in drawn.items()})
    return {figure: written[f"control-{name}-{figure}"] for figure in drawn}


def text(sections: Sequence["Section"]) -> str:
    """The page as Markdown."""
    from sparseout_experiments.tasks.image import REESTIMATED  # imports torch

    return pages.rendered(
        __package__,
        "results.md.j2",
        title_of_page=TITLE,
        sections=sections,
        analysis=analysis,
        networks=figures.NETWORKS,
        seeds=SEEDS,
        grids=GRIDS,
        reestimated=REESTIMATED["test"],
    )


def protocol_tables() -> str:
    """The tables of docs/protocol.md, which a test compares with it."""
    plan = {"grid_of": grid_of, "budgets": BUDGETS, "always": ALWAYS, "count": count}
    return pages.rendered(__package__, "protocol.md.j2", **plan, seeds=SEEDS, tuning_seed=TUNING_SEED)


class Group(NamedTuple):
    """A setting at one value, with its rows."""

    setting: Setting
    value: str
    rows: list[Row]

    def mean(self, measure: str) -> Interval:
        """A measure over seeds."""
        return figures.mean(self.rows, measure)

    @property
    def most_empty(self) -> float:
        """The largest share of samples without an active unit, over seeds."""
        return max(row.undefined for row in self.rows)

    @property
    def collapsed(self) -> bool:
        """Whether the protocol calls it collapsed."""
        return analysis.collapsed(self.rows)

    @property
    def epochs(self) -> list[int]:
        """The epochs after which the tested weights were taken."""
        return sorted({row.best_epoch for row in self.rows})


class Task:
    """One task at one budget."""

    def __init__(self, record: Record) -> None:
        self.record, self.grid, self.images = record, record.grid, dict[str, str]()
        self.complete = record.complete  # what means and figures are of
        self.digits = _DIGITS[self.grid.metric]
        self.options = options(record)

    def samples(self, part: str = "test") -> int | None:
        """Over how many samples sparsity and dead units are measured; None: over all."""
        return samples(self.record, part)

    def dial(self, p: PChoice, scale: str = "matched", gradient: str = "detached") -> "Dial":
        """The runs at all q's."""
        return Dial(analysis.rows_of(self.complete, scale, gradient, p))

    @property
    def plain(self) -> Group:
        """The runs without noise."""
        return Group(Setting("none"), "", figures.plain_rows(self.complete, "none", "own"))

    @property
    def seeds(self) -> list[int]:
        """The seeds of which all runs have ended."""
        return sorted({row.run.seed for row in self.complete.rows if row.run.role != "tuning"})

    @property
    def none_is_best(self) -> bool | None:
        """Whether no q at matched noise does better on validation data."""
        return analysis.none_is_best(self.complete)

    @property
    def lowest_loss(self) -> tuple[int, float, float, float]:
        """Without noise: the epoch of the lowest mean validation loss, this loss, the last, and that in training."""
        train, valid = figures.losses(self.plain.rows)
        return valid.index(min(valid)) + 1, min(valid), valid[-1], train[-1]

    @property
    def nothing_dead(self) -> bool:
        """Whether live units are all units in every contrast."""
        of_budget = contrasts(self.record.budget)
        some = (one for one in of_budget if one.task == self.record.task and one.measure != "metric")
        return all(analysis.alive(self.record, one) for one in some)

    @property
    def emptiest(self) -> Row:
        """The run with the largest share of samples without an active unit."""
        return max(self.record.rows, key=lambda row: row.undefined)

    @property
    def undefined(self) -> list[float]:
        """The shares of samples without a measure where they are many, by run."""
        return [share for _, share in analysis.warned(self.record)]

    @cached_property
    def groups(self) -> list[Group]:
        """Every setting, in the order of the table."""
        found: dict[tuple[Setting, str], list[Row]] = {}
        for row in self.record.rows:
            if row.run.role != "tuning":
                note = ", p of q = 2" if row.run.role == "common" else ""
                found.setdefault((row.run.setting, _value(row) + note), []).append(row)
        methods = ("none", "dropout", "sparseout")

        def order(key: tuple[Setting, str]) -> tuple[int, str, str, str, float]:
            setting, value = key
            return methods.index(setting.method), setting.scale or "", setting.gradient or "", value, setting.q or 0.0

        return [Group(*key, found[key]) for key in sorted(found, key=order)]

    @property
    def tuning(self) -> list[tuple[Setting, list[tuple[str, float]], float | None]]:
        """The trials of each setting with their score, and the value that they chose."""
        trials = [row for row in self.record.rows if row.run.role == "tuning" and row.run.value]
        found = []
        for setting in settings(self.record.budget, self.record.task):
            scores = [(_value(row), row.valid) for row in trials if row.run.setting == setting]
            chosen = self.record.chosen.get(setting)
            found += [(setting, scores, chosen.value if chosen else None)] if scores else []
        return found

    @property
    def chosen(self) -> list[float]:
        """The p that each setting chose."""
        return [value.value for setting, value in self.record.chosen.items() if setting.method != "none"]

    @property
    def lowest(self) -> int:
        """How many settings chose the smallest p that was tried."""
        return self.chosen.count(min(self.grid.p))

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """The most frequent kinds of warnings: how many runs have one, and the first."""
        kinds: dict[str, list[str]] = {}
        for warning in (warning for row in self.record.rows for warning in row.warnings):
            kinds.setdefault(_NUMBER.sub("", warning), []).append(warning)
        return [(len(some), some[0]) for some in sorted(kinds.values(), key=len, reverse=True)[:_KINDS]]

    @property
    def failures(self) -> list[tuple[str, str, str, int]]:
        """Setting, value and reason of failed runs, and how many there are."""
        found = Counter((one.run.setting.name, _value(one), one.reason) for one in self.record.failures)
        return [(*key, count) for key, count in found.items()]


class Dial:
    """Runs that differ in q and seed alone."""

    def __init__(self, rows: Mapping[float, list[Row]]) -> None:
        self.rows, self.q = rows, tuple(rows)
        self.collapsed = tuple(q for q, some in rows.items() if analysis.collapsed(some))

    @property
    def whole(self) -> bool:
        """Whether there are rows at every q, with a metric and a measure."""
        return all(self.rows.values()) and all(math.isfinite(self.at(q, "hoyer").mean) for q in self.q)

    @property
    def every(self) -> Group:
        """All rows."""
        return Group(Setting("sparseout"), "", [row for some in self.rows.values() for row in some])

    @property
    def lost(self) -> list[Row]:
        """The rows of collapsed settings."""
        return [row for q in self.collapsed for row in self.rows[q]]

    def at(self, q: float, measure: str) -> Interval:
        """A measure at one q, over seeds."""
        return figures.mean(self.rows[q], measure)

    @property
    def price(self) -> bool:
        """Whether Hoyer and the metric both fall from the smallest q and from q = 2 to the largest."""
        ends = ((self.q[-1], self.q[0]), (self.q[-1], 2.0))
        return all(direction(self._between(name, *pair)) < 0 for name in ("hoyer", "metric") for pair in ends)

    def change(self, measure: str) -> Interval:
        """The difference between the largest and the smallest q, within seeds."""
        return self._between(measure, self.q[-1], self.q[0])

    def minus(self, other: "Dial", measure: str, q: float) -> Interval:
        """The difference to another dial at one q, within seeds."""
        return paired(_by_seed(self.rows[q], measure), _by_seed(other.rows[q], measure)).interval

    def _between(self, measure: str, first: float, second: float) -> Interval:
        return paired(_by_seed(self.rows[first], measure), _by_seed(self.rows[second], measure)).interval

    def trend(self, measure: str) -> str:
        """A word for `change`, by its interval."""
        change = self.change(measure)
        return "goes" if math.isnan(change.half) else _TRENDS[direction(change)]


class Line(NamedTuple):
    """The result of a contrast, over which units, and how many digits its numbers get."""

    result: ContrastResult
    units: str
    digits: int


class Section:
    """Everything at one budget."""

    def __init__(self, budget: str, tasks: Sequence[Task]) -> None:
        self.budget, self.tasks, self.contrasts = budget, tasks, contrasts(budget)
        self.by_name = {task.record.task: task for task in tasks}
        self.identity = analysis.identity(task.record for task in tasks)
        self.images: dict[str, str] = {}

    def count(self, name: str) -> int:
        """How many runs are "planned", "missing", "rows" (finished) or "failures"."""
        found = [getattr(task.record, name) for task in self.tasks]
        return sum(one if isinstance(one, int) else len(one) for one in found)

    @property
    def hours(self) -> float:
        """The time that the runs took, one after the other."""
        return sum(row.seconds for task in self.tasks for row in task.record.rows) / 3600

    @property
    def made_with(self) -> list[str]:
        """Versions and processors."""
        return pages.made_with(
            (one, task.record.config.get("device") == "cpu") for task in self.tasks for one in task.record.environments
        )

    def primary(self, claim: str) -> list[Line]:
        """The contrasts that decide a claim: of C1 two, over all and over live units, in each of its networks."""
        return [self._line(one) for one in self.contrasts if one.primary and one.claim == claim]

    def evidence(self, claim: str) -> list[tuple[str, list[Line]]]:
        """These by network; where no unit is dead, all units alone."""
        lines = self._merged(self.primary(claim))
        return [
            (task, list(some)) for task, some in itertools.groupby(lines, key=lambda line: line.result.contrast.task)
        ]

    def verdict(self, claim: str) -> str:
        """The word for a claim."""
        return self.identity.verdict if claim == "C4" else analysis.both(line.result for line in self.primary(claim))

    def post_hoc(self, kind: str) -> list[Line]:
        """The contrasts beside C1 that were added when its data had been seen."""
        return [self._line(one) for one in post_hoc(self.budget) if one.post_hoc == kind]

    def post_hoc_verdict(self, kind: str) -> str:
        """The word that these share."""
        return analysis.both(line.result for line in self.post_hoc(kind))

    @property
    def undecided(self) -> list[Line]:
        """The primary contrasts that are undecided although there are numbers."""
        some = self._merged([self._line(one) for one in self.contrasts if one.primary])
        return [one for one in some if one.result.verdict == "undecided" and not math.isnan(one.result.ends.half)]

    def own(self, task: str) -> Line:
        """The primary contrast of a network's metric, each q at its own p."""
        some = (one for one in self.contrasts if one.primary and one.measure == "metric" and one.task == task)
        return next(self._line(one) for one in some)

    def secondary(self, claim: str, task: str, measure: str) -> Line:
        """The contrast at matched noise and the p of q = 2."""
        wanted = (claim, task, measure, "matched", "detached", "common")
        return next(self._line(one) for one in self.contrasts if one[:6] == wanted)

    @property
    def lines(self) -> list[Line]:
        """Every contrast."""
        count = sum(one.claim == "C1" and one.primary for one in self.contrasts)
        every = [*self.contrasts[:count], *post_hoc(self.budget), *self.contrasts[count:]]
        return self._merged([self._line(one) for one in every])

    def _merged(self, lines: Sequence[Line]) -> list[Line]:
        """Where no unit is dead, the contrast over live units is that over all, and is not repeated."""
        found = []
        for line in lines:
            task = self.by_name.get(line.result.contrast.task)
            if line.units and analysis.alive(task.record if task else None, line.result.contrast):
                if line.units == "live units":
                    continue
                line = line._replace(units="all = live units")
            found.append(line)
        return found

    @property
    def counts(self) -> dict[tuple[str, str], Counter[str]]:
        """The verdicts on secondary contrasts by claim and task."""
        found: dict[tuple[str, str], Counter[str]] = {}
        for result in (line.result for line in self.lines):
            if not (result.contrast.primary or result.contrast.post_hoc) and result.slope.n:
                found.setdefault(result.contrast[:2], Counter())[result.verdict] += 1
        return found

    def _line(self, contrast: Contrast) -> Line:
        task = self.by_name.get(contrast.task)
        live = "live units" if contrast.measure.endswith("_live") else "all units"
        units, digits = ("", _DIGITS[GRIDS[contrast.task].metric]) if contrast.measure == "metric" else (live, 4)
        return Line(analysis.evaluate(contrast, task.record if task else None), units, digits)


def _by_seed(rows: Sequence[Row], measure: str) -> dict[int, float]:
    return {row.run.seed: getattr(row, measure) for row in rows}


def _value(one: Any) -> str:
    value = one.run.value
    return "" if value is None else f"{value.option.replace('_', ' ')} = {value.value:g}"
