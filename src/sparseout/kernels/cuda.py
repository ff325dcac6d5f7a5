"""Launches the Triton kernels: the operation, and beta of ``scale="matched"``. Imported only where they can run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseout.kernels import mask as masks
from sparseout.kernels import reference
from sparseout.kernels import triton_kernels as kernels
from sparseout.kernels.params import NoiseArguments, NoiseParams, Scalar

_WIDTH = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}  # 16 bytes, what a thread loads in one go
_WARPS = 4
_LOADS = 4  # that a thread has on their way at a time, of x alone or of x and grad
_PARTS = 1024  # the most programs that sum: several a multiprocessor, and few enough that one program combines them
_NATIVE = isinstance(kernels.sparseout, triton.JITFunction)  # else Triton's interpreter runs it, on any device


def supports(x: Tensor, shared_dims: Sequence[int]) -> bool:
    """Whether the kernel takes such an `x` and such a mask."""
    return x.dtype in _WIDTH and _sharing(tuple(x.shape), tuple(shared_dims), 16) is not None


def launch(grad: Tensor | None, x: Tensor, noise: NoiseArguments) -> Tensor:
    """Sparseout of `x` if there is no `grad`, else `grad` times the slope at x: the ops of `ops`."""
    seed, p, floats, params_tensor, shared_dims, exact, _ = noise  # a p that is a tensor was read before
    grad, x = None if grad is None else grad.contiguous(), x.contiguous()  # the kernel knows no strides
    out = torch.empty_like(x)
    shape, dims = tuple(x.shape), tuple(shared_dims)
    arguments = _arguments(x.dtype, shape, p, tuple(floats), dims, grad is not None, exact)
    programs = -(-x.numel() // arguments["TILE"])
    with _device_of(x):
        if programs:
            kernels.sparseout[(programs,)](out, grad, x, seed, params_tensor, **arguments)
    return out


def _quarters(q: Scalar) -> int:
    """The exponent q/2 in quarters where roots make its power and that of the slope, else -9."""
    return int(2 * q) if isinstance(q, float) and 2 * q in range(9) else -9


def matched(x: Tensor, q: Scalar) -> NoiseParams:
    """The parameters of the noise of a contiguous `x` with ``scale="matched"``: `reference.matched`, balanced.

    One kernel reads x, once, and writes a few numbers for each part of it; another puts them together. No atomics: the
    parts and the order of all sums depend on the size alone.
    """
    q_tensor, q_float = (q, 0.0) if isinstance(q, Tensor) else (None, q)
    shape = {"LOADS": _LOADS, "THREADS": 32 * _WARPS, "WIDTH": _WIDTH[x.dtype]}
    full_tiles, remainder = divmod(x.numel(), math.prod(shape.values()))
    parts = min(full_tiles + 1, _PARTS)
    sums = torch.empty(3 * _PARTS, dtype=torch.float32, device=x.device)
    params = torch.empty(2, dtype=torch.float32, device=x.device)
    options = {
        "QUARTERS": _quarters(q),
        "NATIVE": _NATIVE,
        "PARTS": _PARTS,
        "num_warps": _WARPS,
        "enable_fp_fusion": True,
    }
    with _device_of(x):
        kernels.matched_sums[(parts,)](sums, x, q_tensor, full_tiles, remainder, q_float, **shape, **options)
        kernels.matched[(1,)](params, sums, q_tensor, parts, q_float, **options)
    return NoiseParams(q, *params.unbind())


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    elsewhere = _NATIVE and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


@functools.lru_cache(maxsize=1024)
def _arguments(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    p: float,
    floats: tuple[float, ...],
    shared_dims: tuple[int, ...],
    backward: bool,
    exact: bool,
) -> dict[str, Any]:
    """The arguments of the kernel besides tensors, kept between calls: on small tensors the host sets the time."""
    bits, threshold = masks.bits_and_threshold(p)
    loaded = 3 - len(floats)
    q, scale_unit, amplitude = params = NoiseParams(*floats or (0.0,)).numbers()  # for what is loaded nothing counts
    limit = torch.finfo(dtype).max if loaded else reference.limit(dtype, p, *params)
    sharing = _sharing(shape, shared_dims, bits)
    assert sharing is not None  # see `supports`
    n = math.prod(shape)
    return {
        "n": n,
        "threshold": masks.signed(threshold, bits) << (32 - bits),
        "kept": masks.variance(masks.effective_p(p)),
        "half": q / 2,
        "scale_unit": scale_unit,
        "amplitude": amplitude,
        "LOADED": loaded,
        "QUARTERS": _quarters(q) if floats else -9,
        "ABOVE_2": q > 2,
        "SCALED": loaded > 0 or params[1:] != (1, 1),
        "EXACT": exact and backward,
        "LIMIT": limit if backward and limit < math.inf else 0.0,
        "BITS": bits,
        "WIDE": n >= 2**32,
        "NATIVE": _NATIVE,
        "TILE": 32 * _WARPS * _WIDTH[dtype] * _LOADS // (2 if backward else 1),
        "num_warps": _WARPS,
        "enable_fp_fusion": True,  # the default, but releases differ in how they take its absence
        **sharing._asdict(),
    }


class Sharing(NamedTuple):
    """The way from the number of an element to the number of its draw: in at most four steps.

    `// STEP`; `% period` if OUTER; `// inner` if INNER; `// block * row + % row` if MIDDLE. What comes out is the
    number of a draw, or, if WHOLE, of a word whose draws the STEP neighbours take in turn.
    """

    STEP: int
    WHOLE: bool
    OUTER: bool = False
    INNER: bool = False
    MIDDLE: bool = False
    period: int = 0
    inner: int = 0
    block: int = 0
    row: int = 0


@functools.lru_cache(maxsize=1024)
def _sharing(shape: tuple[int, ...], shared_dims: tuple[int, ...], bits: int) -> Sharing | None:
    """The sharing of a contiguous tensor; None where shared dims and others take turns more often than it can say."""
    draws = 64 // bits  # of a word
    runs = masks.runs(shape, shared_dims)
    if not any(shared for _, shared in runs):
        return Sharing(draws, True)
    inner = runs.pop()[0] if runs[-1][1] else 1
    outer = runs.pop(0)[0] if runs and runs[0][1] else 1
    if len(runs) > 3:
        return None
    sizes = [size for size, _ in runs] or [1]  # what is left: own, or own, shared, own
    row, block, period = sizes[-1], math.prod(sizes[1:]), math.prod(sizes) * inner
    flags = (outer > 1, inner > 1, len(sizes) == 3)
    # Neighbours that share a draw, or take those of one word, find it together where the sizes allow.
    if inner == 1 and row % draws == 0:
        return Sharing(draws, True, *flags, period // draws, inner, block // draws, row // draws)
    if inner % draws == 0:
        return Sharing(draws, False, *flags, period // draws, inner // draws, block, row)
    return Sharing(1, False, *flags, period, inner, block, row)
