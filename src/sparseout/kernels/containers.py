"""Inputs made of tensors: nested ones, whose rows differ in length, and DTensors, which are spread over processes.

Both are handed on as the dense tensors that they hold, and put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseout._utils import torch_internals
from sparseout._utils.validation import expected
from sparseout.kernels import ops, seeds
from sparseout.kernels.params import NoiseParams, Scalar, ScaleArgument

_STRIDE = 0x1F83D9ABFB41BD6B  # between the seeds of parts: odd, and far from the differences of seeds that users choose


def apply(
    x: Tensor, seed: seeds.Seed, p: Scalar, q: Scalar, scale: ScaleArgument, shared_dims: Sequence[int], exact: bool
) -> Tensor:
    """`ops.apply` of any `x`."""
    if x.is_nested:
        return _nested(x, seeds.tensor(seed, x.device), p, q, scale, shared_dims, exact)
    if torch_internals.is_sharded(x):
        return _sharded(x, seeds.tensor(seed, x.device), p, q, scale, shared_dims, exact)
    if x.layout is not torch.strided:
        raise TypeError(expected("input", "a dense or a nested tensor", f"one of layout {x.layout}"))
    return ops.apply(x, seed, p, q, scale, shared_dims, exact)


def _nested(
    x: Tensor, seed: Tensor, p: Scalar, q: Scalar, scale: ScaleArgument, shared_dims: Sequence[int], exact: bool
) -> Tensor:
    """A nested tensor: one mask over all of its values; along shared dims, draws of their own for each row."""
    if 0 in shared_dims:
        raise ValueError(expected("shared_dims", "dims within the rows of a nested tensor", tuple(shared_dims)))
    dims = [dim - 1 for dim in shared_dims]
    if x.layout is torch.jagged:
        values, lengths, ragged = torch_internals.jagged_parts(x)
        # With lengths there are values between the rows, which are not the tensor's.
        params = ops.noise_params(values if lengths is None or scale != "matched" else _flat(x.unbind()), q, scale)
        if ragged not in dims:
            values = ops.apply(values, seed, p, q, scale, dims, exact, params)
        elif lengths is None:
            values = torch.cat(_rows(x.unbind(), seed, p, params, dims, exact), ragged)
        else:
            raise ValueError(expected("shared_dims", "other than the ragged one of a tensor with lengths", shared_dims))
        return torch_internals.with_values(x, values)
    rows = x.unbind()
    flat = _flat(rows)
    params = ops.noise_params(flat, q, scale)
    if dims:
        return torch.nested.as_nested_tensor(_rows(rows, seed, p, params, dims, exact))
    parts = ops.apply(flat, seed, p, q, scale, (), exact, params).split([row.numel() for row in rows])
    return torch.nested.as_nested_tensor([part.view(row.shape) for part, row in zip(parts, rows, strict=True)])


def _flat(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.reshape(-1) for row in rows])


def _rows(
    rows: Sequence[Tensor], seed: Tensor, p: Scalar, params: NoiseParams, dims: Sequence[int], exact: bool
) -> list[Tensor]:
    return [
        ops.apply(row, seed + index * _STRIDE, p, params.q, None, dims, exact, params) for index, row in enumerate(rows)
    ]


def _sharded(
    x: Any, seed: Tensor, p: Scalar, q: Scalar, scale: ScaleArgument, shared_dims: Sequence[int], exact: bool
) -> Tensor:
    """A DTensor: each process perturbs its part, with draws that differ where the parts do."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = x.device_mesh
    if any(placement.is_partial() for placement in x.placements):  # the noise is not linear in x
        x = x.redistribute(mesh, [Replicate() if placement.is_partial() else placement for placement in x.placements])
    sharded = [isinstance(placement, Shard) for placement in x.placements]
    # Along which dims of the mesh the processes have different draws.
    separate = [
        shard and placement.dim not in shared_dims for shard, placement in zip(sharded, x.placements, strict=True)
    ]

    def reduce(value: Tensor, operation: str, over: Sequence[bool] = sharded) -> Tensor:
        placements = [Partial(operation) if reduced else Replicate() for reduced in over]
        return DTensor.from_local(value, mesh, placements, run_check=False).full_tensor()

    part, coordinate = 0, mesh.get_coordinate()
    for dim, differs in enumerate(separate):
        part = part * mesh.shape[dim] + coordinate[dim] if differs else part
    if not all(separate):  # processes that share draws agree on the seed of the first, whatever their generators hold
        first = not any(index for index, differs in zip(coordinate, separate, strict=True) if not differs)
        seed = reduce(seed if first else torch.zeros_like(seed), "sum", [not differs for differs in separate])
    local = x.to_local()
    params = ops.noise_params(local, q, scale, reduce)
    y = ops.apply(local, seed + part * _STRIDE, p, q, scale, shared_dims, exact, params)
    return DTensor.from_local(y, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
