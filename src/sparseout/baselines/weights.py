"""Noise on weights: added to an existing layer, and removed again."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from sparseout._utils.class_swap import forward_replaced, restore_class_, swap_class_, swapped
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import check_model
from sparseout._utils.torch_internals import conv_forward
from sparseout._utils.tracing import as_step
from sparseout._utils.validation import expected

Layer = TypeVar("Layer", bound=nn.Module)
_RECORD = "_before_baseline"
_ATTRIBUTES = ("p", "q", "per_example", "c")


class NoisyWeights(nn.Module):
    """A layer that in training runs `_noisy` in place of the forward of its class; p = 0 is no noise."""

    p: float

    def forward(self, input: Tensor) -> Tensor:
        if (step := as_step(self, input)) is not None:
            return step  # type: ignore[return-value]
        return self._noisy(input) if self.training and self.p else super().forward(input)

    def _noisy(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The forward of the layer's class with another weight."""
        if isinstance(self, nn.Conv2d):
            return conv_forward(self, input, weight, bias)
        return F.linear(input, weight, bias)

    def extra_repr(self) -> str:
        parameters = [f"{name}={vars(self)[name]}" for name in _ATTRIBUTES if name in vars(self)]
        return ", ".join([super().extra_repr(), *parameters])


def change_(layer: Layer, classes: Mapping[type[nn.Module], type[nn.Module]], **attributes: Any) -> Layer:
    """Make `layer` one of the class that `classes` has for its own, with these attributes besides its own.

    Raises: TypeError.
    """
    if type(layer) not in classes:
        got = type(layer).__name__
        wanted = " or ".join(cls.__name__ for cls in classes)
        raise TypeError(expected("module", f"a {wanted}, and nothing derived from it", f"a {got}"))
    if forward_replaced(layer):
        got = "one with another forward on the object, so that its class decides nothing"
        raise TypeError(expected("module", "a layer with the forward of its class", got))
    swap_class_(layer, classes[type(layer)], attributes, _RECORD)
    reset_compiler()
    return layer


def revert_(model: nn.Module) -> None:
    """Undo `bridgeout_` and `shakeout_` in a layer or in all layers of a model.

    Args:
        model: the layer, or a model with such layers.

    Raises:
        TypeError: if `model` is not a module.
        RuntimeError: if such a layer was changed since, by a parametrization for one; nothing is reverted then.

    Warns:
        UserWarning: if there is no such layer.

    Example:
        >>> from sparseout.baselines import shakeout_
        >>> layer = shakeout_(nn.Linear(3, 2), p=0.5, c=0.1)
        >>> revert_(layer)
        >>> layer
        Linear(in_features=3, out_features=2, bias=True)
    """
    check_model(model)
    changed = swapped(model, _RECORD)
    for module in changed:
        restore_class_(module, _ATTRIBUTES, _RECORD)
    if not changed:
        warnings.warn("nothing was reverted: no layer was changed by bridgeout_ or shakeout_", stacklevel=2)
    else:
        reset_compiler()
