"""Revival of dead units: fresh weights into them, none out of them, so that the function computed stays as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseout._utils.chains import Chain, Chains, find_chains
from sparseout._utils.dataflow import Flow, Step, Value, flows, values_in
from sparseout._utils.distributed import Group, all_gather, is_distributed
from sparseout._utils.modules import named_modules, own_parameters
from sparseout._utils.outcome_table import aligned, outcome_rows
from sparseout._utils.torch_internals import call_hooks, shallow_copy
from sparseout._utils.unit_steps import in_dim, out_dim, spatial_dims, step_kind, weight
from sparseout._utils.validation import expected, type_name


class MeasuredUnits(NamedTuple):
    """Units that were measured: at the input or output of a module, by its name, and how many there are."""

    name: str
    tensor: str
    units: int


@dataclass(frozen=True)
class RevivalReport:
    """Report of a revival: which units have new weights, and which dead ones were left as they were.

    Printed, it is a table.

    Args:
        revived: name of the layer whose outputs the units are -> their indices.
        left: name of a module where dead units were measured -> how many were left, and why.

    Example:
        >>> print(RevivalReport({"0": (1, 5)}, {"4": (1, "is what the model returns")}))
        revived  0  2 units
        left     4  1 unit: is what the model returns

    Source: Sokar et al. (2023), "The dormant neuron phenomenon in deep reinforcement learning", ICML, section 4.
    """

    revived: dict[str, tuple[int, ...]] = field(default_factory=dict)
    left: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            *outcome_rows("revived", {name: _units(len(units)) for name, units in self.revived.items()}),
            *outcome_rows("left", {name: f"{_units(count)}: {why}" for name, (count, why) in self.left.items()}),
        ]
        return aligned(rows or [("revived", "nothing", "no unit is dead")])


@dataclass
class _Revival:
    """The revival of the dead units of a chain."""

    chain: Chain
    units: Tensor  # indices
    constant: Tensor  # what each unit of the chain gives its consumer while it is dead
    fresh: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)


def revive_units(
    model: nn.Module, dead: Mapping[MeasuredUnits, set[int]], optimizer: Any = None, group: Group | None = None
) -> RevivalReport:
    """Revive these dead units, as :func:`sparseout.revive_` does."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(expected("optimizer", "a torch.optim.Optimizer or None", type_name(optimizer)))
    dead = {measured: units for measured, units in dead.items() if units}
    if is_distributed():
        by_rank = all_gather(sorted((measured, sorted(units)) for measured, units in dead.items()), group)
        if any(dead_units != by_rank[0] for dead_units in by_rank):
            got = "others on some: sum the report over them (sync=True)"
            raise ValueError(expected("report", "one with the same dead units on all processes", got))
    report = RevivalReport()
    if not dead:
        return report
    chains = find_chains(model)
    revivals = _plan(model, chains, dead, report)
    with torch.no_grad():
        for revival in revivals:
            for producer in revival.chain.producers:
                revival.fresh[producer] = _shared(_draw_parameters(producer), group)
        for revival in revivals:  # all of these first: a layer may read dead units and make others
            _replace_incoming(revival, optimizer)
        for revival in revivals:
            _clear_outgoing(revival, optimizer)
            for producer in revival.chain.producers:
                report.revived[chains.names[producer]] = tuple(revival.units.tolist())
    return report


def _plan(
    model: nn.Module, chains: Chains, dead: Mapping[MeasuredUnits, set[int]], report: RevivalReport
) -> list[_Revival]:
    """The revivals, with the units that cannot be revived in the report. Nothing is changed."""
    modules = dict(named_modules(model))
    graphs = flows(model, training=False)
    by_path: dict[int, list[tuple[_Path, Value, MeasuredUnits]]] = defaultdict(list)
    paths = [path for chain in chains.chains if (path := _path(chain, graphs)) is not None]
    for measured, units in dead.items():
        if measured.name not in modules:
            raise ValueError(expected("report", "one of this model", f"one with a module {measured.name!r}"))
        module, tensor = _measured_tensor(modules, measured)
        values = [value for flow in graphs for value in _values_of(flow, module, tensor)]
        fitting = [path for path in paths if path.chain.units == measured.units]
        inside = [(path, value) for value in values for path in fitting if value in path.values]
        for path, value in inside:
            by_path[id(path)].append((path, value, measured))
        if not inside:
            report.left[measured.name] = (len(units), _why_not(chains, values))
    revivals = []
    for values_of_path in by_path.values():
        path = values_of_path[0][0]
        constants: dict[int, Tensor] = {}
        for _, value, measured in values_of_path:
            why = _untouchable(path.chain, chains)
            constant = None if why else path.constant(value)
            if constant is None:
                why = why or "a dead unit gives the next layer a constant that its bias cannot take over"
                report.left[measured.name] = (len(dead[measured]), why)
                continue
            constants |= {unit: constant[unit] for unit in dead[measured]}
        if constants:
            chosen = sorted(constants)
            constant_values = torch.stack([constants[unit] for unit in chosen])
            revivals.append(_Revival(path.chain, torch.tensor(chosen, device="cpu"), constant_values))
    return revivals


class _Path:
    """The steps between the producers of a chain and its consumer, in evaluation."""

    def __init__(self, chain: Chain, steps: list[Step], end: Value) -> None:
        self.chain, self.steps, self.end = chain, steps, end
        self.values = {step.output for step in steps}

    def constant(self, start: Value) -> Tensor | None:
        """The input of the consumer from each unit if that is 0 at `start`; None if its bias cannot stand for it."""
        layer = self.chain.producers[0]
        zeros = torch.zeros(self.chain.units, dtype=weight(layer).dtype, device="cpu")
        known: dict[Value, Tensor] = {start: zeros}
        for step in self.steps:
            inputs = [known[x] for x in step.inputs if x in known]
            if not inputs or step.output in known:
                continue
            kind = step_kind(step)
            zero = not any(x.any() for x in inputs)
            if zero and (kind in ("pool", "flatten") or len(step.inputs) > 1):
                known[step.output] = inputs[0]  # also where the other factor of a gate is none
            elif kind == "flatten" and (
                step.module is not None or step.function_name in ("flatten", "view", "reshape", "mean")
            ):
                known[step.output] = inputs[0]
            elif len(step.inputs) == 1 and kind in ("unit", "norm"):
                value = _run(step, known, spatial_dims(layer))
                if value is None:
                    return None
                known[step.output] = value
            else:
                return None
        result = known.get(self.end)
        if result is None or not result.any():
            return result
        consumer = self.chain.consumer
        padded = any(p != 0 for p in _tuple(getattr(consumer, "padding", 0)))
        transposed = "Transpose" in type(consumer).__name__
        if padded or transposed or "bias" not in own_parameters(consumer):
            return None
        return result if result.isfinite().all() else None


def _run(step: Step, known: Mapping[Value, Tensor], spatial: int) -> Tensor | None:
    """The result of a step of one tensor, for each unit."""
    x = known[step.inputs[0]]
    shaped = x.reshape(1, -1, *[1] * spatial)
    args = tuple(shaped if isinstance(arg, Value) else arg for arg in step.args)
    kwargs = {name: shaped if isinstance(arg, Value) else arg for name, arg in step.kwargs.items()}
    module, function = step.module, step.function
    if module is not None:
        module = shallow_copy(module)
        module.training = False
        device = next((t.device for t in chain(module.parameters(), module.buffers())), x.device)
        args = tuple(arg.to(device) if arg is shaped else arg for arg in args)
    try:
        if module is not None:
            result = module.forward(*args, **kwargs)
        elif isinstance(function, str):
            result = getattr(args[0], function)(*args[1:], **kwargs)
        elif getattr(function, "__name__", "") in ("dropout", "dropout1d", "dropout2d", "dropout3d", "sparseout"):
            result = shaped  # as in evaluation
        else:
            assert function is not None
            result = function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError):
        return None
    fits = isinstance(result, Tensor) and result.numel() == x.numel()
    return result.detach().to("cpu", x.dtype).flatten() if fits else None


def _path(chain: Chain, graphs: Iterable[Flow]) -> _Path | None:
    """The steps of a chain in the flow where its consumer is called."""
    for flow in graphs:
        for step in flow.steps:
            if step.module is chain.consumer and not step.inlined:
                inside: set[Step] = set()
                waiting = list(step.inputs)
                while waiting:
                    source = waiting.pop().source
                    if source is not None and source not in inside:
                        inside.add(source)
                        waiting += [] if source.module in chain.producers else source.inputs
                return _Path(chain, [s for s in flow.steps if s in inside], step.inputs[0])
    return None


def _measured_tensor(modules: Mapping[str, nn.Module], measured: MeasuredUnits) -> tuple[nn.Module, str]:
    """The module and tensor that were measured: what noise in a hook is given is the output of the hook's module."""
    module = modules[measured.name]
    for owner in modules.values():
        if any(getattr(hook, "layer", None) is module for hook in call_hooks(owner)):
            return owner, "output"
    return module, measured.tensor


def _values_of(flow: Flow, module: nn.Module, tensor: str) -> list[Value]:
    """The inputs or outputs of a module in a flow."""
    values = []
    for step in flow.steps:
        if step.module is module:
            new = step.inputs[:1] if tensor == "input" else [step.output]
            if step.inlined:  # (arguments, result)
                new = list(values_in(step.args[0]))[:1] if tensor == "input" else list(values_in(step.args[1]))[:1]
            values += new
    return values


def _why_not(chains: Chains, values: Iterable[Value]) -> str:
    """The reason why the layer that made some units is in no chain."""
    for value in values:
        source = value.source
        while source is not None and source.inputs and step_kind(source) not in ("layer", "other", "metadata"):
            source = source.inputs[0].source
        if source is not None and source.module in chains.names:
            name = chains.names[source.module]
            why = chains.left.get(name, f"is a {type(source.module).__name__}, whose weights are not those of units")
            return why if why.startswith(("`", "a parameter")) else f"`{name}` {why}"
    return "the layer that makes these units is not seen: a forward around it cannot be traced"


def _untouchable(chain: Chain, chains: Chains) -> str | None:
    for module in (*chain.producers, chain.consumer):
        if not weight(module).requires_grad:
            return f"`{chains.names[module]}` is frozen: its weight requires no gradient"
    return None


def _draw_parameters(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters as the layer's own initialisation draws them."""
    parameters = {name: nn.Parameter(torch.empty_like(p)) for name, p in own_parameters(layer).items()}
    new = shallow_copy(layer, parameters)
    reset = getattr(new, "reset_parameters", None)
    if reset is not None:
        reset()
    else:  # the Conv1D of transformers, which does this where it is made
        nn.init.normal_(weight(new), std=0.02)
        nn.init.zeros_(new.get_parameter("bias"))
    return {name: p.detach() for name, p in parameters.items()}


def _shared(parameters: dict[str, Tensor], group: Group | None) -> dict[str, Tensor]:
    """The parameters that the first process of a group has drawn."""
    if is_distributed():
        for value in parameters.values():
            torch.distributed.broadcast(value, group_src=0, group=group)
    return parameters


def _replace_incoming(revival: _Revival, optimizer: Any) -> None:
    for layer, fresh in revival.fresh.items():
        for name, value in fresh.items():
            parameter = layer.get_parameter(name)
            dim = out_dim(layer) if name == "weight" else 0
            units = revival.units.to(parameter.device)
            parameter.index_copy_(dim, units, value.index_select(dim, units))
            _clear_state(optimizer, parameter, dim, units)
    for norm in revival.chain.norms:
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            kept: Tensor | None = getattr(norm, name)
            if kept is not None:
                units = revival.units.to(kept.device)
                kept.index_fill_(0, units, start)
                _clear_state(optimizer, kept, 0, units)


def _clear_outgoing(revival: _Revival, optimizer: Any) -> None:
    layer, block = revival.chain.consumer, revival.chain.block
    parameter, dim = weight(layer), in_dim(layer)
    units = (revival.units[:, None] * block + torch.arange(block, device="cpu")).flatten().to(parameter.device)
    if revival.constant.any():
        constant = revival.constant.repeat_interleave(block).to(parameter.device, torch.float64)
        columns = parameter.index_select(dim, units).double().movedim(dim, -1)  # (outputs, ..., units)
        contribution = columns @ constant if columns.ndim == 2 else (columns.flatten(1, -2).sum(1)) @ constant
        layer.get_parameter("bias").add_(contribution.to(parameter.dtype))
    parameter.index_fill_(dim, units, 0.0)
    _clear_state(optimizer, parameter, dim, units)


def _clear_state(optimizer: Any, parameter: Tensor, dim: int, units: Tensor) -> None:
    """Clear the gradient, and what the optimizer keeps, of some rows or columns of a parameter."""
    if parameter.grad is not None:
        parameter.grad.index_fill_(dim, units.to(parameter.grad.device), 0.0)
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
            continue
        units = units.to(value.device)
        if name == "ax":  # of ASGD, an average of weights
            value.index_copy_(dim, units, parameter.index_select(dim, units).to(value))
        elif name == "step_size":  # of Rprop
            value.index_fill_(dim, units, next(g["lr"] for g in optimizer.param_groups if _has_parameter(g, parameter)))
        else:
            value.index_fill_(dim, units, 0.0)


def _has_parameter(group: Mapping[str, Any], parameter: Tensor) -> bool:
    return any(parameter is other for other in group["params"])


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _units(count: int) -> str:
    return "1 unit" if count == 1 else f"{count} units"
