"""Accumulators for activations: sums on their device, and the records that are made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseout.measures import Streaming
from sparseout.monitor._histogram import histogram
from sparseout.monitor._noise import noise_ratio

Key = tuple[str, str, int]  # name and mode of a module, and number of units


class Norm(NamedTuple):
    """A batch norm's inputs in evaluation against its running statistics, in units of the running deviation."""

    module: str
    samples: int
    shift: float  # of means, root mean square over channels
    stretch: float  # of standard deviations, likewise
    spread: float  # mean ratio of standard deviations


class Accumulators:
    """Sums over the rows of one module in one mode at one width: tensors on their device, which merge by adding."""

    def __init__(self, measures: Iterable[str], eps: float = 0.0, relative: bool = False) -> None:
        lifetime = [name for name in measures if name != "gini"]
        self.measures_by_axis = {
            "population": Streaming(measures, eps=eps, relative=relative),
            "lifetime": Streaming(lifetime, axis="lifetime", eps=eps, relative=relative),
        }
        self.sums: dict[str, Tensor] = {}
        self.calls = 0  # the most in one step
        self._step = self._in_step = 0

    def update(self, rows: Tensor, step: int) -> None:
        """Add the rows of one call in a step, which has a number."""
        self._in_step = self._in_step + 1 if step == self._step else 1
        self._step, self.calls = step, max(self.calls, self._in_step)
        for stream in self.measures_by_axis.values():
            stream.update(rows)
        add_to(self.sums, "histogram", histogram(rows))

    def state(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        state = {f"{axis}.{k}": v for axis, stream in self.measures_by_axis.items() for k, v in stream.state().items()}
        return state | {f"sums.{name}": value for name, value in self.sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a result of `state`, or a sum of several."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            head, _, tail = name.partition(".")
            parts.setdefault(head, {})[tail] = value
        self.sums = parts.pop("sums", {})
        for axis, values in parts.items():
            self.measures_by_axis[axis].load_state(values)

    def records(self, head: dict[str, Any], measures: Iterable[str]) -> list[dict[str, Any]]:
        """One record for each axis."""
        counts = [int(count) for count in self.sums["histogram"].tolist()]
        dead = tuple(self.measures_by_axis["population"].dead_units().tolist())
        noise, error = noise_ratio(self.sums.get("noise"))
        return [
            {"module": head["module"], "tensor": head["tensor"], "mode": head["mode"], "axis": axis}
            | {"steps": head["steps"], "of_steps": head["of_steps"]}
            | dict.fromkeys(measures)
            | {name: value.item() for name, value in stream.compute().items()}
            | {"noise": noise, "noise_error": error}
            | {"zeros": counts[0], "histogram": tuple(counts[1:-1]), "not_finite": counts[-1]}
            | {"calls": self.calls, "dead_indices": dead}
            for axis, stream in self.measures_by_axis.items()
        ]


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add in place, so that a long run keeps its few small tensors where they are."""
    if name in sums:
        sums[name] += value.to(sums[name].device)
    else:
        sums[name] = value


def norm_moments(rows: Tensor, samples: int) -> dict[str, Tensor]:
    """Sums that mean and variance of each unit are made from, with the number of rows and of samples."""
    counts = torch.tensor([len(rows), samples], dtype=torch.float64, device="cpu")
    return {"counts": counts.to(rows.device), "sum": rows.double().sum(0), "square": rows.double().square().sum(0)}


@torch.no_grad()
def compare_norm(name: str, norm: Any, moments: Mapping[str, Tensor]) -> Norm:
    """A batch norm's inputs in evaluation against its running statistics."""
    mean, variance = (value.detach().double() for value in (norm.running_mean, norm.running_var))
    counts, total, square = (moments[key].to(mean.device) for key in ("counts", "sum", "square"))
    observed = total / counts[0]
    scale = (variance + norm.eps).sqrt()
    shift = (observed - mean) / scale
    spread = ((square / counts[0] - observed.square()).clamp(min=0) + norm.eps).sqrt() / scale
    away = [part.square().mean().sqrt().item() for part in (shift, spread - 1)]
    return Norm(name, int(counts[1].item()), away[0], away[1], spread.mean().item())
