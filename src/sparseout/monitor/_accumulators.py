"""What was seen at one place: sums on its device, and what they say once they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseout._utils.activations import channel_dim, sampled
from sparseout._utils.validation import expected
from sparseout.layers import Sparseout
from sparseout.measures._functions import Streaming
from sparseout.monitor._histogram import histogram

MODES = ("train", "eval")


Key = tuple[str, str, str, int]  # "site" or "norm", name, mode, and a site's number of units


class Norm(NamedTuple):
    """A batch norm's inputs in evaluation against its running statistics, in units of the running deviation."""

    module: str
    samples: int
    shift: float  # of means, root mean square over channels
    stretch: float  # of standard deviations, likewise
    spread: float  # mean ratio of standard deviations


class Tally:
    """What was seen at one place in one mode: tensors on its device that merge by summing."""

    def __init__(self, measures: Iterable[str]) -> None:
        lifetime = [name for name in measures if name != "gini"]
        self.streams = {"population": Streaming(measures), "lifetime": Streaming(lifetime, axis="lifetime")}
        self.sums: dict[str, Tensor] = {}

    def see(self, rows: Tensor) -> None:
        for stream in self.streams.values():
            stream.update(rows)
        self.add("histogram", histogram(rows))

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def state(self) -> dict[str, Tensor]:
        streams = {f"{axis}.{k}": v for axis, stream in self.streams.items() for k, v in stream.state().items()}
        return streams | {f"sums.{name}": value for name, value in self.sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        part = {
            head: {k.removeprefix(f"{head}."): v for k, v in state.items() if k.startswith(f"{head}.")}
            for head in ("population", "lifetime", "sums")
        }
        self.sums = part.pop("sums")
        for axis, values in part.items():
            self.streams[axis].load_state(values)

    def records(self, head: dict[str, Any], steps: list[int], measures: Iterable[str]) -> list[dict[str, Any]]:
        """One record for each axis."""
        histogram = [int(count) for count in self.sums["histogram"].tolist()]
        noise, error = _noise_ratio(self.sums.get("noise"))
        found = []
        for axis, stream in self.streams.items():
            values: dict[str, Any] = {name: value.item() for name, value in stream.compute().items()}
            found.append(
                {**head, "axis": axis, "steps": steps[0], "of_steps": steps[1]}
                | dict.fromkeys(measures)
                | values
                | {"noise": noise, "noise_error": error}
                | {"zeros": histogram[0], "histogram": tuple(histogram[1:-1]), "not_finite": histogram[-1]}
            )
        return found


def dropout_variance(module: nn.Module) -> float | None:
    """V of the noise of Dropout at the layer's p; None where there is none to compare with."""
    if not isinstance(module, (Sparseout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
        return None
    p: float = module.p
    return p / (1 - p) if 0 < p < 1 else None


@torch.no_grad()
def noise_sums(module: nn.Module, x: Tensor, y: Tensor, unit: int) -> Tensor:
    """Sums over rows of n = |y - x|^2 and d = V |x|^2, and of n^2, n d and d^2, as a standard error needs them."""
    before, after = sampled(x, unit).double(), sampled(y, unit).double()
    noise = (after - before).square().sum(1)
    dropout = before.square().sum(1) * (dropout_variance(module) or math.nan)
    spread = torch.stack([(noise * noise).sum(), (noise * dropout).sum(), (dropout * dropout).sum()])
    # Rows that share their draws are taken as one, the worst case.
    channels = channel_dim(module, x.ndim)
    dims: Iterable[int] = () if channels is None else range(channels + 1, x.ndim)
    if isinstance(module, Sparseout):
        dims = module._dims(x)
    apart = {dim % x.ndim for dim in dims} - {unit % x.ndim}
    rows = max(1, x.numel() // max(1, x.shape[unit]))
    together = max(1.0, math.prod(x.shape[dim] for dim in apart) * len(before) / rows)
    return torch.cat([torch.stack([noise.sum(), dropout.sum()]), spread * together])


def _noise_ratio(sums: Tensor | None) -> tuple[float | None, float | None]:
    """The noise's power over that of Dropout, and its standard error; None if there was no noise to see."""
    noise, dropout, nn_, nd, dd = sums.tolist() if sums is not None else (0.0,) * 5
    if not dropout:
        return None, None
    ratio = noise / dropout
    return ratio, math.sqrt(max(0.0, nn_ - 2 * ratio * nd + ratio**2 * dd)) / dropout


@torch.no_grad()
def moments(rows: Tensor, samples: int) -> dict[str, Tensor]:
    """What mean and variance of each unit are made from, and the number of samples."""
    counts = torch.tensor([len(rows), samples], dtype=torch.float64)
    return {"counts": counts.to(rows.device), "sum": rows.double().sum(0), "square": rows.double().square().sum(0)}


def compared(name: str, norm: Any, tally: Tally) -> Norm:
    """What a batch norm saw in evaluation against its running statistics, in units of their standard deviation."""
    mean, variance = (value.detach().double() for value in (norm.running_mean, norm.running_var))
    counts, total, square = (tally.sums[key].to(mean.device) for key in ("counts", "sum", "square"))
    seen = total / counts[0]
    scale = (variance + norm.eps).sqrt()
    shift = (seen - mean) / scale
    spread = ((square / counts[0] - seen.square()).clamp(min=0) + norm.eps).sqrt() / scale
    away = [part.square().mean().sqrt().item() for part in (shift, spread - 1)]
    return Norm(name, int(counts[1].item()), away[0], away[1], spread.mean().item())


def all_together(
    tallies: dict[Key, Tally], steps: dict[str, list[int]], device: torch.device
) -> tuple[dict[Key, Tally], dict[str, list[int]]]:
    """The sums over all processes, in one all_reduce; a process that has not been somewhere counts as nothing."""
    mine = {key: tally.state() for key, tally in tallies.items()}
    shapes = {key: {name: tuple(value.shape) for name, value in state.items()} for key, state in mine.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    measures = {key: tuple(tally.streams["population"]._table) for key, tally in tallies.items()}
    dist.all_gather_object(everyone, (shapes, steps, measures))
    layout: dict[Key, dict[str, tuple[int, ...]]] = {}
    for theirs, _, _ in everyone:
        for key, state in theirs.items():
            layout.setdefault(key, {}).update(state)
    for theirs, _, _ in everyone:  # the same on all, so that all stop
        for key, state in theirs.items():
            if any(layout[key][name] != shape for name, shape in state.items()):
                raise ValueError(expected(key[1], "a module of as many units on every process", "different ones"))
    named = {key: names for _, _, theirs in everyone for key, names in theirs.items()}
    flat = [
        mine.get(key, {}).get(name, torch.zeros(shape)).to(device, torch.float64).flatten()
        for key, state in layout.items()
        for name, shape in state.items()
    ]
    joined = torch.cat(flat) if flat else torch.zeros(0, device=device)
    dist.all_reduce(joined)
    pieces = iter(joined.split([len(piece) for piece in flat]))
    summed = {}
    for key, state in layout.items():
        summed[key] = Tally(named[key])
        summed[key].load({name: next(pieces).reshape(shape) for name, shape in state.items()})
    most = {mode: max((theirs[mode] for _, theirs, _ in everyone), key=lambda s: (s[0], s[1])) for mode in MODES}
    return summed, most
