"""The CPU path: a factor times the slope dy/dx, in blocks that stay in cache.

Under "detached" y is x times its own slope, since the slope of the noise term is the term over x: forward and backward
are one function. What a pass costs decides how it is written (ns an element, fp32, one thread of an AVX-512 machine):
a product 0.1, a root 0.4, a logarithm or an exponential 1, a `pow` 2.6, a `where` 4, torch's own Bernoulli draw 15.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparseout.kernels import mask as masks
from sparseout.kernels.params import Numbers
from sparseout.kernels.reference import compute_dtype, limit

_BLOCK = masks.MANY  # elements: fewer cost more calls, more leave the cache

# a^e by roots, in place, for the e that have them.
_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    -0.75: lambda a: a.rsqrt_().mul_(a.sqrt()),
    -0.5: Tensor.rsqrt_,
    -0.25: lambda a: a.rsqrt_().sqrt_(),
    0.0: lambda a: a.fill_(1),
    0.25: lambda a: a.sqrt_().sqrt_(),
    0.5: Tensor.sqrt_,
    0.75: lambda a: a.sqrt_().mul_(a.sqrt()),
    1.0: lambda a: a,
    2.0: Tensor.square_,
}


def supports(dtype: torch.dtype, p: float, params: Numbers) -> bool:
    """Whether x times its slope is y at every x: not where q is so small that the slope of a denormal overflows."""
    return params[0] >= 2 or limit(dtype, p, *params, room=compute_dtype(dtype)) == math.inf


def keeps_slope(dtype: torch.dtype, p: float, params: Numbers) -> bool:
    """Whether `slope` gives y and its gradient at every x: where it is not rounded and does not saturate."""
    return dtype == compute_dtype(dtype) and limit(dtype, p, *params) == math.inf


def slope(x: Tensor, seed: int, p: float, params: Numbers, shared_dims: Sequence[int]) -> Tensor:
    """The slope under "detached" of a contiguous `x`, see `keeps_slope`."""
    if 0 < x.numel() <= _BLOCK:
        return _slope_(x.abs(), _noise(x, seed, p, shared_dims), params)
    result = torch.empty_like(x)
    for (x_, result_), xi in _blocks([x, result], seed, p, shared_dims):
        _slope_(torch.abs(x_, out=result_), xi, params)
    return result


def value(x: Tensor, seed: int, p: float, params: Numbers, shared_dims: Sequence[int]) -> Tensor:
    """The output y for a contiguous `x`: x times its slope under "detached", which does not saturate here."""
    result = torch.empty_like(x)
    for (x_, result_), xi in _blocks([x, result], seed, p, shared_dims):
        torch.mul(x_, _slope_(x_.to(xi.dtype).abs(), xi, params), out=result_)
    return result


def gradient(
    grad: Tensor, x: Tensor, seed: int, p: float, params: Numbers, shared_dims: Sequence[int], exact: bool
) -> Tensor:
    """`grad` times the slope of a contiguous `x`."""
    result = torch.empty_like(x)
    most = limit(x.dtype, p, *params)
    for (grad_, x_, result_), xi in _blocks([grad.contiguous(), x, result], seed, p, shared_dims):
        torch.mul(grad_, _slope_(x_.to(xi.dtype).abs(), xi, params, exact, most), out=result_)
    return result


def matched(x: Tensor, q: float) -> tuple[float, float]:
    """The `scale_unit` and `amplitude` of `reference.matched` for a contiguous `x`."""
    if x.numel() == 0 or q == 2:
        return 1.0, 1.0
    peak = max(abs(float(end)) for end in torch.aminmax(x))
    if not 0 < peak < math.inf:
        return 1.0, 1.0
    square = moment = 0.0
    for block in x.view(-1).split(_BLOCK):
        u = block.to(compute_dtype(x.dtype), copy=True).abs_().div_(peak)
        square += float(torch.dot(u, u))
        moment += float((u.sgn_() if q == 0 else _power(q)(u)).sum())
    return peak, math.sqrt(square / moment)


def _slope_(a: Tensor, xi: Tensor, params: Numbers, exact: bool = False, most: float = math.inf) -> Tensor:
    """1 + beta a^(q/2 - 1) xi, times q/2 in the noise if `exact`, in the memory of a = |x|."""
    q, scale_unit, amplitude = params
    if scale_unit != 1:
        a.div_(scale_unit)
    if q < 2:
        torch.threshold_(a, 0.0, math.inf)  # the slope of the noise is 0 at x = 0, and infinity has that power
    steepness = _power(q / 2 - 1)(a)
    if exact:
        amplitude *= q / 2
    if amplitude != 1:
        steepness.mul_(amplitude)
    if most < math.inf:
        return steepness.mul_(xi).clamp_(-most, most).add_(1)
    return torch.addcmul(_one(a.dtype), steepness, xi, out=steepness)


def _power(e: float) -> Callable[[Tensor], Tensor]:
    """The function that takes a to a^e in place."""
    # exp and log are vectorised, which pow is not.
    return _POWERS.get(e, lambda a: a.log_().mul_(e).exp_())


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=dtype, device="cpu")


def _blocks(
    tensors: list[Tensor], seed: int, p: float, shared_dims: Sequence[int]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Block after block: the parts of contiguous `tensors` of one shape, and the noise xi that broadcasts to them."""
    x = tensors[-1]
    if x.numel() == 0:
        return
    if x.numel() <= _BLOCK:
        yield tensors, _noise(x, seed, p, shared_dims)
    elif not shared_dims:
        noise = functools.partial(masks.noise, masks.key(seed), p, compute_dtype(x.dtype))
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, x.numel(), _BLOCK):
            parts = [tensor[start : start + _BLOCK] for tensor in flat]
            yield parts, noise(start, len(parts[0]))
    else:
        xi, rows = _noise(x, seed, p, shared_dims), max(1, _BLOCK * len(x) // x.numel())
        for start in range(0, len(x), rows):
            here = slice(start, start + rows)
            yield [tensor[here] for tensor in tensors], xi[here] if len(xi) > 1 else xi


def _noise(x: Tensor, seed: int, p: float, shared_dims: Sequence[int]) -> Tensor:
    """All of xi, of size 1 along the shared dims of `x`."""
    shape = [1 if dim in shared_dims else size for dim, size in enumerate(x.shape)] if shared_dims else x.shape
    key, dtype, count = masks.key(seed), compute_dtype(x.dtype), math.prod(shape)
    if count <= _BLOCK:
        xi = masks.noise(key, p, dtype, 0, count)
    else:
        starts = range(0, count, _BLOCK)
        xi = torch.cat([masks.noise(key, p, dtype, start, min(_BLOCK, count - start)) for start in starts])
    return xi if len(shape) == 1 else xi.view(shape)
