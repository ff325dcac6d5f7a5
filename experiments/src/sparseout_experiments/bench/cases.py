"""The cases of a run. Implementations of one case are measured together, and the case is finished or not as a whole."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from sparseout_experiments.bench.implementations import LAYOUTS
from sparseout_experiments.bench.timing import Budget

Section = Literal["operation", "model", "alternatives"]
Mode = Literal["eager", "compiled"]

SMALL = 64  # elements: what such a call takes is what any call takes at least
M = 2**20
MIDDLING = 2**14  # where the cost of a call and that of the elements are alike
BUSY = ", busy"
LATENCY_CALLS = {"wall": 100, "events": 20}


@dataclass(frozen=True)
class Operation:
    """One size, dtype, layout and number of threads (None on a GPU)."""

    elements: int
    dtype: str
    threads: int | None = None
    layout: str = "vector"
    clock: Literal["wall", "events"] = "wall"
    busy: bool = False  # other processes want as many cores as there are
    section: ClassVar[Section] = "operation"

    @property
    def key(self) -> str:
        threads = f", {count(self.threads, 'thread')}" if self.threads else ""
        host = ", host" if self.clock == "wall" and not self.threads else ""
        return f"{size(self.elements)} {self.dtype}, {self.layout}{threads}{host}" + (BUSY if self.busy else "")


@dataclass(frozen=True)
class Model:
    """One training step of a model."""

    model: str
    mode: Mode
    threads: int | None = None
    busy: bool = False
    section: ClassVar[Section] = "model"

    @property
    def key(self) -> str:
        return f"{self.model}, {self.mode}" + (BUSY if self.busy else "")


@dataclass(frozen=True)
class Layer:
    """ReLU, a method and a linear layer of so many inputs and outputs, on a batch of rows."""

    width: int
    threads: int | None = None
    batch: int = 64
    busy: ClassVar[bool] = False
    section: ClassVar[Section] = "alternatives"

    @property
    def key(self) -> str:
        return f"Linear {self.width} x {self.width}, batch {self.batch}"


Case = Operation | Model | Layer


class Images(NamedTuple):
    """A wide residual network on images of 32 x 32 pixels in 10 classes."""

    depth: int
    width: int
    batch: int


class Text(NamedTuple):
    """A language model of LSTM layers on a batch of texts."""

    layers: int
    units: int
    embedding: int
    batch: int
    steps: int
    words: int = 10_000


MODELS: dict[str, Images | Text] = {
    "WRN-28-10, batch 128": Images(28, 10, 128),
    "WRN-16-2, batch 16": Images(16, 2, 16),
    "WRN-10-1, batch 16": Images(10, 1, 16),
    "LSTM 3 x 1150, batch 80 x 70 steps": Text(3, 1150, 400, 80, 70),
    "LSTM 2 x 200, batch 20 x 35 steps": Text(2, 200, 200, 20, 35),
}


class Plan(NamedTuple):
    """Sizes and numbers of the cases, which --quick changes."""

    budget: Budget
    sizes: tuple[int, ...]  # of vectors, in elements
    dtypes: tuple[str, ...]  # the first in all sizes; on a CPU the others in one
    layout_size: int
    models: Mapping[str, tuple[Mode, ...]]
    widths: tuple[int, ...] = ()  # of linear layers
    busy_sizes: tuple[int, ...] = ()  # of vectors, while other processes want the cores
    busy_models: tuple[str, ...] = ()
    shapes: bool = False  # whether layouts of a shape of their own are measured


_BOTH: tuple[Mode, ...] = ("eager", "compiled")
_LSTM = "LSTM 2 x 200, batch 20 x 35 steps"
# Compiling a residual network takes 40 s on a CPU, for each method.
_CPU_MODELS: dict[str, tuple[Mode, ...]] = {"WRN-16-2, batch 16": ("eager",), _LSTM: _BOTH}
_QUICK_MODELS: dict[str, tuple[Mode, ...]] = {"WRN-10-1, batch 16": ("eager",), _LSTM: _BOTH}
_GPU_MODELS = {"WRN-28-10, batch 128": _BOTH, "LSTM 3 x 1150, batch 80 x 70 steps": _BOTH}
_GPU_WIDTHS = (256, 1024, 2048)
_GPU_SIZES = (M, 16 * M, 64 * M, 256 * M)
_CPU_SIZES = (SMALL, 4096, MIDDLING, M, 10 * M)
_CPU = Plan(
    Budget(5, 7, 60),
    _CPU_SIZES,
    ("fp32", "bf16"),
    M,
    _CPU_MODELS,
    (64, 256, 1024),
    busy_sizes=_CPU_SIZES,
    busy_models=tuple(_CPU_MODELS),
    shapes=True,
)
PLANS = {
    ("cpu", False): _CPU,
    ("cpu", True): Plan(Budget(1, 4, 20), (SMALL, MIDDLING, M), ("fp32", "bf16"), M, _QUICK_MODELS, (256,), (M,)),
    ("cuda", False): Plan(Budget(4, 20, 100), _GPU_SIZES, ("fp32", "bf16", "fp16"), 64 * M, _GPU_MODELS, _GPU_WIDTHS),
    ("cuda", True): Plan(Budget(1, 10, 30), (64 * M,), ("fp32", "bf16"), 64 * M, _GPU_MODELS, (1024,)),
}


def cases(device: str, quick: bool, only: str = "") -> list[Case]:
    """Every case of a run, in the order of the tables; `only` names a section."""
    plan = PLANS[device, quick]
    layers = [Layer(width, 1 if device == "cpu" else None) for width in plan.widths]
    planned = [*(_on_cpu if device == "cpu" else _on_cuda)(plan), *_models(plan, device), *layers]
    return [case for case in planned if only in ("", case.section)]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_cpu(plan: Plan) -> Iterator[Case]:
    first, *others = plan.dtypes
    for sizes, busy in ((plan.sizes, False), (plan.busy_sizes, True)):
        for elements in sizes:
            for threads in sorted({1, cores()}):
                yield Operation(elements, first, threads, busy=busy)
    for dtype in others:
        yield Operation(plan.layout_size, dtype, 1)
    for name, layout in list(LAYOUTS.items())[1:]:
        if layout.shape[0] == -1:
            yield Operation(plan.layout_size, first, cores(), name)
        elif plan.shapes:
            yield Operation(math.prod(layout.shape), first, cores(), name)


def _on_cuda(plan: Plan) -> Iterator[Case]:
    for dtype in plan.dtypes:
        yield Operation(SMALL, dtype)
        for elements in (SMALL, *plan.sizes):
            yield Operation(elements, dtype, clock="events")
    for name, layout in list(LAYOUTS.items())[1:]:
        if layout.shape[0] == -1:
            yield Operation(plan.layout_size, plan.dtypes[0], None, name, "events")


def _models(plan: Plan, device: str) -> Iterator[Case]:
    for model, modes in plan.models.items():
        for mode in modes:
            yield Model(model, mode, cores() if device == "cpu" else None)
    for model in plan.busy_models:
        yield Model(model, "eager", cores(), busy=True)


def size(elements: int) -> str:
    """64, 1M: M is 2^20."""
    return f"{elements // M}M" if elements % M == 0 else str(elements)


def count(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number} {noun}" + ("s" if number != 1 else "")
