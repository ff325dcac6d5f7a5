"""The operation as torch sees it: registered ops, their fake and autograd rules, and the choice between paths.

Two paths compute one equation. The ops are opaque to autograd and to the compiler, save one input and a seed, and
recompute the noise in backward. The plain path is ordinary differentiable torch: for vmap, jvp, forward mode and
higher derivatives, which a registered op would get silently wrong or not at all.

The curve of the noise is (q, unit, gain), see `reference`: as floats, or as one tensor where any of them is one, so
that a moving q costs neither a recompilation nor a host sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparseout.kernels import mask as masks
from sparseout.kernels import reference
from sparseout.kernels.reference import Scalar

_LIBRARY = torch.library.Library("sparseout", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor seed, float p, float[] curve, Tensor? curve_tensor, int[] shared_dims,"
    " bool exact) -> Tensor"
)
_LIBRARY.define(
    "backward(Tensor grad, Tensor x, Tensor seed, float p, float[] curve, Tensor? curve_tensor,"
    " int[] shared_dims, bool exact) -> Tensor"
)


def apply(
    x: Tensor,
    seed: Tensor,
    p: float,
    q: Scalar,
    unit: Scalar,
    gain: Scalar,
    shared_dims: Sequence[int],
    exact: bool,
) -> Tensor:
    """Sparseout of a contiguous `x`, 0 < p < 1, with the mask of a 0-d int64 `seed` on x's device."""
    if _transforms_active():
        dtype = reference.compute_dtype(x.dtype)
        xi = _noise(x, seed, p, shared_dims)
        q = q.to(dtype) if isinstance(q, Tensor) else q
        return reference.sparseout(x, xi, q, unit, gain, exact)
    floats, tensor = _pack(x, q, unit, gain)
    y: Tensor = torch.ops.sparseout.forward(x, seed, p, floats, tensor, shared_dims, exact)
    return y


def _transforms_active() -> bool:
    """Whether a functorch transform (vmap, grad, jvp ...) or a forward-mode level is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _pack(x: Tensor, *curve: Scalar) -> tuple[list[float], Tensor | None]:
    if all(isinstance(value, float) for value in curve):
        return list(curve), None  # type: ignore[arg-type]
    dtype = reference.compute_dtype(x.dtype)
    values = [
        value.to(x.device, dtype) if isinstance(value, Tensor) else x.new_full((), value, dtype=dtype)
        for value in curve
    ]
    return [], torch.stack(values)


def _unpack(curve: list[float], tensor: Tensor | None) -> tuple[Scalar, Scalar, Scalar]:
    q, unit, gain = curve if tensor is None else tensor.unbind()
    return q, unit, gain


def _noise(x: Tensor, seed: Tensor, p: float, shared_dims: Sequence[int]) -> Tensor:
    shape = [1 if dim in shared_dims else size for dim, size in enumerate(x.shape)]
    return reference.noise(masks.make(seed, shape, p), masks.effective_p(p), reference.compute_dtype(x.dtype))


def _forward(
    x: Tensor,
    seed: Tensor,
    p: float,
    curve: list[float],
    curve_tensor: Tensor | None,
    shared_dims: list[int],
    exact: bool,
) -> Tensor:
    xi = _noise(x, seed, p, shared_dims)
    return reference.value(x, xi, *_unpack(curve, curve_tensor))


def _backward(
    grad: Tensor,
    x: Tensor,
    seed: Tensor,
    p: float,
    curve: list[float],
    curve_tensor: Tensor | None,
    shared_dims: list[int],
    exact: bool,
) -> Tensor:
    xi = _noise(x, seed, p, shared_dims)
    slope = reference.slope(x, xi, *_unpack(curve, curve_tensor), exact)
    return (grad * slope).to(x.dtype).contiguous()


_LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _backward, "CompositeExplicitAutograd")


torch.library.register_fake("sparseout::forward", lambda x, *_: torch.empty_like(x))
torch.library.register_fake("sparseout::backward", lambda grad, x, *_: torch.empty_like(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, ctx.p, ctx.curve, curve_tensor, ctx.shared_dims, ctx.exact = inputs
    ctx.save_for_backward(x, seed, curve_tensor)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, seed, curve_tensor = ctx.saved_tensors
    if torch.is_grad_enabled() or _transforms_active():  # a derivative of this derivative will be asked for
        xi = _noise(x, seed, ctx.p, ctx.shared_dims)
        slope = reference.slope(x, xi, *_unpack(ctx.curve, curve_tensor), ctx.exact)
        result = (grad * slope).to(x.dtype)
    else:
        result = torch.ops.sparseout.backward(grad, x, seed, ctx.p, ctx.curve, curve_tensor, ctx.shared_dims, ctx.exact)
    return result, None, None, None, None, None, None


torch.library.register_autograd("sparseout::forward", _differentiate, setup_context=_setup_context)
