"""What a controller can be asked for: which measures, which layers, which targets."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from sparseout.errors import expected, kind
from sparseout.layers import Sparseout


class Scale(NamedTuple):
    """How a measure is controlled: on this scale, and with this sign, it rises with sparsity by about as much."""

    sign: int
    high: float  # targets are below, and above `low`
    low: float
    extreme: Callable[[float, float], float]  # the densest value of n units of which m are live
    scale: Callable[[float], float] = float


SCALES = {
    "hoyer": Scale(1, 1, 0, lambda n, m: (n**0.5 - m**0.5) / (n**0.5 - 1)),
    "hoyer_live": Scale(1, 1, 0, lambda n, m: 0.0),
    "gini": Scale(1, 1, 0, lambda n, m: 1 - m / n),
    "treves_rolls": Scale(-1, 1, 0, lambda n, m: m / n),
    "sparsity": Scale(1, 1, 0, lambda n, m: 1 - m / n),
    "density": Scale(-1, 1, 0, lambda n, m: m / n),
    "kurtosis": Scale(1, math.inf, 1, lambda n, m: n / m, lambda value: math.log(value) / 4),
}


def layers_of(model: nn.Module, modules: Any) -> dict[str, Sparseout]:
    """The layers to control, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "an nn.Module", kind(model)))
    every = {name: module for name, module in model.named_modules() if isinstance(module, Sparseout)}
    if not every:
        raise ValueError(
            expected("model", "one with Sparseout layers, which convert_dropout_ and insert_after_ make", kind(model))
        )
    if modules is None:
        return every
    if callable(modules):
        chosen = {name: layer for name, layer in every.items() if modules(name, layer)}
    else:
        if isinstance(modules, str):
            raise TypeError(expected("modules", "a collection of names", repr(modules)))
        if unknown := [name for name in modules if name not in every]:
            raise ValueError(expected("modules", f"names of Sparseout layers: {', '.join(every)}", repr(unknown[0])))
        chosen = {name: every[name] for name in every if name in set(modules)}
    if not chosen:
        raise ValueError(expected("modules", f"some of {', '.join(every)}", "none of them"))
    return chosen


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
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(expected("target", "a number", kind(value)))
        if not scale.low < value < scale.high:
            raise ValueError(expected("target", f"in ({scale.low:g}, {scale.high:g}), as {measure} is", value))
    return {name: float(value) for name, value in targets.items()}
