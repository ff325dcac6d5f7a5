"""The calls in the forward of one module: as a torch.fx graph where it can be traced, else as its source."""

from __future__ import annotations

import ast
import inspect
import random
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from sparseout._utils.torch_internals import shallow_copy


class _OneLevel(fx.Tracer):
    """Every child is one step of the graph: what is inside it is its own graph's business."""

    proxy_buffer_attributes = True  # so that a forward that changes its buffers does not

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(module: nn.Module, training: bool = True, method: str = "forward") -> fx.Graph | None:
    """The graph of the module's own forward, or of another method, in a mode; None if it cannot be traced."""
    # A twin, so that a forward that keeps its activations as attributes leaves none of the tracer's in the model.
    try:
        twin = shallow_copy(module)
        twin.training = training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parameters = inspect.signature(getattr(type(module), method)).parameters.values()
            defaults = {x.name: x.default for x in parameters if x.default is not x.empty}
            tracer = _OneLevel()
            tracer.traced_func_name = method
            return tracer.trace(twin, concrete_args=defaults or None)
    except Exception:  # whatever a forward raises when it is given stand-ins for tensors
        return None


def as_step(module: nn.Module, x: Any) -> fx.Proxy | None:
    """The result of `module(x)` as one step of the graph, where torch.fx traces a model that `module` is in; else None.

    As for torch's own layers: the graph calls the layer, in the mode and with the arguments that it has then.
    """
    path = _path(module, x)
    return x.tracer.create_proxy("call_module", path, (x,), {}) if path else None


def is_step(module: nn.Module, output: Any) -> bool:
    """Whether the output is a step of a graph in which the module is called, and with it its hooks."""
    path = _path(module, output)
    return path is not None and (output.node.op, output.node.target) == ("call_module", path)


def _path(module: nn.Module, x: Any) -> str | None:
    """The path of the module in the model that torch.fx traces with x; None where it traces none, or not this one."""
    if not isinstance(x, fx.Proxy) or not isinstance(x.tracer, fx.Tracer):
        return None
    try:
        return x.tracer.path_of_module(module)
    except NameError:
        return None


def source(module: nn.Module) -> list[tuple[Callable[..., Any], ast.AST]]:
    """Forward and the methods it calls, those of torch excepted: each function with its syntax tree."""
    trees: list[tuple[Callable[..., Any], ast.AST]] = []
    todo, queued = ["forward"], {"forward"}
    while todo:
        function = inspect.unwrap(getattr(type(module), todo.pop(0)))
        if getattr(function, "__module__", "").startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # made at run time, or compiled
            continue
        trees.append((function, tree))
        for node in ast.walk(tree):
            path = self_path(node.func) if isinstance(node, ast.Call) else None
            if path and path not in queued and inspect.isfunction(getattr(type(module), path, None)):
                queued.add(path)
                todo.append(path)
    return trees


def self_path(node: ast.AST) -> str | None:
    """The path "a.b" of the expression `self.a.b`, None for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if parts and isinstance(node, ast.Name) and node.id == "self" else None


class Names:
    """The objects that names in the source of a function may stand for, as far as can be said without running it.

    Args:
        module: what `self` is.
        function: a method of it.
        tree: the syntax tree of the function.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], tree: ast.AST) -> None:
        self._module = module
        self._outer: dict[str, Any] = dict(getattr(function, "__globals__", {})) | dict(
            inspect.getclosurevars(function).nonlocals
        )
        self._local: dict[str, list[ast.AST]] = {}  # what is assigned to a name; nothing where only a run can tell
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                self._local.setdefault(node.arg, [])
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._local.setdefault(node.id, [])
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_imports(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._local[node.targets[0].id].append(node.value)

    def objects(self, node: ast.AST, around: tuple[str, ...] = ()) -> Iterator[Any]:
        """The objects that the expression may be."""
        if path := self_path(node):
            yield attribute(self._module, path)
        elif isinstance(node, ast.Attribute):
            yield from (getattr(value, node.attr, None) for value in self.objects(node.value, around))
        elif isinstance(node, ast.IfExp):
            yield from self.objects(node.body, around)
            yield from self.objects(node.orelse, around)
        elif isinstance(node, ast.Name) and node.id not in self._local:
            yield self._outer.get(node.id)
        elif isinstance(node, ast.Name) and node.id not in around:
            for value in self._local[node.id]:
                yield from self.objects(value, (*around, node.id))

    def _add_imports(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                value = getattr(sys.modules.get(node.module or ""), alias.name, None)
                value = value or sys.modules.get(f"{node.module}.{alias.name}")
            else:
                value = sys.modules.get(alias.name if alias.asname else alias.name.partition(".")[0])
            self._outer[alias.asname or alias.name.partition(".")[0]] = value


def label(node: ast.AST) -> str:
    """The last word of what is called: "softmax" for `F.softmax` and `x.softmax`, "Softmax" for `nn.Softmax(1)`."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def attribute(root: Any, path: str) -> Any:
    """The attribute `root.a.b`, or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def runs_own_code(module: nn.Module) -> bool:
    """Whether the module's forward is neither torch's own nor missing; that of a Sequential is what it holds."""
    if isinstance(module, (nn.Sequential, torch.jit.ScriptModule)):
        return isinstance(module, nn.Sequential)
    forward: Callable[..., Any] = type(module).forward
    return not (getattr(forward, "__module__", None) or "").startswith("torch.nn")  # that of a GraphModule has none


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores the random generators: some forwards draw while they are traced (layers dropped at random)."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
