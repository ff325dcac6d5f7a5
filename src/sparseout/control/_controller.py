r"""Set a sparsity: a controller that moves q while a network trains until its activations are as sparse as wanted."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import unwrapped
from sparseout._utils.validation import expected, kind
from sparseout.control._arguments import (
    bounds_of,
    constant,
    groups_of,
    is_sparseout,
    layers_of,
    separate_q,
    steps_of,
    targets_of,
)
from sparseout.control._input_hook import Eye, Place, Seen, read
from sparseout.control._measure_specs import SCALES, scale_of
from sparseout.layers import Sparseout

__all__ = ["SparsityController"]

SMOOTH = 0.25  # the part of a change of the error that an update takes in
WINDOW = 50  # updates, over which units are counted as dead and a target as out of reach
BLIND = 5  # updates without a training pass, until that is told


@dataclass
class _Group:
    """Layers that share a q and a target."""

    layers: dict[str, Sparseout]
    target: float
    q: float
    measured: float | None = None
    error: float | None = None  # at the last update
    told: str = ""  # why the target is out of reach
    problem: str = ""  # why some of what was seen last has no value
    warned: bool = False  # of such a problem
    # over the window so far
    updates: int = 0
    total: float = 0.0  # of what was measured
    at_bound: bool = True
    active: dict[Place, Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin a window."""
        self.updates, self.total, self.at_bound, self.active = 0, 0.0, True, {}

    @property
    def names(self) -> str:
        """Its layers, as sentences name them."""
        return ", ".join(name or "the model" for name in self.layers)


class SparsityController:
    r"""Moves q while a network trains until the activations that its Sparseout layers take in are as sparse as wanted.

    Every `every` steps, with e the excess of sparsity over the target, measured since the last update,

    .. math:: q \leftarrow q + \mathrm{gain}\,(e_t - e_{t-1} + e_t / \mathrm{delay})

    where e is smoothed, each update taking in a quarter of its change: a proportional-integral law in velocity form.
    The first term answers a change at once, the second removes what is left. A step of q is at most `max_step` up
    and half of it down, since too small a q kills units that do not come back; inside the dead-band only the first term
    acts. The network itself is not changed. Give the layers ``scale="matched"``, so that q moves the shape of the noise
    and not its strength.

    What is measured are the inputs of the layers in training mode, means over samples of the measure over units: the
    channels of ``Sparseout1d/2d/3d``, dim 1 of other 4-d and 5-d inputs, the last dim of others. A layer called at
    several widths counts as a layer for each. Earlier noise takes part in that, so a network with several layers may
    measure a little differently in evaluation. A dead unit makes a code look sparse; ``measure="hoyer_live"`` leaves
    these out.

    Told in a warning, once, and by `report` are: a target that is not reached though q has been at a bound for 50
    updates, or that the dead units rule out, with the closest value; and inputs that are NaN or infinite, by which q is
    not moved. Where no training pass is seen in 5 updates that is told too.

    While it is attached q is the controller's: what :func:`sparseout.set_q_` writes is overwritten at the next update.
    A later controller on the same layers takes them over. A model can be copied and pickled with its controller; a
    copy's q then stays. Layers are named as in the model that was written, without what `torch.compile` and
    `DistributedDataParallel` put around it, so that a state fits with them and without.

    Args:
        model: with Sparseout layers: at least one.
        target: the value of `measure` that is wanted; with `per_layer` it may be a mapping from layer names to values.
        measure: ``"hoyer"``, ``"hoyer_live"`` (over units not dead), ``"gini"``, ``"treves_rolls"``, ``"sparsity"``,
            ``"density"`` or ``"kurtosis"``.
        modules: dotted names or types of the layers that are controlled, or a function of name and layer that chooses
            them; None: all.
        per_layer: each layer has a q of its own, and its own target. Otherwise one q moves all layers, and the mean
            over layers is what is measured. A tensor for q that a layer shares with one that is to move differently
            is replaced by one of its own.
        every: steps between updates. Each waits for the device once.
        bounds: of q.
        deadband: an error so small is left alone.
        gain: units of q by unit of error.
        delay: updates over which the integral term repeats the proportional one; about as long as the network
            needs to answer.
        max_step: the most by which q rises in one update.

    Raises:
        ValueError: where the model has no Sparseout layer, or a value is out of range.
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
        modules: Collection[str | type[nn.Module]] | Callable[[str, nn.Module], bool] | None = None,
        per_layer: bool = False,
        every: int = 10,
        bounds: tuple[float, float] = (1.0, 4.0),
        deadband: float = 0.002,
        gain: float = 20.0,
        delay: float = 20.0,
        max_step: float = 0.1,
    ) -> None:
        scale_of(measure)
        if not isinstance(model, nn.Module):
            raise TypeError(expected("model", "an nn.Module", kind(model)))
        model = unwrapped(model)
        layers = layers_of(model, modules)
        targets = targets_of(target, measure, layers, per_layer)
        self.measure, self.every, self.bounds = measure, steps_of(every), bounds_of(bounds)
        self.deadband, self.gain = constant("deadband", deadband, zero=True), constant("gain", gain)
        self.delay, self.max_step = constant("delay", delay), constant("max_step", max_step)
        low, high = self.bounds
        start = {name: min(max(float(layer.q), low), high) for name, layer in layers.items()}
        if per_layer:
            self._groups = [_Group({name: layer}, targets[name], start[name]) for name, layer in layers.items()]
        else:
            self._groups = [_Group(layers, next(iter(targets.values())), sum(start.values()) / len(start))]
        self._steps = self._blind = 0
        self._eyes = {name: Eye(measure) for name in layers}
        for name, layer in layers.items():
            self._eyes[name].attach(layer)
        separate_q(model, [list(group.layers.values()) for group in self._groups])
        for group in self._groups:
            self._set(group)
        reset_compiler()

    @property
    def q(self) -> dict[str, float]:
        """The present q of every layer, by dotted name."""
        return {name: group.q for group in self._groups for name in group.layers}

    @property
    def measured(self) -> dict[str, float | None]:
        """What was measured before the last update, by layer; where layers share a q, the mean over them."""
        return {name: group.measured for group in self._groups for name in group.layers}

    def step(self) -> None:
        """Count a step of the optimizer; after every `every` of them, measure and move q.

        With several processes (`torch.distributed`) what all have seen is summed, so all must call this alike.

        Raises:
            RuntimeError: after `detach`, and where a layer was reverted or is another controller's now.
        """
        self._check_layers()
        self._steps += 1
        if self._steps % self.every:
            return
        seen = read(self._eyes, self.measure, self._device())
        self._blind = 0 if seen else self._blind + 1
        if self._blind == BLIND:
            steps = BLIND * self.every
            warnings.warn(
                f"no training pass was seen in {steps} steps, so q does not move: is the model in evaluation mode?",
                stacklevel=2,
            )
        for group in self._groups:
            self._update(group, {place: value for place, value in seen.items() if place[0] in group.layers})

    def report(self) -> list[str]:
        """A sentence for each q: where it is, what is measured, and why a target is out of reach if it is."""
        sentences = []
        for group in self._groups:
            value = "not measured" if group.measured is None else f"{group.measured:.3f}"
            sentence = f"{group.names}: q = {group.q:.3f}, {self.measure} {value}, target {group.target:g}"
            sentences.append("; ".join(filter(None, (sentence, group.problem, group.told))))
        return sentences

    def detach(self) -> None:
        """Take the hooks away; every q stays where it is, as a float. `step` is an error then."""
        for eye in self._eyes.values():
            eye.detach()
        for group in self._groups:
            for layer in group.layers.values():
                if is_sparseout(layer):  # and not reverted
                    layer.q = group.q
        reset_compiler()

    def state_dict(self) -> dict[str, Any]:
        """Everything that an interrupted training needs to move q as if it had not been."""
        return {
            "measure": self.measure,
            "steps": self._steps,
            "sums": {(name, units): v.clone() for name, eye in self._eyes.items() for units, v in eye.sums.items()},
            "groups": {
                "+".join(group.layers): {name: getattr(group, name) for name in _KEPT}
                | {"active": {place: value.clone() for place, value in group.active.items()}}
                for group in self._groups
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; with another target, from its q.

        Raises:
            ValueError: for a state of another measure or of other layers, or none of a controller.
            TypeError: for what is no mapping. Nothing has been changed then.
        """
        groups = groups_of(state, self.measure, ["+".join(group.layers) for group in self._groups])
        self._steps = state["steps"]
        device = self._device()
        for name, eye in self._eyes.items():
            eye.sums = {
                units: sums.to(device, copy=True) for (layer, units), sums in state["sums"].items() if layer == name
            }
        for group, saved in zip(self._groups, groups, strict=True):
            for name in (*_KEPT, "active"):
                if name != "target":
                    setattr(group, name, dict(saved[name]) if name == "active" else saved[name])
            if saved["target"] != group.target:
                group.error, group.told = None, ""
                group.forget()
            self._set(group)

    def _check_layers(self) -> None:
        for name, layer in ((name, layer) for group in self._groups for name, layer in group.layers.items()):
            if not is_sparseout(layer):
                wanted = "a Sparseout layer as before (detach the controller, then revert)"
                raise RuntimeError(expected(name or "model", wanted, kind(layer)))
            if self._eyes[name].handle is None:
                got = f"one that was detached, or that gave `{name}` to a later one"
                raise RuntimeError(expected("controller", "on its layers", got))

    def _device(self) -> torch.device:
        return torch.as_tensor(next(iter(self._groups[0].layers.values())).q).device

    def _update(self, group: _Group, seen: Mapping[Place, Seen]) -> None:
        if not seen:  # no training pass since the last update
            return
        problems = {name or "the model": value.problem for (name, _), value in seen.items() if value.problem}
        group.problem = "; ".join(f"q is not moved by {name}: its inputs {why}" for name, why in problems.items())
        if group.problem and not group.warned:
            group.warned = True
            warnings.warn(group.problem, stacklevel=3)
        seen = {place: value for place, value in seen.items() if not value.problem}
        if not seen:
            group.measured = None
            return
        for place, (_, active, _) in seen.items():
            group.active[place] = group.active[place] + active if place in group.active else active
        known = [value for value, _, _ in seen.values() if math.isfinite(value)]
        rule = SCALES[self.measure]
        if known:
            group.measured = sum(known) / len(known)
            error = rule.sign * (rule.scale(group.measured) - rule.scale(group.target))
        else:  # no unit is active in any sample: as sparse as can be
            group.measured, error = None, 1.0
        change = 0.0 if group.error is None else SMOOTH * (error - group.error)
        group.error = error if group.error is None else group.error + change
        error = group.error
        step = self.gain * (change + (error / self.delay if abs(error) > self.deadband else 0.0))
        before, (low, high) = group.q, self.bounds
        group.q = min(max(before + min(max(step, -self.max_step / 2), self.max_step), low), high)
        self._set(group)
        stuck = before == group.q and ((group.q == low and error < 0) or (group.q == high and error > 0))
        group.at_bound = group.at_bound and stuck and abs(error) > self.deadband
        group.updates += 1
        group.total += math.nan if group.measured is None else group.measured
        if group.updates == WINDOW:
            self._judge(group)
            group.forget()

    def _set(self, group: _Group) -> None:
        for layer in group.layers.values():
            if isinstance(layer.q, Tensor):
                layer.q.fill_(group.q)
            else:  # somebody has set a number
                layer.q = torch.tensor(group.q)

    def _judge(self, group: _Group) -> None:
        """Say once if the target is out of reach."""
        if group.told:
            return
        rule = SCALES[self.measure]
        units = sum(active.numel() for active in group.active.values())
        dead = sum(int((active == 0).sum()) for active in group.active.values())
        killed = f"{dead} of {units} units are dead, which no q brings back"
        closest = group.total / WINDOW
        reached = "no sample has an active unit" if math.isnan(closest) else f"the closest value is {closest:.3f}"
        densest = [
            rule.extreme(active.numel(), float((active > 0).sum()))
            for active in group.active.values()
            if (active > 0).any()
        ]
        limit = sum(densest) / len(densest) if densest else math.nan
        if not densest or rule.sign * (rule.scale(limit) - rule.scale(group.target)) > self.deadband:
            why = killed
        elif group.at_bound:
            low = group.q == self.bounds[0]
            why = f"q has been at its {'lower' if low else 'upper'} bound, {group.q:g}, for {WINDOW} updates"
            why += f", and {killed}" if dead and not low else ""
        else:
            return
        group.told = f"the target {group.target:g} of {self.measure} is out of reach: {why}; {reached}"
        warnings.warn(f"{group.names}: {group.told}", stacklevel=4)


# of a group, in a state beside what was active
_KEPT = ("target", "q", "measured", "error", "told", "problem", "warned", "updates", "total", "at_bound")
