"""Measurements of a controller: sums over the inputs of its layers, on their device until they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseout._utils.activations import UnitTracker, local_rows
from sparseout._utils.distributed import Group, all_reduce_sums
from sparseout._utils.hooks import DeadHook
from sparseout._utils.torch_internals import (
    in_backward,
    is_recorded,
    outside_transforms,
    without_transforms,
)
from sparseout.measures import MEASURES, Streaming

Source = tuple[str, int]  # a layer's name and its number of units: a layer may be called at several widths


class Measurement(NamedTuple):
    """The measurement of one source since the last update."""

    value: float  # of the measure; NaN where no unit is active in any sample
    active: Tensor  # in how many samples each unit was
    problem: str  # what its inputs are or have that there is no value, or ""


class InputHook:
    """The hook before a layer: adds to one vector of sums for each number of units, apart for the other mode.

    A class, so that a model is pickled with its hook. In a copy it is off, until a copied controller turns it on.
    """

    def __init__(self, name: str, measure: str, mode: str, tracker: UnitTracker) -> None:
        self.name, self.measure, self.mode, self.tracker = name, measure, mode, tracker
        self.sums: dict[int, Tensor] = {}
        self.other_sums: dict[int, Tensor] = {}  # of the mode in which the target is not to be met
        self.handle: RemovableHandle | None = None
        self.on = True
        self.ticket = _ticket(self)

    def attach(self, layer: nn.Module) -> bool:
        """Begin to measure, in the place of any other controller. Returns whether there was one."""
        others = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, InputHook)]
        for hook in others:
            hook.detach()
            hook.tracker.detach()  # it is of no use to its controller, which can no longer be stepped
        self.handle = layer.register_forward_pre_hook(self, with_kwargs=True)
        return any(hook.on for hook in others)

    def detach(self) -> None:
        """Measure no more."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not (self.on and isinstance(x, Tensor)):
            return
        if not x.is_floating_point() or not x.ndim or x.layout not in (torch.strided, torch.jagged):
            return  # what the layer cannot take it will say itself
        compiling = torch.compiler.is_compiling()
        if torch.compiler.is_exporting() if compiling else is_recorded((x,)):
            return
        dim = self.tracker.dim(self.name, layer, x) - x.ndim  # from the last, so that it holds without vmap as well
        x = local_rows(x.detach(), dim)
        if compiling:
            torch.ops.sparseout.measure_input(self.ticket, x, dim, layer.training)
        else:
            self.add(x, dim, layer.training)

    def add(self, x: Tensor, dim: int, training: bool) -> None:
        """Add a tensor whose units lie along `dim`, a number below 0."""
        if in_backward():  # a checkpoint computes its forward again
            return
        sums = self.sums if training == (self.mode == "train") else self.other_sums
        with outside_transforms():
            for rows in _rows(without_transforms(x), dim):
                stream = _stream(self.measure)
                stream.update(rows)
                new = torch.cat([value.flatten() for value in stream.state().values()])
                total = sums.setdefault(rows.shape[1], torch.zeros_like(new))
                total.add_(new.to(total.device))  # replicas of nn.DataParallel are on other devices

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ticket"} | {"on": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.ticket = _ticket(self)


class Eye(DeadHook):
    """The remains of the hook in a model that the first version pickled."""


# Compiled code calls this op, which runs as Python at every call: so it knows when a checkpoint computes again, makes
# sums for a new width, and is compiled once for all layers. The ticket is a tensor, as a number would be guarded on;
# it is declared as mutated, so that nothing takes the call for one without effect.
_library = torch.library.Library("sparseout", "FRAGMENT")
_library.define("measure_input(Tensor(a!) ticket, Tensor input, int dim, bool training) -> ()")
_hooks: WeakValueDictionary[int, InputHook] = WeakValueDictionary()
_numbers = count()


def _measure_input(ticket: Tensor, input: Tensor, dim: int, training: bool) -> None:
    hook = _hooks.get(int(ticket[0]))
    if hook is not None and hook.handle is not None:
        hook.add(input, dim, training)


_library.impl("measure_input", _measure_input, "CompositeExplicitAutograd")
torch.library.register_fake("sparseout::measure_input", lambda ticket, input, dim, training: None, lib=_library)


def _measure_batched(info: Any, in_dims: Any, ticket: Tensor, input: Tensor, dim: int, training: bool) -> Any:
    rows = input if in_dims[1] is None else input.movedim(in_dims[1], 0)
    return torch.ops.sparseout.measure_input(ticket, rows, dim, training), None


torch.library.register_vmap("sparseout::measure_input", _measure_batched, lib=_library)


def _ticket(hook: InputHook) -> Tensor:
    number = next(_numbers)
    _hooks[number] = hook
    with torch.inference_mode(False):
        return torch.tensor([number], device="cpu")


def _rows(x: Tensor, dim: int) -> list[Tensor]:
    """Rows of units, (rows, units); of a nested tensor the real ones, for each width."""
    if not x.is_nested:
        return [x.movedim(dim, -1).flatten(0, -2) if x.ndim > 1 else x[None]]
    widths: dict[int, list[Tensor]] = {}
    for part in x.unbind():
        (rows,) = _rows(part, dim)
        widths.setdefault(rows.shape[1], []).append(rows)
    return [torch.cat(parts) for parts in widths.values()]


def read(
    hooks: Mapping[str, InputHook], measure: str, device: torch.device, group: Group | None
) -> tuple[dict[Source, Measurement], dict[Source, Measurement]]:
    """The measurements of all processes of the group since the last time, in the hooks' mode and in the other.

    Waits for the device once.
    """
    sums = {(name, units, False): vector for name, hook in hooks.items() for units, vector in hook.sums.items()}
    sums |= {(name, units, True): vector for name, hook in hooks.items() for units, vector in hook.other_sums.items()}
    totals = all_reduce_sums(sums, device, group)
    if not totals:
        return {}, {}
    for vector in sums.values():
        vector.zero_()
    vectors = torch.cat(list(totals.values())).cpu().split([len(total) for total in totals.values()])
    measurements: tuple[dict[Source, Measurement], dict[Source, Measurement]] = ({}, {})
    for (name, units, other), vector in zip(totals, vectors, strict=True):
        if (measurement := _measurement(measure, vector)) is not None:
            measurements[other][name, units] = measurement
    return measurements


def _stream(measure: str) -> Streaming:
    return Streaming((measure,) if measure in MEASURES else ())


def _measurement(measure: str, vector: Tensor) -> Measurement | None:
    """The measurement that the sums give; None where no sample was seen."""
    stream = _stream(measure)
    stream.update(torch.zeros(0, 1, device="cpu"))
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
    return Measurement(value, active, problem)
