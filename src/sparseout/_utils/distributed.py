"""Sums over the processes of a group, and which group holds the copies of one model."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseout._utils.modules import is_fully_sharded
from sparseout._utils.torch_internals import is_part_of_fsdp
from sparseout._utils.validation import expected, type_name

Key = TypeVar("Key", bound=Hashable)
Group = Any  # a torch.distributed.ProcessGroup, which some builds of torch lack


def is_distributed() -> bool:
    """Whether there are other processes to sum over."""
    return dist.is_available() and dist.is_initialized()


def data_parallel_group(model: nn.Module) -> Group | None:
    """The processes that each run `model` on rows of their own, where its wrappers know them; else None.

    Known to DistributedDataParallel and FullyShardedDataParallel around the model or parts of it, and to the device
    mesh of `fully_shard`, if that has one dim.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return module.process_group
        if type(module).__name__ == "FullyShardedDataParallel":
            hybrid = "HYBRID" in str(module.sharding_strategy)  # of several groups, which together are the world
            return None if hybrid else module.process_group
        if is_fully_sharded(module):
            mesh = next((p.device_mesh for p in module.parameters() if hasattr(p, "device_mesh")), None)
            if mesh is not None and mesh.ndim == 1:
                return mesh.get_group()
    return None


def check_group(group: Any) -> None:
    """Raise unless `group` is None or a group of `torch.distributed` with this process in it."""
    if group is None:
        return
    if not is_distributed():
        raise ValueError(expected("group", "None, as torch.distributed is not initialized", type_name(group)))
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what `new_group` gives to processes outside of it
        raise ValueError(expected("group", "a process group with this process in it", "one of others"))
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(expected("group", "a torch.distributed.ProcessGroup or None", type_name(group)))


def check_replicas(model: nn.Module) -> None:
    """Raise, on all processes, if they do not all have this model with the same parameters.

    Data-parallel processes do. Those of a pipeline or of tensor parallelism hold different parts of one model, and
    sums over them would mean nothing.
    """
    if any(map(is_part_of_fsdp, model.modules())):
        return  # each holds a part of the parameters, and runs all of the model
    fingerprints = all_gather(_fingerprint(model), None)
    others = [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
    if others:
        wanted = "the processes that run copies of this model, as not all processes do"
        got = f"None, with other parameters on process {others[0]} than on process 0"
        raise ValueError(expected("group", wanted, got))


def all_gather(value: Any, group: Group | None) -> list[Any]:
    """The values of all processes of the group, in their order; all of them must call."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def all_reduce_sums(sums: Mapping[Key, Tensor], device: torch.device, group: Group | None = None) -> dict[Key, Tensor]:
    """The sum of each tensor over the processes of a group, in one reduction, fp64 and on `device`.

    A key that some processes lack counts as zeros there. Without `torch.distributed` the sums are this process's own.

    Args:
        sums: tensors by keys that can be pickled.
        device: where the reduction takes place.
        group: the processes, all of which must call; None: all.

    Raises:
        ValueError: on all processes, if one key has tensors of different shapes.
    """
    if not is_distributed():
        return {key: value.to(device, torch.float64, copy=True) for key, value in sums.items()}
    shapes: dict[Key, tuple[int, ...]] = {}
    for shapes_of_rank in all_gather({key: tuple(value.shape) for key, value in sums.items()}, group):
        for key, shape in shapes_of_rank.items():
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(
                    expected("sums", f"of one shape on every process for {key}", f"{shapes[key]}, {shape}")
                )
    if not shapes:
        return {}
    flat = [
        sums[key].to(device, torch.float64).flatten() if key in sums
        else torch.zeros(shape, dtype=torch.float64, device=device).flatten()
        for key, shape in shapes.items()
    ]  # fmt: skip
    joined = torch.cat(flat)
    dist.all_reduce(joined, group=group)
    pieces = joined.split([len(piece) for piece in flat])
    return {key: piece.reshape(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _fingerprint(model: nn.Module) -> str:
    """A hash of names and shapes of the parameters and of a few values of each, which copies have in common."""
    names, values = [], []
    for name, parameter in model.named_parameters():
        local = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
        names.append((name, tuple(local.shape)))
        if not local.is_meta and local.numel():
            values.append(local.flatten()[:: max(1, local.numel() // 16)].double())
    read = torch.cat([value.to(values[0].device) for value in values]).tolist() if values else []  # waits once
    return hashlib.sha256(repr((names, read)).encode()).hexdigest()
