"""Dropout that no conversion of layers can reach: inside torch's modules, and called as a function."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from sparseout._utils.modules import named_modules, select
from sparseout._utils.tracing import Names, attribute, label, self_path, source

# The functions that drop, by name, and where among their positional arguments p is.
_P_ARGUMENT = {
    "dropout": 1,
    "dropout1d": 1,
    "dropout2d": 1,
    "dropout3d": 1,
    "dropout_": 1,
    "alpha_dropout": 1,
    "feature_alpha_dropout": 1,
    "feature_dropout": 1,
    "native_dropout": 1,
    "scaled_dot_product_attention": 4,
    "Dropout": 0,  # built in forward
    "Dropout1d": 0,
    "Dropout2d": 0,
    "Dropout3d": 0,
}
_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_P_KEYWORDS = ("p", "dropout_p", "dropout")


def unreached(
    model: nn.Module, graphs: Mapping[nn.Module, fx.Graph | None], on_attention: Collection[nn.Module]
) -> dict[str, str]:
    """Dropout inside each module that is no layer, by the module's dotted name.

    Args:
        model: the model.
        graphs: the graph of each module that runs code of its own, None where it cannot be traced.
        on_attention: layers that were left, whose p an attention function uses.
    """
    calls = {}
    for name, module in select(dict(named_modules(model)), None).items():
        reported = any(child in on_attention for child in module.children())
        texts = list(dict.fromkeys(_inside(module, graphs, reported)))
        if texts:
            calls[name] = "; ".join(texts)
    return calls


def _inside(module: nn.Module, graphs: Mapping[nn.Module, fx.Graph | None], reported: bool) -> Iterator[str]:
    if isinstance(module, nn.RNNBase):
        if module.dropout > 0 and module.num_layers > 1:
            yield f"dropout (p={module.dropout:g}) between its layers is inside torch's {type(module).__name__}"
    elif isinstance(module, nn.MultiheadAttention):
        if module.dropout > 0:
            yield f"dropout (p={module.dropout:g}) on attention probabilities is inside torch's function"
    elif isinstance(module, torch.jit.ScriptModule):
        if re.search("dropout", str(getattr(module, "original_name", "")), re.IGNORECASE):
            yield "compiled by TorchScript, where no class can be changed"
    elif module in graphs:
        graph = graphs[module]
        calls = _calls_in_source(module) if graph is None else _calls_in_graph(graph)
        for function, p, attention in calls:
            if not (attention and reported):
                yield f"{function} is called with p={p} in {type(module).__name__}.forward"


def _calls_in_graph(graph: fx.Graph) -> Iterator[tuple[str, str, bool]]:
    for node in graph.nodes:
        name = _torch_name(node.target) if node.op == "call_function" else ""
        if name:
            attention = name == "scaled_dot_product_attention"
            p = _argument(name, node.args, node.kwargs, 0.0 if attention else 0.5)
            if p != 0 and node.kwargs.get("training", True) is not False:
                yield name, f"{p:g}" if isinstance(p, (int, float)) else str(p), attention


def _argument(name: str, args: Any, kwargs: Mapping[str, Any], default: Any) -> Any:
    for keyword in _P_KEYWORDS:
        if keyword in kwargs:
            return kwargs[keyword]
    return args[_P_ARGUMENT[name]] if len(args) > _P_ARGUMENT[name] else default


def _calls_in_source(module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    for function, tree in source(module):
        names = Names(module, function, tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or isinstance(node.func, ast.Call):
                continue
            if isinstance(attribute(module, self_path(node.func) or ""), nn.Module):
                continue
            name = next(filter(None, map(_torch_name, names.objects(node.func))), "")
            keywords = {x.arg: x.value for x in node.keywords if x.arg}
            if name:
                expression = _argument(name, node.args, keywords, None)
            else:  # a function that takes a probability
                expression = keywords.get("dropout_p", keywords.get("dropout"))
                if expression is None:
                    continue
            attention = name in ("", "scaled_dot_product_attention")
            name = name or label(node.func)
            if expression is None:
                if not attention:
                    yield name, "0.5", attention
            elif (p := _value(module, expression)) != 0:
                yield name, ast.unparse(expression) if p is None else f"{p:g}", attention


def _torch_name(target: Any) -> str:
    """The name in the table of a function or class of torch's; "" for all others, whatever their name."""
    if isinstance(target, type):
        return next((cls.__name__ for cls in _LAYERS if issubclass(target, cls)), "")
    name = getattr(target, "__name__", "")
    of_torch = str(getattr(target, "__module__", "")).partition(".")[0] == "torch"
    return name if of_torch and name in _P_ARGUMENT else ""


def _value(module: nn.Module, expression: ast.AST) -> float | None:
    """The largest number in an expression of constants and attributes of self; None where there is none."""
    values = [x.value for x in ast.walk(expression) if isinstance(x, ast.Constant)]
    values += [attribute(module, path) for x in ast.walk(expression) if (path := self_path(x))]
    numbers = [float(x) for x in values if isinstance(x, (int, float)) and not isinstance(x, bool)]
    return max(numbers) if numbers else None
