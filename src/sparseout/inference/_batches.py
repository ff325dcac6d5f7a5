"""Batches, and a model that is run on them as in evaluation and left as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparseout._utils.modes import restored_modes
from sparseout._utils.modules import check_model, named_modules, own_tensors, unwrapped
from sparseout._utils.tracing import untouched_random_state
from sparseout._utils.validation import expected, type_name


def check_runs(model: Any) -> None:
    """Check that a model can be run: that its weights are there.

    Raises:
        TypeError: if it is no module.
        ValueError: if it has lazy layers that have not seen an input, or is on the meta device.
    """
    check_model(model)
    for name, module in named_modules(model):
        if any(map(is_lazy, own_tensors(module).values())):
            wanted = "a model whose lazy layers have seen an input"
            raise ValueError(expected("model", wanted, f"{name!r} that has not: call the model on a batch first"))
    if (device := _device(model)) is not None and device.type == "meta":
        raise ValueError(expected("model", "a model with values", "one on the meta device"))


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
    collection: Any = list(batches) if isinstance(batches, Iterator) or not hasattr(batches, "__len__") else batches
    with untouched_random_state():  # a DataLoader draws
        none = object()
        first = next(iter(collection), none)
    if first is none:
        raise ValueError(expected("batches", "at least one batch", "none"))
    first_item = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(first_item, (Tensor, Mapping)):
        raise TypeError(expected("batches", wanted, f"one that is or begins with {type_name(first_item)}"))
    return collection  # type: ignore[no-any-return]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """A block in evaluation mode without gradients; modes and random generators are put back after."""
    with restored_modes(model), untouched_random_state(), torch.no_grad():
        for module in model.modules():
            module.training = False
        yield


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output: of a mapping its items are keyword arguments; of a tuple or list the first is the input.

    Tensors are moved to the device of the model. Wrappers, such as `torch.compile`, are left out: hooks would not run.
    """
    inner, device = unwrapped(model), _device(model)
    if isinstance(batch, Mapping):
        return inner(**{key: _moved(value, device) for key, value in batch.items()})
    return inner(_moved(batch[0] if isinstance(batch, (tuple, list)) else batch, device))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in mappings, tuples, lists and dataclasses; those in a nested tensor one by one."""
    if isinstance(value, Tensor):
        yield from value.unbind() if value.is_nested else [value]
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in(vars(value))


def check_rows(batches: Collection[Any]) -> None:
    """Raise a ValueError if no batch has rows."""
    if not any(x.numel() for batch in batches for x in tensors_in(batch)):
        raise ValueError("expected `batches` to have rows, but got none")


def _device(model: nn.Module) -> torch.device | None:
    inner = unwrapped(model)
    tensor = next(chain(inner.parameters(), inner.buffers()), None)
    return None if tensor is None else tensor.device


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value
