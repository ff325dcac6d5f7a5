"""What a network's activations look like while it runs: counted on its device, read when a report is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseout.errors import expected, kind
from sparseout.layers import Sparseout
from sparseout.measures import Streaming
from sparseout.norm import batch_norms
from sparseout.sites import Modules, Site, choose, first_tensor, sampled, unit_dim
from sparseout.sparsity_report import BINS, LOWEST, PER_DECADE, Norm, SparsityReport

MODES = ("train", "eval")


class SparsityMonitor:
    r"""Watches how sparse the activations of a model are, in training and in evaluation, one kept apart from the other.

    A with-block, or :meth:`attach` and :meth:`detach`; then :meth:`report`. Watched are the outputs of activation
    modules (softmaxes and attention are none) and the inputs of Sparseout and Dropout layers, on every `every`-th step.
    Nothing is read from the device before a report, and nothing is left on the model after `detach`.

    **A step** is one call of the model, and all calls of a module in it count. Where only its submodules are called, as
    training frameworks do, a step lasts until the watched module that began it is called again. Training and evaluation
    are counted apart, by the flag `training` of the module whose call begins the step; the first step of each is
    watched. What activation checkpointing computes again in backward is not counted.

    **Units** lie along dim 1 of a 4-d or 5-d tensor and along the last dim of others; rows are all the rest. Of a call
    with more than 4096 rows (samples, times positions of a map) every s-th is taken, s the least step that leaves so
    many and has no factor in common with their number, so that all positions of a map are met: always the same ones.

    **Under torch.compile** the graph breaks at each watched module while the monitor is attached (so not with
    `fullgraph=True`), and attaching and detaching call `torch.compiler.reset()`, as compiled code would not see the
    change: a step after either is compiled anew.

    Args:
        model: the module that is run; of a compiled one the module within.
        modules: what to watch instead: a function (name, module) -> bool, or a collection of dotted names or of types.
            Dropout-like modules are watched at their input, all others at their output: its first floating-point
            tensor, if it is a tuple or a dict.
        measures: names in `sparseout.measures`; gini, which needs whole rows, is None on the lifetime axis.
        every: watch one step in so many.
        unit_dim: where units lie, for all: 1 for sequences in the layout (N, C, L).

    Raises:
        ValueError: for a value out of range; if `modules` has a name or type that the model has not, or nothing is
            there to watch; later, in the forward pass, where a module's number of units changes.
        TypeError: for an argument of another type; later, for a watched output without a floating-point tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.eye(2)), model[0].bias.data.zero_()
        >>> with SparsityMonitor(model) as monitor:
        ...     _ = model(torch.tensor([[1.0, -1.0], [3.0, -2.0], [-1.0, -1.0]]))
        >>> population = monitor.report()[0]
        >>> population["density"], population["dead_units"], population["undefined_rows"]
        (0.3333333333333333, 1, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Modules | None = None,
        *,
        measures: Iterable[str] = ("hoyer", "gini", "density"),
        every: int = 1,
        unit_dim: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(expected("model", "a module", kind(model)))
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(expected("every", "an int", kind(every)))
        if every < 1:
            raise ValueError(expected("every", "at least 1", every))
        if unit_dim is not None and (isinstance(unit_dim, bool) or not isinstance(unit_dim, int)):
            raise TypeError(expected("unit_dim", "an int or None", kind(unit_dim)))
        self.measures = measures if isinstance(measures, str) else tuple(measures)
        Streaming(self.measures)  # says what is wrong with them
        self.every = every
        self.unit_dim = unit_dim
        self._model = getattr(model, "_orig_mod", model)  # names are then those of the model that was written
        self._sites = choose(self._model, modules)
        self._norms = batch_norms(self._model)
        self._handles: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self._tallies: dict[tuple[str, str, str], _Tally] = {}  # ("site" or "norm", name, mode)
        self._steps = {mode: [0, 0] for mode in MODES}  # watched, of how many
        self._depth = 0  # open calls of the model
        self._opener: str | None = None  # the site that began a step without the model
        self._mode, self._watching = "train", False
        self._inputs: dict[str, Tensor] = {}  # of noise layers, until they return

    def attach(self) -> Self:
        """Begin to watch. Returns the monitor itself."""
        if self._handles:
            return self
        self._depth, self._opener, self._inputs = 0, None, {}
        hooked: Any = torch.compiler.disable  # Python that counts is no work for the compiler
        model = self._model
        self._handles.append(model.register_forward_pre_hook(hooked(self._enter)))
        for site in self._sites:
            if site.tensor == "output":
                self._handles.append(site.module.register_forward_hook(hooked(_Hook(self._output, site))))
                continue
            before, after = hooked(_Hook(self._input, site)), hooked(_Hook(self._noise, site))
            self._handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(site.module.register_forward_hook(after))
        for name, norm in self._norms.items():
            self._handles.append(norm.register_forward_pre_hook(hooked(_Hook(self._norm, name)), with_kwargs=True))
        # Last, so that a site that is the model itself is still within the call; and after an error too.
        self._handles.append(model.register_forward_hook(hooked(self._leave), always_call=True))
        torch.compiler.reset()
        return self

    def detach(self) -> None:
        """Take every hook off the model. What was seen stays, until :meth:`reset`."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._inputs = {}
        torch.compiler.reset()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _enter(self, model: nn.Module, args: Any) -> None:
        if _in_backward():
            return
        if self._depth == 0:
            self._begin(model.training)
            self._opener = None
        self._depth += 1

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if not _in_backward():
            self._depth = max(0, self._depth - 1)

    def _begin(self, training: bool) -> None:
        self._mode = MODES[0] if training else MODES[1]
        steps = self._steps[self._mode]
        self._watching = steps[1] % self.every == 0
        steps[0] += self._watching
        steps[1] += 1

    def _due(self, site: Site) -> bool:
        if _in_backward():
            return False
        if self._depth == 0 and self._opener in (None, site.name):
            self._begin(site.module.training)
            self._opener = site.name
        return self._watching

    def _output(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        if self._due(site):
            self._add(site, output)

    def _input(self, site: Site, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs.pop(site.name, None)
        if self._due(site):
            x = self._add(site, (args, kwargs))
            if module.training and _variance(module):
                self._inputs[site.name] = x.clone() if getattr(module, "inplace", False) else x

    def _noise(self, site: Site, module: nn.Module, args: Any, output: Tensor) -> None:
        x = self._inputs.pop(site.name, None)
        if x is not None:
            noise = _noise_sums(module, x, output, unit_dim(x, self.unit_dim))
            self._tallies["site", site.name, self._mode].add("noise", noise)

    def _norm(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._watching and self._mode == "eval" and not module.training and not _in_backward():
            x = first_tensor((args, kwargs))
            if x is not None:
                tally = self._tallies.setdefault(("norm", name, "eval"), _Tally(()))
                for key, value in _moments(sampled(x, 1), x.shape[0]).items():
                    tally.add(key, value)

    @torch.no_grad()
    def _add(self, site: Site, value: Any) -> Tensor:
        x = first_tensor(value)
        if x is None:
            wish = f"a floating-point tensor of at least one dimension as {site.tensor}"
            raise TypeError(expected(site.name or "model", f"a module with {wish}", "one without"))
        rows = sampled(x, unit_dim(x, self.unit_dim))
        tally = self._tallies.setdefault(("site", site.name, self._mode), _Tally(self.measures))
        if tally.units not in (None, rows.shape[1]):
            wish = f"a module of {tally.units} units at every call (choose other `modules`, or `unit_dim`)"
            raise ValueError(expected(site.name or "model", wish, rows.shape[1]))
        tally.see(rows)
        return x

    def report(self, sync: bool = True) -> SparsityReport:
        """What was seen since the last reset; the only place where the device is waited for.

        With `torch.distributed` initialised it is that of all processes together, and all must ask for it;
        `sync=False` is this process alone. The step counts are then those of the process that saw most.
        """
        tallies, steps = self._tallies, self._steps
        if sync and dist.is_available() and dist.is_initialized():
            tallies, steps = _together(tallies, steps, next(_tensors(self._model), torch.zeros(())).device)
        records, seen = [], set()
        for site in self._sites:
            for mode in MODES:
                tally = tallies.get(("site", site.name, mode))
                if tally is not None:
                    seen.add(site.name)
                    head = {"module": site.name, "tensor": site.tensor, "mode": mode}
                    records += tally.records(head, steps[mode], self.measures)
        norms = [
            _compared(name, norm, tallies["norm", name, "eval"])
            for name, norm in self._norms.items()
            if ("norm", name, "eval") in tallies
        ]
        silent = [site.name for site in self._sites if site.name not in seen]
        return SparsityReport(records, {mode: (s[0], s[1]) for mode, s in steps.items()}, norms, silent)


class _Hook:
    """A hook that knows its place; a lambda could not be copied with the model."""

    def __init__(self, function: Any, place: Any) -> None:
        self.function, self.place = function, place

    def __call__(self, *args: Any) -> None:
        self.function(self.place, *args)


class _Tally:
    """What was seen at one place in one mode: tensors on its device that merge by summing."""

    def __init__(self, measures: Iterable[str]) -> None:
        lifetime = [name for name in measures if name != "gini"]
        self.streams = {"population": Streaming(measures), "lifetime": Streaming(lifetime, axis="lifetime")}
        self.sums: dict[str, Tensor] = {}
        self.units: int | None = None

    def see(self, rows: Tensor) -> None:
        self.units = rows.shape[1]
        for stream in self.streams.values():
            stream.update(rows)
        self.add("histogram", _histogram(rows))

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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _histogram(rows: Tensor) -> Tensor:
    """Counts of 0, of log10|x| in each bin (what is beyond them in the outermost), and of NaN and infinity."""
    size = rows.abs() if rows.dtype == torch.float64 else rows.float().abs()
    bins = ((size.log10() - LOWEST) * PER_DECADE).floor().clamp(0, BINS - 1) + 1
    bins = bins.masked_fill(size == 0, 0).masked_fill(~size.isfinite(), BINS + 1).long().flatten()
    ones = torch.ones((), dtype=torch.float64, device=rows.device).expand(bins.shape)
    return torch.zeros(BINS + 2, dtype=torch.float64, device=rows.device).scatter_add(0, bins, ones)


def _variance(module: nn.Module) -> float | None:
    """V of the noise of Dropout at the layer's p; None where there is none to compare with."""
    if not isinstance(module, (Sparseout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
        return None
    p: float = module.p
    return p / (1 - p) if 0 < p < 1 else None


@torch.no_grad()
def _noise_sums(module: nn.Module, x: Tensor, y: Tensor, unit: int) -> Tensor:
    """Sums over rows of n = |y - x|^2 and d = V |x|^2, and of n^2, n d and d^2, as a standard error needs them."""
    before, after = sampled(x, unit).double(), sampled(y, unit).double()
    noise = (after - before).square().sum(1)
    dropout = before.square().sum(1) * (_variance(module) or math.nan)
    spread = torch.stack([(noise * noise).sum(), (noise * dropout).sum(), (dropout * dropout).sum()])
    # Rows that share their draws are taken as one, the worst case.
    dims: Iterable[int] = () if isinstance(module, nn.Dropout) else range(2, x.ndim)
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
def _moments(rows: Tensor, samples: int) -> dict[str, Tensor]:
    counts = torch.tensor([len(rows), samples], dtype=torch.float64)
    return {"counts": counts.to(rows.device), "sum": rows.double().sum(0), "square": rows.double().square().sum(0)}


def _compared(name: str, norm: Any, tally: _Tally) -> Norm:
    """What a batch norm saw in evaluation against its running statistics, in units of their standard deviation."""
    mean, variance = (value.detach().double() for value in (norm.running_mean, norm.running_var))
    counts, total, square = (tally.sums[key].to(mean.device) for key in ("counts", "sum", "square"))
    seen = total / counts[0]
    scale = (variance + norm.eps).sqrt()
    shift = (seen - mean) / scale
    spread = ((square / counts[0] - seen.square()).clamp(min=0) + norm.eps).sqrt() / scale
    away = [part.square().mean().sqrt().item() for part in (shift, spread - 1)]
    return Norm(name, int(counts[1].item()), away[0], away[1], spread.mean().item())


def _together(
    tallies: dict[tuple[str, str, str], _Tally], steps: dict[str, list[int]], device: torch.device
) -> tuple[dict[tuple[str, str, str], _Tally], dict[str, list[int]]]:
    """The sums over all processes, in one all_reduce; a process that has not been somewhere counts as nothing."""
    mine = {key: tally.state() for key, tally in tallies.items()}
    shapes = {key: {name: tuple(value.shape) for name, value in state.items()} for key, state in mine.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    measures = {key: tuple(tally.streams["population"]._table) for key, tally in tallies.items()}
    dist.all_gather_object(everyone, (shapes, steps, measures))
    layout: dict[tuple[str, str, str], dict[str, tuple[int, ...]]] = {}
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
        summed[key] = _Tally(named[key])
        summed[key].load({name: next(pieces).reshape(shape) for name, shape in state.items()})
    most = {mode: max((theirs[mode] for _, theirs, _ in everyone), key=lambda s: (s[0], s[1])) for mode in MODES}
    return summed, most
