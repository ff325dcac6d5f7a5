"""Which implementation of the ops runs where: Triton kernels on NVIDIA GPUs, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from sparseout.errors import expected

_SETTINGS = ("auto", "torch", "triton")
_OLDEST = (8, 0)  # the oldest compute capability that the kernels are compiled for in the tests


class Backend(NamedTuple):
    """The `name` of an implementation, ``"torch"`` or ``"triton"``, and the `reason` for taking it."""

    name: str
    reason: str


def backend(device: torch.device | str | int | None = None) -> Backend:
    """The implementation that :func:`sparseout.sparseout` takes for tensors on `device`, and why.

    The environment variable ``SPARSEOUT_BACKEND`` decides: ``auto`` (the default) takes the Triton kernels where they
    run, ``torch`` never, and ``triton`` raises an error where they do not. Values agree between implementations up to
    rounding, and masks exactly. Whatever is decided, torch computes fp64, vmap and higher derivatives, and masks
    whose shared dims take turns in memory with others more often than shared, own, shared, own, shared.

    Args:
        device: as ``torch.device`` takes it; by default the current CUDA device if there is one, else the CPU.

    Raises:
        ValueError: for another value of ``SPARSEOUT_BACKEND``.
        RuntimeError: for ``SPARSEOUT_BACKEND=triton`` where the kernels do not run.

    Example:
        >>> import sparseout
        >>> sparseout.backend("cpu")
        Backend(name='torch', reason='the Triton kernels need a CUDA device, and this is cpu')
    """
    if device is None:
        if not torch.cuda.is_available():
            return _choose(_setting(), "there is no CUDA device")
        device = "cuda"
    return _backend(torch.device(device))


def kernels(device: torch.device) -> ModuleType | None:
    """The module with the kernels for tensors on `device`; None where plain torch is to be taken."""
    return _kernels() if _backend(device).name == "triton" else None


def _backend(device: torch.device) -> Backend:
    setting = _setting()
    if setting == "torch":
        return _choose(setting, "")
    if device.type != "cuda":
        return _choose(setting, f"the Triton kernels need a CUDA device, and this is {device.type}")
    return _choose(setting, _obstacle(torch.cuda.current_device() if device.index is None else device.index))


def _setting() -> str:
    setting = os.environ.get("SPARSEOUT_BACKEND", "auto")
    if setting not in _SETTINGS:
        raise ValueError(expected("SPARSEOUT_BACKEND", "'auto', 'torch' or 'triton'", repr(setting)))
    return setting


@functools.cache
def _choose(setting: str, obstacle: str) -> Backend:
    if setting == "torch":
        return Backend("torch", "SPARSEOUT_BACKEND=torch")
    if not obstacle:
        return Backend("triton", "SPARSEOUT_BACKEND=triton" if setting == "triton" else "it runs on this device")
    if setting == "triton":
        raise RuntimeError(f"SPARSEOUT_BACKEND=triton cannot be followed: {obstacle}")
    return Backend("torch", obstacle)


@functools.cache
def _obstacle(index: int) -> str:
    """Why the kernels do not run on the CUDA device of this `index`; empty if they do."""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, and this is an AMD one"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return "the Triton kernels need compute capability {}.{}, and this GPU has {}.{}".format(*_OLDEST, *capability)
    try:
        _kernels()
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    try:
        # Triton builds its driver with a C compiler, and with the headers of Python, when it is first asked.
        importlib.import_module("triton.runtime.driver").driver.active.get_current_target()
    except Exception as error:  # whatever it is, torch can do without
        return f"triton does not run here: {error}"
    return ""


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("sparseout.kernels.cuda")
