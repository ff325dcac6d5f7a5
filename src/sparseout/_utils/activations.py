"""Activations as rows of units: the tensor, where its units lie, and which rows are read."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

ROWS = 4096
# Where the channels are in what these take, by its number of dims. Layers of this library say so themselves.
_CHANNELS: dict[type[nn.Module], Mapping[int, int]] = {
    nn.Dropout1d: {2: 0, 3: 1},
    nn.Dropout2d: {3: 1, 4: 1},
    nn.Dropout3d: {4: 0, 5: 1},
}


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of at least one dimension that is in `value`."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim else None
    if isinstance(value, PackedSequence):
        return value.data
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def channel_dim(module: nn.Module, ndim: int) -> int | None:
    """Where the channels of an input of `ndim` dims are, if `module` is of a class that knows; else None."""
    own: Mapping[int, int] | None = getattr(module, "channel_dims", None)
    dims = own or next((dims for cls, dims in _CHANNELS.items() if isinstance(module, cls)), None)
    return None if dims is None else dims.get(ndim)


def unit_dim(x: Tensor, given: int | None, module: nn.Module | None = None) -> int:
    """Where the units of `x` lie: as given, as `module` has it, else 1 for maps and volumes and -1 for others."""
    if given is None and module is not None:
        given = channel_dim(module, x.ndim)
    return given if given is not None else 1 if x.ndim in (4, 5) else -1


def stride(rows: int) -> int:
    """The least step that leaves at most `ROWS` of so many rows and has no factor in common with their number.

    With a common factor it could meet the same few positions of every image, borders only for one.
    """
    step = max(1, -(-rows // ROWS))
    while math.gcd(step, rows) > 1 and rows:
        step += 1
    return step


def sampled(x: Tensor, dim: int) -> Tensor:
    """Rows of `x`, (rows, units), with units along `dim`: every `stride`-th of them."""
    x = x.detach().movedim(dim, -1)
    shape = x.shape[:-1]
    count = math.prod(shape)
    if (step := stride(count)) == 1:
        return x.reshape(count, x.shape[-1])
    number = torch.arange(0, count, step, device=x.device)
    places = []
    for size in reversed(shape):
        places.append(number % size)
        number = number // size
    return x[tuple(reversed(places))]
