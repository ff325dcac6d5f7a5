"""Noise on weights: how it comes onto a layer that is there, and how it goes again."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import check_model
from sparseout._utils.validation import expected

Layer = TypeVar("Layer", bound=nn.Module)


def change_(layer: Layer, classes: Mapping[type[nn.Module], type[nn.Module]], **attributes: Any) -> Layer:
    """Make `layer` one of the class that `classes` has for its own, with these attributes besides its own.

    It stays the object that it is, with its parameters, hooks and keys. Raises: TypeError.
    """
    if type(layer) not in classes:
        got = type(layer).__name__
        wish = " or ".join(kind.__name__ for kind in classes)
        raise TypeError(expected("module", f"a {wish}, and nothing derived from it", f"a {got}"))
    vars(layer).update(attributes, _before_baseline=(type(layer), tuple(attributes)))
    layer.__class__ = classes[type(layer)]  # type: ignore[assignment]
    reset_compiler()
    return layer


def revert_(model: nn.Module) -> None:
    """Undo `bridgeout_` and `shakeout_` in a layer or in all layers of a model.

    Args:
        model: the layer, or what holds it.

    Raises:
        TypeError: if `model` is no module.

    Example:
        >>> from sparseout.baselines import shakeout_
        >>> layer = shakeout_(nn.Linear(3, 2), p=0.5, c=0.1)
        >>> revert_(layer)
        >>> layer
        Linear(in_features=3, out_features=2, bias=True)
    """
    check_model(model)
    changed = [module for module in model.modules() if "_before_baseline" in vars(module)]
    for module in changed:
        module.__class__, names = vars(module).pop("_before_baseline")
        for name in names:
            del vars(module)[name]
    if changed:
        reset_compiler()
