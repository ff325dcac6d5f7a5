"""Choice of the implementation of the operation: native on CPUs, Triton on NVIDIA GPUs, or torch."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from sparseout._utils.validation import expected
from sparseout.kernels import cpu

_SETTINGS = ("auto", "torch", "triton", "native")
CPU = torch.device("cpu")
_OLDEST = (8, 0)  # the oldest compute capability that the kernel is compiled for in the tests


class Backend(NamedTuple):
    """The implementation that is taken on a device, as :func:`sparseout.backend` returns it.

    Attributes:
        name: ``"native"``, ``"triton"`` or ``"torch"``.
        reason: for taking it, in a sentence.

    Example:
        >>> import sparseout
        >>> sparseout.backend("meta").name
        'torch'
    """

    name: str
    reason: str


def backend(device: torch.device | str | int | None = None) -> Backend:
    """The implementation that :func:`sparseout.sparseout` takes for tensors on `device`, and why.

    ``"native"`` is a kernel for CPUs in C, which pip compiles when it installs sparseout, if there is a C compiler.
    ``"triton"`` is a kernel for NVIDIA GPUs, and ``"torch"`` means torch's own operations: the same results, slower.
    The environment variable ``SPARSEOUT_BACKEND`` decides: ``auto``, the default, takes the kernels where they run;
    ``torch`` takes neither; ``native`` and ``triton`` are ``auto``, but an error on a CPU, or a CUDA device, where that
    kernel does not run. It is read at the first call of the operation, and at every call of this function.

    Masks agree between implementations exactly, and values up to rounding. They may differ at infinite inputs, where
    the result is the limit or, as infinity minus infinity, NaN; and on a GPU for |x / unit| < 2^-126, which counts as 0
    in the Triton kernel (in units of 1 for q < 4; from q = 4 on of a float `scale`, or of max |x| with "matched").
    Whatever is decided, torch computes functorch's transforms and higher derivatives, and on a GPU fp64 and masks whose
    shared dims take turns in memory with others more often than shared, own, shared, own, shared.

    Args:
        device: as ``torch.device`` takes it; by default the current CUDA device if there is one, else the CPU.

    Raises:
        ValueError: for another value of ``SPARSEOUT_BACKEND``, or a `device` that torch does not know.
        RuntimeError: for ``SPARSEOUT_BACKEND=triton`` on a CUDA device where the Triton kernel does not run, and for
            ``native`` on a CPU where the native one does not.

    Example:
        >>> import sparseout
        >>> sparseout.backend("meta")
        Backend(name='torch', reason='there is no kernel for meta')
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(expected("device", "one that torch.device takes", repr(device))) from error
    _setting.cache_clear()
    _setting()  # if it is none, that comes first
    if found.type == "cuda" and not torch.cuda.is_available():
        return Backend("torch", "there is no CUDA device")
    return _backend(found)


def kernels(device: torch.device) -> ModuleType | None:
    """The module that launches the kernel for tensors on `device`; None where plain torch is to be taken."""
    if device is CPU or device.type == "cpu":  # quick, since on small tensors the time of the host is all there is
        if _setting() != "torch" and not cpu.obstacle():
            return cpu
        _backend(device)  # raises where "native" was asked for
        return None
    return _launchers() if device.type == "cuda" and _backend(device).name == "triton" else None


@functools.cache
def _setting() -> str:
    setting = os.environ.get("SPARSEOUT_BACKEND") or "auto"
    if setting not in _SETTINGS:
        raise ValueError(expected("SPARSEOUT_BACKEND", "'auto', 'torch', 'triton' or 'native'", repr(setting)))
    return setting


def _backend(device: torch.device) -> Backend:
    setting = _setting()
    if device.type not in ("cpu", "cuda"):
        return Backend("torch", f"there is no kernel for {device.type}")
    if setting == "torch":
        return Backend("torch", "SPARSEOUT_BACKEND=torch")
    if device.type == "cpu":
        name, obstacle, reason = "native", cpu.obstacle(), cpu.threads()
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        name, obstacle, reason = "triton", _obstacle(index), "it runs on this device"
    if not obstacle:
        return Backend(name, reason)
    if setting == name:
        raise RuntimeError(f"SPARSEOUT_BACKEND={name} cannot be followed: {obstacle}")
    return Backend("torch", obstacle)


@functools.cache
def _obstacle(index: int) -> str:
    """The reason why the kernel does not run on the CUDA device of this `index`; empty if it does."""
    if torch.version.hip is not None:
        return "the Triton kernel is for NVIDIA GPUs, and this is an AMD one"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return "the Triton kernel needs compute capability {}.{}, and this GPU has {}.{}".format(*_OLDEST, *capability)
    try:
        _launchers()
        # Triton builds its driver with a C compiler, and with the headers of Python, when it is first asked.
        importlib.import_module("triton.runtime.driver").driver.active.get_current_target()
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    except Exception as error:  # whatever it is, torch can do without
        return f"triton does not run here: {error}"
    return ""


@functools.cache
def _launchers() -> ModuleType:
    return importlib.import_module("sparseout.kernels.cuda")
