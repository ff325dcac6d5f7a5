"""The equation in plain torch, with an explicit mask: the definition that every faster path must match.

    xi = m / (1 - p) - 1                           mean 0, variance p / (1 - p)
    y  = x + beta sign(x) |x|^(q/2) xi             beta = gain * unit^(1 - q/2)

`q`, `unit` and `gain` are Python floats or 0-d tensors. Writing beta as a gain and a unit of x, so that the term
is gain * unit * sign(x) |x / unit|^(q/2), lets no power overflow that the result itself does not.

Everything here differentiates, in reverse and forward mode and to second order, and runs under vmap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Scalar = float | Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in fp32, fp32 and fp64 in themselves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise(mask: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """The noise xi of a boolean `mask` that is False with probability exactly `p`."""
    kept = torch.full((), p / (1 - p), dtype=dtype, device=mask.device)
    return torch.where(mask, kept, -1.0)


def matched(x: Tensor, q: Scalar) -> tuple[Tensor, Tensor]:
    """The `unit` and `gain` that give the noise Dropout's power: beta^2 mean |x|^q = mean x^2.

    The unit is max |x|: both means then lie between 1/n and 1 whatever x is measured in. beta is 1 where that is 0 or
    not finite. No gradient flows through either.
    """
    a = x.detach().to(compute_dtype(x.dtype)).abs()
    if a.numel() == 0:
        return a.new_ones(()), a.new_ones(())
    peak = a.amax()
    usable = (peak > 0) & (peak < math.inf)
    unit = torch.where(usable, peak, 1.0)
    u = a / unit
    moment = torch.where(u > 0, u.pow(q), 0.0).mean()  # 0^0 counts as 0: sign(0) is 0
    return unit, torch.where(usable, (u.square().mean() / moment).sqrt(), 1.0)


def value(x: Tensor, xi: Tensor, q: Scalar, unit: Scalar, gain: Scalar) -> Tensor:
    """y, in x's dtype. Not to be differentiated: the power has an infinite slope at 0 for q < 2."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide + _term(wide, q, unit, gain) * xi).to(x.dtype)


def sparseout(x: Tensor, xi: Tensor, q: Scalar, unit: Scalar, gain: Scalar, exact: bool) -> Tensor:
    """y, with dy/dx = `slope` and higher derivatives accordingly. In x's dtype."""
    dtype, x = x.dtype, x.to(compute_dtype(x.dtype))
    base = x.detach()
    steepness = _noise_slope(base, xi, q, unit, gain, exact, torch.finfo(dtype).max)
    # The value of the term and its slope, both constants: a straight line through the point x.
    term = _term(base, q, unit, gain) * xi + steepness * (x - base)
    if exact:
        # The line stays only where the power itself has no finite slope: at zeros, denormals and where it saturates.
        info = torch.finfo(dtype)
        flat = (_in_units(base, unit) < info.tiny) | (steepness.abs() >= info.max)
        term = torch.where(flat, term, _term(torch.where(flat, 1.0, x), q, unit, gain) * xi)
    return (x + term).to(dtype)


def slope(x: Tensor, xi: Tensor, q: Scalar, unit: Scalar, gain: Scalar, exact: bool) -> Tensor:
    """dy/dx in the compute dtype: 1 + beta |x|^(q/2 - 1) xi, the noise term times q/2 if `exact`.

    Differentiable in x if `exact`, and a constant otherwise.
    """
    wide = x.to(compute_dtype(x.dtype))
    return 1 + _noise_slope(wide if exact else wide.detach(), xi, q, unit, gain, exact, torch.finfo(x.dtype).max)


def _term(x: Tensor, q: Scalar, unit: Scalar, gain: Scalar) -> Tensor:
    return x.sign() * (_in_units(x, unit).pow(q / 2) * unit * gain)


def _noise_slope(x: Tensor, xi: Tensor, q: Scalar, unit: Scalar, gain: Scalar, exact: bool, limit: float) -> Tensor:
    """The slope of the noise term, beta |x|^(q/2 - 1) xi (times q/2): at x = 0 it is xi for q = 2 and 0 otherwise."""
    a = _in_units(x, unit)
    zero = a == 0
    at_zero = (q == 2).to(x.dtype) if isinstance(q, Tensor) else float(q == 2)
    # The inner `where` keeps the infinite derivative of the power at 0 out of the graph.
    safe = torch.where(zero, 1.0, a)
    factor = (q / 2 if exact else 1.0) * gain
    # Not safe^(q/2 - 1), which may overflow where q/2 is 0 and their product is NaN.
    steepness = torch.where(zero, at_zero, safe.pow(q / 2) * factor / safe)
    return (steepness * xi).clamp(-limit, limit)


def _in_units(x: Tensor, unit: Scalar) -> Tensor:
    return x.abs() if isinstance(unit, float) and unit == 1 else x.abs() / unit


def limit(dtype: torch.dtype, p: float, q: float, unit: float, gain: float, room: torch.dtype | None = None) -> float:
    """Where the slope of the noise saturates: at the largest number of the dtype, or infinite if no x takes it there.

    With `room` it is asked whether x of this dtype can take the slope beyond the largest number of that one.
    """
    info, largest = torch.finfo(dtype), torch.finfo(room or dtype).max
    ends = (math.log2(end) - math.log2(unit) for end in (info.tiny * info.eps, info.max))
    factor = max(gain * max(q / 2, 1) * max(p / (1 - p), 1), info.tiny)
    steepest = math.log2(factor) + max((q / 2 - 1) * end for end in ends)
    return largest if steepest > math.log2(largest) - 1 else math.inf  # a factor of 2 for what is rounded
