"""The page of results: the numbers that its template, results.md.j2, fills in."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from sparseout_experiments.studies.control import analysis, figures
from sparseout_experiments.studies.control.analysis import Contrast, ContrastResult, contrasts, post_hoc
from sparseout_experiments.studies.control.collect import Record, options, samples
from sparseout_experiments.studies.control.dial import COLLAPSED, Dial, PChoice, mean
from sparseout_experiments.studies.control.grid import (
    ALWAYS,
    BUDGETS,
    GRIDS,
    SEEDS,
    TITLE,
    TUNING_SEED,
    Setting,
    Value,
    count,
    grid_of,
    settings,
)
from sparseout_experiments.studies.engine import pages

_NUMBER = r"\d+(?:,\d\d\d)*(?:\.\d+)?"
_KINDS = 3  # of warnings are shown, the most frequent
_DIGITS = {"mse": 5, "error": 4, "perplexity": 2}


def made(records: Sequence[Record]) -> tuple[str, dict[str, bytes]]:
    """The page and its figures."""
    sections = [
        Section(budget, [Task(record) for record in some])
        for budget, some in itertools.groupby(records, key=lambda record: record.budget)
    ]
    drawn: dict[str, bytes] = {}

    def add(name: str, found: Mapping[str, bytes]) -> dict[str, str]:
        drawn.update((f"control-{name}-{figure}", content) for figure, content in found.items())
        return {figure: f"images/control-{name}-{figure}.png" for figure in found}

    for section in sections:
        section.images = add(section.budget, figures.draw_together([task.complete for task in section.tasks]))
        for task in section.tasks:
            task.images = add(f"{section.budget}-{task.record.task}", figures.draw(task.complete))
    return text(sections), drawn


def text(sections: Sequence["Section"]) -> str:
    """The page as Markdown."""
    from sparseout_experiments.tasks.image import REESTIMATED  # imports torch

    return pages.rendered(
        __package__,
        "results.md.j2",
        title_of_page=TITLE,
        sections=sections,
        analysis=analysis,
        collapse=COLLAPSED,
        mean=mean,
        networks=figures.NETWORKS,
        seeds=SEEDS,
        grids=GRIDS,
        reestimated=REESTIMATED["test"],
    )


def protocol_tables() -> str:
    """The tables of docs/protocol.md, which a test compares with it."""
    plan = {"grid_of": grid_of, "budgets": BUDGETS, "always": ALWAYS, "count": count}
    return pages.rendered(__package__, "protocol.md.j2", **plan, seeds=SEEDS, tuning_seed=TUNING_SEED)


class Task:
    """One task at one budget."""

    def __init__(self, record: Record) -> None:
        self.record, self.grid, self.images = record, record.grid, dict[str, str]()
        self.complete = record.complete  # what means and figures are of
        self.plain = figures.plain(self.complete, "none", "own")
        self.digits = _DIGITS[self.grid.metric]
        self.options = options(record)
        self.none_is_best = analysis.none_is_best(self.complete)

    def samples(self, part: str = "test") -> int | None:
        """Over how many samples sparsity and dead units are measured; None: over all."""
        return samples(self.record, part)

    def dial(self, p: PChoice, scale: str = "matched", gradient: str = "detached") -> Dial:
        """The runs at all q's."""
        return Dial(self.complete, scale, gradient, p)

    @property
    def seeds(self) -> set[int]:
        """The seeds of which all runs have ended."""
        return set(self.complete.analysed["seed"])

    @property
    def lowest_loss(self) -> tuple[int, float, float, float] | None:
        """Without noise: the epoch of the lowest mean validation loss, this loss, the last, and that in training."""
        train, valid = figures.losses(self.plain)
        return (valid.index(min(valid)) + 1, min(valid), valid[-1], train[-1]) if valid else None

    @property
    def nothing_dead(self) -> bool:
        """Whether live units are all units in every contrast."""
        of_budget = contrasts(self.record.budget)
        some = (one for one in of_budget if one.task == self.record.task and one.measure != "metric")
        return all(analysis.alive(self.record, one) for one in some)

    @property
    def emptiest(self) -> Any:
        """The run with the largest share of samples without an active unit."""
        return self.record.finished.loc[self.record.finished["undefined"].idxmax()]

    @property
    def undefined(self) -> list[float]:
        """The shares of samples without a measure where they are many, by run."""
        return [share for share in self.record.finished["undefined"] if share > analysis.UNDEFINED]

    @property
    def groups(self) -> list[tuple[Setting, str, pd.DataFrame]]:
        """Every setting at each value, in the order of the table, with its runs."""
        rows = self.record.analysed
        value = [f"{run.value or ''}{', p of q = 2' if run.role == 'common' else ''}" for run in rows["run"]]
        some = rows.assign(shown=value).groupby(["setting", "shown"])
        found = [(group["run"].iloc[0].setting, shown, group) for (_, shown), group in some]
        methods = ("none", "dropout", "sparseout")

        def order(of: tuple[Setting, str, pd.DataFrame]) -> tuple[int, str, str, str, float]:
            setting, value, _ = of
            return methods.index(setting.method), setting.scale or "", setting.gradient or "", value, setting.q or 0.0

        return sorted(found, key=order)

    @property
    def tuning(self) -> list[tuple[Setting, list[tuple[Value, float]], float | None]]:
        """The trials of each setting with their score, and the value that they chose."""
        trials = self.record.finished[self.record.finished["role"] == "tuning"]
        found = []
        for setting in settings(self.record.budget, self.record.task):
            some, chosen = trials[trials["setting"] == setting.name], self.record.chosen.get(setting)
            scores = [(run.value, score) for run, score in zip(some["run"], some["valid"], strict=True)]
            found += [(setting, scores, chosen.value if chosen else None)] if scores else []
        return found

    @property
    def chosen(self) -> list[float]:
        """The p that each setting chose."""
        return [value.value for setting, value in self.record.chosen.items() if setting.method != "none"]

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """The most frequent kinds of warnings: how many runs have one, and the first."""
        found = self.record.finished["warnings"].explode(ignore_index=True).dropna()
        kinds = [list(some) for _, some in found.groupby(found.str.replace(_NUMBER, "", regex=True), sort=False)]
        return [(len(some), some[0]) for some in sorted(kinds, key=len, reverse=True)[:_KINDS]]

    @property
    def failures(self) -> Counter[tuple[str, str, str]]:
        """Setting, value and reason of failed runs, and how many there are."""
        failed = self.record.failed
        runs = zip(failed["run"], failed["reason"], strict=True)
        return Counter((run.setting.name, str(run.value or ""), reason) for run, reason in runs)


class Line(NamedTuple):
    """The result of a contrast, over which units, and how many digits its numbers get."""

    result: ContrastResult
    units: str
    digits: int


class Section:
    """Everything at one budget."""

    def __init__(self, budget: str, tasks: Sequence[Task]) -> None:
        self.budget, self.tasks, self.images = budget, tasks, dict[str, str]()
        self.by_name = {task.record.task: task for task in tasks}
        self.identity = analysis.identity(task.record for task in tasks)
        some = contrasts(budget)
        place = sum(one.claim == "C1" and one.primary for one in some)
        self._lines = [self._line(one) for one in (*some[:place], *post_hoc(budget), *some[place:])]

    def count(self, name: str) -> int:
        """Number of runs that are "planned", "missing", "finished" or "failed"."""
        found = [getattr(task.record, name) for task in self.tasks]
        return sum(one if isinstance(one, int) else len(one) for one in found)

    @property
    def hours(self) -> float:
        """The time that the runs took, one after the other."""
        return float(sum(task.record.finished["seconds"].sum() for task in self.tasks)) / 3600

    @property
    def made_with(self) -> str:
        """Versions and processors; a GPU that runs were told to leave alone was not used."""
        told = [(one, task.record.config.get("device")) for task in self.tasks for one in task.record.environments]
        return pages.made_with((one | ({"gpu": None} if device == "cpu" else {}) for one, device in told), gpu=True)

    def lines(self, merged: bool = True, **wanted: Any) -> list[Line]:
        """The contrasts with these fields.

        Where no unit is dead, that over live units is that over all, and if they are `merged` it is not repeated.
        """
        found = []
        for line in self._lines:
            contrast = line.result.contrast
            if any(getattr(contrast, name) != value for name, value in wanted.items()):
                continue
            task = self.by_name.get(contrast.task)
            if merged and line.units and task and analysis.alive(task.record, contrast):
                if line.units == "live units":
                    continue
                line = line._replace(units="all = live units")
            found.append(line)
        return found

    def line(self, claim: str, task: str, measure: str, p: PChoice) -> Line:
        """The contrast with these fields, at matched noise."""
        return self.lines(False, claim=claim, task=task, measure=measure, scale="matched", p=p)[0]

    def evidence(self, claim: str) -> list[tuple[str, list[Line]]]:
        """The contrasts that decide a claim, by network: of C1 two in each, over all and over live units."""
        lines = self.lines(claim=claim, primary=True)
        return [
            (task, list(some)) for task, some in itertools.groupby(lines, key=lambda line: line.result.contrast.task)
        ]

    def verdict(self, claim: str, post_hoc: str = "") -> str:
        """The word for a claim, or that which the contrasts share that were added to it."""
        if claim == "C4":
            return self.identity.verdict
        lines = self.lines(False, claim=claim, primary=not post_hoc, post_hoc=post_hoc)
        return analysis.both(line.result for line in lines)

    @property
    def undecided(self) -> list[Line]:
        """The primary contrasts that are undecided although there are numbers."""
        some = self.lines(primary=True)
        return [one for one in some if one.result.verdict == "undecided" and not math.isnan(one.result.ends.half)]

    @property
    def counts(self) -> dict[tuple[str, str], Counter[str]]:
        """The verdicts on secondary contrasts by claim and task."""
        found: dict[tuple[str, str], Counter[str]] = {}
        for result in (line.result for line in self.lines(primary=False, post_hoc="")):
            if result.slope.n:
                found.setdefault(result.contrast[:2], Counter())[result.verdict] += 1
        return found

    def _line(self, contrast: Contrast) -> Line:
        task = self.by_name.get(contrast.task)
        live = "live units" if contrast.measure.endswith("_live") else "all units"
        units, digits = ("", _DIGITS[GRIDS[contrast.task].metric]) if contrast.measure == "metric" else (live, 4)
        return Line(analysis.evaluate(contrast, task.record if task else None), units, digits)
