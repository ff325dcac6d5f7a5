"""Timings of a Linear layer, dense and sparse, and the density up to which sparse is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseout.inference._sparse_product import Break, density_limit, sparse_product
from sparseout.inference._speed_report import LayerSpeed

ROWS = (1, 4, 16, 64)  # a call with more rows goes by the break-even of the last
_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def layer_speed(x: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, breaks: tuple[Break, ...]) -> LayerSpeed:
    """The times of a call on x, dense and as the layer would be, from its weight in either layout."""

    def run_as_now(x: Tensor) -> Tensor:
        y = sparse_product(x, column, bias, breaks)
        return F.linear(x, column, bias) if y is None else y

    full = torch.ones_like(x)
    dense, sparse, at_full = times(lambda: F.linear(x, row, bias), lambda: run_as_now(x), lambda: run_as_now(full))
    density = int(torch.count_nonzero(x)) / x.numel()
    return LayerSpeed(len(x), density, dense * 1e6, sparse * 1e6, at_full * 1e6, density_limit(breaks, len(x)))


def measure_break_even(column: Tensor, bias: Tensor | None) -> tuple[Break, ...]:
    """The densities up to which sparse is faster, by the number of rows; they fall with it."""
    breaks: list[Break] = []
    generator = torch.Generator().manual_seed(0)
    candidates = [0.0, *_DENSITIES]
    for rows in ROWS:
        low, high = 0, len(candidates)  # the best is one of candidates[low:high]
        while high - low > 1:
            middle = (low + high) // 2
            draws = torch.rand(rows, column.shape[1], generator=generator, device="cpu")
            x = draws.lt(candidates[middle]).to(column.dtype)
            if _gains(x, column, bias):
                low = middle
            else:
                high = middle
        breaks.append(Break(rows, candidates[low]))
        candidates = candidates[: low + 1]
    return tuple(breaks)


def _gains(x: Tensor, column: Tensor, bias: Tensor | None) -> bool:
    always = (Break(1, 1.0),)
    dense, sparse = times(lambda: F.linear(x, column, bias), lambda: sparse_product(x, column, bias, always))
    return sparse < dense


def times(*functions: Callable[[], Any], seconds: float = 0.005, rounds: int = 30) -> list[float]:
    """The least time of each, called three times each in turn: two rounds, then until that took so long or so often."""
    best, began = [float("inf")] * len(functions), time.perf_counter()
    for round_ in range(rounds):
        if round_ >= 2 and time.perf_counter() - began > seconds * len(functions):
            break
        for index, function in enumerate(functions):
            for _ in range(3):  # after the first its matrix is in the cache, if it fits
                start = time.perf_counter()
                function()
                best[index] = min(best[index], time.perf_counter() - start)
    return best
