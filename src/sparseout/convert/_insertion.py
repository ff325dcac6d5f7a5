"""Sparseout after modules of given types, for models that have no dropout."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle

from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import Filter, check_model, named_modules, resolve_filter, select
from sparseout._utils.torch_internals import own_children, remove_call_hooks
from sparseout._utils.tracing import is_step
from sparseout._utils.validation import expected, type_name
from sparseout.convert._report import ConversionReport
from sparseout.functional import Gradient, Scale
from sparseout.layers import Sparseout

_NAME = "sparseout"  # of the child that makes the noise
RECORD = "_before_conversion"  # the attribute of a layer that says how to undo what made it


def insert_after_(
    model: nn.Module,
    types: type[nn.Module] | tuple[type[nn.Module], ...],
    *,
    p: float,
    q: float | Tensor,
    gradient: Gradient = "detached",
    scale: Scale = None,
    filter_fn: Filter | None = None,
) -> ConversionReport:
    """Perturbs the output of every module of the given types, in place, for models that have no dropout to convert.

    Each such module gets a child ``sparseout``, a :class:`Sparseout` layer without weights, and a forward hook that
    applies it; its class and the keys of ``state_dict()`` do not change. Of a tuple the first element is perturbed.
    ``train()``, ``eval()`` and :func:`set_q_` apply to the layers; :func:`revert_` removes them. Compiled code is
    reset, since it does not look for new hooks.

    Args:
        model: any module; it may itself be of the given types.
        types: a class of modules, or a tuple of classes. Subclasses count too.
        p: drop probability.
        q: exponent, as in :func:`sparseout.sparseout`. A tensor is shared by all layers: changed in place, it changes
            all.
        gradient: ``"detached"`` or ``"exact"``.
        scale: ``None``, a float > 0, or ``"matched"``.
        filter_fn: called with the dotted name and the module; False: skip it.

    Returns:
        A report of what changed and what was skipped.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an argument of another type; nothing is changed then. In forward, for an output that is neither a
            tensor nor a tuple that begins with one.

    Warns:
        UserWarning: if there is no module of the given types.

    Example:
        >>> from torch import nn
        >>> import sparseout
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> print(sparseout.insert_after_(model, nn.ReLU, p=0.2, q=1.5))
        changed  1  ReLU -> ReLU, then Sparseout(p=0.2, q=1.5)

    Source: Khan & Stavness (2019), section 3, for the noise that is inserted.
    """
    check_model(model)
    _check_types(types)
    report = ConversionReport()
    new: list[tuple[nn.Module, Sparseout]] = []
    for name, module in select(dict(named_modules(model)), None).items():
        if isinstance(module, types):
            layer = Sparseout(p, q, gradient=gradient, scale=scale)
            reason = _why_not(module)
            if reason is None and resolve_filter(filter_fn, module, [name]) is False:
                reason = "filter_fn says so"
            if reason is not None:
                report.skipped[name] = reason
                continue
            new.append((module, layer.train(module.training)))
            kept = type(module).__name__
            report.changed[name] = (kept, f"{kept}, then {layer!r}")
    Sparseout(p, q, gradient=gradient, scale=scale)  # bad arguments are an error also where no module is found
    for module, layer in new:
        module.add_module(_NAME, layer)
        # Kept whole: a handle that is copied or pickled with its module still knows which hook is its own.
        vars(layer)[RECORD] = module.register_forward_hook(PerturbOutput(layer))
    if new:
        reset_compiler()
    elif not report.skipped:
        warnings.warn(f"nothing was inserted: the {type(model).__name__} has no such module", stacklevel=2)
    return report


def remove_inserted_(model: nn.Module) -> bool:
    """Remove inserted layers. Returns whether there was one."""
    removed = False
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            handle = vars(child).get(RECORD)
            if isinstance(handle, RemovableHandle):
                handle.remove()
                delattr(module, name)
                removed = True
        removed |= remove_call_hooks(module, PerturbOutput)  # copied without the child, by quantization
    return removed


def _check_types(types: Any) -> None:
    for cls in types if isinstance(types, tuple) else (types,):
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(expected("types", "a class of modules or a tuple of them", type_name(cls)))


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f"a {type(module).__name__} would take a new child for one of its steps"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weights and never calls it"
    if isinstance(module, Sparseout):
        return "it is a Sparseout layer itself"
    if isinstance(getattr(module, _NAME, None), Sparseout):
        return "it has a Sparseout layer after it already"
    if hasattr(module, _NAME):
        return f"it has an attribute `{_NAME}`, where the layer would go"
    return None


class PerturbOutput:
    """The hook of an inserted layer.

    It holds the layer, since torch's quantization makes another module of this one with its hooks but without its
    children. That module has noise if it is in training mode and the layer was.
    """

    _is_noise = True  # what observes the module sees its output without it
    per_unit = True  # compaction and revival look through it

    def __init__(self, layer: Sparseout) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if (_NAME not in own_children(module) and not module.training) or is_step(module, output):
            return output
        return self._perturb(type(module).__name__, output)

    def _perturb(self, name: str, output: Any) -> Any:
        if isinstance(output, (Tensor, fx.Proxy)):
            return self.layer(output)
        if isinstance(output, tuple) and output:
            first = self._perturb(name, output[0])
            if type(output) is tuple:
                return (first, *output[1:])
            if hasattr(output, "_make"):  # a named tuple, such as a packed sequence
                return output._make((first, *output[1:]))
        raise TypeError(expected(f"output of {name}", "a tensor or a tuple that begins with one", type_name(output)))


def _perturb_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The hook of models that were pickled by the first version."""
    return PerturbOutput(module.get_submodule(_NAME))(module, args, output)  # type: ignore[arg-type]
