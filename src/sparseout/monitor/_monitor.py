"""What a network's activations look like while it runs: counted on its device, read when a report is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseout._utils.activations import first_tensor, sampled, unit_dim
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import Modules, Site, choose, unwrapped
from sparseout._utils.validation import expected, kind
from sparseout.convert._batch_norm import batch_norms
from sparseout.measures._functions import Streaming
from sparseout.monitor._accumulators import (
    MODES,
    Key,
    Tally,
    all_together,
    compared,
    dropout_variance,
    moments,
    noise_sums,
)
from sparseout.monitor._report import SparsityReport


class SparsityMonitor:
    r"""Watches how sparse the activations of a model are, in training and in evaluation, one kept apart from the other.

    A with-block, or :meth:`attach` and :meth:`detach`; then :meth:`report`. Watched are the outputs of activation
    modules (softmaxes and attention are none) and the inputs of Sparseout and Dropout layers, on every `every`-th step.
    Nothing is read from the device before a report, and nothing is left on the model after `detach`.

    **A step** is one call of the model, and all calls of a module in it count. Where only its submodules are called, as
    training frameworks do, a step lasts until the watched module that began it is called again. Training and evaluation
    are counted apart, by the flag `training` of the module whose call begins the step; the first step of each is
    watched. What activation checkpointing computes again in backward is not counted.

    **Units** are the channels of what ``Sparseout1d/2d/3d`` and ``nn.Dropout1d/2d/3d`` take in; else they lie along
    dim 1 of a 4-d or 5-d tensor and along the last dim of others. Rows are all the rest. Of a call
    with more than 4096 rows (samples, times positions of a map) every s-th is taken, s the least step that leaves so
    many and has no factor in common with their number, so that all positions of a map are met: always the same ones.

    **Under torch.compile** the graph breaks at each watched module while the monitor is attached, which with
    `fullgraph=True` is an error, and attaching and detaching call `torch.compiler.reset()`, as compiled code would not
    see the change: a step after either is compiled anew.

    A copy of the model, or one that was pickled, is not watched. Names are those of the model that was written, without
    what `torch.compile` and `DistributedDataParallel` put around it.

    Args:
        model: the module that is run.
        modules: what to watch instead: a function (name, module) -> bool, or a collection of dotted names or of types.
            Dropout-like modules are watched at their input, all others at their output: its first floating-point
            tensor, if it is a tuple or a dict.
        measures: names in `sparseout.measures`; gini, which needs whole rows, is None on the lifetime axis.
        every: watch one step in so many.
        unit_dim: where units lie, for all: 1 for sequences in the layout (N, C, L). A module that is called at several
            widths has a record for each.

    Raises:
        ValueError: for a value out of range; if `modules` has a name or type the model has not, or nothing is there to
            watch.
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
        self._model = unwrapped(model)
        self._sites = choose(self._model, modules)
        self._norms = batch_norms(self._model)
        self._handles: list[Any] = []
        self.reset()

    def reset(self, mode: str | None = None) -> None:
        """Forget all steps, or those of one mode: "train" or "eval"."""
        if mode is None:
            self._tallies: dict[Key, Tally] = {}
            self._steps = {mode: [0, 0] for mode in MODES}  # watched, of how many
            self._depth = 0  # open calls of the model
            self._opener: str | None = None  # the site that began a step without the model
            self._mode, self._watching = "train", False
            self._inputs: dict[str, Tensor] = {}  # of noise layers, until they return
        elif mode in MODES:
            self._tallies = {key: tally for key, tally in self._tallies.items() if key[2] != mode}
            self._steps[mode] = [0, 0]
        else:
            raise ValueError(expected("mode", f"one of {', '.join(MODES)}", repr(mode)))

    def attach(self) -> Self:
        """Begin to watch. Returns the monitor itself."""
        if self._handles:
            return self
        self._depth, self._opener, self._inputs = 0, None, {}
        hook, model = _hook_class(), self._model
        self._handles.append(model.register_forward_pre_hook(hook(self._enter)))
        for site in self._sites:
            if site.tensor == "output":
                self._handles.append(site.module.register_forward_hook(hook(self._output, site)))
                continue
            self._handles.append(site.module.register_forward_pre_hook(hook(self._input, site), with_kwargs=True))
            self._handles.append(site.module.register_forward_hook(hook(self._noise, site)))
        for name, norm in self._norms.items():
            self._handles.append(norm.register_forward_pre_hook(hook(self._norm, name), with_kwargs=True))
        # Last, so that a site that is the model itself is still within the call; and after an error too.
        self._handles.append(model.register_forward_hook(hook(self._leave), always_call=True))
        reset_compiler()
        return self

    def detach(self) -> None:
        """Take every hook off the model. What was seen stays, until :meth:`reset`."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._inputs = {}
        reset_compiler()

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
            if module.training and dropout_variance(module):
                self._inputs[site.name] = x.clone() if getattr(module, "inplace", False) else x

    def _noise(self, site: Site, module: nn.Module, args: Any, output: Tensor) -> None:
        x = self._inputs.pop(site.name, None)
        if x is not None:
            dim = unit_dim(x, self.unit_dim, module)
            noise = noise_sums(module, x, output, dim)
            self._tallies["site", site.name, self._mode, x.shape[dim]].add("noise", noise)

    def _norm(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._watching and self._mode == "eval" and not module.training and not _in_backward():
            x = first_tensor((args, kwargs))
            if x is not None:
                tally = self._tallies.setdefault(("norm", name, "eval", 0), Tally(()))
                for key, value in moments(sampled(x, 1), x.shape[0]).items():
                    tally.add(key, value)

    @torch.no_grad()
    def _add(self, site: Site, value: Any) -> Tensor:
        x = first_tensor(value)
        if x is None:
            wish = f"a floating-point tensor of at least one dimension as {site.tensor}"
            raise TypeError(expected(site.name or "model", f"a module with {wish}", "one without"))
        rows = sampled(x, unit_dim(x, self.unit_dim, site.module))
        # a module may be called at several widths, as the one ReLU of a ResNet's block is
        key = ("site", site.name, self._mode, rows.shape[1])
        self._tallies.setdefault(key, Tally(self.measures)).see(rows)
        return x

    def report(self, sync: bool = True) -> SparsityReport:
        """What was seen since the last reset; the only place where the device is waited for.

        With `torch.distributed` initialised it is that of all processes together, and all must ask for it;
        `sync=False` is this process alone. The step counts are then those of the process that saw most.
        """
        tallies, steps = self._tallies, self._steps
        if sync and dist.is_available() and dist.is_initialized():
            tallies, steps = all_together(tallies, steps, next(_tensors(self._model), torch.zeros(())).device)
        records, seen = [], set()
        for site in self._sites:
            for mode in MODES:
                head = {"module": site.name, "tensor": site.tensor, "mode": mode}
                for units in sorted(key[3] for key in tallies if key[:3] == ("site", site.name, mode)):
                    seen.add(site.name)
                    records += tallies["site", site.name, mode, units].records(head, steps[mode], self.measures)
        norms = [
            compared(name, norm, tallies["norm", name, "eval", 0])
            for name, norm in self._norms.items()
            if ("norm", name, "eval", 0) in tallies
        ]
        silent = [site.name for site in self._sites if site.name not in seen]
        return SparsityReport(records, {mode: (s[0], s[1]) for mode, s in steps.items()}, norms, silent)


@cache
def _hook_class() -> Any:
    """A class of hooks that call a method of the monitor; made when needed, as it imports the compiler."""

    class Hook:
        def __init__(self, method: Any, *place: Any) -> None:
            self.method, self.place = method, place

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # Python that counts is no work for the compiler
        def __call__(self, *args: Any) -> None:
            self.method(*self.place, *args)

        def __reduce__(self) -> Any:
            return _Unwatched, ()

    return Hook


class _Unwatched:
    """What is left of a hook in a copy of the model, or in a file: nothing happens."""

    def __call__(self, *args: Any) -> None:
        pass


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
