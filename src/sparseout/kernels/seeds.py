"""Seeds of masks: as a tensor, for all that traces, batches or differentiates, and as a number."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

Seed = int | Tensor | None  # None is one that is drawn from torch's generator

_LEAST, _END = -(2**63), 2**63 - 1
_local = threading.local()  # its cell: a tensor, in which seeds are drawn, and the number in its memory


def tensor(seed: Seed, device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on `device`."""
    if seed is None:
        # Drawn here as a tensor: what makes vmap's modes, checkpoints, CUDA graphs and the compiler behave.
        return torch.randint(_LEAST, _END, (), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((), _signed(seed), dtype=torch.int64, device=device)


def number(seed: Seed) -> int:
    """The seed that `tensor` would give on the CPU, as an int, at half the time: nothing is traced here."""
    if seed is None:
        if (cell := getattr(_local, "cell", None)) is None:  # made here, where no mode is active
            memory = ctypes.c_int64()  # read sooner than by `item`
            with torch.inference_mode(False):  # or it could not be written to outside
                cell = _local.cell = torch.frombuffer(memory, dtype=torch.int64), memory
        cell[0].random_(_LEAST, _END)
        return cell[1].value
    return seed.item() if isinstance(seed, Tensor) else _signed(seed)  # type: ignore[return-value]


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed
