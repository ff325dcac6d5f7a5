"""Measurements of a controller: sums over what modules take in or put out, on their device until they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sparseout._utils.activations import UnitTracker, counted_rows, first_tensor, local_rows
from sparseout._utils.distributed import Group, all_reduce_sums
from sparseout._utils.hooks import Hook, Hooks
from sparseout._utils.torch_internals import (
    call_hooks,
    in_backward,
    is_recorded,
    outside_transforms,
    without_transforms,
)
from sparseout.measures import MEASURES, Streaming

Source = tuple[str, int]  # a module's name and its number of units: a module may be called at several widths


class Measurement(NamedTuple):
    """The measurement of one source since the last update."""

    value: float  # of the measure; NaN where no unit is active in any sample
    active: Tensor  # in how many samples each unit was
    problem: str  # what its activations are or have that there is no value, or ""


class Eps(NamedTuple):
    """Magnitudes that count as zero: up to `eps`, with `relative` in units of a row's root mean square."""

    eps: float = 0.0
    relative: bool = False


class Accumulator:
    """Sums over the activations at one module: a vector for each number of units, apart for training and evaluation.

    Attributes:
        sums: by the mode of the module, True for training, and by the number of units.
        trained: whether a pass in training was seen. Where `after_training`, evaluation before that, such as a check
            of the validation loop, is left out: it is of a network that has not begun to train.
        unmasked: whether there was a mask of rows that fitted no dims of what was seen.
    """

    def __init__(
        self,
        name: str,
        tensor: str,
        knob: str,
        measure: str,
        eps: Eps,
        tracker: UnitTracker,
        *,
        after_training: bool = False,
    ) -> None:
        self.name, self.tensor, self.knob = name, tensor, knob
        self.measure, self.eps, self.tracker = measure, eps, tracker
        self.sums: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}
        self.trained, self.after_training, self.unmasked = False, after_training, False
        self.hooks = Hooks()
        self.ticket = _ticket(self)

    def attach(self, module: nn.Module) -> bool:
        """Begin to measure, in the place of another controller of the same knob. Returns whether there was one."""
        functions = [getattr(hook.function, "__self__", None) for hook in call_hooks(module) if isinstance(hook, Hook)]
        others = [other for other in functions if isinstance(other, Accumulator) and other.knob == self.knob]
        for other in others:
            other.hooks.remove()
            other.tracker.detach()  # it is of no use to its controller, which can no longer be stepped
        (self.hooks.before if self.tensor == "input" else self.hooks.after)(module, self.update)
        return bool(others)

    def update(self, module: nn.Module, args: Any, more: Any) -> None:
        """A hook: `more` are keyword arguments before the call, and the output after it."""
        x = first_tensor((args, more) if self.tensor == "input" else more)
        if x is None or x.layout not in (torch.strided, torch.jagged):
            return  # what the module cannot take it will say itself
        compiling = torch.compiler.is_compiling()
        if not compiling and is_recorded((x,)):
            return
        dim = self.tracker.dim(self.name, module, x) - x.ndim  # from the last, so that it holds without vmap as well
        x = local_rows(x.detach(), dim)
        if compiling:
            torch.ops.sparseout.measure_input(self.ticket, x, dim, module.training)
        else:
            self.add(x, dim, module.training)

    def add(self, x: Tensor, dim: int, training: bool) -> None:
        """Add a tensor whose units lie along `dim`, a number below 0."""
        if in_backward():  # a checkpoint computes its forward again
            return
        self.trained |= training
        if self.after_training and not self.trained:
            return
        sums = self.sums[training]
        with outside_transforms():
            parts, misfit = counted_rows(without_transforms(x), dim, limit=None)
            self.unmasked |= misfit
            for rows in parts:
                stream = _stream(self.measure, self.eps)
                stream.update(rows)
                new = torch.cat([value.flatten() for value in stream.state().values()])
                total = sums.setdefault(rows.shape[1], torch.zeros_like(new))
                total.add_(new.to(total.device))  # replicas of nn.DataParallel are on other devices

    def begin_probe(self) -> None:
        """Evaluation is from here on what a probe sees; what was evaluated besides is left out."""
        for vector in self.sums[False].values():
            vector.zero_()

    def state(self, training: bool) -> dict[Source, Tensor]:
        """The sums of a mode, as :meth:`load` takes them."""
        return {(self.name, units): vector.clone() for units, vector in self.sums[training].items()}

    def load(self, training: bool, state: Mapping[Source, Tensor], device: torch.device) -> None:
        """Go on from the sums of a mode, among those of other modules."""
        with torch.inference_mode(False):
            self.sums[training] = {
                units: vector.to(device, copy=True) for (name, units), vector in state.items() if name == self.name
            }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ticket"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.ticket = _ticket(self)


# Compiled code calls this op, which runs as Python at every call: so it knows when a checkpoint computes again, makes
# sums for a new width, and is compiled once for all layers. The ticket is a tensor, as a number would be guarded on;
# it is declared as mutated, so that nothing takes the call for one without effect.
_library = torch.library.Library("sparseout", "FRAGMENT")
_library.define("measure_input(Tensor(a!) ticket, Tensor input, int dim, bool training) -> ()")
_accumulators: WeakValueDictionary[int, Accumulator] = WeakValueDictionary()
_numbers = count()


def _measure_input(ticket: Tensor, input: Tensor, dim: int, training: bool) -> None:
    accumulator = _accumulators.get(int(ticket[0]))
    if accumulator is not None and accumulator.hooks:
        accumulator.add(input, dim, training)


_library.impl("measure_input", _measure_input, "CompositeExplicitAutograd")
torch.library.register_fake("sparseout::measure_input", lambda ticket, input, dim, training: None, lib=_library)


def _measure_batched(info: Any, in_dims: Any, ticket: Tensor, input: Tensor, dim: int, training: bool) -> Any:
    rows = input if in_dims[1] is None else input.movedim(in_dims[1], 0)
    return torch.ops.sparseout.measure_input(ticket, rows, dim, training), None


torch.library.register_vmap("sparseout::measure_input", _measure_batched, lib=_library)


def _ticket(accumulator: Accumulator) -> Tensor:
    number = next(_numbers)
    _accumulators[number] = accumulator
    with torch.inference_mode(False):
        return torch.tensor([number], device="cpu")


def read(
    accumulators: Sequence[Accumulator], device: torch.device, group: Group | None
) -> dict[bool, dict[Source, Measurement]]:
    """The measurements of all processes of the group since the last time, by mode: True for training.

    Waits for the device once.
    """
    sums = {
        (index, training, units): vector
        for index, accumulator in enumerate(accumulators)
        for training, by_units in accumulator.sums.items()
        for units, vector in by_units.items()
    }
    totals = all_reduce_sums(sums, device, group)
    measurements: dict[bool, dict[Source, Measurement]] = {True: {}, False: {}}
    if not totals:
        return measurements
    for vector in sums.values():
        vector.zero_()
    vectors = torch.cat(list(totals.values())).cpu().split([len(total) for total in totals.values()])
    for (index, training, units), vector in zip(totals, vectors, strict=True):
        accumulator = accumulators[index]
        if (measurement := _measurement(accumulator.measure, accumulator.eps, vector)) is not None:
            measurements[training][accumulator.name, units] = measurement
    return measurements


def state_of_sums(accumulators: Sequence[Accumulator], mode: str | None) -> dict[str, Any]:
    """The sums of all accumulators, as :func:`load_sums` takes them: of the controller's mode, and of the other."""
    state: dict[str, Any] = {
        key: {source: vector for accumulator in accumulators for source, vector in accumulator.state(training).items()}
        for key, training in _modes(mode)
    }
    return state | {"trained": [accumulator.name for accumulator in accumulators if accumulator.trained]}


def load_sums(
    accumulators: Sequence[Accumulator], state: Mapping[str, Any], mode: str | None, device: torch.device
) -> None:
    """Go on from sums, or from those of the first version, which had one mode."""
    for accumulator in accumulators:
        accumulator.trained = "trained" not in state or accumulator.name in state["trained"]
        for key, training in _modes(mode):
            accumulator.load(training, state.get(key, {}), device)


def _modes(mode: str | None) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """The keys of sums in a state, and whether they are of training."""
    return ("sums", mode != "eval"), ("other_sums", mode == "eval")


def _stream(measure: str, eps: Eps) -> Streaming:
    return Streaming((measure,) if measure in MEASURES else (), eps=eps.eps, relative=eps.relative)


def _measurement(measure: str, eps: Eps, vector: Tensor) -> Measurement | None:
    """The measurement that the sums give; None where no sample was seen."""
    stream = _stream(measure, eps)
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
