"""The function: check the arguments, leave early where nothing is to be done, hand the rest to the kernels."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseout._utils.validation import expected, kind
from sparseout.kernels import ops

Gradient = Literal["detached", "exact"]
Scale = float | Literal["matched"] | None

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# torch's own functions for q = 2, by (input.dim(), shared_dims).
_DROPOUT = {
    (2, (1,)): F.dropout1d,
    (3, (2,)): F.dropout1d,
    (4, (2, 3)): F.dropout2d,
    (4, (1, 2, 3)): F.dropout3d,
    (5, (2, 3, 4)): F.dropout3d,
}


def sparseout(
    input: Tensor,
    p: float = 0.5,
    q: float | Tensor = 2.0,
    training: bool = True,
    inplace: bool = False,
    *,
    gradient: Gradient = "detached",
    scale: Scale = None,
    shared_dims: Sequence[int] = (),
    seed: int | Tensor | None = None,
) -> Tensor:
    r"""Dropout whose noise grows as :math:`|x|^{q/2}`, so that training makes the activations sparser or denser.

    The default gradient treats the multiplier of the noise as a constant, and so it fails ``gradcheck`` by design:
    it is what the code published with the paper does, and it moves sparsity more than the derivative of the output
    does. Pass ``gradient="exact"`` for the derivative.

    .. math::
        y = x + \beta \, \operatorname{sign}(x) \, |x|^{q/2} \, \xi, \qquad
        \xi = \frac{m}{1 - p} - 1, \qquad m \sim \operatorname{Bernoulli}(1 - p)

    so that :math:`E[y] = x` and :math:`\operatorname{Var}[y] = \beta^2 |x|^q \, p / (1 - p)`. With q < 2 small
    activations are shaken hard and training drives them to zero; q = 2 is Dropout; with q > 2 large activations
    pay most and the code spreads out. A dropped unit is zero only at q = 2: elsewhere it moves to
    :math:`x - \beta \operatorname{sign}(x) |x|^{q/2}`, past zero where :math:`\beta |x|^{q/2} > |x|`. Sparsity is
    learned, not made by the mask.

    Args:
        input: a tensor of fp64, fp32, bf16 or fp16. Half types are computed in fp32.
        p: probability that the mask is 0, in [0, 1]. At 0 the input itself is returned, at 1 zeros, as
            ``F.dropout`` does. Inside, it is rounded to a multiple of 2^-16 (of 2^-32 outside [0.01, 0.99]).
        q: exponent, a finite number >= 0. A float q = 2 with ``seed=None`` calls ``F.dropout`` (``F.dropout1d``,
            ``2d``, ``3d`` for their masks): same bits, same random numbers. A 0-d fp32 tensor without gradient can
            be changed in place with no recompilation; its value is not checked.
        training: if False, the input itself is returned and no random number is drawn.
        inplace: overwrite ``input`` with the result. Saves no memory where a gradient is needed.
        gradient: ``"detached"``: :math:`dy/dx = 1 + \beta |x|^{q/2 - 1} \xi`. ``"exact"``:
            :math:`dy/dx = 1 + \tfrac{q}{2} \beta |x|^{q/2 - 1} \xi`. In both the slope of the noise term at x = 0
            is 0, or :math:`\xi` for q = 2, and saturates at the dtype's largest number. For q <= 1 its variance
            is infinite where activations are dense near 0: clip gradients.
        scale: sets :math:`\beta`, through which no gradient flows. ``None``: 1, as in the paper. A float c > 0,
            a unit in which x is measured: :math:`c^{1 - q/2}`. ``"matched"``:
            :math:`\sqrt{\operatorname{mean} x^2 / \operatorname{mean} |x|^q}` over the whole input, so that the
            noise has the power that Dropout's would have, at any q and in any unit of x.
        shared_dims: dims along which one draw is shared, such as ``(2, 3)`` for whole channels of NCHW or
            ``(0,)`` on (time, batch, features) for one mask over time.
        seed: an int or a 0-d int64 tensor: the same mask on every call. ``None`` draws one from torch's generator.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Shape:
        - Input: :math:`(*)`, any shape.
        - Output: :math:`(*)`, the same.

    Raises:
        ValueError: for a value outside the ranges above.
        TypeError: for an argument of another type, booleans for ``p`` and ``q`` included.

    Note:
        Where a gradient is needed one tensor of the input's size is kept for backward: the input itself, often kept
        anyway, or, on a CPU for fp32 and fp64 under ``"detached"``, the slope. ``F.dropout`` keeps a mask of a byte an
        element on a GPU, and one of the input's size on a CPU. What runs where: :func:`sparseout.backend`.

    Example:
        >>> import torch, sparseout
        >>> x = torch.tensor([0.0, 0.25, 1.0, 4.0])
        >>> sparseout.sparseout(x, p=0.5, q=1.0, seed=3)  # x ± sqrt(x)
        tensor([ 0.0000, -0.2500,  0.0000,  2.0000])
        >>> sparseout.sparseout(x, p=0.5, q=1.0, training=False) is x
        True

    Source: Khan & Stavness (2019), Sparseout: Controlling Sparsity in Deep Networks, section 3, and the code
    published with it; ``"exact"`` and ``scale`` are this library's.
    """
    dims = check_arguments(p, q, inplace, gradient, scale, shared_dims, seed)
    if not isinstance(input, Tensor):
        raise TypeError(expected("input", "a tensor", kind(input)))
    dims = normalise_dims(dims, input.dim())
    if not training or p == 0:
        return input
    if input.dtype not in _DTYPES:
        raise TypeError(expected("input", "a floating-point tensor (fp64, fp32, bf16 or fp16)", input.dtype))
    if p == 1:
        return F.dropout(input, 1.0, True, inplace)
    if seed is None and not isinstance(q, Tensor) and q == 2:
        if not dims:
            return F.dropout(input, p, True, inplace)
        if (input.dim(), dims) in _DROPOUT:
            return _DROPOUT[input.dim(), dims](input, p, True, inplace)
    if inplace:
        kept = input.clone() if input.requires_grad and torch.is_grad_enabled() else input
        return input.copy_(_perturb(kept, p, q, gradient, scale, dims, seed))
    return _perturb(input, p, q, gradient, scale, dims, seed)


def check_arguments(
    p: Any, q: Any, inplace: Any, gradient: Any, scale: Any, shared_dims: Any, seed: Any
) -> tuple[int, ...]:
    """Raise one clear sentence for an argument that no input could make right; return `shared_dims` as a tuple."""
    p_range = "a number between 0 and 1"
    if not 0 <= _number("p", p_range, p) <= 1:
        raise ValueError(expected("p", p_range, p))
    if isinstance(q, Tensor):
        if q.dim() != 0 or q.dtype != torch.float32:
            got = f"a tensor of shape {tuple(q.shape)} and {q.dtype}"
            raise TypeError(expected("q", "a number or a 0-d fp32 tensor", got))
        if q.requires_grad:
            raise ValueError(expected("q", "a tensor without gradient", "one that requires it"))
    elif not 0 <= _number("q", "a number or a 0-d fp32 tensor", q) < math.inf:
        raise ValueError(expected("q", "a finite number >= 0", q))
    if not isinstance(inplace, bool):
        raise TypeError(expected("inplace", "a bool", kind(inplace)))
    if gradient not in ("detached", "exact"):
        raise ValueError(expected("gradient", "'detached' or 'exact'", repr(gradient)))
    if scale is not None and scale != "matched":
        if isinstance(scale, str):
            raise ValueError(expected("scale", "None, a number > 0 or 'matched'", repr(scale)))
        if not 0 < _number("scale", "None, a number > 0 or 'matched'", scale) < math.inf:
            raise ValueError(expected("scale", "a finite number > 0", scale))
        if not 1e-37 <= scale <= 1e37:
            raise ValueError(expected("scale", "a number from 1e-37 to 1e37, which fp32 can divide by", scale))
    _check_seed(seed)
    return check_dims(shared_dims)


def _number(name: str, wanted: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(expected(name, wanted, kind(value)))
    return float(value)


def _check_seed(seed: Any) -> None:
    wanted = "None, an int or a 0-d int64 tensor"
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise TypeError(expected("seed", wanted, f"a tensor of shape {tuple(seed.shape)} and {seed.dtype}"))
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(expected("seed", wanted, kind(seed)))
        if not -(2**63) <= seed < 2**64:
            raise ValueError(expected("seed", "an integer of 64 bits", seed))


def check_dims(dims: Any) -> tuple[int, ...]:
    """Dims for one draw, as far as they can be checked without an input."""
    wanted = "a sequence of different ints"
    if not isinstance(dims, (tuple, list)):
        raise TypeError(expected("shared_dims", wanted, kind(dims)))
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(expected("shared_dims", wanted, f"one with {kind(dim)} in it"))
    if len(set(dims)) < len(dims):
        raise ValueError(expected("shared_dims", wanted, tuple(dims)))
    return tuple(dims)


def normalise_dims(dims: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The same as numbers >= 0, in order."""
    for dim in dims:
        if not -ndim <= dim < ndim:
            raise ValueError(expected("shared_dims", f"dims of a {ndim}-d input", dims))
    normalised = tuple(sorted(dim % ndim for dim in dims))
    if len(set(normalised)) < len(dims):
        raise ValueError(expected("shared_dims", f"different dims of a {ndim}-d input", dims))
    return normalised


def _perturb(
    input: Tensor,
    p: float,
    q: float | Tensor,
    gradient: Gradient,
    scale: Scale,
    dims: tuple[int, ...],
    seed: int | Tensor | None,
) -> Tensor:
    q = q if isinstance(q, Tensor) else float(q)
    return ops.apply(input, _seed_tensor(seed, input.device), float(p), q, scale, dims, gradient == "exact")


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        # Drawn here as a tensor: what makes vmap's modes, checkpoints, CUDA graphs and the compiler behave.
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
