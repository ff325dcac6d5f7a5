"""Factors on the learning rate, as functions of the fraction of training that is done."""

import math
from collections.abc import Callable


def one_cycle(progress: float) -> float:
    """Up on a line from 0.04 in the first quarter, down on a cosine to 0: for short budgets."""
    return 0.04 + 0.96 * progress / 0.25 if progress < 0.25 else cosine((progress - 0.25) / 0.75)


def steps(progress: float) -> float:
    """Times 0.2 after 30, 60 and 80% of training: 60, 120 and 160 of the 200 epochs of Zagoruyko & Komodakis (2016)."""
    return 0.2 ** sum(progress >= at for at in (0.3, 0.6, 0.8))


def cosine(progress: float) -> float:
    """From 1 down to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {"one-cycle": one_cycle, "steps": steps}
