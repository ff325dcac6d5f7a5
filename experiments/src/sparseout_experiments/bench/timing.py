"""Times from alternating runs: every round times each implementation once, in a new order, so that drift hits all."""

import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Times = dict[str, float]  # seconds by phase
Runner = Callable[[], Times]
Clock = Callable[[Callable[[], object]], float]  # the seconds that a call takes

# Bytes that must move at least, in tensors of the input's size: forward x, y; backward the gradient, x, the result.
STREAMS = {"forward": 2, "backward": 3, "both": 5}

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


class WallClock:
    """A clock of host time, which waits for the device before and after."""

    def __init__(self, device: str) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, act: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - start


class EventClock:
    """A clock of device time: caches emptied, and the device held while the host queues the work."""

    def __init__(self) -> None:
        self._filler = torch.zeros(256 << 18, dtype=torch.int32, device="cuda")  # 256 MiB, more than any L2

    def __call__(self, act: Callable[[], object]) -> float:
        """Seconds that `act` takes on the device, launches not counted."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._filler.add_(1)
        torch.cuda._sleep(_AHEAD)
        start.record()
        act()
        end.record()
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
    for index, (name, runner) in enumerate(runners.items()):
        on_progress(name, index / len(runners) / 2)
        try:
            cost += _warm(runner)
            times[name] = []
        except Exception as error:
            failed(name, error)
    order = list(times)
    shuffle = random.Random(0).shuffle
    rounds = budget.rounds(cost)
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            shuffle(order)
            for name in [name for name in order if name in times]:
                on_progress(name, (1 + done / rounds) / 2)
                try:
                    times[name].append(runners[name]())
                except Exception as error:
                    failed(name, error)
                    del times[name]
    finally:
        gc.enable()
    return times


def _warm(run: Runner) -> float:
    """Run until compilations, allocations and caches have settled; return what one run then takes."""
    clock = WallClock("cpu")
    clock(run)
    cost = clock(run)
    return cost if cost > _SLOW else clock(run)


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

    times = {"forward": clock(forward) / calls, "backward": clock(backward) / calls}
    outputs.clear()
    return times | {"both": clock(both) / calls}


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
