"""Row mask: which rows of the activations are counted in a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from sparseout._utils.torch_internals import is_recorded, is_sharded, outside_transforms, without_transforms
from sparseout._utils.validation import expected, type_name


class Kept(NamedTuple):
    """The rows that a mask keeps, by their numbers in row-major order, and the shape that is numbered."""

    shape: tuple[int, ...]
    numbers: Tensor


class _Open(NamedTuple):
    """The open blocks, from the innermost out."""

    kept: Kept | None
    outer: _Open | None
    owner: object


_open: ContextVar[_Open | None] = ContextVar("sparseout_row_mask", default=None)


class row_mask:
    r"""Context manager in which only the rows that a mask keeps are counted, by monitors and controllers alike.

    Padding is no data: with a tokenizer's `attention_mask` the sparsity, the dead units and the number of rows are
    those of the real tokens, exactly. The model computes what it did, and a penalty still sums over all rows.

    **Which activations.** The rows of an activation are all of its dims but that of its units. An activation is masked
    if the first of these are the dims of the mask: a mask (batch, time) is for (batch, time, units), for the
    channels-first (batch, units, time), and for (batch, time, heads, units), all heads of a position; a mask (batch,)
    for whatever begins with the batch. Rows of others, such as (batch, heads, time, units), (batch * time, units) or
    (time, batch, units), are all counted, and the report names them. Only sizes are compared: where the number of heads
    or of examples equals that of time steps, the wrong dims are masked. Of nested tensors, which have no padding, a
    mask (batch,) keeps whole entries; a mask (batch, time) that keeps as many rows of each entry as it has changes
    nothing.

    **Blocks.** A mask is read from its device once, when it is given, and not again. It holds in the block, in the
    thread (or asyncio task) that opened it; a block inside has its own, which for activations of other sizes leaves
    that of the outer block in place, as with the masks of an encoder and a decoder. Activation checkpointing may
    recompute outside the block, since that is not counted. Put the block around compiled code: inside, it breaks the
    graph.

    **Threads** that begin in the block know the mask if they run in a copy of its context:
    ``Thread(target=contextvars.copy_context().run, args=(model, x))``. Those of `nn.DataParallel` on several devices
    do not, and have a part of the batch each: pass it the mask as an argument, which it splits as it splits the batch,
    and open the block in the model's own forward. DistributedDataParallel starts no threads.

    Args:
        mask: a tensor of at least one dim, boolean or of zeros and ones: 0 where a row is not to be counted. None: all
            rows count, as if no block were open.

    Raises:
        TypeError: if it is no tensor, or a complex or nested one.
        ValueError: if it has no dims, or a value other than 0 and 1, as masks that are added to attention scores have.

    Example:
        >>> import torch, sparseout
        >>> model = torch.nn.Sequential(torch.nn.ReLU())
        >>> x = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[2.0, 0.0], [9.0, 9.0]]])  # the last row is padding
        >>> with sparseout.SparsityMonitor(model) as monitor, sparseout.row_mask(torch.tensor([[1, 1], [1, 0]])):
        ...     _ = model(x)
        >>> record = monitor.report()[0]
        >>> record["rows"], record["density"], record["dead_units"]
        (3, 0.5, 1)
    """

    def __init__(self, mask: Tensor | None) -> None:
        self._kept = None if mask is None else _read(mask)

    def __enter__(self) -> Self:
        _open.set(_Open(self._kept, _open.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _open.set(_without(_open.get(), self))


def _without(block: _Open | None, owner: row_mask) -> _Open | None:
    """The open blocks less the innermost of an owner: not always the last, as generators may end in any order."""
    if block is None or block.owner is owner:
        return None if block is None else block.outer
    return block._replace(outer=_without(block.outer, owner))


def _read(mask: Any) -> Kept:
    wanted = "a boolean tensor, or one of zeros and ones, of at least one dim"
    if not isinstance(mask, Tensor):
        raise TypeError(expected("mask", wanted, type_name(mask)))
    if mask.is_complex() or mask.is_nested:
        raise TypeError(expected("mask", wanted, "a nested tensor" if mask.is_nested else f"one of {mask.dtype}"))
    if not mask.ndim:
        raise ValueError(expected("mask", wanted, "a 0-d one"))
    if is_recorded((mask,)):  # without values, as the passes that come; it fits nothing
        return Kept((), torch.zeros(0, dtype=torch.long))
    with outside_transforms():
        mask = without_transforms(mask.detach())
        mask = getattr(mask, "to_local")() if is_sharded(mask) else mask  # noqa: B009 the rows of this process
        if mask.dtype != torch.bool:
            other = mask[(mask != 0) & (mask != 1)]
            if other.numel():
                raise ValueError(expected("mask", wanted, f"one with {other[0].item():g}"))
            mask = mask != 0
        return Kept(tuple(mask.shape), mask.flatten().nonzero().flatten())


def kept_rows(shape: Sequence[int]) -> tuple[Kept | None, bool]:
    """The innermost mask whose dims rows of this shape begin with, or None; and whether masks are open and none is."""
    block, misfit = _open.get(), False
    while block is not None and block.kept is not None:
        size = block.kept.shape
        if size and size == tuple(shape[: len(size)]):
            return block.kept, False
        block, misfit = block.outer, True
    return None, misfit


def kept_entries(lengths: Sequence[int]) -> tuple[Sequence[int], bool]:
    """The entries of a nested tensor, of so many rows each, that are kept; and whether masks are open and none fits.

    Waits for the device if a mask is open.
    """
    all_entries, block, misfit = range(len(lengths)), _open.get(), False
    while block is not None and block.kept is not None:
        size, numbers = block.kept
        if size == (len(lengths),):
            return numbers.tolist(), False
        entry = numbers // max(1, math.prod(size[1:]))
        if size[:1] == (len(lengths),) and entry.bincount(minlength=len(lengths)).tolist() == list(lengths):
            return all_entries, False  # its rows are those that the mask keeps
        block, misfit = block.outer, True
    return all_entries, misfit


def any_mask() -> bool:
    """Whether a mask is in force in this thread."""
    block = _open.get()
    return block is not None and block.kept is not None


def attention_mask(batch: Any) -> Any:
    """The `attention_mask` of a batch that is a mapping, or of the first one with it in a tuple or list; else None."""
    if isinstance(batch, Mapping):
        return batch.get("attention_mask")
    parts = batch if isinstance(batch, (tuple, list)) else ()
    masks = (part.get("attention_mask") for part in parts if isinstance(part, Mapping))
    return next((mask for mask in masks if mask is not None), None)
