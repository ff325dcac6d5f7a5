"""A pass in evaluation over rows that a controller is given, which leaves everything as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparseout._utils.hooks import uncounted
from sparseout._utils.modes import restored_modes
from sparseout._utils.row_mask import attention_mask, row_mask
from sparseout._utils.torch_internals import own_children, tensor_version
from sparseout._utils.validation import expected, type_name


def check_probe(probe: Any) -> row_mask:
    """The mask of its rows, by its `attention_mask`, if it is a batch: a tensor, a tuple or list, or a mapping."""
    if probe is not None and not isinstance(probe, (Tensor, tuple, list, Mapping)):
        wanted = "a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments"
        raise TypeError(expected("probe", wanted, type_name(probe)))
    try:
        return row_mask(attention_mask(probe))
    except (TypeError, ValueError) as error:  # it may be one that is added to scores
        warnings.warn(f"all rows of the probe count, for its `attention_mask` is no mask: {error}", stacklevel=3)
        return row_mask(None)


def probed(model: nn.Module) -> nn.Module:
    """The model without wrappers that are for training: DataParallel, DistributedDataParallel, torch.compile's."""
    while True:
        children = own_children(model)
        name = "module" if isinstance(model, (DistributedDataParallel, DataParallel)) else "_orig_mod"
        if (inner := children.get(name)) is None:
            return model
        model = inner


def run_probe(model: nn.Module, probe: Any, mask: row_mask) -> None:
    """Call the model on the probe in evaluation mode, without gradients, with a mask of its own rows.

    Modes of modules, buffers, random number generators, autocast and its cache are put back, after an error too.
    Monitors do not count the pass.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batch = _moved(probe, device)
    with ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        devices = [device] if device.type not in ("cpu", "meta") else []
        stack.enter_context(torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"))
        stack.enter_context(_own_autocast_cache(device.type))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncounted())
        stack.enter_context(mask)
        model.eval()
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """A block after which modes and buffers are those of before."""
    buffers = [(buffer, tensor_version(buffer), buffer.clone()) for buffer in model.buffers()]
    try:
        with restored_modes(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, version, value in buffers:
                if tensor_version(buffer) != version:
                    buffer.copy_(value)


@contextmanager
def _own_autocast_cache(device: str) -> Iterator[None]:
    """A block in which autocast stays as it is but does not keep what it casts, which here has no gradient."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def _moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
