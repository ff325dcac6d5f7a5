"""Measurement of one case: a row for every implementation, ready for JSON."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout_experiments.bench import memory, timing
from sparseout_experiments.bench.cases import LATENCY_CALLS, MODELS, SMALL, Case, Images, Layer, Model, Operation, cores
from sparseout_experiments.bench.implementations import (
    ALTERNATIVES,
    FOR_TEXT,
    LAYOUTS,
    METHODS,
    Method,
    P,
    compiled,
    named,
)
from sparseout_experiments.bench.timing import STREAMS, Budget, Clock, Function, Runner, Times, spread
from sparseout_experiments.models import LanguageModel, WideResNet
from sparseout_experiments.tasks.base import penalised
from sparseout_experiments.training.environment import threads
from sparseout_experiments.training.noise import attach

Row = dict[str, Any]
OnProgress = Callable[[str, float], None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COPY = "copy"


def measure(case: Case, device: str, budget: Budget, on_progress: OnProgress) -> list[Row]:
    """The rows of one case, the baseline first."""
    busy = timing.spinning(cores() if case.busy else 0)
    with busy, threads(case.threads), torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(case, Operation):
            rows = _operation(case, device, budget, on_progress)
        else:
            rows = _steps(case, device, budget, on_progress)
    torch.compiler.reset()  # not after an interrupt, which may have left the compiler half imported
    return rows


def _operation(case: Operation, device: str, budget: Budget, on_progress: OnProgress) -> list[Row]:
    x, grad, target = _tensors(case, device)
    clock: Clock = timing.EventClock() if case.clock == "events" else timing.WallClock(device)
    calls = LATENCY_CALLS[case.clock] if case.elements == SMALL else 1
    implementations = LAYOUTS[case.layout].implementations(device)
    if case.busy:
        implementations = {name: call for name, call in implementations.items() if "formula" not in name}
    runners: dict[str, Runner] = {
        name: partial(timing.phases, function, x, grad, calls, clock) for name, function in implementations.items()
    }
    if case.elements != SMALL:  # where a copy is a matter of bandwidth
        runners[_COPY] = lambda: {_COPY: clock(partial(target.copy_, x.detach()))}
    rows, times = _rows(case, runners, budget, on_progress)
    copies = times.pop(_COPY, None)
    rows.pop(_COPY, None)
    for name, row in rows.items():
        row["calls"] = calls
        if name not in times:
            continue
        if copies:
            copying = spread([seconds[_COPY] for seconds in copies]).median
            row["copy_bytes_per_second"] = STREAMS["forward"] * x.nbytes / copying
            row["of_copy_bandwidth"] = of_copy_bandwidth(row["seconds"], copying)
        function = implementations[name]
        row["peak_bytes"] = memory.peak(partial(_call, function, x, grad), device)
        row["kept_bytes"], row["kept_input_bytes"] = memory.kept(function, x)
        row["input_bytes"] = x.nbytes
    return list(rows.values())


def _tensors(case: Operation, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """An input, a gradient and a target for copies."""
    layout = LAYOUTS[case.layout]
    x = torch.randn(case.elements, dtype=DTYPES[case.dtype], device=device)
    x = x.view(layout.shape).contiguous(memory_format=layout.memory_format)
    return x.requires_grad_(), torch.randn_like(x.detach()), torch.empty_like(x.detach())


def _call(function: Function, x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(function(x), x, grad)


def of_copy_bandwidth(seconds: Mapping[str, Mapping[str, float]], copying: float) -> dict[str, float]:
    """The least time, with each operand moved once at the speed of `copying` the input, over the time it took."""
    least = {phase: streams / STREAMS["forward"] * copying for phase, streams in STREAMS.items()}
    return {phase: least[phase] / times["median"] for phase, times in seconds.items()}


def steps_of(case: Model | Layer, device: str) -> dict[str, Callable[[], None]]:
    """A training step with every method that the case has a place for."""
    if isinstance(case, Layer):
        return {name: layer_step(case, method, device) for name, method in (METHODS | ALTERNATIVES).items()}
    methods = dict(METHODS)
    if device == "cuda":
        methods |= {f"Sparseout q={q:g}": named("sparseout", p=P, q=q) for q in (1.0, 2.5)}
    if case.mode == "eager" and not case.busy:
        images = isinstance(MODELS[case.model], Images)
        methods |= {name: method for name, method in ALTERNATIVES.items() if images or name in FOR_TEXT}
    return {name: training_step(case, method, device) for name, method in methods.items()}


def _steps(case: Model | Layer, device: str, budget: Budget, on_progress: OnProgress) -> list[Row]:
    clock, steps = timing.WallClock(device), steps_of(case, device)
    runners: dict[str, Runner] = {name: lambda step=step: {"step": clock(step)} for name, step in steps.items()}  # type: ignore[misc]
    rows, times = _rows(case, runners, budget, on_progress)
    for name in times:
        rows[name]["peak_bytes"] = memory.peak(steps[name], device)
    return list(rows.values())


def layer_step(case: Layer, method: Method, device: str) -> Callable[[], None]:
    """Forward and backward to input and weights, of one layer with a method; no gradients are left between steps."""
    layer = nn.Linear(case.width, case.width)
    model = nn.Sequential(nn.ReLU(), method.noise(), layer).to(device)
    x = torch.randn(case.batch, case.width, device=device, requires_grad=True)
    grad = torch.randn(case.batch, case.width, device=device)
    penalty = attach(method.attachment, model, [model[0]], [layer])

    def step() -> None:
        out = model(x)
        penalised((out * grad).sum(), penalty).backward()
        model.zero_grad(set_to_none=True)
        x.grad = None

    return step


def training_step(case: Model, method: Method, device: str) -> Callable[[], None]:
    """Forward, loss, backward and a step of SGD, on one batch of random data; no gradients are left between steps."""
    shape, weights = MODELS[case.model], torch.Generator().manual_seed(0)
    model: WideResNet | LanguageModel
    if isinstance(shape, Images):
        model = WideResNet(shape.depth, shape.width, lambda _: method.noise(), weights)
        x = torch.randn(shape.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        target = torch.randint(10, (shape.batch,), device=device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        model = LanguageModel(
            shape.words, shape.embedding, shape.units, shape.layers, lambda _: method.noise(), weights
        )
        x = torch.randint(shape.words, (shape.steps, shape.batch), device=device)
        target = torch.randint(shape.words, (shape.steps * shape.batch,), device=device)
    model = model.to(device)
    penalty = attach(method.attachment, model, model.activations().values(), model.following())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    forward = compiled(model) if case.mode == "compiled" else model
    half = device == "cuda" and isinstance(shape, Images)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = forward(x)
            logits = out if isinstance(out, Tensor) else out[0].flatten(0, 1)
            loss = penalised(F.cross_entropy(logits, target), penalty)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _rows(
    case: Case, runners: Mapping[str, Runner], budget: Budget, on_progress: OnProgress
) -> tuple[dict[str, Row], dict[str, list[Times]]]:
    """A row for every runner, with times and ratios to the first of them or with the reason why there are none."""
    reasons: dict[str, str] = {}
    times = timing.alternate(runners, budget, lambda name, error: reasons.update({name: _reason(error)}), on_progress)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    rows: dict[str, Row] = {}
    baseline = times.get(next(iter(runners)))
    for name in runners:
        row = {"section": case.section, "case": case.key, **asdict(case), "implementation": name, "date": date}
        if name in times:
            row |= {"rounds": len(times[name]), "seconds": _spreads(times[name])}
            row["ratio"] = _spreads(ratios(times[name], baseline)) if baseline and name != _COPY else None
        else:
            row["failed"] = reasons[name]
        rows[name] = row
    return rows, times


def ratios(times: list[Times], baseline: list[Times]) -> list[Times]:
    """Round by round, so that what slowed a round down slowed both."""
    return [{phase: time[phase] / base[phase] for phase in time} for time, base in zip(times, baseline, strict=True)]


def _spreads(times: list[Times]) -> dict[str, dict[str, float]]:
    return {phase: spread([time[phase] for time in times])._asdict() for phase in times[0]}


def _reason(error: Exception) -> str:
    """One line. What the compiler wraps is inside."""
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [type(inner).__name__]
    return lines[0][:160]
