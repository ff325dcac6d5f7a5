"""The operation as torch sees it: registered ops with their rules, and the choice between paths.

    what is open, or what x is                   forward                      backward
    -------------------------------------------  ---------------------------  --------------------------
    vmap, jvp, forward mode, any functorch       reference.sparseout          torch's own
    the compiler, a tracer, a mode, a subclass   op `forward`                 op `backward`
      with "detached", fp32 or fp64 on a CPU     x times op `slope`           torch's own
    a plain tensor                               the same functions as the ops, without the dispatcher

    a derivative of the derivative, or many gradients at once, of either:     reference.slope

The ops save their input and a seed, and make the noise again in backward. In an op, and for a plain tensor:

    on a CPU that has the kernel                 cpu.launch, cpu.run          cpu.launch
    on a GPU that has the kernel                 cuda.launch                  cuda.launch
    elsewhere                                    reference.value              grad times reference.slope

With "matched" beta comes from `cpu.matched` or `cuda.matched` for a plain tensor, else from `reference.matched`. The
dispatcher would cost more than a small tensor does. The first row is ordinary differentiable torch because an op with
an autograd rule gives a silent zero tangent there, or an error.

Every function here takes an x of any strides: the result has the memory format that `torch.empty_like` gives it, and
the mask follows that memory. See `params.NoiseParams` for `floats` and `params_tensor`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseout._utils import torch_internals
from sparseout._utils.validation import expected
from sparseout.kernels import backends, cpu, reference, seeds
from sparseout.kernels import mask as masks
from sparseout.kernels.params import NoiseArguments, NoiseParams, Numbers, Scalar, ScaleArgument

_LIBRARY = torch.library.Library("sparseout", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor seed, float p, float[] curve, Tensor? curve_tensor, int[] shared_dims,"
    " bool exact, Tensor? p_tensor=None) -> Tensor"
)
_LIBRARY.define(
    "backward(Tensor grad, Tensor x, Tensor seed, float p, float[] curve, Tensor? curve_tensor,"
    " int[] shared_dims, bool exact, Tensor? p_tensor=None) -> Tensor"
)
_LIBRARY.define("noise(Tensor seed, Tensor p, SymInt[] shape, ScalarType dtype) -> Tensor")
_LIBRARY.define("slope(Tensor x, Tensor seed, float p, float[] curve, int[] shared_dims) -> Tensor")

# Elements up to which the slope is computed once and kept, and autograd's own product is the backward: a function in
# Python costs more than the computation there. Beyond, a second power costs less than a third tensor.
_SMALL = 2**14
_NO_P = 0.5  # in the place of a p that is a tensor
_UNROUNDED = (torch.float32, torch.float64)  # dtypes in which a slope can be kept


def apply(
    x: Tensor,
    seed: seeds.Seed,
    p: Scalar,
    q: Scalar,
    scale: ScaleArgument,
    shared_dims: Sequence[int],
    exact: bool,
    params: NoiseParams | None = None,
) -> Tensor:
    """Sparseout of `x`, 0 < p < 1, with the mask of a `seed`.

    A p that is a tensor is for what is intercepted. Where x is one of several parts, its `params` are those of all.
    """
    untouched = torch_internals.is_untouched(x)
    if untouched and x.is_cpu and isinstance(p, float) and backends.kernels(backends.CPU) is cpu:
        if not x.is_contiguous():
            order = _memory_order(x)
            dims = [order.index(dim) for dim in shared_dims]
            dense = x.permute(order).contiguous()
            return apply(dense, seed, p, q, scale, dims, exact, params).permute(_inverse(order))
        return _native(x, seed, p, params.numbers() if params else _numbers(x, q, scale), shared_dims, exact)
    seed = seeds.tensor(seed, x.device)
    params = params or noise_params(x, q, scale, plain=untouched)
    if not untouched and torch_internals.transforms_active():
        z = reference.sparseout(x, _noise(x, seed, p, shared_dims), *params, exact)
        return z if isinstance(p, float) else z * (p != 1)  # as Dropout has it, which a float 1 is left to
    floats, params_tensor = params.pack(x.device, reference.compute_dtype(x.dtype))
    differentiated = x.requires_grad and torch.is_grad_enabled()
    keeps_slope = (
        differentiated
        and isinstance(p, float)
        and not exact
        and _is_product(x, p, floats, params_tensor)
        and x.dtype == reference.compute_dtype(x.dtype)  # or the slope that is kept would be rounded
        and not torch_internals.is_tracing()  # a traced program runs in either grad mode, and must not depend on it
    )
    if keeps_slope:
        make: Any = _slope if untouched else torch.ops.sparseout.slope
        slope: Tensor = make(x.detach(), seed, p, floats, shared_dims)
        return x * slope
    run: Any = torch.ops.sparseout.forward if not untouched else _run_eager if differentiated else _forward
    arguments = (p, None) if isinstance(p, float) else (_NO_P, p.clone())  # backward has forward's, wherever p is moved
    y: Tensor = run(x, seed, arguments[0], floats, params_tensor, shared_dims, exact, arguments[1])
    return y


def _native(x: Tensor, seed: seeds.Seed, p: float, params: Numbers, shared_dims: Sequence[int], exact: bool) -> Tensor:
    """`apply` for a plain contiguous tensor and the native kernel, with as little between the two as can be."""
    number = seeds.number(seed)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return cpu.run(cpu.VALUE, None, x, number, p, params, shared_dims)
    if not exact and x.numel() <= _SMALL and x.dtype in _UNROUNDED and _is_slope_finite_cached(x.dtype, p, *params):
        return x * cpu.run(cpu.SLOPE, None, x, number, p, params, shared_dims)
    y: Tensor = _run_native(x, (number, p, params, shared_dims, exact))
    return y


def _numbers(x: Tensor, q: Scalar, scale: ScaleArgument) -> Numbers:
    """The parameters of the noise of a contiguous `x` on a CPU, where there is no device to wait for."""
    q = float(q)
    if scale is None or q == 2:
        return q, 1.0, 1.0
    return (q, *cpu.matched(x, q)) if scale == "matched" else (q, float(scale), 1.0)


def _is_slope_finite(dtype: torch.dtype, p: float, q: float, scale_unit: float, amplitude: float) -> bool:
    """Whether x times its slope is y at every x of `dtype`: where the slope does not saturate."""
    return reference.limit(reference.compute_dtype(dtype), p, q, scale_unit, amplitude) == math.inf


def _is_product(x: Tensor, p: float, floats: Sequence[float], params_tensor: Tensor | None) -> bool:
    """Whether y is computed as x times its slope, with gradients or without: the two must be the same bits."""
    return params_tensor is None and x.is_cpu and _is_slope_finite(x.dtype, p, *floats)


_is_slope_finite_cached = functools.lru_cache(maxsize=1024)(_is_slope_finite)  # the compiler warns of caches


def noise_params(
    x: Tensor, q: Scalar, scale: ScaleArgument, reduce: reference.Reduce | None = None, plain: bool = False
) -> NoiseParams:
    """The parameters of the noise of `x`, see `reference.matched` for `reduce`. A `plain` tensor may go to a kernel."""
    dtype = reference.compute_dtype(x.dtype)
    if isinstance(q, Tensor):
        q = q.to(x.device, dtype)
    if scale is None or (isinstance(q, float) and q == 2):  # beta is 1, and not up to rounding
        return NoiseParams(q, 1.0, 1.0)  # written out: a compiler would take the defaults for inputs of its graph
    if plain and scale == "matched":
        kernels = backends.kernels(x.device)
        if kernels is not None and kernels is not cpu and kernels.supports(x, ()):
            dense = x.detach() if x.is_contiguous() else x.detach().permute(_memory_order(x)).contiguous()
            params: NoiseParams = kernels.matched(dense, q)
            return params
    unit, amplitude = reference.matched(x, q, reduce) if scale == "matched" else (float(scale), 1.0)
    return NoiseParams(q, unit, amplitude).balanced(dtype)


def _memory_order(x: Tensor) -> list[int]:
    """The dims from the outermost to the innermost in the memory of a result for `x`."""
    if torch.compiler.is_compiling():
        return list(x.dim_order())  # strides that are symbols cannot be sorted
    strides = torch.empty_like(x).stride()
    return sorted(range(x.dim()), key=strides.__getitem__, reverse=True)


def _in_memory_order(
    run: Callable[[Tensor | None, Tensor, list[int]], Tensor],
    grad: Tensor | None,
    x: Tensor,
    shared_dims: Sequence[int],
) -> Tensor:
    """The result of `run` on contiguous tensors whose dims are those of `x` in the order of memory."""
    order = _memory_order(x)
    grad = None if grad is None else grad.permute(order)
    result = run(grad, x.permute(order).contiguous(), [order.index(dim) for dim in shared_dims])
    return result.permute(_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def _noise(x: Tensor, seed: Tensor, p: Scalar, shared_dims: Sequence[int]) -> Tensor:
    """The noise xi of an `x` of any strides, of size 1 along the shared dims."""
    order = _memory_order(x)
    shape = [1 if dim in shared_dims else x.shape[dim] for dim in order]
    dtype = reference.compute_dtype(x.dtype)
    make: Any = torch.ops.sparseout.noise if isinstance(p, Tensor) else _make_noise
    xi: Tensor = make(seed, p, shape, dtype)
    return xi.permute(_inverse(order))


def _make_noise(seed: Tensor, p: Scalar, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    p = float(p)
    if p in (0, 1):  # which no float p is here
        return torch.full(shape, -p, dtype=dtype, device=seed.device)
    return reference.noise(masks.make(seed, shape, p), masks.effective_p(p), dtype)


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _compute(None, x, NoiseArguments(*arguments))


def _backward(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return _compute(grad, x, NoiseArguments(*arguments))


def _compute(grad: Tensor | None, x: Tensor, noise: NoiseArguments) -> Tensor:
    """The output y if there is no `grad`, else `grad` times the slope: where, the device and the arguments decide."""
    if noise.p_tensor is not None:
        p = float(noise.p_tensor)
        if not 0 <= p <= 1:
            raise ValueError(expected("p", "a number between 0 and 1", p))
        if p in (0, 1):
            value = x if grad is None else grad
            return torch.empty_like(x).copy_(F.dropout(value, p, training=p == 1))
        noise = noise._replace(p=p, p_tensor=None)
    if not x.is_contiguous():
        return _in_memory_order(
            lambda grad, x, dims: _compute(grad, x, noise._replace(shared_dims=dims)), grad, x, noise.shared_dims
        )
    kernels = backends.kernels(x.device)
    if kernels is not None and kernels.supports(x, noise.shared_dims):
        result: Tensor = kernels.launch(grad, x, noise)
        return result
    xi = _noise(x, noise.seed, noise.p, noise.shared_dims)
    if grad is not None:
        return (grad * reference.slope(x, xi, *noise.params, noise.exact)).to(x.dtype).contiguous()
    if _is_product(x, noise.p, noise.floats, noise.params_tensor):
        wide = x.to(reference.compute_dtype(x.dtype))
        return (wide * reference.slope(wide, xi, *noise.params, exact=False)).to(x.dtype)
    return reference.value(x, xi, *noise.params)


def _slope(x: Tensor, seed: Tensor, p: float, floats: list[float], shared_dims: Sequence[int]) -> Tensor:
    if not x.is_contiguous():
        return _in_memory_order(lambda _, x, dims: _slope(x, seed, p, floats, dims), None, x, shared_dims)
    if backends.kernels(x.device) is None:
        params = NoiseParams.unpack(floats, None)
        return reference.slope(x, _noise(x, seed, p, shared_dims), *params, exact=False).contiguous()
    return cpu.run(cpu.SLOPE, None, x, int(seed), p, NoiseParams(*floats).numbers(), shared_dims)


# Plain registrations, not `triton_op`: the compiler is not to see into a kernel, which it could fuse with nothing and
# would hand Python floats as fp64. One implementation for all devices, since even on CUDA it is the dtype, the mask
# and the machine that choose between the kernels and plain torch.
_LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("slope", _slope, "CPU")
_LIBRARY.impl("noise", _make_noise, "CompositeExplicitAutograd")

torch.library.register_fake("sparseout::forward", lambda x, *_: torch.empty_like(x))
torch.library.register_fake("sparseout::backward", lambda grad, x, *_: torch.empty_like(x))
torch.library.register_fake("sparseout::slope", lambda x, *_: torch.empty_like(x))
torch.library.register_fake("sparseout::noise", lambda seed, p, shape, dtype: seed.new_empty(shape, dtype=dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, ctx.p, ctx.floats, params_tensor, ctx.shared_dims, ctx.exact, p_tensor = inputs
    ctx.save_for_backward(x, seed, params_tensor, p_tensor)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, seed, params_tensor, p_tensor = ctx.saved_tensors
    noise = NoiseArguments(seed, ctx.p, ctx.floats, params_tensor, ctx.shared_dims, ctx.exact, p_tensor)
    return _gradient(grad, x, noise), *(None for _ in noise)


def _gradient(grad: Tensor, x: Tensor, noise: NoiseArguments) -> Tensor:
    if not _is_constant(grad):
        p = noise.p if noise.p_tensor is None else noise.p_tensor
        xi = _noise(x, noise.seed, p, noise.shared_dims)
        return (grad * reference.slope(x, xi, *noise.params, noise.exact)).to(x.dtype)
    run: Any = _backward if torch_internals.is_untouched(grad) else torch.ops.sparseout.backward
    result: Tensor = run(grad, x, *noise)
    return result


def _is_constant(grad: Tensor) -> bool:
    """Whether no derivative of this derivative may be asked for, and no number of gradients come as one."""
    return not (
        torch.is_grad_enabled() or torch_internals.transforms_active() or torch_internals.is_batched_gradient(grad)
    )


torch.library.register_autograd("sparseout::forward", _differentiate, setup_context=_setup_context)


def _one_by_one(op: Any) -> Any:
    """The vmap rule of an op that is called as such: what is batched is taken apart, and the results stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        rows = [
            [
                value.select(dim, index) if isinstance(dim, int) else value
                for value, dim in zip(arguments, in_dims, strict=True)
            ]
            for index in range(info.batch_size)
        ]
        return torch.stack([op(*row) for row in rows]), 0

    return rule


for _op in (getattr(torch.ops.sparseout, name) for name in ("forward", "backward", "slope", "noise")):
    torch.library.register_vmap(torch_internals.op_name(_op), _one_by_one(_op))


class _Native(torch.autograd.Function):
    """The op for the native kernel, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = arguments
        return cpu.run(cpu.VALUE, None, x, *arguments[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        plain = torch_internals.is_untouched(grad) and not torch_internals.is_batched_gradient(grad)
        if plain and not torch.is_grad_enabled():  # nobody asks for a derivative of this derivative
            return cpu.run(cpu.GRADIENT, grad, x, *ctx.arguments), None
        seed, p, params, shared_dims, exact = ctx.arguments
        noise = NoiseArguments(torch.tensor(seed, device="cpu"), p, list(params), None, shared_dims, exact)
        return _gradient(grad, x, noise), None


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, at half the host time (see docs/design.md)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _forward(*arguments)
        _setup_context(ctx, arguments, y)
        return y

    backward = staticmethod(_differentiate)


_run_native, _run_eager = (torch_internals.direct_apply(function) for function in (_Native, _Eager))
