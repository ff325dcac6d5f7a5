"""Evidence that a dropout layer is applied to attention probabilities.

There the noise of q != 2 would make weights negative. The evidence, strongest first: the graph of the owner's forward
(softmax feeds the layer, or a product does); the layer's own name; the source of the owner's forward; that the owner
is an ...Attention and the layer's name does not say that it is on the output.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

from torch import fx, nn

from sparseout._utils.modules import unwrapped
from sparseout._utils.tracing import attribute, label, self_path, source

_PROBABILITIES = re.compile(r"soft_?max|entmax|sparsemax", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|_)att(_|\d|\.|$)", re.IGNORECASE)
_OUTPUT = re.compile(r"(?<!drop)out|proj|resid|post|hidden|final", re.IGNORECASE)
# Functions that move or mask elements of their first argument and leave the others as they are.
_TRANSPARENT = re.compile(
    "to|type|type_as|float|half|bfloat16|double|contiguous|clone|view|reshape|flatten|unflatten|transpose|permute|"
    "movedim|swapaxes|squeeze|unsqueeze|expand|expand_as|chunk|split|unbind|select|getitem|masked_fill_?|nan_to_num|"
    "dropout"
)
# Functions whose result is never attention probabilities.
_NO_PROBABILITIES = re.compile(
    "matmul|bmm|baddbmm|einsum|linear|conv[123]d|embedding|layer_norm|relu|gelu|silu|tanh|scaled_dot_product_attention|"
    "multi_head_attention_forward"
)
_NAMESPACES = {"torch", "F", "functional"}
_SCALINGS = {"mul", "truediv", "div"}


def attention_reason(owner: nn.Module, path: str, graph: fx.Graph | None) -> str | None:
    """The reason to take `owner.path` for dropout on attention probabilities, or None if there is none.

    Args:
        owner: the module whose forward applies the layer.
        path: the layer's dotted name inside `owner`.
        graph: the graph of the owner's forward, if it could be traced.
    """
    verdict = _by_graph(owner, path, graph) if graph is not None else None
    if verdict is not None:
        return "softmax feeds it" if verdict else None
    if _ATTENTION.search(path) and not _OUTPUT.search(path):
        return "according to its name"
    verdict = _by_source(owner, path)
    if verdict is not None:
        return f"according to the source of {type(owner).__name__}.forward" if verdict else None
    name = type(owner).__name__
    if _ATTENTION.search(name) and not name.endswith("Output") and not _OUTPUT.search(path):
        return f"its owner is a {name}"
    return None


def _by_graph(owner: nn.Module, path: str, graph: fx.Graph) -> bool | None:
    layer = attribute(owner, path)
    calls = [n for n in graph.nodes if n.op == "call_module" and owner.get_submodule(n.target) is layer]
    return _any(_is_probability_node(owner, n.args[0]) for n in calls if n.args)


def _is_probability_node(owner: nn.Module, node: Any) -> bool | None:
    while isinstance(node, fx.Node) and node.op.startswith("call"):
        if node.op == "call_module":
            module = unwrapped(owner.get_submodule(str(node.target)))
            if _PROBABILITIES.search(type(module).__name__):
                return True
            if not isinstance(module, (nn.Identity, nn.Dropout)):
                return False
            node = node.args[0] if node.args else None
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if _PROBABILITIES.search(name):
            return True
        if _NO_PROBABILITIES.fullmatch(name) or node.target is operator.matmul:
            return False
        if name == "where":
            return _any(_is_probability_node(owner, x) for x in node.args[1:])
        scaled = name in _SCALINGS and not any(isinstance(x, fx.Node) for x in node.args[1:])
        node = node.args[0] if (_TRANSPARENT.fullmatch(name) or scaled) and node.args else None
    return None


def _by_source(owner: nn.Module, path: str) -> bool | None:
    reader = _Reader(owner, path)
    for _, tree in source(owner):
        reader.names = {}
        reader.visit(tree)
    return _any(reader.verdicts)


def _any(verdicts: Any) -> bool | None:
    """True if one is True, else False if one is False, else None: nothing is known."""
    verdicts = set(verdicts)
    return True if True in verdicts else False if False in verdicts else None


class _Reader(ast.NodeVisitor):
    """Tracks, line by line, whether names are probabilities (True), something else (False) or unknown (None)."""

    def __init__(self, owner: nn.Module, path: str) -> None:
        self.owner = owner
        self.layer = path
        self.names: dict[str, bool | None] = {}
        self.verdicts: list[bool | None] = []

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.names[name.id] = self.is_probability(node.value)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before, after = self.names, []
        for body in (node.body, node.orelse):
            self.names = dict(before)
            for statement in body:
                self.visit(statement)
            after.append(self.names)
        self.names = {name: _any(names.get(name) for names in after) for name in after[0] | after[1]}

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if self_path(node.func) == self.layer and node.args:
            self.verdicts.append(self.is_probability(node.args[0]))
        for keyword in node.keywords:  # an attention function gets the layer's p
            if keyword.arg in ("dropout", "dropout_p"):
                self.verdicts += [True for x in ast.walk(keyword.value) if self_path(x) == f"{self.layer}.p"]

    def is_probability(self, node: ast.AST) -> bool | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Subscript):
            return self.is_probability(node.value)
        if isinstance(node, ast.IfExp):
            return _any(map(self.is_probability, (node.body, node.orelse)))
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.MatMult):
                return False
            scaled = isinstance(node.op, (ast.Mult, ast.Div)) and isinstance(node.right, ast.Constant)
            return self.is_probability(node.left) if scaled else None
        if not isinstance(node, ast.Call):
            return None
        name, child = label(node.func), attribute(self.owner, self_path(node.func) or "")
        child = unwrapped(child) if isinstance(child, nn.Module) else child
        if _PROBABILITIES.search(name) or _PROBABILITIES.search(type(child).__name__):
            return True
        if isinstance(child, nn.Module) and not isinstance(child, (nn.Identity, nn.Dropout)):
            return False
        if _NO_PROBABILITIES.fullmatch(name):
            return False
        if not _TRANSPARENT.fullmatch(name) and not isinstance(child, nn.Module):
            return None
        if isinstance(node.func, ast.Attribute) and child is None and label(node.func.value) not in _NAMESPACES:
            return self.is_probability(node.func.value)  # a method of a tensor
        return self.is_probability(node.args[0]) if node.args else None
