"""Times from alternating runs: every round times each implementation once, in a new order, so that drift hits all."""

import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Times = dict[str, float]  # seconds by phase
Runner = Callable[[], Times]

# Bytes that must move at least, in tensors of the input's size: forward x, y; backward the gradient, x, the result.
STREAMS = {"forward": 2, "backward": 3, "both": 5}

_SHUFFLE_SEED = 0
_SLOW = 0.3  # seconds: what takes longer is not warmed up a third time
_AHEAD = 20_000_000  # cycles, some ten milliseconds, in which the host queues what an event clock will time


class Budget(NamedTuple):
    """The time to measure for: about `seconds`, but no fewer than `least` rounds and no more than `most`."""

    seconds: float
    least: int
    most: int

    def rounds(self, cost: float) -> int:
        """The number of rounds where one takes `cost` seconds."""
        return min(max(int(self.seconds / max(cost, 1e-9)), self.least), self.most)


class Spread(NamedTuple):
    """A median with the quantiles at 10 and 90%."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of two values or more, with interpolation between neighbours."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1])


class Clock(Protocol):
    """Two kinds: the wall's, for what the host takes, and CUDA events, for what the device takes."""

    def prepare(self) -> None:
        """Called before a measurement."""

    def mark(self) -> Any:
        """A point in time."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another."""


class WallClock:
    """Host time; the device's work is waited for at every mark."""

    def __init__(self, device: str) -> None:
        self._waits = device == "cuda"

    def prepare(self) -> None:
        pass

    def mark(self) -> float:
        if self._waits:
            torch.cuda.synchronize()
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """Device time: caches emptied, and the device held while the host queues the work, so that launches stay out."""

    def __init__(self) -> None:
        self._filler = torch.zeros(256 << 18, dtype=torch.int32, device="cuda")  # 256 MiB, more than any L2

    def prepare(self) -> None:
        self._filler.add_(1)
        torch.cuda._sleep(_AHEAD)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def alternate(
    runners: Mapping[str, Runner],
    budget: Budget,
    failed: Callable[[str, Exception], None],
    on_progress: Callable[[str, float], None] = lambda name, share: None,
) -> dict[str, list[Times]]:
    """The times that every runner returned in every round, after a warm-up.

    A runner that raises is reported to `failed` and left out. `on_progress` gets the name of
    the runner and the share of all that is done.
    """
    times: dict[str, list[Times]] = {}
    cost = 0.0

    def attempt(act: Callable[[str], None], name: str) -> None:
        try:
            act(name)
        except Exception as error:
            failed(name, error)
            times.pop(name, None)

    def warm(name: str) -> None:
        nonlocal cost
        cost += _warm(runners[name])
        times[name] = []

    def run(name: str) -> None:
        times[name].append(runners[name]())

    for place, name in enumerate(runners):
        on_progress(name, place / len(runners) / 2)
        attempt(warm, name)
    order = list(times)
    shuffle = random.Random(_SHUFFLE_SEED).shuffle
    rounds = budget.rounds(cost)
    with _no_collection():
        for done in range(rounds):
            shuffle(order)
            for name in order:
                if name in times:
                    on_progress(name, (1 + done / rounds) / 2)
                    attempt(run, name)
    return times


def _warm(run: Runner) -> float:
    """Run until compilations, allocations and caches have settled; return what one run then takes."""
    _seconds(run)
    cost = _seconds(run)
    return cost if cost > _SLOW else _seconds(run)


def _seconds(run: Runner) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def phases(function: Function, x: Tensor, grad: Tensor, calls: int, clock: Clock) -> Times:
    """Time `calls` calls: forward and backward apart, then both together. `x` requires a gradient."""
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.extend(function(x) for _ in range(calls))

    def backward() -> None:
        for y in outputs:
            torch.autograd.grad(y, x, grad)

    def both() -> None:
        for _ in range(calls):
            torch.autograd.grad(function(x), x, grad)

    times = {"forward": timed(forward, clock) / calls, "backward": timed(backward, clock) / calls}
    outputs.clear()
    return times | {"both": timed(both, clock) / calls}


def timed(act: Callable[[], object], clock: Clock) -> float:
    """Seconds that `act` takes."""
    clock.prepare()
    start = clock.mark()
    act()
    return clock.between(start, clock.mark())


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many other processes that each want a core to themselves, for a block."""
    program = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    processes = [subprocess.Popen(program, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for a block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
