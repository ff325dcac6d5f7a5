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


class Seen(NamedTuple):
    """What was seen of a chain: what each producer was given and made, and what the consumer was given."""

    inputs: list[Range]
    outputs: list[Range]
    hidden: Range


@contextmanager
def watched(chains: Sequence[Chain]) -> Iterator[list[Seen]]:
    """A block in which the units of the chains are watched in every pass."""
    hooks = Hooks()
    seen = [Seen([Range() for _ in c.producers], [Range() for _ in c.producers], Range()) for c in chains]
    try:
        for chain, ranges in zip(chains, seen, strict=True):
            for layer, given, made in zip(chain.producers, ranges.inputs, ranges.outputs, strict=True):
                hooks.before(layer, _before, given, 1)
                hooks.after(layer, _after, made, any(map(mixes_positions, chain.steps)))
            hooks.before(chain.consumer, _before, ranges.hidden, chain.block)
        yield seen
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


def proven(chain: Chain, seen: Seen, gone: dict[nn.Module, Tensor]) -> Tensor:
    """Which units are 0 for every input in the range seen, or constant for any input, by the weights alone.

    A ReLU whose input cannot exceed 0 is 0; whatever comes of a row of zeros in the weight is constant. On a range that
    is one point, as of one row, everything is constant, which proves nothing.

    Args:
        chain: the units.
        seen: the ranges.
        gone: of layers that are consumers of other chains, which of their columns will go: these inputs are constant.
    """
    bounds: dict[Value, Bounds] = {}
    layers = dict(zip(chain.producers, seen.inputs, strict=True))
    last = None
    for step in chain.steps:
        if step.module in layers:
            last = _of_layer(step.module, layers[step.module], gone.get(step.module))
        else:
            given = [bounds[value] for value in step.inputs if value in bounds]
            last = _of_step(step, given) if len(given) == len(step.inputs) else None
        if last is None:
            return torch.zeros(chain.units, dtype=torch.bool)
        bounds[step.output] = last
    assert last is not None
    return (last.constant | ((last.low == 0) & (last.high == 0))).cpu()


def _of_layer(layer: nn.Module, given: Range, gone: Tensor | None) -> Bounds:
    """Bounds of a layer's outputs: positive weights times one end of the inputs, negative ones times the other."""
    w = weight(layer).detach().double().movedim(out_dim(layer), 0)
    w = w.flatten(2) if spatial_dims(layer) else w.unsqueeze(-1)  # (outputs, inputs, taps)
    assert given.low is not None
    assert given.high is not None
    low, high = given.low.double(), given.high.double()
    if spatial_dims(layer):  # at the border taps may read zeros, or nothing
        low, high = low.clamp(max=0), high.clamp(min=0)
    kept = w if gone is None else w[:, ~gone.to(w.device)]
    bias = layer._parameters.get("bias")
    b = w.new_zeros(w.shape[0]) if bias is None else bias.detach().double()
    up, down = w.clamp(min=0).sum(2), w.clamp(max=0).sum(2)
    return Bounds(up @ low + down @ high + b, up @ high + down @ low + b, (kept == 0).flatten(1).all(1))


def _of_step(step: Step, given: list[Bounds]) -> Bounds:
    if len(given) > 1:
        return _of_product(step, given)
    x, kind = given[0], step_kind(step)
    word = type(step.module).__name__.lower() if step.module is not None else step.word
    if kind == "norm":
        return _of_norm(step.module, x)
    if word in ("relu", "relu6"):
        top = 6.0 if word == "relu6" else math.inf
        return Bounds(x.low.clamp(0, top), x.high.clamp(0, top), x.constant)
    if kind in ("pool", "flatten") and (_KEEPS_RANGE.match(word) or _is_mean(step)):
        return x
    if word.startswith("avg") and not _is_mean(step):
        nothing = (x.low == 0) & (x.high == 0)
        return Bounds(x.low.clamp(max=0), x.high.clamp(min=0), x.constant & nothing)
    if word in ("identity", "contiguous", "clone", "detach", "to", "float", "double") or "dropout" in word:
        return x
    if getattr(step.module, "_is_noise", False):
        return x
    end = torch.full_like(x.low, math.inf)
    if _KEEPS_ZERO.fullmatch(word):
        end = end.masked_fill((x.low == 0) & (x.high == 0), 0.0)
    return Bounds(-end, end, x.constant)


def _is_mean(step: Step) -> bool:
    """Whether a pooling by averages gives means: of no zeros of a padding, divided by their number."""
    if not (step.word or type(step.module).__name__.lower()).startswith("avg"):
        return False
    if step.module is None:
        return len(step.args) <= 3 and set(step.kwargs) <= {"input", "kernel_size", "stride"}
    padding: Any = step.module.padding
    own = getattr(step.module, "divisor_override", None)
    return own is None and not any(padding if isinstance(padding, tuple) else (padding,))


def _of_product(step: Step, given: list[Bounds]) -> Bounds:
    corners = torch.stack([a * b for a in given[0][:2] for b in given[1][:2]])
    constant = given[0].constant & given[1].constant
    if step.word not in ("mul", "multiply"):
        unknown = torch.full_like(given[0].low, math.inf)
        return Bounds(-unknown, unknown, constant)
    zero = torch.stack([(x.low == 0) & (x.high == 0) for x in given]).any(0)
    low, high = corners.amin(0).masked_fill(zero, 0.0), corners.amax(0).masked_fill(zero, 0.0)
    return Bounds(low, high, constant)


def _of_norm(norm: Any, x: Bounds) -> Bounds:
    if norm.running_mean is None:
        unknown = torch.full_like(x.low, math.inf)
        return Bounds(-unknown, unknown, x.constant)
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach().double()
    shift = -norm.running_mean.double() * gain
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    ends = torch.stack([x.low * gain + shift, x.high * gain + shift])
    return Bounds(ends.amin(0), ends.amax(0), x.constant | (gain == 0))
