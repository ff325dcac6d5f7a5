"""Rows of units that compete with each other: their number of winners, and functions of the rows of any tensor."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sparseout._utils.torch_internals import is_sharded, jagged_parts, with_values
from sparseout._utils.validation import check_number, check_scalar, expected

_COUNT = "a whole number >= 1 (of units) or a number > 0 and < 1 (the fraction of them)"


def check_count(name: str, value: Any) -> float | Tensor:
    """A number of winners as it was given: an int, or a float below 1, or a 0-d tensor that holds one, unread.

    Raises: TypeError, ValueError.
    """
    if isinstance(value, Tensor):
        return check_scalar(name, value)
    check_number(name, value, _COUNT, lambda k: 0 < k < 1 or (k >= 1 and isinstance(value, Integral)))
    return int(value) if isinstance(value, Integral) else float(value)


def map_rows(x: Tensor, dim: int, function: Callable[[list[Tensor], int], list[Tensor]]) -> Tensor:
    """A function of rows: what precedes `dim` are rows, what follows it competes as the units along it do.

    Args:
        x: a dense or nested tensor or a DTensor, of which each process takes the rows that it holds.
        dim: where the units of `x` lie, >= 0.
        function: takes dense tensors and the dim of their units, and returns tensors of the same shapes.

    Raises:
        ValueError: for a tensor without units; for a nested one whose units lie along its examples, or with gaps
            between these.
    """
    if is_sharded(x):
        return _map_sharded(x, dim, function)
    if x.is_nested:
        if dim < 1:
            wanted = "a dim within the examples of a nested tensor"
            raise ValueError(expected("unit_dim", wanted, "that of the examples"))
        return with_parts(x, function(list(x.unbind()), dim - 1))
    if x.dim() == 0 or x.shape[dim] == 0:
        raise ValueError(expected("x", "of at least one dim and one unit", f"shape {tuple(x.shape)}"))
    return function([x], dim)[0]


def _map_sharded(x: Any, dim: int, function: Callable[[list[Tensor], int], list[Tensor]]) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    placements = [p if p.is_shard() and p.dim < dim else Replicate() for p in x.placements]
    whole = x.redistribute(placements=placements)
    y = map_rows(whole.to_local(), dim, function)
    y = DTensor.from_local(y, x.device_mesh, placements, run_check=False, shape=x.shape, stride=whole.stride())
    return y.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def with_parts(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """A nested tensor as `x` is, of other examples. Raises: ValueError."""
    if x.layout is not torch.jagged:
        return torch.nested.as_nested_tensor(list(parts))
    _, lengths, ragged = jagged_parts(x)
    if lengths is not None:
        raise ValueError(expected("x", "a nested tensor without gaps between its examples", "one with lengths"))
    return with_values(x, torch.cat(list(parts), ragged))
