"""Monitor of a model's activations: counted on their device, read when a report is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from threading import RLock, get_ident
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparseout._utils.activations import UnitDim, UnitTracker, counted_rows, first_tensor, local_rows, sampled
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.distributed import (
    Group,
    all_gather,
    all_reduce_sums,
    check_group,
    check_replicas,
    data_parallel_group,
    is_distributed,
)
from sparseout._utils.hooks import EagerHook, Hooks, is_counted
from sparseout._utils.modules import HookPoint, Modules, check_model, choose, unwrapped
from sparseout._utils.torch_internals import outside_transforms, without_transforms
from sparseout._utils.validation import check_int, expected
from sparseout.convert._batch_norm import batch_norms
from sparseout.measures import Streaming
from sparseout.monitor._accumulators import Accumulators, Key, add_to, compare_norm, norm_moments
from sparseout.monitor._noise import dropout_variance, noise_powers, noise_sums, rows_that_share
from sparseout.monitor._report import SparsityReport
from sparseout.monitor._steps import MODES, StepCounter


class SparsityMonitor:
    r"""Measures how sparse the activations of a model are, separately in training and in evaluation.

    Use it in a with-block, or call :meth:`attach` and :meth:`detach`; then :meth:`report`. It watches the outputs of
    activation modules, of torch or by the name of their class (softmax and attention are not among them), and the
    inputs of Sparseout and Dropout layers, on every `every`-th step. Nothing is read from the device before a report
    (except the lengths of jagged tensors), and nothing is left on the model after `detach`.

    **A step** is one call of the model. All calls of a module in it count; if there are several the report says so,
    since one record covers them all. If only submodules are called, as training frameworks do, a step lasts until the
    watched module that began it is called again.

    **Modes.** Training and evaluation are counted separately, and the first step of each is watched. A row belongs to
    the mode of the watched module at the time of the call: a frozen part that is kept in evaluation mode has records of
    evaluation, and so has a decoder that is evaluated alone.

    **What counts.** In a block of :class:`sparseout.row_mask` the rows that its mask keeps. Not what activation
    checkpointing computes again in backward, nor passes without values: over meta or fake tensors, in `torch.export`,
    `make_fx`, `torch.jit.trace` and `torch.fx`. Inside `torch.func` transforms the values are counted: under `vmap`
    those of all examples. Of nested tensors the real rows are counted, no padding.

    **Units** lie where the module that made a tensor put them: last after Linear, Embedding, LayerNorm, recurrent and
    attention modules, along dim 1 after convolutions, batch, group and instance norm; activations, noise layers and
    functions keep them there. A tensor permuted or reshaped in between has them along its one dim of as many units;
    failing that where they were, if the number of dims is unchanged. Before any such module they are along dim 1 of a
    4-d or 5-d tensor and the last dim of others. ``Sparseout1d/2d/3d`` and ``nn.Dropout1d/2d/3d`` know their channels;
    `unit_dim` overrides all of this. All other dims are rows. Of a call with more than 4096 rows (samples, times
    positions of a map) every s-th is measured, with s the smallest step that leaves at most 4096 and has no factor in
    common with their number, so that every position of a map is reached; these are always the same rows.

    **Under torch.compile** the graph breaks at each watched module while the monitor is attached, which with
    `fullgraph=True` is an error, and attaching and detaching call `torch.compiler.reset()`, as compiled code would not
    see the change: the next step is recompiled.

    A copy of the model, or one that was pickled, is not watched. Names are those of the model that was written, without
    what `torch.compile`, `DistributedDataParallel` and the like put around it or around its parts.

    Args:
        model: the module that is run.
        modules: what to watch instead: a function (name, module) -> bool, or a collection of dotted names or of types.
            Dropout-like modules are watched at their input, all others at their output: its first floating-point
            tensor, if it is a tuple or a dict.
        measures: names in `sparseout.measures`; gini, which needs whole rows, is None on the lifetime axis.
        every: watch every `every`-th step.
        eps: values up to this magnitude count as zero: in the measures sparsity and density, and in what is a dead, a
            live or an always-on unit. GELU, SiLU and tanh have hardly any exact zeros.
        relative: `eps` is in units of the root mean square of the row, the units of one sample.
        unit_dim: where units lie, for all modules; or a mapping from names or types of modules to dims, or a function
            (name, module, tensor) -> dim or None, for some of them. A module that is called at several widths has a
            record for each.

    Raises:
        ValueError: for a value out of range; if `modules` has a name or type the model has not, or nothing is there to
            watch; later, for a `unit_dim` that a tensor does not have.
        TypeError: for an argument of another type; later, if a module that `modules` chose puts out no floating-point
            tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.eye(2)), model[0].bias.data.zero_()
        >>> with SparsityMonitor(model) as monitor:
        ...     _ = model(torch.tensor([[1.0, -1.0], [3.0, -2.0], [-1.0, -1.0]]))
        >>> population = monitor.report()[0]
        >>> population["density"], population["dead_units"], population["undefined_rows"]
        (0.3333333333333333, 1, 1)

    Source: that of the measures, :mod:`sparseout.measures`, and of the two axes, :class:`sparseout.SparsityReport`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Modules | None = None,
        *,
        measures: Iterable[str] = ("hoyer", "gini", "density"),
        every: int = 1,
        unit_dim: UnitDim = None,
        eps: float = 0.0,
        relative: bool = False,
    ) -> None:
        check_model(model)
        check_int("every", every, 1)
        self.measures = Streaming(measures, eps=eps, relative=relative).measures  # checked there
        self.every, self.unit_dim, self.eps, self.relative = every, unit_dim, eps, relative
        self._given, self._model = model, unwrapped(model)  # the wrappers know their process group
        self._units = UnitTracker(self._model, unit_dim)
        self._sites, self._chosen = choose(self._model, modules), modules is not None
        self._norms = batch_norms(self._model)
        self._hooks = Hooks(EagerHook)
        self._compared = False  # the parameters with those of other processes, once
        self._lock = RLock()  # of what is added to, for threads that share the model
        self.reset()

    def reset(self, mode: str | None = None) -> None:
        """Forget all steps, or those of one mode: "train" or "eval"."""
        if mode is None:
            self._accumulators: dict[Key, Accumulators] = {}
            self._moments: dict[str, dict[str, Tensor]] = {}  # of what batch norms are given, by name
            self._counter = StepCounter(self.every)
            self._called: set[str] = set()  # in steps that are watched and in others
            self._misfits: set[tuple[str, str]] = set()  # name and mode where open row masks were for other sizes
            self._inputs: dict[tuple[str, int], Tensor] = {}  # of noise layers, by thread, until they return
        elif mode in MODES:
            self._accumulators = {key: value for key, value in self._accumulators.items() if key[1] != mode}
            self._misfits = {(name, its) for name, its in self._misfits if its != mode}
            if mode == "eval":
                self._moments = {}
            self._counter.reset(mode)
        else:
            raise ValueError(expected("mode", f"one of {', '.join(MODES)}", repr(mode)))

    def attach(self) -> Self:
        """Begin to watch. Returns the monitor itself."""
        if self._hooks:
            return self
        self._counter.close()
        self._units.attach()
        self._hooks.before(self._model, self._enter)
        for point in self._sites:
            if point.tensor == "output":
                self._hooks.after(point.module, self._output, point)
                continue
            self._hooks.before(point.module, self._input, point)
            self._hooks.after(point.module, self._noise, point)
        for name, norm in self._norms.items():
            self._hooks.before(norm, self._norm, name)
        # Last, so that a module that is the model itself is still within the call; and after an error too.
        self._hooks.after(self._model, self._leave, always=True)
        reset_compiler()
        return self

    def detach(self) -> None:
        """Take every hook off the model. What was seen stays, until :meth:`reset`."""
        if not self._hooks:
            return
        self._hooks.remove()
        self._units.detach()
        self._inputs = {}
        reset_compiler()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_inputs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        of_later_versions = {"eps": 0.0, "relative": False, "_misfits": set()}
        self.__dict__ |= of_later_versions | state | {"_lock": RLock()}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        with self._lock:
            self._counter.enter(model.training, is_counted(args, kwargs))

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        with self._lock:
            self._counter.leave()

    def _output(self, point: HookPoint, module: nn.Module, args: Any, output: Any) -> None:
        self._update(point, output)

    def _input(self, point: HookPoint, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs.pop((point.name, get_ident()), None)
        x = self._update(point, (args, kwargs))
        if x is not None and module.training and dropout_variance(module) is not None:
            self._inputs[point.name, get_ident()] = x.clone() if getattr(module, "inplace", False) else x

    def _noise(self, point: HookPoint, module: nn.Module, args: Any, output: Tensor) -> None:
        x = self._inputs.pop((point.name, get_ident()), None)
        if x is None:
            return
        dim = self._units.dim(point.name, module, x) - x.ndim
        with outside_transforms():
            together = rows_that_share(module, x, dim)
            x, y = (local_rows(without_transforms(t), dim) for t in (x, output))
            for before, after in zip(counted_rows(x, dim)[0], counted_rows(y, dim)[0], strict=True):
                sums = noise_sums(noise_powers(module, before, after), together * len(before))
                with self._lock:
                    add_to(self._at(point, module, before.shape[1]).sums, "noise", sums)

    def _norm(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor((args, kwargs))
        if module.training or x is None or not is_counted(x):
            return
        if self._counter.watches("eval"):
            with outside_transforms():
                x = without_transforms(x)
                # of all rows, padding too, as the running statistics are
                for key, value in norm_moments(sampled(x, 1), x.shape[0]).items():
                    with self._lock:
                        add_to(self._moments.setdefault(name, {}), key, value)

    def _update(self, point: HookPoint, value: Any) -> Tensor | None:
        """Add what a module takes or gives to its accumulators; returns the tensor if it was added."""
        x = first_tensor(value)
        if not is_counted(value if x is None else x):
            return None
        with self._lock:
            self._called.add(point.name)
            if not self._counter.part(point.name, point.module.training):
                return None
        if x is None and not self._chosen:
            return None
        if x is None:
            wanted = f"a module with a floating-point tensor of at least one dimension as {point.tensor}"
            raise TypeError(expected(point.name or "model", wanted, "one without"))
        dim = self._units.dim(point.name, point.module, x) - x.ndim
        with outside_transforms():
            parts, misfit = counted_rows(local_rows(without_transforms(x), dim), dim)
            with self._lock:
                for rows in parts:
                    self._at(point, point.module, rows.shape[1]).update(
                        rows, self._counter.number(point.module.training)
                    )
                if misfit:
                    self._misfits.add((point.name, MODES[not point.module.training]))
        return x

    def _at(self, point: HookPoint, module: nn.Module, units: int) -> Accumulators:
        # a module may be called at several widths, as the one ReLU of a ResNet's block is
        key = (point.name, MODES[not module.training], units)
        if key not in self._accumulators:
            self._accumulators[key] = Accumulators(self.measures, self.eps, self.relative)
        return self._accumulators[key]

    def report(self, sync: bool = True, group: Group | None = None) -> SparsityReport:
        """The report on all that ran since the last reset; the only place where the device is waited for.

        With `torch.distributed` initialised it is that of all data-parallel processes together, and all of them must
        ask for it. The step counts are those of the process that saw most.

        Args:
            sync: False for this process alone.
            group: the processes that run copies of the model on rows of their own. None: the group of
                DistributedDataParallel, FullyShardedDataParallel or `fully_shard`, if the model that was given is
                wrapped in one, and else all processes.

        Raises:
            ValueError: on all processes, if the group is not known and the processes have different parameters, as the
                stages of a pipeline and tensor-parallel ones have; if their monitors differ in `measures` or `every`;
                for a group without this process.
            TypeError: for a group of another type.
        """
        check_group(group)
        accumulators, moments = self._accumulators, self._moments
        counts, called, misfits = self._counter.counts, self._called, self._misfits
        if sync and is_distributed():
            if group is None:
                group = data_parallel_group(self._given)
                if group is None and not self._compared:
                    check_replicas(self._model)
                    self._compared = True
            accumulators, moments, counts, called, misfits = self._together(group)
        records = []
        for point in self._sites:
            for mode in MODES:
                head: dict[str, Any] = {"module": point.name, "tensor": point.tensor, "mode": mode}
                head |= {"steps": counts[mode][0], "of_steps": counts[mode][1]}
                for key in sorted(key for key in accumulators if key[:2] == (point.name, mode)):
                    records += accumulators[key].records(head, self.measures)
        norms = [compare_norm(name, norm, moments[name]) for name, norm in self._norms.items() if name in moments]
        silent = [point.name for point in self._sites if point.name not in called]
        skipped = called - {name for name, _, _ in accumulators}
        skipped_names = [point.name for point in self._sites if point.name in skipped]
        steps = {mode: (n[0], n[1]) for mode, n in counts.items()}
        unmasked = [point.name for point in self._sites if any(name == point.name for name, _ in misfits)]
        zero = (self.eps, self.relative)
        return SparsityReport(records, steps, norms, silent, skipped_names, unmasked, zero)

    def _together(self, group: Group | None) -> Any:
        """Accumulators, moments, counts of steps, modules called and those no mask fitted, of all of a group."""
        sums: dict[tuple[Key | str, str], Tensor] = {
            (key, name): value for key, at in self._accumulators.items() for name, value in at.state().items()
        }
        sums |= {(norm, name): value for norm, part in self._moments.items() for name, value in part.items()}
        parts: dict[Key | str, dict[str, Tensor]] = {}
        for (owner, name), value in all_reduce_sums(sums, self._device(), group).items():
            parts.setdefault(owner, {})[name] = value
        calls = {key: at.calls for key, at in self._accumulators.items()}
        settings = (self.measures, self.every, self.eps, self.relative)
        ranks = all_gather((self._counter.counts, self._called, calls, self._misfits, settings), group)
        *_, settings_of_first = ranks[0]
        for rank, (*_, other) in enumerate(ranks):
            if other != settings_of_first:
                got = f"{settings_of_first} on process 0 and {other} on process {rank}"
                raise ValueError(expected("(measures, every, eps, relative)", "the same on all processes", got))
        accumulators: dict[Key, Accumulators] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        for owner, part in parts.items():
            if isinstance(owner, str):
                moments[owner] = part
                continue
            accumulators[owner] = Accumulators(self.measures, self.eps, self.relative)
            accumulators[owner].load_state(part)
            accumulators[owner].calls = max(calls.get(owner, 0) for _, _, calls, *_ in ranks)
        counts = {mode: max((counts[mode] for counts, *_ in ranks), key=tuple) for mode in MODES}
        called, misfits = (set().union(*(gathered[index] for gathered in ranks)) for index in (1, 3))
        return accumulators, moments, counts, called, misfits

    def _device(self) -> torch.device:
        tensors = chain(self._model.parameters(), self._model.buffers())
        return next((x.device for x in tensors), torch.device("cpu"))
