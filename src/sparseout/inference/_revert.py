"""The way back from changes that inference made to a model."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from sparseout._utils.class_swap import restore_class_, swapped
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import check_model, own_parameters
from sparseout.inference._sparse_linear import ATTRIBUTES, RECORD
from sparseout.inference._threshold import remove_thresholds_


def revert_(model: nn.Module) -> None:
    """Undoes :func:`sparseout.inference.sparse_linear_` and :func:`sparseout.inference.threshold_` in a model.

    Layers get back their class and the layout of their weight, with the values that it has now; thresholds are removed.
    What ``compact`` removed is gone.

    Args:
        model: the model, or a part of it.

    Raises:
        TypeError: if `model` is no module.
        RuntimeError: if a layer was changed since, for example by a parametrization. Nothing is reverted then.

    Warns:
        UserWarning: if there is nothing to revert.

    Example:
        >>> import torch
        >>> from sparseout.inference import threshold_
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
        >>> report = threshold_(model, [torch.randn(64, 4)], density=0.5)
        >>> revert_(model)
        >>> x = torch.randn(64, 4)
        >>> torch.equal(model(x), model[2](model[1](model[0](x))))
        True
    """
    check_model(model)
    layers = swapped(model, RECORD)
    for layer in layers:
        was_contiguous = layer._was_contiguous
        restore_class_(layer, ATTRIBUTES, RECORD)
        weight = own_parameters(layer).get("weight")
        if was_contiguous and weight is not None:
            with torch.inference_mode(False):
                weight.data = weight.data.contiguous()
    if not remove_thresholds_(model) and not layers:
        warnings.warn("nothing was reverted: the model has no sparse layer and no threshold", stacklevel=2)
    else:
        reset_compiler()
