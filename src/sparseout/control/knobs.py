"""Knobs: what a controller moves to make activations sparser or denser, and where it measures them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseout._utils.modules import named_modules, select
from sparseout._utils.torch_internals import DROPOUT_BASE
from sparseout._utils.validation import expected, type_name
from sparseout.baselines import ActivityPenalty, GaussianDropout, KWinners, StatisticalTopK
from sparseout.control._knob_protocol import KNOB_WANTED, Knob, check_knob
from sparseout.layers import Sparseout


class _LayerAttribute(NamedTuple):
    """The knobs q, p and k: an attribute of layers."""

    types: tuple[type[nn.Module], ...]
    description: str
    made_by: str
    tensor: str
    bounds: tuple[float, float]
    scale: str
    raises_sparsity: bool


_TOP_K: tuple[type[nn.Module], ...] = (KWinners, StatisticalTopK)
_NOISE: tuple[type[nn.Module], ...] = (Sparseout, DROPOUT_BASE, GaussianDropout)
_ATTRIBUTES = {
    "q": _LayerAttribute(
        (Sparseout,), "Sparseout layers", "convert_dropout_ and insert_after_ make", "input", (1, 4), "linear", False
    ),
    "p": _LayerAttribute(
        _NOISE, "Sparseout and Dropout layers", "insert_after_ makes", "input", (0.01, 0.95), "logit", True
    ),
    "k": _LayerAttribute(_TOP_K, "KWinners layers", "sparseout.baselines has", "output", (0.005, 0.95), "log", False),
}


# Layers whose p and k may be tensors, which compiled code reads when it runs. torch's Dropout layers take a float, for
# whose value code is compiled.
_MOVABLE = (Sparseout, GaussianDropout, *_TOP_K)


class LayerKnob(Knob):
    """An attribute, q, p or k, of layers, which all have the same value."""

    def __init__(self, name: str, layers: Mapping[str, nn.Module]) -> None:
        self.name, self.layers, attribute = name, dict(layers), _ATTRIBUTES[name]
        self.sites = dict.fromkeys(layers, attribute.tensor)
        self.bounds, self.scale, self.raises_sparsity = attribute.bounds, attribute.scale, attribute.raises_sparsity
        self._k_eval = {  # as multiples of k
            key: float(layer.k_eval) / float(layer.k)
            for key, layer in layers.items()
            if isinstance(layer, KWinners) and layer.k_eval is not None
        }

    def get(self) -> float:
        return sum(float(getattr(layer, self.name)) for layer in self.layers.values()) / len(self.layers)

    def set(self, value: float) -> None:
        for layer, name, number in self._attributes(value):
            _set(layer, name, number)

    def _attributes(self, value: float) -> Iterator[tuple[nn.Module, str, float]]:
        """Every attribute that moves, and what it is at this value of the knob."""
        for layer in self.layers.values():
            yield layer, self.name, value
        for key, factor in self._k_eval.items():
            yield self.layers[key], "k_eval", min(factor * value, math.nextafter(1.0, 0.0))

    def check(self) -> None:
        """Raise if a layer is none any more: `revert_` changes classes."""
        attribute = _ATTRIBUTES[self.name]
        for key, layer in self.layers.items():
            if not isinstance(layer, attribute.types):
                wanted = f"a {attribute.types[0].__name__} layer as before (detach the controller, then revert)"
                raise RuntimeError(expected(key or "model", wanted, type_name(layer)))

    def hold(self) -> None:
        """Make p and k tensors where layers take them, such that compiled code sees them move."""
        for layer, name, _ in self._attributes(self.get()):
            if isinstance(layer, _MOVABLE) and name != "q":
                setattr(layer, name, movable(float(getattr(layer, name))))

    def without_effect(self) -> list[str]:
        """The layers in which the value makes no difference."""
        return [key for key, layer in self.layers.items() if self.name == "q" and getattr(layer, "p", None) in (0, 1)]

    def release(self, value: float) -> None:
        """End the controller's hold: what it moved are floats again."""
        for layer, name, number in self._attributes(value):
            if isinstance(layer, _ATTRIBUTES[self.name].types):  # and not reverted
                setattr(layer, name, number)


class StrengthKnob(Knob):
    """The strength of an :class:`sparseout.baselines.ActivityPenalty`, at some of its modules or at all.

    Where modules have different strengths, they keep their proportions, and the value is the geometric mean.
    """

    def __init__(self, penalty: ActivityPenalty, sites: Mapping[str, str], keys: Collection[str]) -> None:
        """`sites` by the model's names of the modules, `keys` by those of the penalty."""
        self.name, self.scale, self.raises_sparsity = "strength", "log", True
        self.penalty, self.sites, self.keys = penalty, dict(sites), list(keys)
        strengths = [float(_strength_at(penalty, key)) for key in self.keys]
        if min(strengths) <= 0:
            raise ValueError(expected("strength", "> 0 where it is to be moved by factors", min(strengths)))
        mean = math.exp(sum(map(math.log, strengths)) / len(strengths))
        self._factors = [strength / mean for strength in strengths]
        self.bounds = (mean / 1000, mean * 1000)

    def get(self) -> float:
        return float(_strength_at(self.penalty, self.keys[0])) / self._factors[0]

    def set(self, value: float) -> None:
        for key, factor in zip(self.keys, self._factors, strict=True):
            _strength_at(self.penalty, key).fill_(value * factor)

    def hold(self) -> None:
        """Make the strengths tensors, which change in place, so that compiled code is not compiled again."""
        penalty = self.penalty
        if len(self.keys) == len(penalty.sites) and not isinstance(penalty.strength, Mapping):
            penalty.strength = scalar(float(penalty.strength), torch.device("cpu"))
        else:
            old = {key: _strength_at(penalty, key) for key in penalty.sites}
            new = {key: scalar(float(old[key]), torch.device("cpu")) for key in self.keys}
            penalty.strength = old | new

    def release(self, value: float) -> None:
        """End the controller's hold: strengths are floats again."""
        strengths = {key: value * factor for key, factor in zip(self.keys, self._factors, strict=True)}
        old = self.penalty.strength
        self.penalty.strength = old | strengths if isinstance(old, dict) else value * self._factors[0]


def knobs_of(model: nn.Module, knob: Any, modules: Any, per_layer: bool) -> list[Knob]:
    """The knobs to move, each with a target of its own: one, or with `per_layer` one for each layer."""
    if isinstance(knob, str):
        if knob not in _ATTRIBUTES:
            raise ValueError(expected("knob", KNOB_WANTED, repr(knob)))
        layers = _layers(model, knob, modules)
        groups = [{name: layer} for name, layer in layers.items()] if per_layer else [layers]
        return [LayerKnob(knob, group) for group in groups]
    if isinstance(knob, ActivityPenalty):
        return _strength_knobs(model, knob, modules, per_layer)
    several = isinstance(knob, Sequence)
    if several and not per_layer:
        raise ValueError(expected("knob", "one knob, or with per_layer=True a sequence of them", type_name(knob)))
    knobs = [check_knob(model, each) for each in (knob if several else [knob])]
    if not knobs:
        raise ValueError(expected("knob", KNOB_WANTED, "an empty sequence"))
    sites = [name for each in knobs for name in each.sites]
    if per_layer and len(sites) > len(knobs):
        raise ValueError(expected("knob", "a sequence of knobs, each of one site, as per_layer=True asks for", knob))
    if len(set(sites)) < len(sites):
        raise ValueError(expected("knob", "a sequence of knobs of different sites", f"sites {', '.join(sites)}"))
    if modules is not None:
        raise ValueError(expected("modules", "None beside a knob of your own, whose `sites` say where", modules))
    return knobs


def hold(model: nn.Module, knobs: Sequence[Knob]) -> None:
    """Prepare what knobs of this library move, such that compiled code sees it move."""
    for knob in knobs:
        if isinstance(knob, (StrengthKnob, LayerKnob)):
            knob.hold()
    of_q = [knob for knob in knobs if isinstance(knob, LayerKnob) and knob.name == "q"]
    _separate_q(model, [list(knob.layers.values()) for knob in of_q])


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-d tensor for q or a strength: fp32 on that device, whatever the defaults are, and no inference tensor."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def movable(value: float) -> Tensor:
    """A 0-d tensor for p or k: fp64, with the bits of a float, and on the CPU, where no device is waited for."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def _layers(model: nn.Module, knob: str, modules: Any) -> dict[str, nn.Module]:
    attribute = _ATTRIBUTES[knob]
    every = {name: module for name, module in named_modules(model) if isinstance(module, attribute.types)}
    if not every:
        wanted, got = f"one with {attribute.description}, which {attribute.made_by}", type_name(model)
        if count := sum(isinstance(module, DROPOUT_BASE) for module in model.modules()) if knob == "q" else 0:
            got += f" with {count} Dropout layer{'s' if count > 1 else ''}, not yet converted"
        raise ValueError(expected("model", wanted, got))
    layers = select(every, modules, attribute.description)
    for name, layer in layers.items():
        if knob == "k" and (k := float(getattr(layer, "k"))) >= 1:  # noqa: B009
            wanted = f"a fraction of the units of {repr(name) if name else 'the model'}, to be moved"
            raise ValueError(expected("k", wanted, f"{int(k)}, a number of them: give the layer k / units"))
    return layers


def _strength_knobs(model: nn.Module, penalty: ActivityPenalty, modules: Any, per_layer: bool) -> list[Knob]:
    names = {id(module): name for name, module in reversed(list(named_modules(model)))}
    keys = {}
    for key, point in penalty.sites.items():
        if id(point.module) not in names:
            raise ValueError(expected("knob", "a penalty on modules of the model", f"one on another's, {key!r}"))
        keys[names[id(point.module)]] = key
    by_name = {name: penalty.sites[key] for name, key in keys.items()}
    chosen = select({name: point.module for name, point in by_name.items()}, modules, "modules of the penalty")
    groups = [[name] for name in chosen] if per_layer else [list(chosen)]
    return [
        StrengthKnob(penalty, {name: by_name[name].tensor for name in group}, [keys[name] for name in group])
        for group in groups
    ]


def _strength_at(penalty: ActivityPenalty, key: str) -> Any:
    strength = penalty.strength
    return strength[key] if isinstance(strength, Mapping) else strength


def _set(layer: nn.Module, name: str, value: float) -> None:
    old = getattr(layer, name)
    if isinstance(old, Tensor):
        with torch.no_grad():
            old.fill_(value)
    elif not isinstance(layer, _MOVABLE):
        setattr(layer, name, value)
    else:  # somebody has set a number
        setattr(layer, name, scalar(value, torch.device("cpu")) if name == "q" else movable(value))


def _separate_q(model: nn.Module, groups: Sequence[Sequence[Any]]) -> None:
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
        layer.q = scalar(float(old), old.device if isinstance(old, Tensor) else device)
