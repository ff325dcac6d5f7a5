"""Batches, and a model that is run on them as in evaluation and left as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.modules import unwrapped
from sparseout._utils.tracing import untouched_random_state
from sparseout._utils.validation import expected, type_name


def check_batches(batches: Any) -> Collection[Any]:
    """Batches that can be gone through again: an iterator is read into a list.

    Raises:
        TypeError: if it is no iterable of tensors, of tuples or lists that begin with one, or of mappings.
        ValueError: if there is no batch.
    """
    wanted = "an iterable of batches: tensors, tuples or lists that begin with one, or mappings"
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        got = type_name(batches) + (
            ": put a single batch into a list" if isinstance(batches, (Tensor, Mapping)) else ""
        )
        raise TypeError(expected("batches", wanted, got))
    again: Any = list(batches) if isinstance(batches, Iterator) or not hasattr(batches, "__len__") else batches
    with untouched_random_state():  # a DataLoader draws
        first = next(iter(again), None)
    if first is None:
        raise ValueError(expected("batches", "at least one batch", "none"))
    begins = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(begins, (Tensor, Mapping)):
        raise TypeError(expected("batches", wanted, f"one that is or begins with {type_name(begins)}"))
    return again  # type: ignore[no-any-return]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """A block in which all modules are in evaluation mode and nothing is differentiated; modes are put back after."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output: of a mapping its items are keyword arguments; of a tuple or list the first is the input.

    Tensors are moved to the device of the model. Wrappers, such as `torch.compile`, are left out: hooks would not run.
    """
    inner = unwrapped(model)
    tensor = next(chain(inner.parameters(), inner.buffers()), None)
    device = None if tensor is None else tensor.device
    if isinstance(batch, Mapping):
        return inner(**{key: _moved(value, device) for key, value in batch.items()})
    return inner(_moved(batch[0] if isinstance(batch, (tuple, list)) else batch, device))


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value
