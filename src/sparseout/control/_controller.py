r"""A controller that moves q while a network trains, until its activations are as sparse as wanted."""

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.activations import UnitDim, UnitTracker
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.distributed import (
    Group,
    all_gather,
    check_group,
    check_replicas,
    data_parallel_group,
    is_distributed,
)
from sparseout._utils.modules import unwrapped
from sparseout._utils.validation import check_choice, check_int, check_positive, expected, type_name
from sparseout.control._arguments import (
    bounds_of,
    groups_of,
    is_sparseout,
    layers_of,
    separate_q,
    targets_of,
)
from sparseout.control._input_hook import InputHook, read
from sparseout.control._law import Law
from sparseout.control._layer_group import IDLE_UPDATES, STALL_WINDOW, LayerGroup
from sparseout.control._measure_specs import scale_of

__all__ = ["SparsityController"]


class SparsityController:
    r"""Changes q during training until the inputs of the Sparseout layers are as sparse as wanted.

    Every `every` steps, with e the excess of sparsity over the target, measured since the last update,

    .. math:: q \leftarrow q + \mathrm{gain}\,(e_t - e_{t-1} + e_t / \mathrm{delay})

    where e is an exponential moving average of weight 1/4: a proportional-integral law in velocity form. The first term
    responds to a change at once, the second removes the remaining error. An update raises q by at most `max_step` and
    lowers it by at most half of that, since units that die at a small q do not recover; inside the dead-band only the
    first term acts. The network itself is not changed. Give the layers ``scale="matched"``, so that q changes the shape
    of the noise and not its strength.

    What is measured are the inputs of the layers in training mode, as means over samples of the measure over units.
    These inputs contain the noise of earlier layers, so a network with several Sparseout layers may be less or more
    sparse in evaluation: `report` says what was measured there too, and with ``mode="eval"`` the target is met there.
    Dead units make activations look sparse; ``measure="hoyer_live"`` leaves them out.

    Warnings, repeated by `report`, say that a target is out of reach, because q has been at a bound for 50 updates or
    because dead units rule the target out, with the closest value, until it is met after all; that inputs are NaN or
    infinite, which do not change q; and that no training pass was seen in 5 updates, or none of a layer with a q of its
    own. Layers with p = 0 are named when the controller is made.

    While a controller is attached it owns q: what :func:`sparseout.set_q_` writes is overwritten at the next update. A
    later controller on the same layers takes them over, with a warning. A model can be copied and pickled with its
    controller; in a copy without it nothing is measured, and q does not change. Names of layers are those of the
    written model, without the wrappers of `torch.compile`, `DistributedDataParallel` and the like, so that a state fits
    with and without them.

    Args:
        model: a model with at least one Sparseout layer.
        target: the wanted value of `measure`; with `per_layer` it may be a mapping from layer names to values.
        measure: ``"hoyer"``, ``"hoyer_live"`` (over units that are not dead), ``"gini"``, ``"treves_rolls"``,
            ``"sparsity"``, ``"density"`` or ``"kurtosis"``.
        mode: ``"train"`` or ``"eval"``: the mode of the layers in which the target is to be met. For ``"eval"`` call
            the model in evaluation mode between updates; without such a call an update leaves q as it is.
        modules: dotted names or types of the layers to control, or a function of name and layer; None: all.
        per_layer: each layer has its own q and its own target. Otherwise all layers have one q, and the mean over
            layers is measured. A tensor for q that is shared with a layer of another q is replaced by a new one.
        every: steps between updates. Each update waits for the device once.
        bounds: the least and the greatest q.
        deadband: errors up to this size count as none for the integral term.
        gain: change of q per unit of error.
        delay: updates over which the integral term repeats the proportional one; about as long as the network takes
            to respond.
        max_step: the most by which an update raises q.
        unit_dim: dimension of the units where the module that made an activation does not tell: an int, a mapping from
            names or types of modules to ints, or a function of name, module and tensor.
        group: process group over which measurements are summed; None: that of the data-parallel wrapper around the
            model, else all processes, which must have equal parameters then.

    Raises:
        ValueError: if the model has no Sparseout layer, or a value is out of range.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 32), torch.nn.ReLU(), sparseout.Sparseout(q=2.5, scale="matched"),
        ...     torch.nn.Linear(32, 8),
        ... )
        >>> controller = sparseout.SparsityController(model, target=0.6)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> for _ in range(20):
        ...     x = torch.rand(16, 8)
        ...     loss = (model(x) - x).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     controller.step()
        >>> controller.q["2"] < 2.5
        True

    Source: the law is the textbook one (Astrom & Hagglund 2006, Advanced PID Control, section 3.4); that q moves
    sparsity is Khan & Stavness (2019).
    """

    def __init__(
        self,
        model: nn.Module,
        target: float | Mapping[str, float],
        measure: str = "hoyer",
        *,
        mode: str = "train",
        modules: Collection[str | type[nn.Module]] | Callable[[str, nn.Module], bool] | None = None,
        per_layer: bool = False,
        every: int = 10,
        bounds: tuple[float, float] = (1.0, 4.0),
        deadband: float = 0.002,
        gain: float = 20.0,
        delay: float = 20.0,
        max_step: float = 0.1,
        unit_dim: UnitDim = None,
        group: Group | None = None,
    ) -> None:
        scale_of(measure)
        check_choice("mode", mode, ("train", "eval"))
        if not isinstance(model, nn.Module):
            raise TypeError(expected("model", "an nn.Module", type_name(model)))
        given, model = model, unwrapped(model)
        layers = layers_of(model, modules)
        targets = targets_of(target, measure, layers, per_layer)
        self.measure, self.mode, self.every, self.bounds = (
            measure,
            mode,
            check_int("every", every, 1),
            bounds_of(bounds),
        )
        self.deadband, self.gain = check_positive("deadband", deadband, zero=True), check_positive("gain", gain)
        self.delay, self.max_step = check_positive("delay", delay), check_positive("max_step", max_step)
        self._model, self._tracker = model, UnitTracker(model, unit_dim)
        check_group(group)
        self._process_group = data_parallel_group(given) if group is None and is_distributed() else group
        self._compared = False  # with the controllers of other processes
        self._steps = 0
        low, high = self.bounds
        start = {name: min(max(float(layer.q), low), high) for name, layer in layers.items()}
        groups = [{name: layer} for name, layer in layers.items()] if per_layer else [layers]
        self._groups = [
            LayerGroup(
                group, measure, targets[next(iter(group))], sum(start[name] for name in group) / len(group), mode
            )
            for group in groups
        ]
        self._hooks = {name: InputHook(name, measure, mode, self._tracker) for name in layers}
        self._tracker.attach()
        taken = [name for name, layer in layers.items() if self._hooks[name].attach(layer)]
        separate_q(model, [list(group.layers.values()) for group in self._groups])
        for group in self._groups:
            group.apply_q()
        reset_compiler()
        if taken:
            names = ", ".join(name or "the model" for name in taken)
            warnings.warn(
                f"another controller has lost {names} to this one and can no longer be stepped: detach it first",
                stacklevel=2,
            )
        if quiet := [name or "the model" for name, layer in layers.items() if layer.p in (0, 1)]:
            warnings.warn(f"q has no effect where p is 0 or 1, as it is in {', '.join(quiet)}", stacklevel=2)

    @property
    def q(self) -> dict[str, float]:
        """The current q of every layer, by dotted name."""
        return {name: group.q for group in self._groups for name in group.layers}

    @property
    def measured(self) -> dict[str, float | None]:
        """The measurement of the last update, by layer; for layers that share a q, their mean."""
        return {name: group.measured for group in self._groups for name in group.layers}

    def step(self) -> None:
        """Count a step of the optimizer; after every `every` of them, update q.

        With several processes (`torch.distributed`) measurements are summed over them, so all must call it alike.

        Raises:
            RuntimeError: after `detach`, and if a layer was reverted or taken over by another controller; on all
                processes, if their controllers differ, as after one of them alone has loaded a state.
            ValueError: on all processes, if they have different models and `group` was not given.
        """
        self._check_layers()
        first, self._compared = not self._compared, True
        if first or (self._steps + 1) % self.every == 0:
            self._check_processes(first)
        self._steps += 1
        if self._steps % self.every:
            return
        measurements, others = read(self._hooks, self.measure, self._device(), self._process_group)
        law = Law(self.gain, self.delay, self.deadband, self.max_step, self.bounds)
        messages = []
        for group in self._groups:
            mine = {source: value for source, value in measurements.items() if source[0] in group.layers}
            messages += group.update(mine, law)
            group.note_other(value for (name, _), value in others.items() if name in group.layers)
        for message in messages + self._idle_messages():
            warnings.warn(message, stacklevel=2)

    def report(self) -> list[str]:
        """A sentence for each q: its value, the measured sparsity, and why the target is out of reach, if it is."""
        return [group.report() for group in self._groups]

    def detach(self) -> None:
        """Remove the hooks. Every q keeps its value, as a float; `step` raises from then on."""
        self._tracker.detach()
        for hook in self._hooks.values():
            hook.detach()
        for group in self._groups:
            for layer in group.layers.values():
                if is_sparseout(layer):  # and not reverted
                    layer.q = group.q
        reset_compiler()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue as if training had not been interrupted."""
        return {
            "measure": self.measure,
            "mode": self.mode,
            "steps": self._steps,
            "sums": {
                (name, units): vector.clone()
                for name, hook in self._hooks.items()
                for units, vector in hook.sums.items()
            },
            "groups": {"+".join(group.layers): group.state() for group in self._groups},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; with another target, from the q of the state.

        Raises:
            ValueError: for a state of another measure or of other layers, or that is not of a controller.
            TypeError: if it is not a mapping. Nothing is changed then.
        """
        groups = groups_of(state, self.measure, self.mode, ["+".join(group.layers) for group in self._groups])
        if not (self._compared and is_distributed()):  # all processes update at the same calls, whoever loads a state
            self._steps = state["steps"]
        device = self._device()
        with torch.inference_mode(False):
            for name, hook in self._hooks.items():
                hook.sums = {
                    units: vector.to(device, copy=True)
                    for (layer, units), vector in state["sums"].items()
                    if layer == name
                }
        for group, saved in zip(self._groups, groups, strict=True):
            group.load(saved)
            group.apply_q()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process_group": None, "_compared": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_eyes" in state:
            wanted = "one of this version: build a new one, whose load_state_dict takes states of the first version"
            raise RuntimeError(expected("the pickled controller", wanted, "one of the first version"))
        self.__dict__ |= state
        self._tracker.attach()
        for hook in self._hooks.values():
            hook.on = True

    def _check_layers(self) -> None:
        for name, layer in ((name, layer) for group in self._groups for name, layer in group.layers.items()):
            if not is_sparseout(layer):
                wanted = "a Sparseout layer as before (detach the controller, then revert)"
                raise RuntimeError(expected(name or "model", wanted, type_name(layer)))
            if self._hooks[name].handle is None:
                got = f"one that was detached, or that gave `{name}` to a later one"
                raise RuntimeError(expected("controller", "on its layers", got))

    def _check_processes(self, first: bool) -> None:
        """Raise, on all processes, if their controllers differ: each would move q elsewhere."""
        if not is_distributed():
            return
        if first and self._process_group is None:
            check_replicas(self._model)
        names = ("measure", "mode", "every", "bounds", "deadband", "gain", "delay", "max_step", "_steps")
        values = {name.lstrip("_"): getattr(self, name) for name in names}
        for group in self._groups:
            values |= {f"{name} of {group.names}": getattr(group, name) for name in ("target", "q", "error")}
        everyone = all_gather(values, self._process_group)
        for (rank, theirs), name in itertools.product(enumerate(everyone), values):
            first_value, value = everyone[0].get(name), theirs.get(name)
            if value != first_value and not (isinstance(value, float) and math.isclose(value, first_value or 0.0)):
                wanted = "the same on all processes (with the same arguments, and one state loaded on all)"
                got = f"{name} {first_value} on process 0 and {value} on process {rank}"
                raise RuntimeError(expected("controller", wanted, got))

    def _device(self) -> torch.device:
        q = next(iter(self._groups[0].layers.values())).q
        return q.device if isinstance(q, Tensor) else torch.device("cpu")

    def _idle_messages(self) -> list[str]:
        training = self.mode == "train"
        mode, other = ("training", "evaluation") if training else ("evaluation", "training")
        limit = IDLE_UPDATES if training else STALL_WINDOW  # some evaluate once in an epoch
        idle = [group for group in self._groups if group.idle == limit and (training or not group.called)]
        seen = f"was seen in {limit * self.every} steps"
        if len(idle) == len(self._groups):
            return [f"no {mode} pass {seen}, so q does not move: is the model in {other} mode?"]
        question = f"is it called, and in {mode} mode?"
        return [f"no {mode} pass of {group.names} {seen}, so its q does not move: {question}" for group in idle]
