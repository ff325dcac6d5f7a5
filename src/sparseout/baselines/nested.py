"""Nested tensors, whose examples differ in length: a function of each, and the results put together again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseout._utils.torch_internals import jagged_parts, with_values
from sparseout._utils.validation import expected


def with_parts(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """A nested tensor as `x` is, of other examples. Raises: ValueError."""
    if x.layout is not torch.jagged:
        return torch.nested.as_nested_tensor(list(parts))
    _, lengths, ragged = jagged_parts(x)
    if lengths is not None:
        raise ValueError(expected("x", "a nested tensor without gaps between its examples", "one with lengths"))
    return with_values(x, torch.cat(list(parts), ragged))
