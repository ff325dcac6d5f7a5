"""The protocol of a knob, and checks of knobs and their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from sparseout._utils.modules import named_modules
from sparseout._utils.validation import expected, is_number, type_name
from sparseout.control._law import NATURAL

KNOB_WANTED = "'q', 'p', 'k', an ActivityPenalty, or an object as sparseout.Knob describes"
_PARTS = ("name", "sites", "bounds", "scale", "raises_sparsity", "get", "set")
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "q": ("0 <= ", lambda value: 0 <= value < math.inf),
    "k": ("> 0 and < 1, ", lambda value: 0 < value < 1),  # from 1 on it would be a number of units
    "linear": ("", math.isfinite),
    "log": ("> 0, ", lambda value: 0 < value < math.inf),
    "logit": ("> 0 and < 1, ", lambda value: 0 < value < 1),
}


@runtime_checkable
class Knob(Protocol):
    """Protocol of a knob of :class:`sparseout.SparsityController`; any object that has these will do.

    Attributes:
        name: what reports and warnings call it.
        sites: where sparsity is measured: ``"input"`` or ``"output"`` by the dotted name of a module.
        bounds: the least and the greatest value.
        scale: how it is moved: ``"linear"``; ``"log"``, by factors, for bounds > 0, such as the strength of a penalty;
            or ``"logit"``, by the logarithm of p / (1 - p), for bounds in (0, 1), such as the p of noise.
        raises_sparsity: whether activations become sparser as it rises.

    Example:
        >>> import torch, sparseout
        >>> class Threshold(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.least = 0.1
        ...     def forward(self, x):
        ...         return torch.where(x > self.least, x, 0.0)
        >>> class ThresholdKnob:
        ...     name, sites, bounds, scale, raises_sparsity = "threshold", {"1": "output"}, (0.01, 10.0), "log", True
        ...     def __init__(self, layer):
        ...         self.layer = layer
        ...     def get(self):
        ...         return self.layer.least
        ...     def set(self, value):
        ...         self.layer.least = value
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), Threshold())
        >>> controller = sparseout.SparsityController(model, 0.2, "density", knob=ThresholdKnob(model[1]), every=1)
        >>> for _ in range(100):
        ...     _ = model(torch.rand(64, 8))
        ...     controller.step()
        >>> abs(controller.measured["1"] - 0.2) < 0.02
        True
    """

    name: str
    sites: Mapping[str, str]
    bounds: tuple[float, float]
    scale: str
    raises_sparsity: bool

    def get(self) -> float:
        """The value now."""

    def set(self, value: float) -> None:
        """Take a value within the bounds."""


def check_knob(model: nn.Module, knob: Any) -> Knob:
    """The user's knob. Raises TypeError or ValueError where it lacks something."""
    if isinstance(knob, type) or not isinstance(knob, Knob):
        lacks = [name for name in _PARTS if not hasattr(knob, name)]
        got = type_name(knob) if len(lacks) == len(_PARTS) else f"{type_name(knob)} without {', '.join(lacks)}"
        raise TypeError(expected("knob", KNOB_WANTED, repr(knob) if isinstance(knob, type) else got))
    if not isinstance(knob.name, str) or not knob.name:
        raise TypeError(expected("knob.name", "a name", type_name(knob.name)))
    if not isinstance(knob.sites, Mapping) or not knob.sites:
        got = "an empty one" if isinstance(knob.sites, Mapping) else type_name(knob.sites)
        raise TypeError(expected("knob.sites", "a mapping of names of modules to 'input' or 'output'", got))
    names = dict(named_modules(model))
    for name, tensor in knob.sites.items():
        if name not in names:
            raise ValueError(expected("knob.sites", "by names of the model's modules", repr(name)))
        if tensor not in ("input", "output"):
            raise ValueError(expected("knob.sites", f"'input' or 'output' for {name!r}", repr(tensor)))
    if knob.scale not in NATURAL:
        raise ValueError(expected("knob.scale", f"one of {', '.join(map(repr, NATURAL))}", repr(knob.scale)))
    if not isinstance(knob.raises_sparsity, bool):
        raise TypeError(expected("knob.raises_sparsity", "a bool", type_name(knob.raises_sparsity)))
    bounds_of("knob.bounds", knob.bounds, knob.scale)
    value = knob.get()
    if not is_number(value) or not math.isfinite(value):
        raise TypeError(expected("knob.get()", "a finite number", value if is_number(value) else type_name(value)))
    return knob


def bounds_of(name: str, bounds: Any, scale: str, layer_knob: str = "") -> tuple[float, float]:
    """The bounds of a knob of that scale, which has no place for others; q and k of layers have ranges of their own."""
    text, holds = _RANGES[layer_knob if layer_knob in ("q", "k") else scale]
    wanted = f"two finite numbers {text}low <= high"
    if isinstance(bounds, str) or not isinstance(bounds, Sequence):
        raise TypeError(expected(name, wanted, type_name(bounds)))
    if not all(map(is_number, bounds)):
        raise TypeError(expected(name, wanted, bounds))
    if len(bounds) != 2 or not bounds[0] <= bounds[1] or not all(map(holds, bounds)):
        raise ValueError(expected(name, wanted, bounds))
    return float(bounds[0]), float(bounds[1])
