"""Naive measures of rows in float64, and data to try measures on."""

import math
from functools import partial

import numpy as np
import torch
from hypothesis import settings

from sparseout import measures
from sparseout.measures import MEASURES

FUNCTIONS = {name: getattr(measures, name) for name in MEASURES}


fast = settings(max_examples=40, deadline=None)


same = partial(torch.testing.assert_close, equal_nan=True)


def naive(name, row, eps=0.0, relative=False):
    """The definitions, written down a second time, for one row of float64."""
    a = np.abs(np.asarray(row, dtype=np.float64))
    n, limit = len(a), eps * math.sqrt(np.mean(a**2)) if relative else eps
    if name in ("sparsity", "density"):
        active = sum(1 for v in a if v > limit) / n
        return active if name == "density" else 1 - active
    if not a.any():
        return math.nan
    if name == "hoyer":
        return (math.sqrt(n) - np.sum(a) / math.sqrt(np.sum(a**2))) / (math.sqrt(n) - 1) if n > 1 else math.nan
    if name == "gini":
        return sum(abs(u - v) for u in a for v in a) / (2 * n * np.sum(a))  # mean difference, another form
    if name == "treves_rolls":
        return np.mean(a) ** 2 / np.mean(a**2)
    return np.mean(a**4) / np.mean(a**2) ** 2


def naive_rows(name, x, **options):
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    return torch.tensor([naive(name, row, **options) for row in rows], dtype=torch.float64)


def sparse_data(*shape, seed=0, zeros=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x * (torch.rand(*shape, generator=generator) > zeros)).to(dtype)


# ------------------------------------------------------------------------------------------ bad input

KINDS = "hoyer, gini, treves_rolls, sparsity, density, kurtosis"


ONES = torch.ones(2, 3)
