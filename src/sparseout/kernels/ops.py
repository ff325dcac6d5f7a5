"""The operation as torch sees it: registered ops with their rules, and the choice between paths.

Three ways lead to one equation. The registered ops are for the compiler and for whatever else traces or intercepts:
they save one input and a seed, and make the noise again in backward; or, on a CPU for fp32 and fp64 under "detached",
one makes the slope and autograd keeps it. Plain eager tensors take the same rules without the dispatcher, which would
cost more than a small tensor does. And the plain path is ordinary differentiable torch: for vmap, jvp, forward mode and
higher derivatives, which an op would get silently wrong or not at all.

The curve of the noise is (q, unit, gain), see `reference`: as floats, or, where one of them is a tensor, the last two
or all three in one tensor, so that a moving q costs neither a recompilation nor a host sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparseout.kernels import backends, cpu, reference
from sparseout.kernels import mask as masks
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
_LIBRARY.define("slope(Tensor x, Tensor seed, float p, float[] curve, int[] shared_dims) -> Tensor")


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
    curve, curve_tensor = _pack(x, q, unit, gain)
    intercepted, differentiated = _intercepted(x), x.requires_grad and torch.is_grad_enabled()
    if differentiated and not exact and x.device.type == "cpu" and not (intercepted and curve_tensor is not None):
        floats = _floats(curve, curve_tensor)
        if cpu.keeps_slope(x.dtype, p, floats):
            # Made once and kept: on a CPU the power costs more than memory does, and `F.dropout` keeps as much.
            make: Any = torch.ops.sparseout.slope if intercepted else _slope
            slope: Tensor = make(x.detach(), seed, p, floats, shared_dims)
            return x * slope
    arguments = (x, seed, p, curve, curve_tensor, shared_dims, exact)
    run: Any = torch.ops.sparseout.forward if intercepted else _Eager.apply if differentiated else _forward
    y: Tensor = run(*arguments)
    return y


def matched(x: Tensor, q: Scalar) -> tuple[Scalar, Scalar]:
    """The unit and the gain for a contiguous `x`, see `reference`: as floats where nothing is lost by reading them."""
    if x.device.type == "cpu" and not _transforms_active() and not _intercepted(x):
        return cpu.matched(x.detach(), float(q))
    return reference.matched(x, q)


def _transforms_active() -> bool:
    """Whether a functorch transform (vmap, grad, jvp ...) or a forward-mode level is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _intercepted(x: Tensor) -> bool:
    """Whether something besides autograd is to see what happens to `x`: the compiler, a tracer, a mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def _pack(x: Tensor, *curve: Scalar) -> tuple[list[float], Tensor | None]:
    if all(isinstance(value, float) for value in curve):
        return list(curve), None  # type: ignore[arg-type]
    floats = [value for value in curve[:1] if isinstance(value, float)]  # a float q: there are shortcuts for some
    dtype = reference.compute_dtype(x.dtype)
    values = [
        value.to(x.device, dtype) if isinstance(value, Tensor) else x.new_full((), value, dtype=dtype)
        for value in curve[len(floats) :]
    ]
    return floats, torch.stack(values)


def _unpack(curve: list[float], tensor: Tensor | None) -> tuple[Scalar, Scalar, Scalar]:
    values: Sequence[Scalar] = curve if tensor is None else [*curve, *tensor.unbind()]
    q, unit, gain = values
    return q, unit, gain


def _floats(curve: list[float], tensor: Tensor | None) -> cpu.Curve:
    q, unit, gain = curve if tensor is None else [*curve, *tensor.tolist()]
    return q, unit, gain


def _cpu_curve(x: Tensor, p: float, curve: list[float], tensor: Tensor | None) -> cpu.Curve | None:
    """The curve for the CPU path, or None where that is not the one to take."""
    if x.device.type != "cpu":
        return None
    floats = _floats(curve, tensor)
    return floats if cpu.supports(x.dtype, p, floats) else None


def _noise(x: Tensor, seed: Tensor, p: float, shared_dims: Sequence[int]) -> Tensor:
    shape = [1 if dim in shared_dims else size for dim, size in enumerate(x.shape)]
    return reference.noise(masks.make(seed, shape, p), masks.effective_p(p), reference.compute_dtype(x.dtype))


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _compute(None, x, *arguments)


def _compute(
    grad: Tensor | None,
    x: Tensor,
    seed: Tensor,
    p: float,
    curve: list[float],
    curve_tensor: Tensor | None,
    shared_dims: Sequence[int],
    exact: bool,
) -> Tensor:
    """The output y if there is no `grad`, else `grad` times the slope: where, the device and the arguments decide."""
    if floats := _cpu_curve(x, p, curve, curve_tensor):
        if grad is None:
            return cpu.value(x, int(seed), p, floats, shared_dims)
        return cpu.gradient(grad, x, int(seed), p, floats, shared_dims, exact)
    kernels = backends.kernels(x.device)
    if kernels is not None and kernels.supports(x, shared_dims):
        result: Tensor = kernels.launch(grad, x, seed, p, curve, curve_tensor, shared_dims, exact)
        return result
    xi = _noise(x, seed, p, shared_dims)
    if grad is None:
        return reference.value(x, xi, *_unpack(curve, curve_tensor))
    slope = reference.slope(x, xi, *_unpack(curve, curve_tensor), exact)
    return (grad * slope).to(x.dtype).contiguous()


def _slope(x: Tensor, seed: Tensor, p: float, curve: Sequence[float], shared_dims: Sequence[int]) -> Tensor:
    q, unit, gain = curve
    return cpu.slope(x, int(seed), p, (q, unit, gain), shared_dims)


# Plain registrations, not `triton_op`: the compiler is not to see into a kernel, which it could fuse with nothing and
# would hand Python floats as fp64. One implementation for all devices, since even on CUDA it is the dtype, the mask
# and the machine that choose between the kernels and plain torch.
_LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _compute, "CompositeExplicitAutograd")
_LIBRARY.impl("slope", _slope, "CPU")


torch.library.register_fake("sparseout::forward", lambda x, *_: torch.empty_like(x))
torch.library.register_fake("sparseout::backward", lambda grad, x, *_: torch.empty_like(x))
torch.library.register_fake("sparseout::slope", lambda x, *_: torch.empty_like(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, ctx.p, ctx.curve, curve_tensor, ctx.shared_dims, ctx.exact = inputs
    ctx.save_for_backward(x, seed, curve_tensor)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, seed, curve_tensor = ctx.saved_tensors
    rest = (ctx.p, ctx.curve, curve_tensor, ctx.shared_dims, ctx.exact)
    # A derivative of this derivative may be asked for, or several gradients come as one.
    if torch.is_grad_enabled() or _transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad):
        xi = _noise(x, seed, ctx.p, ctx.shared_dims)
        slope = reference.slope(x, xi, *_unpack(ctx.curve, curve_tensor), ctx.exact)
        result = (grad * slope).to(x.dtype)
    elif _intercepted(grad):
        result = torch.ops.sparseout.backward(grad, x, seed, *rest)
    else:
        result = _compute(grad, x, seed, *rest)
    return result, None, None, None, None, None, None


torch.library.register_autograd("sparseout::forward", _differentiate, setup_context=_setup_context)


def _one_by_one(op: Any) -> Any:
    """The vmap rule of an op that is called as such: what is batched is taken apart, and the results stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        rows = [
            [
                value.select(dim, place).contiguous() if isinstance(dim, int) else value
                for value, dim in zip(arguments, in_dims, strict=True)
            ]
            for place in range(info.batch_size)
        ]
        return torch.stack([op(*row) for row in rows]), 0

    return rule


for _op in (torch.ops.sparseout.forward, torch.ops.sparseout.backward, torch.ops.sparseout.slope):
    torch.library.register_vmap(_op._qualified_op_name, _one_by_one(_op))


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, at half the host time (see docs/design.md)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _forward(*arguments)
        _setup_context(ctx, arguments, y)
        return y

    backward = staticmethod(_differentiate)
