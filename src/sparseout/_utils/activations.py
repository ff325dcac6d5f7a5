"""Activations as rows of units: the tensor, where its units lie, and which rows are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparseout._utils.hooks import Hook, Hooks
from sparseout._utils.row_mask import Kept, kept_entries, kept_rows
from sparseout._utils.torch_internals import allow_side_effect, is_sharded, is_tracing
from sparseout._utils.validation import expected, type_name

ROWS = 4096
UnitDim = int | Mapping[str | type[nn.Module], int] | Callable[[str, nn.Module, Tensor], int | None] | None

# Where the channels are in what these take, by its number of dims. Layers of this library say so themselves.
_CHANNELS: dict[type[nn.Module], Mapping[int, int]] = {
    nn.Dropout1d: {2: 0, 3: 1},
    nn.Dropout2d: {3: 1, 4: 1},
    nn.Dropout3d: {4: 0, 5: 1},
}


def _last(ndim: int) -> int:
    return ndim - 1


def _second(ndim: int) -> int:
    return 1


# Modules that produce an activation: the dim of its units by its number of dims, and the attribute with their number.
# Unbatched maps, (C, H, W), have their units at dim 0.
_PRODUCERS: dict[tuple[type[nn.Module], ...], tuple[Callable[[int], int], str]] = {
    (nn.Linear, nn.Bilinear): (_last, "out_features"),
    (nn.LayerNorm, nn.RMSNorm): (_last, "normalized_shape"),
    (nn.Embedding, nn.EmbeddingBag): (_last, "embedding_dim"),
    (nn.MultiheadAttention,): (_last, "embed_dim"),
    (nn.RNNBase, nn.RNNCellBase): (_last, ""),
    (nn.Conv1d, nn.ConvTranspose1d): (lambda ndim: ndim - 2, "out_channels"),
    (nn.Conv2d, nn.ConvTranspose2d): (lambda ndim: ndim - 3, "out_channels"),
    (nn.Conv3d, nn.ConvTranspose3d): (lambda ndim: ndim - 4, "out_channels"),
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm): (_second, "num_features"),
    (nn.InstanceNorm1d,): (lambda ndim: ndim - 2, ""),
    (nn.InstanceNorm2d, nn.PixelShuffle, nn.PixelUnshuffle): (lambda ndim: ndim - 3, ""),
    (nn.InstanceNorm3d,): (lambda ndim: ndim - 4, ""),
    (nn.GroupNorm,): (_second, "num_channels"),
    (nn.LocalResponseNorm, nn.Unflatten): (_second, ""),
}


class Production(NamedTuple):
    """The units of a tensor as the module that produced it has them."""

    dim: int
    ndim: int
    shape: torch.Size | None = None  # but of nested tensors
    stride: int | None = None  # along `dim`, but in compiled code, where it may be a symbol


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of at least one dimension that is in `value`."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim else None
    if isinstance(value, PackedSequence):
        return value.data
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((tensor for item in items if (tensor := first_tensor(item)) is not None), None)


def channel_dim(module: nn.Module, ndim: int) -> int | None:
    """The dim of the channels in an input of `ndim` dims, if `module` is of a class that knows; else None."""
    declared: Mapping[int, int] | None = getattr(module, "channel_dims", None)
    dims = declared or next((dims for cls, dims in _CHANNELS.items() if isinstance(module, cls)), None)
    return None if dims is None else dims.get(ndim)


def unit_dim(
    x: Tensor, override: int | None = None, module: nn.Module | None = None, produced: Production | None = None
) -> int:
    """The dim of the units of `x`.

    In this order: `override`; the channels of `module`, which takes `x` or returns it; where the module that produced
    `x` put the units; dim 1 of maps and volumes and the last dim of others.
    """
    if override is not None:
        return override
    channels = None if module is None else channel_dim(module, x.ndim)
    if channels is not None:
        return channels
    followed = None if produced is None else _follow(x, produced)
    return followed if followed is not None else 1 if x.ndim in (4, 5) else -1


def check_unit_dim(unit_dim: Any) -> None:
    """Raise TypeError unless it is a :data:`UnitDim`."""
    wanted = "an int, a mapping from names or types of modules to ints, a function (name, module, tensor), or None"
    if isinstance(unit_dim, bool):
        raise TypeError(expected("unit_dim", wanted, unit_dim))
    if isinstance(unit_dim, Mapping):
        for key, dim in unit_dim.items():
            if not isinstance(key, (str, type)):
                raise TypeError(expected("unit_dim", wanted, f"a mapping with a key that is {type_name(key)}"))
            if isinstance(dim, bool) or not isinstance(dim, int):
                raise TypeError(expected("unit_dim", wanted, f"a mapping to {type_name(dim)}"))
    elif unit_dim is not None and not isinstance(unit_dim, int) and not callable(unit_dim):
        raise TypeError(expected("unit_dim", wanted, type_name(unit_dim)))


class UnitTracker:
    """Tracks the dim of the units of activations by the modules that made them: the last producer that ran before.

    Linear, Embedding, LayerNorm, RMSNorm, recurrent and attention modules put units last; convolutions, batch, group
    and instance norm at dim 1. Activations and noise layers keep them there. A tensor that was permuted or reshaped in
    between has them along the one dim of as many units; where there is none, along the same dim if the number of dims
    is unchanged. Else, and where no producer ran: along dim 1 of 4-d and 5-d tensors and the last dim of others. All of
    it works in compiled code too.

    Args:
        model: the module whose producers are followed.
        unit_dim: overrides all of that: an int; a mapping from names or types of modules to ints; a function of a
            module's name, the module and the tensor that returns an int, or None where it does not decide.
    """

    def __init__(self, model: nn.Module, unit_dim: UnitDim = None) -> None:
        check_unit_dim(unit_dim)
        self.unit_dim = unit_dim
        self.produced: Production | None = None
        self._model = model
        self._hooks = Hooks(Hook)

    def attach(self) -> None:
        """Start tracking. Attach it before hooks that call `dim`, since a watched module may be a producer itself."""
        if self._hooks or isinstance(self.unit_dim, int):
            return
        self._hooks.before(self._model, self._begin)
        for module in self._model.modules():
            if (producer := _producer(module)) is not None:
                self._hooks.after(module, self._record, *producer)

    def detach(self) -> None:
        """Stop tracking."""
        self._hooks.remove()
        self.produced = None

    def dim(self, name: str, module: nn.Module, x: Tensor) -> int:
        """The dim in [0, x.ndim) of the units of `x`, which enters or leaves the module of that name.

        Raises:
            ValueError: if the user's dim is out of range for `x`.
            TypeError: if the user's function returns anything but an int or None.
        """
        override = _resolve(self.unit_dim, name, module, x)
        if override is not None and not -x.ndim <= override < x.ndim:
            wanted = f"in [{-x.ndim}, {x.ndim - 1}] for `{name or 'model'}`, which has {x.ndim} dims"
            raise ValueError(expected("unit_dim", wanted, override))
        return unit_dim(x, override, module, self.produced) % x.ndim

    def _begin(self, *call: Any) -> None:
        self.produced = None

    def _record(self, dim_of: Callable[[int], int], units: int | None, module: nn.Module, args: Any, out: Any) -> None:
        x = None if is_tracing() else first_tensor(out)  # sizes are no numbers to a tracer
        if x is None or not 0 <= dim_of(x.ndim) < x.ndim:
            return
        dim = dim_of(x.ndim)
        if x.is_nested:
            self._remember(Production(dim, x.ndim))
            return
        if units is not None and x.shape[dim] != units:  # a subclass with a layout of its own, or a part of the units
            elsewhere = [d for d in range(x.ndim) if x.shape[d] == units]
            dim = elsewhere[0] if len(elsewhere) == 1 else dim
        strided = x.layout is torch.strided and not torch.compiler.is_compiling()
        self._remember(Production(dim, x.ndim, x.shape, x.stride(dim) if strided else None))

    def _remember(self, produced: Production) -> None:
        if torch.compiler.is_compiling():  # perhaps in a checkpoint, where the compiler refuses what is left behind
            allow_side_effect(self._set, produced)
        else:
            self._set(produced)

    def _set(self, produced: Production) -> None:
        self.produced = produced


def _producer(module: nn.Module) -> tuple[Callable[[int], int], int | None] | None:
    """The dim where a producer puts its units and their number, if it says so; None for other modules."""
    for types, (dim_of, attribute) in _PRODUCERS.items():
        if isinstance(module, types):
            units: Any = getattr(module, attribute, None)
            if attribute == "normalized_shape":
                if len(units) > 1:  # over several dims, and so of none
                    return None
                units = units[0]
            if isinstance(module, nn.Unflatten) and module.dim != 1:
                return None
            return dim_of, units
    return None


def _follow(x: Tensor, produced: Production) -> int | None:
    """The dim of the units of a tensor that was produced so, and perhaps permuted or reshaped since."""
    last = produced.dim == produced.ndim - 1
    dim = x.ndim - 1 if last else produced.dim
    if x.is_nested or produced.shape is None:
        return dim if x.ndim == produced.ndim else None
    units = produced.shape[produced.dim]
    same_units = dim < x.ndim and x.shape[dim] == units
    same_ndim = x.ndim == produced.ndim
    # Where several dims are as long, a permuted view is told by its strides.
    if same_ndim and produced.stride is not None and not (same_units and x.stride(dim) == produced.stride):
        permuted = [d for d in range(x.ndim) if x.shape[d] == units and x.stride(d) == produced.stride]
        if len(permuted) == 1:
            return permuted[0]
    if same_ndim and same_units:  # asked before other sizes, which compiled code would have to guard on
        return dim
    elsewhere = [d for d in range(1, x.ndim) if d != dim and x.shape[d] == units]
    if not same_ndim:
        # A view of the same elements keeps their order; of others, as an attention's (batch, heads, queries, keys), a
        # dim that happens to be as long says nothing beside another one.
        if same_units and (not elsewhere or x.numel() == produced.shape.numel()):
            return dim
        return elsewhere[0] if len(elsewhere) == 1 and not same_units else None
    if len(elsewhere) != 1 or all(x.shape[d] == produced.shape[d] for d in range(x.ndim) if d != dim):
        return dim  # in the second case some of the units, as of a GLU
    return elsewhere[0]


def _resolve(unit_dim: UnitDim, name: str, module: nn.Module, x: Tensor) -> int | None:
    if unit_dim is None or isinstance(unit_dim, int):
        return unit_dim
    if isinstance(unit_dim, Mapping):
        if name in unit_dim:
            return unit_dim[name]
        return next((unit_dim[cls] for cls in type(module).__mro__ if cls in unit_dim), None)
    dim = unit_dim(name, module, x)
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(expected("unit_dim", "a function that gives an int or None", f"one that gave {type_name(dim)}"))
    return dim


def stride(rows: int, limit: int = ROWS) -> int:
    """The least step that leaves at most `limit` of so many rows and has no factor in common with their number.

    With a common factor it could meet the same few positions of every image, borders only for one.
    """
    step = max(1, -(-rows // limit))
    while math.gcd(step, rows) > 1 and rows:
        step += 1
    return step


def local_rows(x: Tensor, dim: int) -> Tensor:
    """The local rows of a DTensor, with all of their units along `dim` < 0; other tensors as they are."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(x, DTensor)
    layout = [Replicate() if p.is_partial() or p.is_shard(dim + x.ndim) else p for p in x.placements]
    return x.redistribute(placements=layout).to_local()


def counted_rows(x: Tensor, dim: int, limit: int | None = ROWS) -> tuple[list[Tensor], bool]:
    """The rows of `x` that an open :class:`row_mask` keeps, (rows, units), and whether masks are open and none fits.

    What monitor and controller count. Of a nested tensor they are the real ones, a tensor for each width.

    Args:
        x: an activation, outside of functorch's transforms.
        dim: where its units lie.
        limit: the most rows, of those kept, that are taken: every `stride`-th; None: all.
    """
    if not x.is_nested:
        x = x if x.layout is torch.strided else x.to_dense()
        dim %= x.ndim
        kept, misfit = kept_rows(x.shape[:dim] + x.shape[dim + 1 :])
        return [sampled(x, dim, limit, kept)], misfit
    parts = [part.movedim(dim % x.ndim - 1, -1) for part in x.detach().unbind()]
    entries, misfit = kept_entries([math.prod(part.shape[:-1]) for part in parts])
    # also those of which no row is kept, so that every width has an entry
    widths: dict[int, list[Tensor]] = {part.shape[-1]: [] for part in parts}
    for entry in entries:
        part = parts[entry]
        widths[part.shape[-1]].append(part.reshape(-1, part.shape[-1]))
    return [
        sampled(torch.cat(rows) if rows else parts[0].new_zeros(0, width), -1, limit)
        for width, rows in sorted(widths.items())
    ], misfit


def sampled(x: Tensor, dim: int, limit: int | None = ROWS, kept: Kept | None = None) -> Tensor:
    """Rows of `x`, (rows, units), with units along `dim`: every `stride`-th of those that are `kept`."""
    x = x.detach().movedim(dim, -1)
    shape = x.shape[:-1]
    inner = 1 if kept is None else math.prod(shape[len(kept.shape) :])  # rows for each of the mask's
    count = math.prod(shape) if kept is None else len(kept.numbers) * inner
    step = 1 if limit is None else stride(count, limit)
    if kept is None and step == 1:
        return x.reshape(count, x.shape[-1])
    number = torch.arange(0, count, step, device=x.device)
    if kept is not None:
        number = kept.numbers.to(x.device)[number // max(1, inner)] * inner + number % max(1, inner)
    indices = []
    for size in reversed(shape):
        indices.append(number % size)
        number = number // size
    return x[tuple(reversed(indices))]
