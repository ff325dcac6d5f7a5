"""Ranges of hidden units: those seen on the rows given, and what must follow for every input in the range seen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseout._utils.chains import Chain
from sparseout._utils.dataflow import Step, Value
from sparseout._utils.hooks import Hooks
from sparseout._utils.modules import own_parameters
from sparseout._utils.row_mask import kept_rows
from sparseout._utils.unit_steps import mixes_positions, out_dim, spatial_dims, step_kind, unit_dim, weight

# Functions that are 0 at 0, a product with a number among them.
_KEEPS_ZERO = re.compile(
    "gelu|silu|tanh|elu|selu|celu|leaky_?relu|hardtanh|hardswish|mish|softsign|softshrink|hardshrink|tanhshrink|abs|"
    "square|sqrt|sin|erf|expm1|log1p|neg|mul|multiply"
)
_KEEPS_RANGE = re.compile("max|adaptive|flatten|view|reshape|mean|amax")


class Range:
    """The least and the largest value of each unit, and on how many rows. A row is a position where there are any."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.rows = 0
        self.calls = 0
        self.ndims: set[int] = set()

    def update(self, x: Tensor, dim: int, block: int = 1) -> None:
        """Take in `x`, whose units are along `dim` < 0, each in a block of so many columns."""
        self.calls += 1
        if x.is_nested:
            x = torch.cat([part.flatten(0, -2) for part in x.unbind()])
        x = masked(x.detach().movedim(dim, -1), 1)
        if not x.numel():
            return
        self.rows += x.numel() // x.shape[-1]
        x = x.unflatten(-1, (-1, block)).movedim(-2, 0).flatten(1)
        low, high = x.amin(1), x.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def masked(x: Tensor, last: int = 0) -> Tensor:
    """The rows of `x` that the row mask in force keeps, if there is one whose dims `x` begins with.

    Args:
        x: a tensor.
        last: how many dims at the end are none of rows.
    """
    kept, _ = kept_rows(x.shape[: x.ndim - last])
    return x if kept is None else x.flatten(0, len(kept.shape) - 1)[kept.numbers.to(x.device)]


class ChainRanges(NamedTuple):
    """Observed tensors of a chain: inputs and outputs of each producer, and inputs of the consumer."""

    inputs: list[Range]
    outputs: list[Range]
    hidden: Range


@contextmanager
def watched(chains: Sequence[Chain]) -> Iterator[list[ChainRanges]]:
    """A block in which the units of the chains are watched in every pass."""
    hooks = Hooks()
    all_ranges = [ChainRanges([Range() for _ in c.producers], [Range() for _ in c.producers], Range()) for c in chains]
    try:
        for chain, ranges in zip(chains, all_ranges, strict=True):
            for layer, inputs_range, outputs_range in zip(chain.producers, ranges.inputs, ranges.outputs, strict=True):
                hooks.before(layer, _before, inputs_range, 1)
                hooks.after(layer, _after, outputs_range, any(map(mixes_positions, chain.steps)))
            hooks.before(chain.consumer, _before, ranges.hidden, chain.block)
        yield all_ranges
    finally:
        hooks.remove()


def _before(ranges: Range, block: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    ranges.update(x, unit_dim(layer), block)


def _after(ranges: Range, pooled: bool, layer: nn.Module, args: Any, output: Any) -> None:
    dim = unit_dim(layer)
    ranges.ndims.add(output.ndim)
    if pooled and output.numel():  # a row is then a whole map: what varies in one need not vary between two
        output, dim = output.amax(tuple(range(dim + 1, 0))), -1
    ranges.update(output, dim)


class Bounds(NamedTuple):
    """Bounds of units for all inputs in the range seen, in fp64, and which units are constant for any input at all."""

    low: Tensor
    high: Tensor
    constant: Tensor


def proven(chain: Chain, ranges: ChainRanges, removed_columns: dict[nn.Module, Tensor]) -> Tensor:
    """Which units are 0 for every input in the range seen, or constant for any input, by the weights alone.

    A ReLU whose input cannot exceed 0 is 0; whatever comes of a row of zeros in the weight is constant. On a range that
    is one point, as of one row, everything is constant, which proves nothing.

    Args:
        chain: the units.
        seen: the ranges.
        gone: of layers that are consumers of other chains, which of their columns will go: these inputs are constant.
    """
    bounds: dict[Value, Bounds] = {}
    layers = dict(zip(chain.producers, ranges.inputs, strict=True))
    last = None
    for step in chain.steps:
        if step.module in layers:
            last = _of_layer(step.module, layers[step.module], removed_columns.get(step.module))
        else:
            step_inputs = [bounds[value] for value in step.inputs if value in bounds]
            last = _of_step(step, step_inputs) if len(step_inputs) == len(step.inputs) else None
        if last is None:
            return torch.zeros(chain.units, dtype=torch.bool, device="cpu")
        bounds[step.output] = last
    assert last is not None
    return (last.constant | ((last.low == 0) & (last.high == 0))).cpu()


def _of_layer(layer: nn.Module, inputs: Range, removed_columns: Tensor | None) -> Bounds:
    """Bounds of a layer's outputs: positive weights times one end of the inputs, negative ones times the other."""
    w = weight(layer).detach().double().movedim(out_dim(layer), 0)
    w = w.flatten(2) if spatial_dims(layer) else w.unsqueeze(-1)  # (outputs, inputs, taps)
    assert inputs.low is not None
    assert inputs.high is not None
    low, high = inputs.low.double(), inputs.high.double()
    if spatial_dims(layer):  # at the border taps may read zeros, or nothing
        low, high = low.clamp(max=0), high.clamp(min=0)
    kept = w if removed_columns is None else w[:, ~removed_columns.to(w.device)]
    bias = own_parameters(layer).get("bias")
    b = w.new_zeros(w.shape[0]) if bias is None else bias.detach().double()
    up, down = w.clamp(min=0).sum(2), w.clamp(max=0).sum(2)
    return Bounds(up @ low + down @ high + b, up @ high + down @ low + b, (kept == 0).flatten(1).all(1))


def _of_step(step: Step, inputs: list[Bounds]) -> Bounds:
    if len(inputs) > 1:
        return _of_product(step, inputs)
    x, kind = inputs[0], step_kind(step)
    name = type(step.module).__name__.lower() if step.module is not None else step.function_name
    if kind == "norm":
        return _of_norm(step.module, x)
    if name in ("relu", "relu6"):
        top = 6.0 if name == "relu6" else math.inf
        return Bounds(x.low.clamp(0, top), x.high.clamp(0, top), x.constant)
    if kind in ("pool", "flatten") and (_KEEPS_RANGE.match(name) or _is_mean(step)):
        return x
    if name.startswith("avg") and not _is_mean(step):
        nothing = (x.low == 0) & (x.high == 0)
        return Bounds(x.low.clamp(max=0), x.high.clamp(min=0), x.constant & nothing)
    if name in ("identity", "contiguous", "clone", "detach", "to", "float", "double") or "dropout" in name:
        return x
    if getattr(step.module, "_is_noise", False):
        return x
    end = torch.full_like(x.low, math.inf)
    if _KEEPS_ZERO.fullmatch(name):
        end = end.masked_fill((x.low == 0) & (x.high == 0), 0.0)
    return Bounds(-end, end, x.constant)


def _is_mean(step: Step) -> bool:
    """Whether a pooling by averages gives means: of no zeros of a padding, divided by their number."""
    if not (step.function_name or type(step.module).__name__.lower()).startswith("avg"):
        return False
    if step.module is None:
        return len(step.args) <= 3 and set(step.kwargs) <= {"input", "kernel_size", "stride"}
    padding: Any = step.module.padding
    own = getattr(step.module, "divisor_override", None)
    return own is None and not any(padding if isinstance(padding, tuple) else (padding,))


def _of_product(step: Step, factors: list[Bounds]) -> Bounds:
    corners = torch.stack([a * b for a in factors[0][:2] for b in factors[1][:2]])
    constant = factors[0].constant & factors[1].constant
    if step.function_name not in ("mul", "multiply"):
        unknown = torch.full_like(factors[0].low, math.inf)
        return Bounds(-unknown, unknown, constant)
    zero = torch.stack([(x.low == 0) & (x.high == 0) for x in factors]).any(0)
    low, high = corners.amin(0).masked_fill(zero, 0.0), corners.amax(0).masked_fill(zero, 0.0)
    return Bounds(low, high, constant)


def _of_norm(norm: Any, x: Bounds) -> Bounds:
    if norm.running_mean is None:
        unknown = torch.full_like(x.low, math.inf)
        return Bounds(-unknown, unknown, x.constant)
    slope = (norm.running_var.double() + norm.eps).rsqrt()
    slope = slope if norm.weight is None else slope * norm.weight.detach().double()
    shift = -norm.running_mean.double() * slope
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    ends = torch.stack([x.low * slope + shift, x.high * slope + shift])
    return Bounds(ends.amin(0), ends.amax(0), x.constant | (slope == 0))
