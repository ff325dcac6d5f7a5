"""The dial: runs that differ in q and seed alone, and how their measures change with q."""

import math
from functools import cached_property, lru_cache
from typing import Literal

import pandas as pd

from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.grid import Setting
from sparseout_experiments.studies.engine.statistics import Interval, direction, t_interval, within_seeds

PChoice = float | Literal["own", "common"]  # a p of the grid; each setting's own p; the p of q = 2 for all
Curve = dict[float, dict[int, float]]  # values by q and seed

COLLAPSED = 0.05  # of the samples, in any seed: more, and a setting counts as collapsed
_TRENDS = {-1: "falls", 1: "rises", 0: "has no clear trend"}


class Dial:
    """The analysed runs of one scale and one gradient at all q's; a q may have none."""

    def __init__(self, record: Record, scale: str, gradient: str, p: PChoice) -> None:
        rows = record.analysed
        chosen = {setting.name: value.value for setting, value in record.chosen.items()}
        of_q_2 = chosen.get(Setting("sparseout", 2.0).name, math.nan)
        value = rows["setting"].map(chosen) if p == "own" else of_q_2 if p == "common" else p
        of_dial = (rows["q"] == 2) | (rows["scale"] == scale) & (rows["gradient"] == gradient)
        self.q, self.rows = record.grid.q, rows[of_dial & (rows["value"] == value)]
        self._of = dict(list(self.rows.groupby("q")))  # asked for every measure, and slow to select

    def of(self, q: float) -> pd.DataFrame:
        return self._of.get(q, self.rows[:0])

    def curve(self, measure: str) -> Curve:
        return {q: dict(zip(self.of(q)["seed"], self.of(q)[measure], strict=True)) for q in self.q}

    @cached_property
    def collapsed(self) -> tuple[float, ...]:
        return tuple(q for q in self.q if collapsed(self.of(q)))

    @property
    def lost(self) -> pd.DataFrame:
        return self.rows[self.rows["q"].isin(self.collapsed)]

    @property
    def whole(self) -> bool:
        """Whether Hoyer has a mean at every q."""
        return all(math.isfinite(self.at(q, "hoyer").mean) for q in self.q)

    def at(self, q: float, measure: str) -> Interval:
        return mean(self.of(q), measure)

    @property
    def price(self) -> bool:
        """Whether Hoyer and the metric both fall from the smallest q and from q = 2 to the largest."""
        last = self.of(self.q[-1])
        changes = (within_seeds(last, self.of(q), name) for name in ("hoyer", "metric") for q in (self.q[0], 2.0))
        return all(direction(change.interval) < 0 for change in changes)

    def change(self, measure: str) -> Interval:
        """The difference between the largest and the smallest q, within seeds."""
        return within_seeds(self.of(self.q[-1]), self.of(self.q[0]), measure).interval

    def minus(self, other: "Dial", measure: str, q: float) -> Interval:
        """The difference to another dial at one q, within seeds."""
        return within_seeds(self.of(q), other.of(q), measure).interval

    def trend(self, measure: str) -> str:
        change = self.change(measure)
        return "goes" if math.isnan(change.half) else _TRENDS[direction(change)]


cached_dial = lru_cache(256)(Dial)  # selecting rows is slow, and figures, contrasts and sentences ask for the same


def collapsed(rows: pd.DataFrame) -> bool:
    """Whether more than COLLAPSED of the test samples have no active unit in any of these runs."""
    return bool((rows["undefined"] > COLLAPSED).any())


def mean(rows: pd.DataFrame, measure: str) -> Interval:
    """The mean of a measure over rows."""
    return t_interval(list(rows[measure]))
