"""Conversion of a model's dropout layers, and back; changes of q in all of a model's layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from sparseout._utils.class_swap import forward_replaced, restore_class_, swap_class_, swapped
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import Filter, check_model, named_modules, resolve_filter, select, such_as, unwrapped
from sparseout._utils.torch_internals import DROPOUT_BASE, own_children
from sparseout._utils.tracing import runs_own_code, trace, untouched_random_state
from sparseout._utils.validation import expected, type_name
from sparseout.convert._attention import attention_reason
from sparseout.convert._functional_dropout import unreached
from sparseout.convert._insertion import RECORD, remove_inserted_
from sparseout.convert._report import ConversionReport
from sparseout.functional import Gradient, Scale, check_gradient, check_p, check_q, check_scale
from sparseout.layers import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d

_LAYERS: dict[type[nn.Module], type[Sparseout]] = {
    nn.Dropout: Sparseout,
    nn.Dropout1d: Sparseout1d,
    nn.Dropout2d: Sparseout2d,
    nn.Dropout3d: Sparseout3d,
}
_UNSUPPORTED: dict[type[nn.Module], str] = {
    nn.AlphaDropout: "AlphaDropout keeps the mean and variance of SELU units, which Sparseout does not",
    nn.FeatureAlphaDropout: "FeatureAlphaDropout keeps the mean and variance of SELU units, which Sparseout does not",
}


_ATTRIBUTES = vars(Sparseout()).keys() - vars(nn.Module()).keys()  # those that make a module a Sparseout


@dataclass(frozen=True)
class _Reference:
    """A reference to a layer: `owner.path`, which is `name` in the model."""

    name: str
    owner: nn.Module | None
    path: str


def convert_dropout_(
    model: nn.Module,
    q: float | Tensor,
    *,
    p: float | None = None,
    gradient: Gradient = "detached",
    scale: Scale = None,
    filter_fn: Filter | None = None,
) -> ConversionReport:
    """Converts a model's dropout layers into Sparseout layers, in place, and reports what was not converted.

    ``nn.Dropout`` becomes :class:`Sparseout` and ``nn.Dropout1d/2d/3d`` :class:`Sparseout1d` and so on. A layer remains
    the same object and only its class changes: hooks, training mode, modules used twice and references held elsewhere
    keep working, and the keys of ``state_dict()`` do not change. Nothing else in the model is changed.

    Not converted, unless ``filter_fn`` says otherwise, is dropout on attention probabilities, where the noise of q != 2
    would make weights negative. Subclasses of torch's layers, and ``nn.AlphaDropout``, are never converted.

    Args:
        model: any module; it may itself be a dropout layer.
        q: exponent, as in :func:`sparseout.sparseout`. A tensor is shared by all layers: changed in place, it changes
            all.
        p: drop probability for all converted layers; ``None`` keeps each layer's own.
        gradient: ``"detached"`` or ``"exact"``.
        scale: ``None``, a float > 0, or ``"matched"``.
        filter_fn: called with each dropout layer and each of its dotted names; True: convert, on attention too; False:
            skip; ``None``: the default. If a layer has several names, one False is enough to skip it.

    Returns:
        A report of what changed, what was skipped, and what cannot be reached by converting layers, such as dropout in
        ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.MultiheadAttention``, and calls of dropout functions, found with
        torch.fx module by module, or in the source of a forward that cannot be traced. Noise that a model makes in
        another way is not found.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an argument of another type. Nothing is changed then.

    Warns:
        UserWarning: if the model has no dropout at all.

    Example:
        >>> from torch import nn
        >>> import sparseout
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1))
        >>> report = sparseout.convert_dropout_(model, q=1.5, scale="matched")
        >>> print(report)
        changed  2  Dropout(p=0.1, inplace=False) -> Sparseout(p=0.1, q=1.5, scale='matched')
        >>> sparseout.revert_(model)
        >>> model[2]
        Dropout(p=0.1, inplace=False)

    Source: Khan & Stavness (2019), section 3, for the noise that replaces Dropout's.
    """
    check_model(model)
    if p is not None:
        check_p(p)
    check_q(q)
    check_gradient(gradient)
    check_scale(scale)
    report = ConversionReport()
    new: dict[nn.Module, Sparseout] = {}
    on_attention: set[nn.Module] = set()
    with untouched_random_state():
        graphs = {module: trace(module) for _, module in named_modules(model) if runs_own_code(module)}
    for layer, references in _dropout_layers(model).items():
        name, reason = references[0].name, _why_not(layer)
        choice = (
            resolve_filter(filter_fn, layer, [reference.name for reference in references]) if reason is None else None
        )
        if choice is False:
            reason = "filter_fn says so"
        elif reason is None and choice is None and (why := _on_attention(references, graphs)):
            reason = f"on attention probabilities: {why}"
            on_attention.add(layer)
        if reason is None:
            try:
                layer_p, inplace = vars(layer)["p"] if p is None else p, vars(layer)["inplace"]
                new[layer] = _LAYERS[type(layer)](layer_p, q, inplace, gradient=gradient, scale=scale)
            except (TypeError, ValueError) as error:  # a p that torch's constructor would not have taken
                reason = str(error)
        if reason is None:
            report.changed[name] = (repr(layer), repr(new[layer]))
        else:
            report.skipped[name] = reason
    report.unreached.update(unreached(model, graphs, on_attention))
    for layer, sparse in new.items():
        swap_class_(layer, type(sparse), {name: vars(sparse)[name] for name in _ATTRIBUTES}, RECORD)
    if new:
        reset_compiler()
    elif report == ConversionReport():
        warnings.warn(f"nothing was converted: the {type(model).__name__} has no dropout", stacklevel=2)
    return report


def revert_(model: nn.Module) -> None:
    """Undoes :func:`convert_dropout_` and :func:`insert_after_`: the model computes the same as before.

    Every converted layer gets back its class, ``p`` and ``inplace``; inserted layers are removed. Layers that were
    built as Sparseout are kept.

    Args:
        model: the model, or a part of it.

    Raises:
        TypeError: if ``model`` is not a module.
        RuntimeError: if a converted layer was changed since, for example by hooks that replace its forward. Nothing is
            reverted then.

    Warns:
        UserWarning: if there is nothing to revert.

    Example:
        >>> from torch import nn
        >>> import sparseout
        >>> model = nn.Dropout(0.3)
        >>> report = sparseout.convert_dropout_(model, q=1.0, p=0.5)
        >>> sparseout.revert_(model)
        >>> model
        Dropout(p=0.3, inplace=False)
    """
    check_model(model)
    converted = swapped(model, RECORD)
    for layer in converted:
        restore_class_(layer, _ATTRIBUTES, RECORD)
    if not remove_inserted_(model) and not converted:
        warnings.warn("nothing was reverted: the model has no converted or inserted layer", stacklevel=2)
    else:
        reset_compiler()


def set_q_(model: nn.Module, q: float | Tensor | Mapping[str, float | Tensor]) -> None:
    """Changes q in all Sparseout layers of a model, or in those that are named.

    Args:
        model: the model.
        q: a number >= 0, or a 0-d floating-point tensor without gradient, which the layers then share; or a mapping
            from dotted names to either. If a layer's q is a tensor, a number is written into it, and compiled code is
            not recompiled.

    Raises:
        ValueError: for a value out of range, a name that is not that of a Sparseout layer of the model, or different
            values for layers that share one tensor.
        TypeError: for an argument of another type. Nothing is changed then.

    Warns:
        UserWarning: if the model has no Sparseout layer.

    Example:
        >>> from torch import nn
        >>> import sparseout
        >>> model = nn.Sequential(sparseout.Sparseout(q=1.0), nn.ReLU(), sparseout.Sparseout(q=1.0))
        >>> sparseout.set_q_(model, 1.5)
        >>> sparseout.set_q_(model, {"2": 2.5})
        >>> model[0].q, model[2].q
        (1.5, 2.5)

    Source: Khan & Stavness (2019), section 3, for q.
    """
    check_model(model)
    layers = {name: module for name, module in named_modules(model) if isinstance(module, Sparseout)}
    new: dict[Sparseout, float | Tensor] = {}
    for name, value in q.items() if isinstance(q, Mapping) else dict.fromkeys(layers, q).items():
        check_q(value)
        new[_layer(name, layers)] = value
    if not isinstance(q, Mapping):
        check_q(q)  # also where there is no layer
    if not new:
        warnings.warn(f"no q was set: the {type(model).__name__} has no Sparseout layer", stacklevel=2)
    for layer, value in new.items():
        if isinstance(layer.q, Tensor) and not isinstance(value, Tensor):
            for other in layers.values():
                if other.q is layer.q and new.get(other) != value:
                    raise ValueError(expected("q", "one value for all layers whose q is the same tensor", "several"))
    for layer, value in new.items():
        if isinstance(layer.q, Tensor) and not isinstance(value, Tensor):
            layer.q.fill_(value)
        else:
            layer.q = value if isinstance(value, Tensor) else float(value)


def _layer(name: Any, layers: Mapping[str, Sparseout]) -> Sparseout:
    wanted = "{name of a Sparseout layer: q}"
    if not isinstance(name, str):
        raise TypeError(expected("q", wanted, f"{type_name(name)} for a name"))
    if name in layers:
        return layers[name]
    raise ValueError(expected("q", f"{wanted}, such as {such_as(layers, name)}", repr(name)))


def _dropout_layers(model: nn.Module) -> dict[nn.Module, list[_Reference]]:
    """The dropout layers with the references to them. An owner is what applies a layer, and not a list."""
    layers: dict[nn.Module, list[_Reference]] = {}
    if _is_dropout(model := unwrapped(model)):
        layers[model] = [_Reference("", None, "")]
    for name, owner in select(dict(named_modules(model)), None).items():
        if owner is model or not isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
            for path, child in _applied(owner):
                if _is_dropout(child):
                    layers.setdefault(child, []).append(_Reference(f"{name}.{path}" if name else path, owner, path))
    return layers


def _applied(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in own_children(owner).items():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{path}", inner) for path, inner in _applied(child))
        elif child is not None:
            yield name, unwrapped(child)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, (DROPOUT_BASE, Sparseout))


def _why_not(layer: nn.Module) -> str | None:
    if isinstance(layer, Sparseout):
        return "it is a Sparseout layer already: set_q_ changes its q"
    if type(layer) in _UNSUPPORTED:
        return _UNSUPPORTED[type(layer)]
    if type(layer) not in _LAYERS:
        base = next(cls for cls in type(layer).__mro__[1:] if issubclass(cls, DROPOUT_BASE))
        return f"{type(layer).__name__} is derived from {base.__name__} and may do something else"
    if forward_replaced(layer):
        return "its forward was replaced on the object, so its class decides nothing"
    return None


def _on_attention(references: Sequence[_Reference], graphs: Mapping[nn.Module, fx.Graph | None]) -> str | None:
    for reference in references:
        owner = reference.owner
        if owner is not None and (reason := attention_reason(owner, reference.path, graphs.get(owner))):
            return reason
    return None
