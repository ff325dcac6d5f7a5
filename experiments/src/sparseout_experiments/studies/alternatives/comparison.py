"""Errors at equal sparsity, and which of them are level with the least."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sparseout_experiments.studies.alternatives.grid import WITHOUT_KNOB
from sparseout_experiments.studies.engine.statistics import holm, p_value

SIGNIFICANT = 0.05
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8)  # of sparsity, at which errors are compared
MEASURES = {"hoyer": "all units", "hoyer_live": "live units"}


def errors_at(level: float, runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The error at a sparsity: a row a method, a column a seed.

    It lies on the straight line between the two settings around that sparsity, and is nan outside of all.
    """
    known = runs.dropna(subset=[measure, "mse"]).sort_values(measure)
    errors = pd.DataFrame(index=list(dict.fromkeys(runs["method"])), columns=sorted(set(runs["seed"])), dtype=float)
    for (method, seed), group in known.groupby(["method", "seed"]):
        errors.loc[method, seed] = np.interp(level, group[measure], group["mse"], math.nan, math.nan)
    return errors


def reached(errors: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Of the errors at a sparsity, the methods with a knob that reach it with every seed that they ran with."""
    ran = runs.groupby("method")["seed"].nunique()
    errors = errors.drop(index=WITHOUT_KNOB, errors="ignore")
    return errors[errors.notna().sum(axis=1) == ran[errors.index]]


def against_least(runs: pd.DataFrame, levels: Sequence[float] = LEVELS) -> dict[tuple[str, float], dict[str, float]]:
    """By measure and level, the method of least mean error, and the others with the p-value of their difference.

    Differences are taken within seeds, of methods that reach the level with every seed that any has; p-values are
    corrected by Holm for all of them, over both measures.
    """
    p_values: dict[tuple[str, float], dict[str, float]] = {}
    for measure, level in itertools.product(MEASURES, levels):
        errors = errors_at(level, runs, measure).drop(index=WITHOUT_KNOB, errors="ignore").dropna()
        least = errors.loc[errors.mean(axis=1).idxmin()] if len(errors) else None
        p_values[measure, level] = {str(method): p_value(list(row - least)) for method, row in errors.iterrows()}
    others = [(key, name) for key, methods in p_values.items() for name, p in methods.items() if p < 1]
    for (key, name), p in zip(others, holm([p_values[key][name] for key, name in others]), strict=True):
        p_values[key][name] = p
    return p_values
