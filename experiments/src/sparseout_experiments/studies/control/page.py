"""The page of results: the numbers that its template, results.md.j2, fills in."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.control import figures, verdicts
from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.dial import COLLAPSED, Dial, PChoice, cached_dial, mean
from sparseout_experiments.studies.control.grid import DIGITS, GRIDS, SEEDS, TITLE, Setting, Value, settings
from sparseout_experiments.studies.control.verdicts import ContrastResult, contrasts, post_hoc
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.study import Page

_NUMBER = r"\d+(?:,\d\d\d)*(?:\.\d+)?"
_KINDS = 3  # of warnings are shown, the most frequent


def made(records: Sequence[Record]) -> Page:
    """The page and its figures."""
    from sparseout_experiments.tasks.image import REESTIMATED  # imports torch

    sections = [
        Section(budget, [Task(record) for record in of_budget])
        for budget, of_budget in itertools.groupby(records, key=lambda record: record.budget)
    ]
    drawn: dict[str, Figure] = {}

    def add(prefix: str, new: Mapping[str, Figure]) -> dict[str, str]:
        drawn.update((f"control-{prefix}-{name}", figure) for name, figure in new.items())
        return {name: f"images/control-{prefix}-{name}.png" for name in new}

    for section in sections:
        section.images = add(section.budget, figures.draw_together([task.complete for task in section.tasks]))
        for task in section.tasks:
            task.images = add(f"{section.budget}-{task.record.task}", figures.draw(task.complete))
    text = pages.rendered(
        __package__,
        "results.md.j2",
        title_of_page=TITLE,
        sections=sections,
        verdicts=verdicts,
        collapse=COLLAPSED,
        mean=mean,
        networks=figures.NETWORKS,
        seeds=SEEDS,
        grids=GRIDS,
        reestimated=REESTIMATED["test"],
    )
    return text, drawn


class Task:
    """One task at one budget."""

    def __init__(self, record: Record) -> None:
        self.record, self.grid, self.images = record, record.grid, dict[str, str]()
        self.complete = record.complete  # what means and figures are of
        self.plain = figures.plain(self.complete, "none", "own")
        self.digits = DIGITS[self.grid.metric]
        self.none_is_best = verdicts.none_is_best(self.complete)

    def dial(self, p: PChoice, scale: str = "matched", gradient: str = "detached") -> Dial:
        return cached_dial(self.complete, scale, gradient, p)

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
        of_task = (contrast for contrast in contrasts(self.record.budget) if contrast.task == self.record.task)
        return all(verdicts.alive(self.record, contrast) for contrast in of_task if contrast.measure != "metric")

    @property
    def emptiest(self) -> Any:
        """The run with the largest share of samples without an active unit."""
        return self.record.finished.loc[self.record.finished["undefined"].idxmax()]

    @property
    def undefined(self) -> list[float]:
        """The shares of samples without a measure where they are many, by run."""
        return [share for share in self.record.finished["undefined"] if share > verdicts.UNDEFINED]

    @property
    def groups(self) -> list[tuple[Setting, str, pd.DataFrame]]:
        """Every setting at each value, in the order of the table, with its runs."""
        rows = self.record.analysed
        value = [f"{run.value or ''}{', p of q = 2' if run.role == 'common' else ''}" for run in rows["run"]]
        methods = ("none", "dropout", "sparseout")

        def order(entry: tuple[Setting, str, pd.DataFrame]) -> tuple[int, str, str, str, float]:
            setting, value, _ = entry
            return methods.index(setting.method), setting.scale or "", setting.gradient or "", value, setting.q or 0.0

        groups = rows.assign(shown=value).groupby(["setting", "shown"])
        return sorted(((group["run"].iloc[0].setting, shown, group) for (_, shown), group in groups), key=order)

    @property
    def tuning(self) -> list[tuple[Setting, list[tuple[Value, float]], float | None]]:
        """The trials of each setting with their score, and the value that they chose."""
        trials = self.record.finished[self.record.finished["role"] == "tuning"]
        table = []
        for setting in settings(self.record.budget, self.record.task):
            runs, chosen = trials[trials["setting"] == setting.name], self.record.chosen.get(setting)
            scores = [(run.value, score) for run, score in zip(runs["run"], runs["valid"], strict=True)]
            table += [(setting, scores, chosen.value if chosen else None)] if scores else []
        return table

    @property
    def chosen(self) -> list[float]:
        return [value.value for setting, value in self.record.chosen.items() if setting.method != "none"]

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """The most frequent kinds of warnings: how many runs have one, and the first."""
        warnings = self.record.finished["warnings"].explode(ignore_index=True).dropna()
        by_kind = warnings.groupby(warnings.str.replace(_NUMBER, "", regex=True), sort=False)
        kinds = sorted((list(kind) for _, kind in by_kind), key=len, reverse=True)
        return [(len(kind), kind[0]) for kind in kinds[:_KINDS]]

    @property
    def failures(self) -> Counter[tuple[str, str, str]]:
        """Setting, value and reason of failed runs, and how many there are."""
        failed = self.record.failed
        runs = zip(failed["run"], failed["reason"], strict=True)
        return Counter((run.setting.name, str(run.value or ""), reason) for run, reason in runs)


class Section:
    """Everything at one budget."""

    def __init__(self, budget: str, tasks: Sequence[Task]) -> None:
        self.budget, self.tasks, self.images = budget, tasks, dict[str, str]()
        self.by_name = {task.record.task: task for task in tasks}
        self.identity = verdicts.identity(task.record for task in tasks)
        planned = contrasts(budget)
        place = sum(contrast.claim == "C1" and contrast.primary for contrast in planned)
        ordered = (*planned[:place], *post_hoc(budget), *planned[place:])
        records = {name: task.record for name, task in self.by_name.items()}
        self._results = [verdicts.evaluate(contrast, records.get(contrast.task)) for contrast in ordered]

    def count(self, name: str) -> int:
        """Number of runs that are "planned", "missing", "finished" or "failed"."""
        values = [getattr(task.record, name) for task in self.tasks]
        return sum(value if isinstance(value, int) else len(value) for value in values)

    @property
    def hours(self) -> float:
        return float(sum(task.record.finished["seconds"].sum() for task in self.tasks)) / 3600

    @property
    def made_with(self) -> str:
        """Versions and processors; a GPU that runs were told to leave alone was not used."""
        return pages.made_with(
            (
                environment | ({"gpu": None} if task.record.config.get("device") == "cpu" else {})
                for task in self.tasks
                for environment in task.record.environments
            ),
            gpu=True,
        )

    def lines(self, merged: bool = True, **wanted: Any) -> list[ContrastResult]:
        """The contrasts with these fields.

        Where no unit is dead, that over live units is that over all, and if they are `merged` it is not repeated.
        """
        lines = []
        for line in self._results:
            contrast = line.contrast
            if any(getattr(contrast, name) != value for name, value in wanted.items()):
                continue
            task = self.by_name.get(contrast.task)
            if merged and line.units and task and verdicts.alive(task.record, contrast):
                if line.units == "live units":
                    continue
                line = line._replace(merged=True)
            lines.append(line)
        return lines

    def line(self, claim: str, task: str, measure: str, p: PChoice) -> ContrastResult:
        """The contrast with these fields, at matched noise."""
        return self.lines(False, claim=claim, task=task, measure=measure, scale="matched", p=p)[0]

    def evidence(self, claim: str) -> list[tuple[str, list[ContrastResult]]]:
        """The contrasts that decide a claim, by network: of C1 two in each, over all and over live units."""
        lines = self.lines(claim=claim, primary=True)
        by_task = itertools.groupby(lines, key=lambda line: line.contrast.task)
        return [(task, list(of_task)) for task, of_task in by_task]

    def verdict(self, claim: str, post_hoc: str = "") -> str:
        """The word for a claim, or that which the contrasts share that were added to it."""
        if claim == "C4":
            return self.identity.verdict
        lines = self.lines(False, claim=claim, primary=not post_hoc, post_hoc=post_hoc)
        return verdicts.both(lines)

    @property
    def undecided(self) -> list[ContrastResult]:
        """The primary contrasts that are undecided although there are numbers."""
        undecided = [line for line in self.lines(primary=True) if line.verdict == "undecided"]
        return [line for line in undecided if not math.isnan(line.ends.half)]

    @property
    def counts(self) -> dict[tuple[str, str], Counter[str]]:
        counts: dict[tuple[str, str], Counter[str]] = {}
        for result in self.lines(primary=False, post_hoc=""):
            if result.slope.n:
                counts.setdefault(result.contrast[:2], Counter())[result.verdict] += 1
        return counts
