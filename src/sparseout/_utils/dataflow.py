"""Dataflow of a model: which layer and function reads what, from the graphs of its modules put together.

Each module is traced one deep, and the graph of a submodule is put in for its call. What cannot be traced is left out,
and the submodules in it are graphs of their own.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from sparseout._utils.modules import named_modules, unwrapped
from sparseout._utils.tracing import attribute, runs_own_code, trace, untouched_random_state

# Methods that hold a feed-forward network where `forward` cannot be traced: those of torch's transformer layers and of
# the encoder layers of `transformers`.
_METHODS = ("_ff_block", "feed_forward_chunk")
# What may be asked of a tensor without reading its units.
_METADATA = ("dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_nested")


class Value:
    """A tensor in a dataflow, by the step that makes it; None for inputs, parameters and what is no tensor."""

    def __init__(self, source: Step | None = None, parameter: Any = None) -> None:
        self.source, self.parameter = source, parameter


class Step:
    """A call of a module or a function.

    Args:
        module: what is called, if it is a module.
        function: the function, or the name of the method, if not.
        args: positional arguments, with a :class:`Value` for every tensor.
        kwargs: arguments by name.
        inlined: whether the module's own steps follow: the step only says what goes in and comes out.
    """

    def __init__(
        self,
        module: nn.Module | None,
        function: Callable[..., Any] | str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inlined: bool = False,
    ) -> None:
        self.module, self.function, self.args, self.kwargs, self.inlined = module, function, args, kwargs, inlined
        self.inputs = [x for x in values_in((args, kwargs)) if not is_metadata(x)]
        self.output = Value(self)

    @property
    def function_name(self) -> str:
        """The function's bare name: "add" for `operator.iadd`, `torch.add` and the method `add_`."""
        name = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "")
        in_place = self.function in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
        return name[1:] if in_place else name.rstrip("_")


class Flow:
    """The steps of one graph with those of the submodules in it, in their order, and what it returns.

    Args:
        owner: the module whose method it is.
        steps: the calls.
        returned: the values that it returns.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.steps: list[Step] = []
        self.returned: list[Value] = []


def flows(model: nn.Module, training: bool) -> list[Flow]:
    """The flows of a model in a mode: one if its forward can be traced, else those of the submodules that can be."""
    with untouched_random_state():
        return list(_Builder(training).flows(model))


class _Builder:
    def __init__(self, training: bool) -> None:
        self._training = training
        self._graphs: dict[tuple[int, str], fx.Graph | None] = {}
        self._covered: set[nn.Module] = set()
        self._called: set[nn.Module] = set()

    def flows(self, model: nn.Module) -> Iterator[Flow]:
        for _, module in named_modules(model):
            if module in self._covered or next(module.children(), None) is None:
                continue
            if isinstance(module, nn.Sequential) and not self._called.isdisjoint(module.children()):
                continue  # a forward calls what is in it one by one
            graphs = [self._graph(module)] if runs_own_code(module) else []
            if not any(graphs):
                methods = [name for name in _METHODS if inspect.isfunction(getattr(type(module), name, None))]
                graphs = [self._graph(module, name) for name in methods]
            for graph in graphs:
                if graph is not None:
                    self._covered.add(module)
                    flow = Flow(module)
                    flow.returned = list(values_in(self._run(flow, module, graph, {})))
                    yield flow

    def _graph(self, module: nn.Module, method: str = "forward") -> fx.Graph | None:
        key = id(module), method
        if key not in self._graphs:
            self._graphs[key] = trace(module, self._training, method)
        return self._graphs[key]

    def _run(self, flow: Flow, module: nn.Module, graph: fx.Graph, arguments: dict[str, Any]) -> Any:
        """Go through a graph with these arguments, and return what it returns."""
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            if node.op == "placeholder":
                env[node] = arguments.get(str(node.target), Value())
            elif node.op == "get_attr":
                env[node] = Value(parameter=attribute(module, str(node.target)))  # None of a tensor made in forward
            elif node.op == "call_module":
                env[node] = self._call(flow, unwrapped(module.get_submodule(str(node.target))), args, kwargs)
            elif node.op == "output":
                return args[0]
            else:
                env[node] = _plain(args) if node.target is operator.getitem else None
                if env[node] is None:
                    env[node] = self._step(flow, Step(None, node.target, args, kwargs))
        return None

    def _call(self, flow: Flow, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._called.add(module)
        graph = self._graph(module) if runs_own_code(module) and not is_leaf(module) else None
        arguments = None if graph is None else _bound(module, graph, args, kwargs)
        if graph is None or arguments is None:
            return self._step(flow, Step(module, None, args, kwargs))
        self._covered.add(module)
        result = self._run(flow, module, graph, arguments)
        flow.steps.append(Step(module, None, (args, result), kwargs, inlined=True))
        return result

    def _step(self, flow: Flow, step: Step) -> Value:
        flow.steps.append(step)
        return step.output


def is_leaf(module: nn.Module) -> bool:
    """Whether what is inside a module is not looked at: noise, which evaluation passes through, and Conv1D."""
    return bool(getattr(module, "_is_noise", False)) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in `transformers`, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def reads_no_units(step: Step) -> bool:
    """Whether a step asks a tensor only for what does not depend on its units, such as its dtype."""
    if step.function is getattr:
        return step.args[1] in _METADATA or step.args[1] == "shape"  # what is done with the shape is another step
    if step.function == "size":
        return step.args[1:] == (0,)
    if step.function in ("dim", "is_floating_point") or step.function_name == "_assert":
        return True
    if step.function is operator.getitem and step.args[1] == 0:
        source = step.args[0].source if isinstance(step.args[0], Value) else None
        return source is not None and source.function is getattr
    return False


def is_metadata(value: Any) -> bool:
    """Whether it is no tensor but what :func:`reads_no_units` asks of one: a dtype, or the size of the batch."""
    step = value.source if isinstance(value, Value) else None
    return step is not None and reads_no_units(step) and not is_shape(value)


def is_shape(value: Value) -> bool:
    """Whether it is the shape of a tensor."""
    return value.source is not None and value.source.function is getattr and value.source.args[1] == "shape"


def values_in(structure: Any) -> Iterator[Value]:
    """All values in tuples, lists, dicts and slices."""
    if isinstance(structure, Value):
        yield structure
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from values_in(item)
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from values_in(item)
    elif isinstance(structure, slice):
        yield from values_in((structure.start, structure.stop, structure.step))


def _plain(args: tuple[Any, ...]) -> Any:
    """The item of a tuple, list or dict that an inlined module returned; None if it is to be taken of a tensor."""
    structure, key = args
    try:
        return structure[key] if isinstance(structure, (tuple, list, dict)) else None
    except (LookupError, TypeError):
        return None


def _bound(module: nn.Module, graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by the names that the graph has for them; None if the graph does not hold for them."""
    placeholders = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    parameters = inspect.signature(type(module).forward).parameters
    try:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    except TypeError:
        return None
    bound.pop(next(iter(parameters)))
    for name, value in bound.items():
        parameter = parameters[name]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return None
        if parameter.default is not parameter.empty and not (value is parameter.default or value == parameter.default):
            return None  # traced with its default
    required = [name for name, value in bound.items() if parameters[name].default is parameters[name].empty]
    return {name: bound[name] for name in required} if set(required) <= set(placeholders) else None
