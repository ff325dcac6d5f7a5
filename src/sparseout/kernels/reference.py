"""The equation in plain torch, with an explicit mask: the definition that every faster path must match.

    xi = m / (1 - p) - 1                           mean 0, variance p / (1 - p)
    y  = x + beta sign(x) |x|^(q/2) xi             beta = amplitude * scale_unit^(1 - q/2)

`q`, `scale_unit` and `amplitude` are Python floats or 0-d tensors, the fields of `params.NoiseParams`. Writing beta in
two factors, so that the term is amplitude * scale_unit * sign(x) |x / scale_unit|^(q/2), lets no power overflow that
the result itself does not.

Everything here differentiates, in reverse and forward mode and to second order, and runs under vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparseout._utils import torch_internals
from sparseout.kernels.mask import variance
from sparseout.kernels.params import Scalar

Reduce = Callable[[Tensor, str], Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in fp32, fp32 and fp64 in themselves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise(mask: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """The noise xi of a boolean `mask` that is False with probability exactly `p`."""
    kept = torch.full((), variance(p), dtype=dtype, device=mask.device)
    return torch.where(mask, kept, -1.0)


def matched(x: Tensor, q: Scalar, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """The `scale_unit` and `amplitude` that give the noise Dropout's power: beta^2 mean |x|^q = mean x^2.

    The unit is max |x|: both sums then lie between 1 and n whatever x is measured in. beta is 1 where that is 0 or
    not finite. No gradient flows through either. Where x is one of several parts, `reduce` takes what one part gives,
    with ``"max"`` or ``"sum"``, to what all of them give.
    """
    reduce = reduce or (lambda value, operation: value)
    a = x.detach().to(compute_dtype(x.dtype)).abs()
    if torch_internals.may_be_empty(a):  # there is no maximum of nothing; a zero more changes none, and no ratio
        a = torch.cat([a.flatten(), a.new_zeros(1)])
    peak = reduce(a.amax(), "max")
    usable = (peak > 0) & (peak < math.inf)
    unit = torch.where(usable, peak, 1.0)
    u = a / unit
    # Up to q = 2 not u^q, which may vanish where the noise does not. 0^0 counts as 0: sign(0) is 0.
    power, ones = _by_q(q, (a.pow(q / 2), unit ** (q / 2)), (u.pow(q / 2), 1.0))
    moment = reduce(torch.where(a > 0, power / ones, 0.0).square().sum(), "sum")
    return unit, torch.where(usable, (reduce(u.square().sum(), "sum") / moment).sqrt(), 1.0)


def value(x: Tensor, xi: Tensor, q: Scalar, scale_unit: Scalar, amplitude: Scalar) -> Tensor:
    """y, in x's dtype. Not to be differentiated: the power has an infinite slope at 0 for q < 2."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide + _term(wide, q, scale_unit, amplitude) * xi).to(x.dtype)


def sparseout(x: Tensor, xi: Tensor, q: Scalar, scale_unit: Scalar, amplitude: Scalar, exact: bool) -> Tensor:
    """y, with dy/dx = `slope` and higher derivatives accordingly. In x's dtype."""
    dtype, x = x.dtype, x.to(compute_dtype(x.dtype))
    base = x.detach()
    steepness = _noise_slope(base, xi, q, scale_unit, amplitude, exact, torch.finfo(dtype).max)
    # The value of the term and its slope, both constants: a straight line through the point x.
    value = _term(base, q, scale_unit, amplitude)
    term = value * xi + steepness * (x - base)
    if exact:
        # The line stays only where the power itself has no finite value or slope: at zeros, denormals and beyond.
        info = torch.finfo(dtype)
        u = _in_units(base, scale_unit)
        power = u.pow(q / 2)
        lost = power.isinf() | ((power < info.tiny) & (value.abs() > info.eps / 8 * base.abs()))
        flat = (u < info.tiny) | (steepness.abs() >= info.max) | lost
        safe = torch.where(flat, 1.0, x)
        power = safe.sign() * (_in_units(safe, scale_unit).pow(q / 2) * scale_unit * amplitude)
        term = torch.where(flat, term, power * xi)
    return (x + term).to(dtype)


def slope(x: Tensor, xi: Tensor, q: Scalar, scale_unit: Scalar, amplitude: Scalar, exact: bool) -> Tensor:
    """dy/dx in the compute dtype: 1 + beta |x|^(q/2 - 1) xi, the noise term times q/2 if `exact`.

    Differentiable in x if `exact`, and a constant otherwise.
    """
    wide, limit = x.to(compute_dtype(x.dtype)), torch.finfo(x.dtype).max
    return 1 + _noise_slope(wide if exact else wide.detach(), xi, q, scale_unit, amplitude, exact, limit)


def _term(x: Tensor, q: Scalar, scale_unit: Scalar, amplitude: Scalar) -> Tensor:
    """The factor of the noise; for q > 2 x times a power in two factors, which overflow only if all does."""
    half, factor = _by_q(q, (q / 2, scale_unit), (q / 4 - 0.5, x.abs()))
    power = _in_units(x, scale_unit).pow(half)
    _, again = _by_q(q, (q, 1.0), (q, power))
    return x.sign() * (power * amplitude * factor * again)


def _noise_slope(
    x: Tensor, xi: Tensor, q: Scalar, scale_unit: Scalar, amplitude: Scalar, exact: bool, limit: float
) -> Tensor:
    """The slope of the noise term, beta |x|^(q/2 - 1) xi (times q/2): at x = 0 it is xi for q = 2 and 0 otherwise."""
    a = _in_units(x, scale_unit).clamp(max=torch.finfo(x.dtype).max)  # for q < 2 the slope at infinity is 0, not NaN
    zero = a == 0
    at_zero = (q == 2).to(x.dtype) if isinstance(q, Tensor) else float(q == 2)
    # The inner `where` keeps the infinite derivative of the power at 0 out of the graph.
    safe = torch.where(zero, 1.0, a)
    factor = (q / 2 if exact else 1.0) * amplitude
    # Up to q = 2 not safe^(q/2 - 1), which may overflow where q/2 is 0 and their product is NaN.
    exponent, divisor = _by_q(q, (q / 2, safe), (q / 2 - 1, 1.0))
    steepness = torch.where(zero, at_zero, safe.pow(exponent) * factor / divisor)
    return (steepness * xi).clamp(-limit, limit)


def _by_q(q: Scalar, below: tuple[Scalar, Scalar], above: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
    """`above` if q > 2, else `below`."""
    if not isinstance(q, Tensor):
        return above if q > 2 else below
    return torch.where(q > 2, above[0], below[0]), torch.where(q > 2, above[1], below[1])


def _in_units(x: Tensor, scale_unit: Scalar) -> Tensor:
    return x.abs() if isinstance(scale_unit, float) and scale_unit == 1 else x.abs() / scale_unit


def limit(dtype: torch.dtype, p: float, q: float, scale_unit: float, amplitude: float) -> float:
    """The bound of the slope of the noise: the largest number of the dtype, or infinity if no x exceeds that."""
    info = torch.finfo(dtype)
    ends = (math.log2(end) - math.log2(scale_unit) for end in (info.tiny * info.eps, info.max))
    factor = max(amplitude * max(q / 2, 1) * max(variance(p), 1), info.tiny)
    steepest = math.log2(factor) + max((q / 2 - 1) * end for end in ends)
    # A factor of 6 for what is rounded, and since cpu.c computes the term itself from a factor of 4 on.
    return info.max if steepest > math.log2(info.max) - 2.5 else math.inf
