"""The product that reads only the columns of the weight whose input is not 0."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout._utils.torch_internals import dispatch_mode_active, is_tracing, transforms_active
from sparseout.kernels.backends import kernels


class Break(NamedTuple):
    """The density up to which a call with so many rows is faster sparse."""

    rows: int
    density: float


def sparse_product(x: Tensor, weight: Tensor, bias: Tensor | None, break_even: tuple[Break, ...]) -> Tensor | None:
    """The output from the columns that x needs; None where the layer is to be dense."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or not x.ndim or not x.numel():
        return None
    if x.dtype is not weight.dtype or not x.is_cpu or not weight.is_cpu or x.shape[-1] != weight.shape[1]:
        return None
    if not weight.t().is_contiguous() or type(weight) not in (nn.Parameter, Tensor):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return None
    if dispatch_mode_active() or transforms_active() or is_tracing() or torch.is_autocast_enabled("cpu"):
        return None
    rows = x.numel() // weight.shape[1]
    max_nonzero = int(density_limit(break_even, rows) * x.numel())
    if not max_nonzero:
        return None
    native, x = kernels(x.device), x.resolve_neg().contiguous()
    if native is not None:
        y: Tensor | None = native.linear(x, weight.t(), bias, max_nonzero)
        return y
    return _embedding_bag(x.view(rows, -1), weight.t(), bias, max_nonzero, (*x.shape[:-1], weight.shape[0]))


def _embedding_bag(
    x: Tensor, columns: Tensor, bias: Tensor | None, max_nonzero: int, shape: Sequence[int]
) -> Tensor | None:
    """The native kernel's result where there is no kernel: torch has an operation that sums chosen rows."""
    if len(x) == 1:
        active = x.view(-1).nonzero().view(-1)
        if len(active) > max_nonzero:
            return None
        offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    else:
        mask = x != 0
        if int(torch.count_nonzero(mask)) > max_nonzero:  # soon said, where nonzero() is slow
            return None
        active = mask.view(-1).nonzero().view(-1)
        counts = mask.sum(1)
        offsets = counts.cumsum(0).sub_(counts)
    values = x.view(-1).index_select(0, active)
    y = F.embedding_bag(active.remainder_(len(columns)), columns, offsets, mode="sum", per_sample_weights=values)
    return (y if bias is None else y.add_(bias)).view(shape)


def density_limit(break_even: tuple[Break, ...], rows: int) -> float:
    """The density up to which a call with so many rows is sparse: between two that were measured, the lower one."""
    index = min(bisect_left(break_even, (rows,)), len(break_even) - 1)
    if break_even[index].rows > rows and index:
        return min(break_even[index - 1].density, break_even[index].density)
    return break_even[index].density


def column_major(weight: Tensor) -> Tensor:
    """The same values with contiguous columns, as `sparse_product` reads them."""
    with torch.inference_mode(False):  # of a tensor of inference mode no parameter could be trained again
        return weight.t().contiguous().t()
