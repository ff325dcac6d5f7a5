"""The function: checks its arguments, returns early where there is nothing to do, and calls the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseout._utils.torch_internals import readable
from sparseout._utils.validation import (
    check_bool,
    check_choice,
    check_number,
    check_scalar,
    expected,
    is_int,
    is_number,
    type_name,
)
from sparseout.kernels import containers, ops

Gradient = Literal["detached", "exact"]
Scale = float | Literal["matched"] | None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sparseout(
    input: Tensor,
    p: float | Tensor = 0.5,
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

    The default gradient treats the multiplier of the noise as a constant, and so fails ``gradcheck`` by design: this is
    what the code published with the paper does, and it has a stronger effect on sparsity than the derivative of the
    output. Pass ``gradient="exact"`` for the derivative.

    .. math::
        y = x + \beta \, \operatorname{sign}(x) \, |x|^{q/2} \, \xi, \qquad
        \xi = \frac{m}{1 - p} - 1, \qquad m \sim \operatorname{Bernoulli}(1 - p)

    so that :math:`E[y] = x` and :math:`\operatorname{Var}[y] = \beta^2 |x|^q \, p / (1 - p)`. With q < 2 the noise is
    large for small activations, relative to their size, and training drives these to zero; q = 2 is Dropout; with q > 2
    it is largest for large activations, and the code spreads over more units. A dropped unit is zero only at q = 2:
    otherwise it becomes :math:`x - \beta \operatorname{sign}(x) |x|^{q/2}`, of opposite sign where
    :math:`\beta |x|^{q/2} > |x|`. Sparsity is learned, not made by the mask.

    Args:
        input: a tensor of fp64, fp32, bf16 or fp16. Half types are computed in fp32.
        p: probability that the mask is 0, in [0, 1]. At 0 the input itself is returned, at 1 zeros, as ``F.dropout``
            does. It is rounded to a multiple of 2^-16 (of 2^-32 outside [0.01, 0.99]). A 0-d floating-point tensor
            without gradient can be changed in place with no recompilation: fp64 on the CPU has the same bits as a
            float, and there is no device to wait for. Compiled code checks its value when it runs.
        q: exponent, a finite number >= 0. A float q = 2 with ``seed=None`` calls ``F.dropout`` (``F.dropout1d``,
            ``2d``, ``3d`` for their masks): same bits, same random numbers. A 0-d floating-point tensor without
            gradient can be changed in place with no recompilation; its value is not checked, and is read in fp32
            unless the input is fp64.
        training: if False, the input itself is returned and no random number is drawn.
        inplace: overwrite ``input`` with the result. Saves no memory if a gradient is needed.
        gradient: ``"detached"``: :math:`dy/dx = 1 + \beta |x|^{q/2 - 1} \xi`. ``"exact"``:
            :math:`dy/dx = 1 + \tfrac{q}{2} \beta |x|^{q/2 - 1} \xi`. In both the slope of the noise term at x = 0 is 0,
            or :math:`\xi` for q = 2, and saturates at the dtype's largest number. For q <= 1 its variance is infinite
            if the density of activations at 0 is positive: clip gradients.
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
        anyway, or, on a CPU under ``"detached"``, the slope of an input of up to 16,384 elements (of any size in
        compiled code). ``F.dropout`` keeps a mask of a byte an element on a GPU, and one of the input's size on a CPU.
        What runs where: :func:`sparseout.backend`.

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
    # What is as usual is let through without a call: on small tensors the time of the host is all there is.
    moved = False
    if type(p) is not float or not 0 <= p <= 1:
        p = readable(check_scalar("p", p)) if isinstance(p, Tensor) else p
        moved = isinstance(p, Tensor)
        p = p if moved else check_p(p)
    if type(q) is not float or not 0 <= q < math.inf:
        q = check_q(q)
    if inplace is not False:
        check_bool("inplace", inplace)
    check_gradient(gradient)
    if scale is not None:
        scale = check_scale(scale)
    if seed is not None:
        check_seed(seed)
    dims = check_dims(shared_dims)
    if not isinstance(input, Tensor):
        raise TypeError(expected("input", "a tensor", type_name(input)))
    if dims:
        dims = normalise_dims(dims, input.dim())
    if not training or (not moved and p == 0):
        return input
    if input.dtype not in _DTYPES:
        raise TypeError(expected("input", "a floating-point tensor (fp64, fp32, bf16 or fp16)", input.dtype))
    if not moved and p == 1:
        return F.dropout(input, 1.0, True, inplace)
    is_dropout = seed is None and not moved and not isinstance(q, Tensor) and q == 2
    if is_dropout and (dropout := _torch_dropout(input, dims, inplace)):
        return dropout(input, p, True, inplace)
    plain = type(input) is Tensor and not input.is_nested and input.layout is torch.strided
    apply = ops.apply if plain else containers.apply
    kept = input.clone() if inplace and input.requires_grad and torch.is_grad_enabled() else input
    y = apply(kept, seed, p, q, scale, dims, gradient == "exact")
    return input.copy_(y) if inplace else y


# One check for each argument, without an input, for everything that takes arguments of these names.


def check_p(p: Any) -> float:
    """Check the probability that the mask is 0."""
    return check_number("p", p, "a number between 0 and 1", lambda p: 0 <= p <= 1)


def check_q(q: Any) -> float | Tensor:
    """Check the exponent."""
    if isinstance(q, Tensor):
        return check_scalar("q", q)
    if not is_number(q):
        raise TypeError(expected("q", "a number or a 0-d floating-point tensor", type_name(q)))
    return check_number("q", q, "a finite number >= 0", lambda q: 0 <= q < math.inf)


def check_gradient(gradient: Any) -> Gradient:
    """Check which gradient is asked for."""
    return check_choice("gradient", gradient, ("detached", "exact"))  # type: ignore[return-value]


def check_scale(scale: Any) -> Scale:
    """Check what sets beta."""
    if scale is None:
        return None
    if isinstance(scale, str) and scale == "matched":
        return "matched"
    wanted = "None, a number > 0 or 'matched'"
    if isinstance(scale, str):
        raise ValueError(expected("scale", wanted, repr(scale)))
    if not is_number(scale):
        raise TypeError(expected("scale", wanted, type_name(scale)))
    check_number("scale", scale, "a finite number > 0", lambda scale: 0 < scale < math.inf)
    wanted = "a number from 1e-37 to 1e37, which fp32 can divide by"
    check_number("scale", scale, wanted, lambda scale: 1e-37 <= scale <= 1e37)
    return float(scale)


def check_seed(seed: Any) -> int | Tensor | None:
    """Check what the mask is made from."""
    if seed is None:
        return None
    wanted = "None, an int or a 0-d int64 tensor"
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise TypeError(expected("seed", wanted, f"a tensor of shape {tuple(seed.shape)} and {seed.dtype}"))
        return seed
    if not is_int(seed):
        raise TypeError(expected("seed", wanted, type_name(seed)))
    if not -(2**63) <= seed < 2**64:
        raise ValueError(expected("seed", "an integer of 64 bits", seed))
    return seed  # type: ignore[no-any-return]


def check_dims(dims: Any) -> tuple[int, ...]:
    """Check the dims along which a draw is shared, as far as that is possible without an input."""
    wanted = "a sequence of different ints"
    if not isinstance(dims, (tuple, list)):
        raise TypeError(expected("shared_dims", wanted, type_name(dims)))
    if not dims:
        return ()
    for dim in dims:
        if not is_int(dim):
            raise TypeError(expected("shared_dims", wanted, f"one with {type_name(dim)} in it"))
    if len(set(dims)) < len(dims):
        raise ValueError(expected("shared_dims", wanted, tuple(dims)))
    return tuple(dims)


def normalise_dims(dims: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The dims as numbers >= 0, in order."""
    for dim in dims:
        if not -ndim <= dim < ndim:
            raise ValueError(expected("shared_dims", f"dims of a {ndim}-d input", dims))
    normalised = tuple(sorted(dim % ndim for dim in dims))
    if len(set(normalised)) < len(dims):
        raise ValueError(expected("shared_dims", f"different dims of a {ndim}-d input", dims))
    return normalised


def _torch_dropout(input: Tensor, dims: tuple[int, ...], inplace: bool) -> Callable[..., Tensor] | None:
    """Torch's own dropout function with one draw along `dims`, or None where it has none."""
    ndim = input.dim()
    if input.is_nested and (dims or inplace or not input.is_contiguous()):
        return None
    if not dims:
        return F.dropout
    if dims == tuple(range(2, ndim)):
        return _feature_dropout
    return _unbatched_dropout if dims == tuple(range(1, ndim)) else None


def _feature_dropout(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    """Channel dropout as `F.dropout1d`, `2d` and `3d` call it, for any number of dims."""
    return (torch.feature_dropout_ if inplace else torch.feature_dropout)(input, p, training)


def _unbatched_dropout(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    y = _feature_dropout(input.unsqueeze(0), p, training, inplace).squeeze(0)
    return input if inplace else y
