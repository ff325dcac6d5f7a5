"""Checks of the arguments of a controller: measures, layers, targets, bounds, states."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.modules import named_modules, select
from sparseout._utils.validation import expected, is_number, type_name
from sparseout.control._layer_group import q_tensor
from sparseout.control._measure_specs import SCALES
from sparseout.layers import Sparseout


def layers_of(model: nn.Module, modules: Any) -> dict[str, Sparseout]:
    """The layers to control, by name."""
    every = {name: module for name, module in named_modules(model) if isinstance(module, Sparseout)}
    if not every:
        wanted, got = "one with Sparseout layers, which convert_dropout_ and insert_after_ make", type_name(model)
        dropout = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
        if count := sum(isinstance(module, dropout) for module in model.modules()):
            got += f" with {count} Dropout layer{'s' if count > 1 else ''}, not yet converted"
        raise ValueError(expected("model", wanted, got))
    return select(every, modules, "Sparseout layers")


def targets_of(target: Any, measure: str, layers: Mapping[str, Sparseout], per_layer: bool) -> dict[str, float]:
    """The target of every layer."""
    if isinstance(target, Mapping):
        if not per_layer:
            raise ValueError(expected("target", "a number, as the layers share a q (per_layer=False)", "a mapping"))
        if target.keys() != layers.keys():
            raise ValueError(expected("target", f"a value for each of {', '.join(layers)}", f"{sorted(target)}"))
        targets = dict(target)
    else:
        targets = dict.fromkeys(layers, target)
    scale = SCALES[measure]
    for value in targets.values():
        if not is_number(value):
            raise TypeError(expected("target", "a number", type_name(value)))
        if not scale.low < value < scale.high:
            raise ValueError(expected("target", f"in ({scale.low:g}, {scale.high:g}), as {measure} is", value))
    return {name: float(value) for name, value in targets.items()}


def bounds_of(bounds: Any) -> tuple[float, float]:
    """The bounds of q."""
    wanted = "two finite numbers 0 <= low <= high"
    if isinstance(bounds, str) or not isinstance(bounds, Sequence):
        raise TypeError(expected("bounds", wanted, type_name(bounds)))
    if not all(map(is_number, bounds)):
        raise TypeError(expected("bounds", wanted, bounds))
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < math.inf:
        raise ValueError(expected("bounds", wanted, bounds))
    return float(bounds[0]), float(bounds[1])


def groups_of(state: Any, measure: str, mode: str, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The groups of a controller's state, if it is one of this measure and these groups."""
    wanted = "what state_dict gives"
    if not isinstance(state, Mapping):
        raise TypeError(expected("state", wanted, type_name(state)))
    if missing := {"measure", "steps", "sums", "groups"} - state.keys():
        raise ValueError(expected("state", wanted, f"one without {', '.join(sorted(missing))}"))
    if state["measure"] != measure:
        raise ValueError(expected("state", f"one of {measure}", f"one of {state['measure']}"))
    if (other := state.get("mode", "train")) != mode:  # the first version had one mode
        raise ValueError(expected("state", f"one of mode {mode!r}", f"one of mode {other!r}"))
    if list(state["groups"]) != names:
        raise ValueError(expected("state", f"one of the layers {', '.join(names)}", ", ".join(state["groups"])))
    return list(state["groups"].values())


def is_sparseout(module: nn.Module) -> bool:
    """Whether it is a Sparseout layer, still: `revert_` changes classes."""
    return isinstance(module, Sparseout)


def separate_q(model: nn.Module, groups: Sequence[Sequence[Sparseout]]) -> None:
    """Give the layers of each group a tensor for q, but where they have one that no layer outside of it has."""
    first = next(model.parameters(), None)  # a layer has none of its own
    device = torch.device("cpu") if first is None else first.device
    layers = [module for module in model.modules() if isinstance(module, Sparseout)]
    new = []
    for group in groups:
        others = {id(layer.q) for layer in layers if layer not in group}
        new += [layer for layer in group if not isinstance(q := layer.q, Tensor) or id(q) in others or q.is_inference()]
    for layer in new:
        old = layer.q
        layer.q = q_tensor(float(old), old.device if isinstance(old, Tensor) else device)
