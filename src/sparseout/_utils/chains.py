"""Chains: hidden units between two layers that nothing else reads, and what stands between the layers.

A chain is Linear or convolution -> (batch norm, activation, dropout, pooling, flatten)* -> Linear or convolution. Each
hidden unit is a row of the first layer's weight and a column of the second's. In a gated chain the units of two layers
are multiplied. That nobody else reads the units is seen in the graphs of torch.fx, in training and in evaluation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.class_swap import forward_replaced
from sparseout._utils.dataflow import Flow, Step, Value, flows, is_shape, reads_no_units
from sparseout._utils.hooks import DeadHook, Hook
from sparseout._utils.modules import named_modules, own_parameters, sharded_modules, unwrapped
from sparseout._utils.torch_internals import call_hooks, gradient_hooks, has_parameter_hooks
from sparseout._utils.unit_steps import (
    LAYERS,
    flattens_units,
    in_dim,
    module_kind,
    out_dim,
    spatial_dims,
    step_kind,
    weight,
)
from sparseout._utils.validation import type_name


class _Space:
    """Tensors with the same units: those that come of a layer's output unit by unit."""

    def __init__(self, producer: Step) -> None:
        self.producers = [producer]
        self.steps: list[Step] = []
        self.consumers: list[Step] = []
        self.reasons: list[str] = []

    def absorb(self, other: _Space) -> None:
        for name in ("producers", "steps", "consumers", "reasons"):
            getattr(self, name).extend(getattr(other, name))


@dataclass(frozen=True, eq=False)
class Chain:
    """Hidden units that nobody outside of these modules reads.

    Args:
        producers: the layers that make them: one, or those whose outputs are multiplied.
        consumer: the layer that reads them.
        steps: what stands between, in order, the producers included.
        norms: the batch norms among it.
        units: how many there are.
        block: how many columns of the consumer belong to a unit: the positions of a map that was flattened.
    """

    producers: tuple[nn.Module, ...]
    consumer: nn.Module
    steps: tuple[Step, ...]
    norms: tuple[nn.Module, ...]
    units: int
    block: int

    @property
    def modules(self) -> list[nn.Module]:
        """Every module of it that keeps something for each unit."""
        return [*self.producers, *self.norms, self.consumer]


@dataclass
class Chains:
    """Chains of a model, and the layers in none.

    Args:
        chains: in the order of the model.
        left: name of a layer -> why its units are in no chain.
        names: the name of each module.
    """

    chains: list[Chain] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)


def find_chains(model: nn.Module) -> Chains:
    """The chains of a model, and why the other layers are in none.

    Layers are torch's own classes of Linear, Conv and ConvTranspose, and the Conv1D of `transformers`; nothing derived.
    """
    result = Chains()
    for name, module in named_modules(model):
        result.names.setdefault(module, name)
    facts = _Facts(model, result.names)
    by_mode: list[dict[Any, Chain]] = []
    reasons: list[dict[nn.Module, str]] = []
    for training in (False, True):
        chains, reasons_of_mode = _in_mode(facts, training)
        by_mode.append(chains)
        reasons.append(reasons_of_mode)
    result.chains = [chain for key, chain in by_mode[0].items() if key in by_mode[1]]
    inside = {producer for chain in result.chains for producer in chain.producers}
    for module, name in result.names.items():
        if module_kind(module) == "layer" and module not in inside:
            other = "is used in another way in training than in evaluation"
            alone = "is what the model returns"
            unseen = "its forward, or that of what it is in, cannot be traced" if name else alone
            evaluated = [reasons_of_mode[module] for reasons_of_mode in reasons if module in reasons_of_mode]
            in_one_mode = any(module in chain.producers for chains in by_mode for chain in chains.values())
            result.left[name] = evaluated[0] if evaluated else other if in_one_mode else unseen
        elif isinstance(module, torch.jit.ScriptModule) and own_parameters(module):
            result.left[name] = "is compiled by TorchScript"
        elif _is_quantized(module):
            result.left[name] = f"is a quantized {type(module).__name__}"
        elif isinstance(module, LAYERS) and module_kind(module) != "layer":
            result.left[name] = f"is {type_name(module)}, a class of its own"
    return result


def _is_quantized(module: nn.Module) -> bool:
    return "quantized" in type(module).__module__ and hasattr(module, "weight")


class _Facts:
    """Facts about the modules of a model whatever the graph: names, parameters in common, hooks."""

    def __init__(self, model: nn.Module, names: dict[nn.Module, str]) -> None:
        self.model, self.names, self.sharded = model, names, sharded_modules(model)
        self.owners: dict[int, list[str]] = defaultdict(list)
        for module, name in names.items():
            for key, parameter in own_parameters(module).items():
                self.owners[id(parameter)].append(f"{name}.{key}" if name else key)

    def name(self, module: nn.Module) -> str:
        return f"`{self.names.get(module) or '(the model)'}`"

    def reason(self, module: nn.Module) -> str | None:
        """The reason why a module is not changed."""
        name = self.name(module)
        if has_hooks(module):
            return f"{name} has hooks, which may read its units"
        if forward_replaced(module):
            return f"{name} has another forward on the object"
        if module in self.sharded and own_parameters(module):
            return f"{name} has parameters that are sharded"
        if module_kind(module) == "layer" and "weight" not in own_parameters(module):
            return f"the weight of {name} is no parameter of it"
        for parameter in own_parameters(module).values():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                return f"a parameter of {name} is a {type(parameter).__name__} of {parameter.dtype}"
            if parameter.is_meta or parameter.is_inference():
                return (
                    f"{name} has {'no values: it is on the meta device' if parameter.is_meta else 'inference tensors'}"
                )
            if len(self.owners[id(parameter)]) > 1:
                return f"a parameter of {name} is shared: {', '.join(self.owners[id(parameter)])}"
            if has_parameter_hooks(parameter):
                return f"a parameter of {name} has hooks"
        return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, but those that are dead, only observe, or leave each unit apart."""
    hooks = [*call_hooks(module), *gradient_hooks(module)]
    return any(not isinstance(hook, (DeadHook, Hook)) and not getattr(hook, "per_unit", False) for hook in hooks)


def _in_mode(facts: _Facts, training: bool) -> tuple[dict[Any, Chain], dict[nn.Module, str]]:
    """The chains in a mode by what they are of, and the reason of every producer that has none."""
    graphs = flows(facts.model, training)
    calls: Counter[nn.Module] = Counter()
    read: dict[int, str] = {}
    for flow in graphs:
        for step in flow.steps:
            if step.module is not None and not step.inlined:
                calls[step.module] += 1
            if not reads_no_units(step) and not step.inlined:
                read.update(
                    {id(x.parameter): _description(step) for x in step.inputs if isinstance(x.parameter, Tensor)}
                )
    chains: dict[Any, Chain] = {}
    why: dict[nn.Module, str] = {}
    for flow in graphs:
        for space in _spaces(facts, flow):
            modules = [p.module for p in space.producers if p.module is not None]
            chain = _chain(facts, space, calls, read)
            if isinstance(chain, str):
                why.update(dict.fromkeys(modules, chain))
            else:
                chains[tuple(map(id, chain.modules))] = chain
    return chains, why


def _spaces(facts: _Facts, flow: Flow) -> Iterable[_Space]:
    """The spaces of a flow, with all that reads them."""
    space_of: dict[Value, _Space] = {}
    spaces: list[_Space] = []
    for step in flow.steps:
        inside = list(dict.fromkeys(space_of[x] for x in step.inputs if x in space_of))
        kind = "boundary" if step.inlined else step_kind(step)
        reads_shape = any(map(is_shape, step.inputs))
        if kind == "layer":
            for space in inside:
                space.consumers.append(step)
            space_of[step.output] = _Space(step)
            spaces.append(space_of[step.output])
        elif kind == "boundary":
            if step.module is not None and (has_hooks(step.module) or forward_replaced(step.module)):
                for space in inside:
                    space.reasons.append(f"{facts.name(step.module)} has hooks, which may read its units")
        elif kind == "metadata":
            if is_shape(step.output) and inside:
                space_of[step.output] = inside[0]
        elif not inside:
            continue
        elif kind != "other" and all(x in space_of for x in step.inputs) and not reads_shape:
            if len(inside) > 1 and step.function_name not in ("mul", "multiply"):
                for space in inside:
                    space.reasons.append(f"is put together with the output of another layer by {step.function_name}")
            for other in inside[1:]:
                inside[0].absorb(other)
                spaces.remove(other)
                space_of.update({value: inside[0] for value, space in space_of.items() if space is other})
            inside[0].steps.append(step)
            space_of[step.output] = inside[0]
        else:
            for space in inside:
                space.reasons.append(f"is read by {_description(step, facts)}")
    for value in flow.returned:
        if value in space_of:
            is_model = flow.owner is unwrapped(facts.model)
            space_of[value].reasons.append(
                "is what the model returns" if is_model else "is returned to a forward that cannot be traced"
            )
    return spaces


def _chain(facts: _Facts, space: _Space, calls: Counter[nn.Module], read: dict[int, str]) -> Chain | str:
    """The chain of a space, or the reason why there is none."""
    if space.reasons:
        return space.reasons[0]
    if len(space.consumers) != 1:
        readers = ", ".join(facts.name(step.module) for step in space.consumers if step.module is not None)
        return f"is read by several layers: {readers}" if readers else "is read by no layer"
    consumer = space.consumers[0].module
    producers = [step.module for step in space.producers if step.module is not None]
    assert consumer is not None
    middle = [step.module for step in space.steps if step.module is not None]
    norms = [module for module in middle if module_kind(module) == "norm"]
    for module in (*producers, *norms, consumer):
        if calls[module] > 1:
            return f"{facts.name(module)} is called more than once"
        for parameter in own_parameters(module).values():
            if id(parameter) in read:
                return f"a parameter of {facts.name(module)} is also read by {read[id(parameter)]}"
        if getattr(module, "groups", 1) != 1:
            return f"{facts.name(module)} is a convolution of {module.groups} groups"
    for module in (*producers, *middle, consumer):
        if reason := facts.reason(module):
            return reason
    return _with_geometry(facts, space, producers, norms, consumer)


def _with_geometry(
    facts: _Facts, space: _Space, producers: list[nn.Module], norms: list[nn.Module], consumer: nn.Module
) -> Chain | str:
    units = {weight(module).shape[out_dim(module)] for module in producers}
    dims = {spatial_dims(module) for module in producers}
    flat = [step for step in space.steps if step_kind(step) == "flatten"]
    pools = [step for step in space.steps if step_kind(step) == "pool"]
    if len(units) != 1 or len(dims) != 1:
        return "is multiplied by the output of a layer of another size"
    count, spatial = units.pop(), dims.pop()
    for step in (*flat, *pools):
        if spatial == 0 or (step in flat and not flattens_units(step, spatial)):
            return f"is read by {_description(step, facts)}"
    if len(flat) > 1 or (spatial_dims(consumer) != spatial and not (flat and spatial_dims(consumer) == 0)):
        return f"is read along another dim by {facts.name(consumer)}"
    if flat and spatial_dims(consumer):
        return f"is read along another dim by {facts.name(consumer)}"
    columns = weight(consumer).shape[in_dim(consumer)]
    if columns % count or (not flat and columns != count):
        return f"is read by {facts.name(consumer)}, which has {columns} inputs"
    for norm in norms:
        if (features := getattr(norm, "num_features", 0)) != count:
            return f"is read by {facts.name(norm)}, which has {features} features"
    steps = (*space.producers, *space.steps)
    return Chain(tuple(producers), consumer, steps, tuple(norms), count, columns // count)


def _description(step: Step, facts: _Facts | None = None) -> str:
    if step.module is None:
        return step.function_name or str(step.function)
    return f"{facts.name(step.module)}, {type_name(step.module)}" if facts else type(step.module).__name__
