"""Linear layers whose input comes from an activation, found by what happens to tensors in one pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from sparseout._utils.hooks import Hooks
from sparseout._utils.torch_internals import DispatchMode, tree_leaves

# Names of torch's operations, those in place with a "_" at the end.
_ACTIVATIONS = re.compile(
    r"(relu|relu6|leaky_relu|prelu|_prelu_kernel|rrelu_with_noise|gelu|silu|mish|elu|celu|selu|tanh|sigmoid|softplus"
    r"|hardtanh|clamp|hardswish|hardsigmoid|glu|threshold|clamp_min|hardshrink|softshrink)_?"
)
# What leaves zero at zero, or an activation as one written out in such steps: x * sigmoid(x), relu(x) ** 2, gate * up.
_KEEPS = re.compile(
    r"(mul|div|pow|clone|_to_copy|copy|contiguous|dropout|native_dropout|cat|where|masked_fill|max_pool\w*|\w*pad\w*)_?"
)


def linears_after_activations(
    layers: Iterable[nn.Module], run: Callable[[], Any], input_of: Callable[[Any, Any], Any]
) -> set[nn.Module]:
    """Those of the layers that, in this run, were given what an activation made, or a product of that."""
    linears: set[nn.Module] = set()
    trace = _Trace()
    hooks = Hooks()

    def look(layer: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if trace.is_activation(input_of(args, kwargs)):
            linears.add(layer)

    try:
        for layer in layers:
            hooks.before(layer, look, layer)
        with trace:
            run()
    finally:
        hooks.remove()
    return linears


class _Trace(DispatchMode):
    """Remembers which memory holds activations: a view of it is one, too, and memory that is used again is not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory: set[int] = set()

    def is_activation(self, x: Any) -> bool:
        return isinstance(x, Tensor) and _begin(x) in self._memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        memory_of_inputs = {_begin(x) for x in inputs}
        from_activation = any(begin in self._memory for begin in memory_of_inputs)
        if _ACTIVATIONS.fullmatch(name):
            from_activation = True
        elif name.rstrip("_") == "add":  # of a number; a sum of tensors is a residual
            from_activation = from_activation and sum(x.numel() > 1 for x in inputs) == 1
        elif not _KEEPS.fullmatch(name):
            from_activation = False
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                begin = _begin(x)
                if from_activation:
                    self._memory.add(begin)
                elif begin not in memory_of_inputs or name.endswith("_"):  # else a view, or nothing was written
                    self._memory.discard(begin)
        return out


def _begin(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of nested and sparse tensors
        return id(x)
