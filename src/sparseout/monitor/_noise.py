"""Power of a layer's noise in training, beside that of Dropout at the same p."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.activations import channel_dim
from sparseout._utils.torch_internals import readable
from sparseout.kernels.mask import variance
from sparseout.layers import Sparseout


def dropout_variance(module: nn.Module) -> float | Tensor | None:
    """Variance p / (1 - p) of Dropout's noise at the layer's p; None where there is none to compare with."""
    if not isinstance(module, (Sparseout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
        return None
    p: Any = readable(module.p)
    return variance(p) if isinstance(p, Tensor) or 0 < p < 1 else None


def noise_powers(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of every row of x and y = module(x), (rows, units), |y - x|^2 and p / (1 - p) |x|^2: a (2, rows) tensor."""
    before, after = x.detach().double(), y.detach().double()
    variance_at_p = dropout_variance(module)
    dropout = before.square().sum(-1) * (math.nan if variance_at_p is None else variance_at_p)
    return torch.stack([(after - before).square().sum(-1), dropout])


def noise_sums(powers: Tensor, together: float) -> Tensor:
    """Sums over rows of the two powers n and d, and of n^2, n d and d^2, as a standard error needs them.

    So many rows `together`, if it is more than one, share their draws and are taken as one, the worst case.
    """
    noise, dropout = powers
    spread = torch.stack([(noise * noise).sum(), (noise * dropout).sum(), (dropout * dropout).sum()])
    return torch.cat([powers.sum(1), spread * max(1.0, together)])


def rows_that_share(module: nn.Module, x: Tensor, dim: int) -> float:
    """The part of the rows of `x`, with units along `dim`, that have one draw of the noise in common."""
    if x.is_nested:
        return 0.0
    channels = channel_dim(module, x.ndim)
    dims: Iterable[int] = () if channels is None else range(channels + 1, x.ndim)
    if isinstance(module, Sparseout):
        dims = module._dims(x)
    shared = {d % x.ndim for d in dims} - {dim % x.ndim}
    whole = max(1, x.numel() // max(1, x.shape[dim]))
    return math.prod(x.shape[d] for d in shared) / whole


def noise_ratio(sums: Tensor | None) -> tuple[float | None, float | None]:
    """The noise's power over that of Dropout, and its standard error; None if there was no noise to see."""
    noise, dropout, nn_, nd, dd = sums.tolist() if sums is not None else (0.0,) * 5
    if not dropout:
        return None, None
    ratio = noise / dropout
    return ratio, math.sqrt(max(0.0, nn_ - 2 * ratio * nd + ratio**2 * dd)) / dropout
