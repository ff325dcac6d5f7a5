r"""Set a sparsity: a controller that moves q while a network trains until its activations are as sparse as wanted."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseout.convert import forget_compiled_code
from sparseout.errors import expected
from sparseout.layers import Sparseout
from sparseout.measures import MEASURES, Streaming
from sparseout.targets import SCALES, layers_of, targets_of

__all__ = ["SparsityController"]

SMOOTH = 0.25  # the part of a change of the error that an update takes in
WINDOW = 50  # updates, over which units are counted as dead and a target as out of reach


@dataclass
class _Group:
    """Layers that share a q and a target."""

    layers: dict[str, Sparseout]
    target: float
    q: float
    measured: float | None = None
    error: float | None = None  # at the last update
    told: str = ""
    # over the window so far
    updates: int = 0
    total: float = 0.0  # of what was measured
    at_bound: bool = True
    active: dict[str, Tensor] = field(default_factory=dict)

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

    What is measured are the inputs of the layers in training mode, means over samples of the measure over units (dim 1
    of 4-d and 5-d inputs, the last one of others). Earlier noise takes part in that, so a network with several layers
    may measure a little differently in evaluation. A dead unit makes a code look sparse; ``measure="hoyer_live"``
    leaves these out.

    A target that is not reached though q has been at a bound for long, or that the dead units rule out, is told once
    in a warning, with the closest value, and stays in `report`.

    Args:
        model: with Sparseout layers: at least one.
        target: the value of `measure` that is wanted; with `per_layer` it may be a mapping from layer names to values.
        measure: ``"hoyer"``, ``"hoyer_live"`` (over units not dead), ``"gini"``, ``"treves_rolls"``, ``"sparsity"``,
            ``"density"`` or ``"kurtosis"``.
        modules: dotted names of the layers that are controlled, or a function of name and module that chooses them;
            None: all.
        per_layer: each layer has a q of its own, and its own target. Otherwise one q moves all layers, and the mean
            over layers is what is measured.
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
        modules: Collection[str] | Callable[[str, nn.Module], bool] | None = None,
        per_layer: bool = False,
        every: int = 10,
        bounds: tuple[float, float] = (1.0, 4.0),
        deadband: float = 0.002,
        gain: float = 20.0,
        delay: float = 20.0,
        max_step: float = 0.1,
    ) -> None:
        if measure not in SCALES:
            raise ValueError(expected("measure", f"one of {', '.join(SCALES)}", repr(measure)))
        layers = layers_of(model, modules)
        targets = targets_of(target, measure, layers, per_layer)
        low, high = bounds
        if not 0 <= low <= high < math.inf:
            raise ValueError(expected("bounds", "two finite numbers 0 <= low <= high", bounds))
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(expected("every", "a whole number >= 1", every))
        for name, value in {"deadband": deadband, "gain": gain, "delay": delay, "max_step": max_step}.items():
            if not (value > 0 or (name == "deadband" and value == 0)) or not value < math.inf:
                raise ValueError(expected(name, "a finite number > 0", value))
        self.measure, self.every, self.bounds = measure, every, (float(low), float(high))
        self.deadband, self.gain, self.delay, self.max_step = deadband, gain, delay, max_step
        self._scale = SCALES[measure]
        start = {name: min(max(float(layer.q), low), high) for name, layer in layers.items()}
        if per_layer:
            self._groups = [_Group({name: layer}, targets[name], start[name]) for name, layer in layers.items()]
        else:
            self._groups = [_Group(layers, next(iter(targets.values())), sum(start.values()) / len(start))]
        self._steps = 0
        self._sums: dict[str, Tensor] = {}
        self._handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
        for group in self._groups:
            for layer in group.layers.values():
                if not isinstance(layer.q, Tensor):
                    layer.q = torch.tensor(group.q, device=_device(model))
            self._set(group)
        forget_compiled_code()

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
        """
        self._steps += 1
        if self._steps % self.every:
            return
        seen = self._seen()
        for group in self._groups:
            self._update(group, {name: seen[name] for name in group.layers if name in seen})

    def report(self) -> list[str]:
        """A sentence for each q: where it is, what is measured, and why a target is out of reach if it is."""
        sentences = []
        for group in self._groups:
            value = "not measured yet" if group.measured is None else f"{group.measured:.3f}"
            sentence = f"{group.names}: q = {group.q:.3f}, {self.measure} {value}, target {group.target:g}"
            sentences.append(f"{sentence}; {group.told}" if group.told else sentence)
        return sentences

    def detach(self) -> None:
        """Take the hooks away; every q stays where it is, as a float."""
        for handle in self._handles:
            handle.remove()
        for group in self._groups:
            for layer in group.layers.values():
                layer.q = group.q
        forget_compiled_code()

    def state_dict(self) -> dict[str, Any]:
        """Everything that an interrupted training needs to move q as if it had not been."""
        kept = ("q", "measured", "error", "told", "updates", "total", "at_bound")
        return {
            "steps": self._steps,
            "sums": {name: sums.clone() for name, sums in self._sums.items()},
            "groups": {
                "+".join(group.layers): {name: getattr(group, name) for name in kept}
                | {"active": {name: value.clone() for name, value in group.active.items()}}
                for group in self._groups
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError for one of other layers, and changes nothing then."""
        names = ["+".join(group.layers) for group in self._groups]
        if list(state["groups"]) != names:
            raise ValueError(expected("state", f"one of the layers {', '.join(names)}", ", ".join(state["groups"])))
        self._steps = state["steps"]
        device = torch.as_tensor(next(iter(self._groups[0].layers.values())).q).device
        self._sums = {name: sums.to(device, copy=True) for name, sums in state["sums"].items()}
        for group, saved in zip(self._groups, state["groups"].values(), strict=True):
            for name, value in saved.items():
                setattr(group, name, _copied(value, device) if name == "active" else value)
            self._set(group)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not layer.training:
                return
            chunk = self._stream(inputs[0].dim())
            chunk.update(inputs[0])
            # One vector: compiled code on a CPU loses what is added in place to a 0-d fp64 tensor (torch 2.13).
            new = torch.cat([value.flatten() for value in chunk.state().values()])
            if name not in self._sums:
                self._sums[name] = new
            else:  # in place, as compiled code wants its state
                self._sums[name].add_(new)

        return see

    def _stream(self, dims: int = 2) -> Streaming:
        names = (self.measure,) if self.measure in MEASURES else ()
        return Streaming(names, unit_dim=1 if dims in (4, 5) else -1)

    def _seen(self) -> dict[str, tuple[float, Tensor]]:
        """The measure of every layer since the last update, and how often each of its units was active."""
        found = {}
        for name, sums in self._sums.items():
            summed = sums.clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(summed)
            sums.zero_()
            stream = self._stream()
            stream.update(torch.zeros(0, 1))
            keys = stream.state()
            sizes = [len(sums) - len(keys) + 1 if key == "active" else 1 for key in keys]  # a count for each unit
            parts = dict(zip(keys, summed.split(sizes), strict=True))
            stream.load_state({key: part if key == "active" else part[0] for key, part in parts.items()})
            result = stream.compute()
            if result["rows"].item() > 0:
                found[name] = result[self.measure].item(), parts["active"]
        return found

    def _update(self, group: _Group, seen: Mapping[str, tuple[float, Tensor]]) -> None:
        values = [value for value, _ in seen.values()]
        if not values:  # no training pass since the last update
            return
        for name, (_, active) in seen.items():
            group.active[name] = group.active[name] + active if name in group.active else active
        known = [value for value in values if math.isfinite(value)]
        if known:
            group.measured = sum(known) / len(known)
            scale = self._scale.scale
            error = self._scale.sign * (scale(group.measured) - scale(group.target))
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
            group.updates, group.total, group.at_bound, group.active = 0, 0.0, True, {}

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
        units = sum(active.numel() for active in group.active.values())
        dead = sum(int((active == 0).sum()) for active in group.active.values())
        killed = f"{dead} of {units} units are dead, which no q brings back"
        closest = group.total / WINDOW
        reached = "no sample has an active unit" if math.isnan(closest) else f"the closest value is {closest:.3f}"
        densest = [
            self._scale.extreme(active.numel(), float((active > 0).sum()))
            for active in group.active.values()
            if (active > 0).any()
        ]
        limit = sum(densest) / len(densest) if densest else math.nan
        scale, sign = self._scale.scale, self._scale.sign
        if not densest or sign * (scale(limit) - scale(group.target)) > self.deadband:
            why = killed
        elif group.at_bound:
            low = group.q == self.bounds[0]
            why = f"q has been at its {'lower' if low else 'upper'} bound, {group.q:g}, for {WINDOW} updates"
            why += f", and {killed}" if dead and not low else ""
        else:
            return
        group.told = f"the target {group.target:g} of {self.measure} is out of reach: {why}; {reached}"
        warnings.warn(f"{group.names}: {group.told}", stacklevel=4)


def _copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, copy=True) for name, value in tensors.items()}


def _device(model: nn.Module) -> torch.device | None:
    """Where the model's parameters are: a layer has none of its own."""
    first = next(model.parameters(), None)
    return None if first is None else first.device
