"""What a controller sees: sums over what its layers take in while training, on their device until they are read."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseout._utils.activations import unit_dim
from sparseout.measures._functions import MEASURES, Streaming

Place = tuple[str, int]  # a layer's name and its number of units: a layer may be called at several widths


class Seen(NamedTuple):
    """What was seen at one place since the last update."""

    value: float  # of the measure; NaN where no unit is active in any sample
    active: Tensor  # in how many samples each unit was
    problem: str  # what its inputs are or have that there is no value, or ""


class Eye:
    """The hook before a layer: adds to one vector of sums for each number of units.

    A class, so that a model is pickled with its hook, and so that a copy has sums of its own: what happens to a copy is
    never taken for what happens to the original.
    """

    def __init__(self, measure: str) -> None:
        self.measure = measure
        self.sums: dict[int, Tensor] = {}
        self.handle: RemovableHandle | None = None

    def attach(self, layer: nn.Module) -> None:
        """Begin to see, in the place of any other controller's."""
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, Eye):
                hook.detach()
        self.handle = layer.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self) -> None:
        """See no more."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not layer.training or not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            return  # what the layer cannot take it will say itself
        dim = unit_dim(x, None, layer)
        chunk = _stream(self.measure, dim)
        chunk.update(x)
        # One vector: compiled code on a CPU loses what is added in place to a 0-d fp64 tensor (torch 2.13).
        new = torch.cat([value.flatten() for value in chunk.state().values()])
        units = x.shape[dim]
        if units not in self.sums:
            self.sums[units] = new
        else:  # in place, as compiled code wants its state
            self.sums[units].add_(new)


def read(eyes: Mapping[str, Eye], measure: str, device: torch.device) -> dict[Place, Seen]:
    """What all processes have seen since the last time, place by place; waits for the device once."""
    sums = {(name, units): vector for name, eye in eyes.items() for units, vector in eye.sums.items()}
    layout = {place: len(vector) for place, vector in sums.items()}
    together = dist.is_available() and dist.is_initialized()
    if together:  # a process that has not been at a place counts as nothing there
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, layout)
        layout = {place: size for theirs in everyone for place, size in theirs.items()}
    if not layout:
        return {}
    parts = [sums[place] if place in sums else torch.zeros(size, dtype=torch.float64) for place, size in layout.items()]
    joined = torch.cat([part.to(device) for part in parts])
    if together:
        dist.all_reduce(joined)
    for vector in sums.values():
        vector.zero_()
    pieces = dict(zip(layout, joined.cpu().split(list(layout.values())), strict=True))
    found = ((place, _computed(measure, pieces[place])) for name in eyes for place in layout if place[0] == name)
    return {place: seen for place, seen in found if seen is not None}


def _stream(measure: str, dim: int = -1) -> Streaming:
    return Streaming((measure,) if measure in MEASURES else (), unit_dim=dim)


def _computed(measure: str, vector: Tensor) -> Seen | None:
    """What the sums say; None where no sample was seen."""
    stream = _stream(measure)
    stream.update(torch.zeros(0, 1))
    keys = stream.state()
    sizes = [len(vector) - len(keys) + 1 if key == "active" else 1 for key in keys]  # a count for each unit
    parts = dict(zip(keys, vector.split(sizes), strict=True))
    stream.load_state({key: part if key == "active" else part[0] for key, part in parts.items()})
    result = stream.compute()
    if result["rows"].item() == 0:
        return None
    value, active = result[measure].item(), parts["active"]
    problem = ""
    if not active.isfinite().all():  # its count is NaN where an activation is not finite
        problem = "are NaN or infinite"
    elif math.isnan(value) and len(active) < 2:
        problem = f"have {len(active)} units, too few for {measure}"
    return Seen(value, active, problem)
