"""Linear layers that read only the columns of their weight whose input is not 0."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparseout._utils.class_swap import forward_replaced, swap_class_
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.hooks import Hooks
from sparseout._utils.modules import Modules, named_modules, own_parameters, select, sharded_modules
from sparseout._utils.torch_internals import call_hooks
from sparseout.inference._batches import call, check_batches, check_rows, check_runs, evaluation
from sparseout.inference._sparse_product import Break, column_major, sparse_product
from sparseout.inference._sparse_timing import ROWS, layer_speed, measure_break_even
from sparseout.inference._speed_report import SparseLinearReport

RECORD = "_before_sparse_linear"  # the attribute of a layer that says how to undo what made it
ATTRIBUTES = ("break_even", "_was_contiguous")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_DENSITY = 0.9  # an input with more nonzeros is not worth a measurement
_MAX_RELATIVE_TIME = 0.8  # of its time as it was may a layer take on the batches, since timings vary
_MAX_SLOWDOWN = 1.25  # times its time as it was may a call take on an input without zeros
_MAX_KEPT_INPUTS = 4  # numbers of rows for which an input of a layer is kept to be timed


class SparseLinear(nn.Linear):
    """A Linear after :func:`sparseout.inference.sparse_linear_`."""

    break_even: tuple[Break, ...]
    _was_contiguous: bool

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self.training:
            output = sparse_product(input, self.weight, self.bias, self.break_even)
            if output is not None:
                return output
        return super().forward(input)


def sparse_linear_(model: nn.Module, batches: Iterable[Any], *, modules: Modules | None = None) -> SparseLinearReport:
    r"""Lets Linear layers read only the columns of their weight whose input is not 0, in evaluation, in place.

    .. math:: y_i = \sum_{j : x_j \ne 0} W_{ij} \, x_j + b_i

    which are the sums of ``F.linear`` in another order, equal to rounding. How fast each layer is either way is
    measured here, on this machine with its present number of threads, on the inputs it has on `batches`; only a layer
    that gains becomes sparse. At each call it counts the nonzeros of its input and is dense past the break-even that
    was measured for its shape, its dtype and so many rows. A layer stays the same object with its parameters, hooks and
    ``state_dict`` keys; its weight is laid out column by column, without a copy. One that would be slower by more than
    a quarter on an input without zeros is left.

    A call is sparse in evaluation without gradients (in ``torch.no_grad()`` or ``torch.inference_mode()``, or where
    neither input nor parameters require any), for plain CPU tensors of the layer's dtype (fp32, fp64, bf16 or fp16). It
    is dense and right in training, under autograd, autocast, ``torch.compile``, ``torch.export``, ``torch.func`` and
    tracing, on another device, and after the weight was given another layout, as by ``load_state_dict(assign=True)``.
    Where x is 0 and W is infinite or NaN, ``F.linear`` gives NaN; a sparse call does not read that.

    Left, with the reason in the report: projections of attention, unless `modules` names them; tied weights; layers
    that are derived from Linear or whose weight is computed anew at each call; layers that torch's fused transformer
    layers read without calling them; layers that gain nothing, as small ones, whose matrix is in the cache.

    Args:
        model: any module; it may itself be a Linear.
        batches: inputs as they will come, in the number of their rows too: tensors, tuples or lists whose first element
            is the input, or mappings of keyword arguments.
        modules: which Linear layers instead of all: a function (name, module) -> bool, or a collection of dotted names
            or of types.

    Returns:
        A report of the layers that changed, with their speed before and after, and of those that were left.

    Raises:
        TypeError, ValueError: for a wrong argument, batches without rows, or a model without values (lazy, or on the
            meta device); nothing is changed then, nor after an error in the model.

    Warns:
        UserWarning: if the model has no Linear layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 1024)).eval()
        >>> _ = nn.init.constant_(model[0].bias, -2.0)  # few units are active
        >>> report = sparse_linear_(model, [torch.randn(1, 64)])
        >>> with torch.no_grad():
        ...     y = model(torch.randn(1, 64))
        >>> report.skipped["0"]
        'its input has hardly a zero on these batches'

    Source: Liu et al. (2023), Deja vu: contextual sparsity for efficient LLMs at inference time, ICML, and Liu et al.
    (2025), TEAL, ICLR, for what is read. It is read by the native kernel, or without one by ``F.embedding_bag``.
    """
    check_runs(model)
    batches = check_batches(batches)
    everything = dict(named_modules(model))
    linears = {name: module for name, module in everything.items() if isinstance(module, nn.Linear)}
    report = SparseLinearReport()
    if not linears:
        warnings.warn(f"nothing was changed: the {type(model).__name__} has no Linear layer", stacklevel=2)
        return report
    chosen = select(linears, modules, "Linear layers")
    reasons = {name: _why_not(name, layer, everything, modules is not None) for name, layer in chosen.items()}
    sharded = sharded_modules(model)
    reasons |= {name: "its weight is sharded" for name, layer in chosen.items() if layer in sharded}
    recorded = _inputs(model, batches, [layer for name, layer in chosen.items() if reasons[name] is None])
    if not any(inputs.numbers for inputs in recorded.values()):
        check_rows(batches)
    breaks: dict[tuple[Any, ...], tuple[Break, ...]] = {}
    for name, layer in chosen.items():
        reason = reasons[name]
        if reason is None:
            reason = _measure(name, layer, recorded[layer], breaks, report)
        if reason is not None:
            report.skipped[name] = reason
    for name in report.changed:
        layer = chosen[name]
        if isinstance(layer, SparseLinear):
            layer.break_even = breaks[_shape(layer)]
        else:
            attributes = {"break_even": breaks[_shape(layer)], "_was_contiguous": layer.weight.is_contiguous()}
            swap_class_(layer, SparseLinear, attributes, RECORD)
        layer.weight.data = column_major(layer.weight.data)
    if report.changed:
        reset_compiler()
    return report


def _shape(layer: nn.Linear) -> tuple[Any, ...]:
    return layer.in_features, layer.out_features, layer.weight.dtype, layer.bias is None


def _why_not(name: str, layer: nn.Linear, modules: dict[str, nn.Module], named: bool) -> str | None:
    """Why a layer is left before anything is measured, if it is."""
    owners_of_layer = [modules[path] for path in _prefixes(name)]
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weights and never calls it"
    if type(layer) not in (nn.Linear, SparseLinear):
        return f"{type(layer).__name__} is derived from Linear and may do something else"
    if forward_replaced(layer):
        return "its forward was replaced on the object, so its class decides nothing"
    if not named and any("attention" in type(module).__name__.lower() for module in owners_of_layer):
        return "a projection of attention"
    if any(isinstance(module, nn.TransformerEncoderLayer) and not _has_hooks(module) for module in owners_of_layer):
        return "torch's fused nn.TransformerEncoderLayer reads its weights and does not call it"
    weight = own_parameters(layer).get("weight")
    if weight is None or not isinstance(layer.bias, nn.Parameter | None):
        return "its weight is computed anew at each call"
    owners = {id(m) for m in modules.values() for p in own_parameters(m).values() if _share_memory(p, weight)}
    if len(owners) > 1:
        return "its weight is tied to that of another module"
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.layout is not torch.strided:
        description = type(weight).__name__ if type(weight) is not nn.Parameter else f"on {weight.device}"
        return f"its weight is no plain CPU tensor: {description}"
    if weight.dtype not in _DTYPES:
        return f"its weight is of {weight.dtype}"
    if weight.is_shared() or weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "its weight is part of a larger storage, or shared with other processes"
    return None


def _prefixes(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _has_hooks(module: nn.Module) -> bool:
    return any(call_hooks(inner) for inner in module.modules())


def _share_memory(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    comparable = type(first) is nn.Parameter and first.device == second.device
    return comparable and _address(first) == _address(second)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() or id(x)


class _Inputs:
    """Inputs of a layer: one for some numbers of rows, and how many of all numbers were not 0."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.nonzero = self.numbers = self.calls = 0

    def update(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        x = args[0] if args else kwargs.get("input")
        if type(x) is Tensor and x.is_cpu and x.numel() and x.layout is torch.strided and not x.is_nested:
            rows = x.reshape(-1, x.shape[-1])
            self.nonzero += int(torch.count_nonzero(rows))
            self.numbers += rows.numel()
            if x.dtype is layer.weight.dtype and (len(self.kept) < _MAX_KEPT_INPUTS or len(rows) in self.kept):
                self.kept.setdefault(len(rows), rows[: ROWS[-1]].clone())


def _inputs(model: nn.Module, batches: Iterable[Any], layers: list[nn.Linear]) -> dict[nn.Linear, _Inputs]:
    by_layer = {layer: _Inputs() for layer in layers}
    hooks = Hooks()
    try:
        for layer, inputs in by_layer.items():
            hooks.before(layer, inputs.update)
        with evaluation(model):
            for batch in batches:
                call(model, batch)
    finally:
        hooks.remove()
    return by_layer


def _measure(
    name: str,
    layer: nn.Linear,
    inputs: _Inputs,
    breaks: dict[tuple[Any, ...], tuple[Break, ...]],
    report: SparseLinearReport,
) -> str | None:
    """Why the layer is left, or None if it gains; its speed goes into the report."""
    if not inputs.numbers:
        return "its inputs are no plain CPU tensors" if inputs.calls else "it is not called on these batches"
    if not inputs.kept:
        return "its inputs are of another dtype than its weight"
    if inputs.nonzero > _MAX_DENSITY * inputs.numbers:
        return "its input has hardly a zero on these batches"
    bias = None if layer.bias is None else layer.bias.detach()
    row, column = layer.weight.detach().contiguous(), column_major(layer.weight.detach())
    with torch.no_grad():
        if (key := _shape(layer)) not in breaks:
            breaks[key] = measure_break_even(column, bias)
        speeds = [layer_speed(x, row, column, bias, breaks[key]) for x in inputs.kept.values()]
    reason = None
    if sum(speed.sparse_us for speed in speeds) > _MAX_RELATIVE_TIME * sum(speed.dense_us for speed in speeds):
        reason = "dense is as fast on these batches"
    elif any(speed.full_us > _MAX_SLOWDOWN * speed.dense_us for speed in speeds):
        reason = "on an input without zeros it would be slower than now, with its weight in columns"
    (report.left if reason else report.changed)[name] = speeds
    return reason
