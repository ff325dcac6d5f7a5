"""Memory: the peak during a call, and what a function keeps for its backward."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparseout_experiments.bench.timing import Function


def kept(function: Function, x: Tensor) -> tuple[int, int]:
    """Bytes that autograd saves for `function(x)`, each storage once: those beside the input's, and the input's.

    The input's own storage stands apart since something else may keep it anyway.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or the address might be used twice
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(function(x))
    shared = storages.pop(x.untyped_storage().data_ptr(), 0)
    return sum(storages.values()), shared


def peak(run: Callable[[], object], device: str) -> int | None:
    """Most bytes allocated at a time during `run` over those before; None where torch's profiler reports none."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    kineto = getattr(profiler.profiler, "kineto_results", None)
    events = [event for event in kineto.events() if event.name() == "[memory]"] if kineto else []
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest if events else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler writes to standard error from C++, past Python's warnings."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
