"""Thresholds: in evaluation, inputs of layers that are close to 0 become 0."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparseout._utils.activations import counted_rows
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.hooks import Hooks
from sparseout._utils.modules import Modules, named_modules, select
from sparseout._utils.outcome_table import ROOT
from sparseout._utils.torch_internals import call_hooks, remove_call_hooks
from sparseout._utils.validation import check_number, check_positive, expected, type_name
from sparseout.inference._after_activation import linears_after_activations
from sparseout.inference._batches import call, check_batches, check_rows, check_runs, evaluation
from sparseout.inference._compact_trial import batch_mask

Loss = Callable[[nn.Module, Any], Tensor | float]
_STEPS = 8  # of the bisection: the density is found to 2^-8
_SHIFT = 13  # bits of an fp32 magnitude that a histogram leaves out: bins are 2^-10 wide, relative to where they are


@dataclass(frozen=True)
class ThresholdReport:
    """Report of :func:`sparseout.inference.threshold_`: the threshold of each layer, and what it does.

    Args:
        records: a dict for each layer: `module`, `threshold`, `density_before` and `density`, which are the fractions
            of its input that are not 0 without and with all thresholds, and `rows`, of which they are.
        loss_before: the mean of `loss` over the batches without thresholds; None without a `loss`.
        loss: the same with them.

    Source: Liu et al. (2025), Training-free activation sparsity in large language models (TEAL), ICLR, for the method.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    loss_before: float | None = None
    loss: float | None = None

    def __str__(self) -> str:
        names = [record["module"] or ROOT for record in self.records]
        width = max(map(len, ["module", *names]))
        lines = [f"{'module':<{width}}  threshold  density before  density"]
        for name, r in zip(names, self.records, strict=True):
            lines.append(f"{name:<{width}}  {r['threshold']:>9.3g}  {r['density_before']:>14.3f}  {r['density']:>7.3f}")
        if self.loss is not None:
            lines.append(f"loss {self.loss_before:.4g} -> {self.loss:.4g}")
        return "\n".join(lines)


def threshold_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float | None = None,
    max_loss_increase: float | None = None,
    loss: Loss | None = None,
    modules: Modules | None = None,
) -> ThresholdReport:
    r"""Makes inputs of layers 0 in evaluation where they are close to it, in place: sparsity for GELU, SiLU and tanh.

    .. math:: \tilde x_j = \begin{cases} x_j & |x_j| > t \\ 0 & \text{else} \end{cases}

    with a threshold t for each layer: the quantile of :math:`|x|` below which the fraction 1 - `density` of its inputs
    lie on `batches`, found on the network without thresholds. Either `density` is given, the same for all layers, or
    `max_loss_increase`: then it is the least density, to 2^-8, found by bisection, for which the mean of `loss` over
    the batches is no more than that above the one without thresholds. What is 0 already, as after a ReLU, counts: a
    layer whose input is sparser than `density` gets the threshold 0 and does not change.

    Layers are those Linear layers (and `Conv1D` of transformers) whose input comes from an activation, also by way of
    dropout, pooling, or a product as in a gated FFN, found in a pass over the first batch; projections after norms or
    attention are not among them. Training is not affected. Thresholds are hooks: they are differentiated, compiled and
    exported as part of the model, copied and pickled with it, and are not in its ``state_dict``, which loads into the
    model without them; they belong to the weights that they were found with. A second call replaces them, and
    :func:`sparseout.inference.revert_` removes them. Speed comes with
    :func:`sparseout.inference.sparse_linear_`, called after.

    Padding is not counted where a batch is a mapping with an ``attention_mask`` (but in an encoder-decoder all rows
    are), as in a block of :class:`sparseout.row_mask`, which holds here too. NaN stays NaN.

    Args:
        model: any module.
        batches: tensors, tuples or lists whose first element is the input, or mappings of keyword arguments; a few
            thousand rows.
        density: the fraction of inputs that stays, > 0 and <= 1.
        max_loss_increase: in the unit of `loss`, >= 0.
        loss: a function (model, batch) -> number, to be small; called in evaluation, without gradients.
        modules: which modules instead, at their first input: a function (name, module) -> bool, or a collection of
            dotted names or of types.

    Returns:
        A report of thresholds and densities, with the loss before and after if `loss` is given.

    Raises:
        ValueError: for a value out of range, batches without rows, or a model without values (lazy, or on the meta
            device), or if no layer has an activation before it.
        TypeError: for a wrong argument. Nothing is changed then, nor after an error in the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 256), nn.GELU(), nn.Linear(256, 2)).eval()
        >>> report = threshold_(model, [torch.randn(64, 4)], density=0.25)
        >>> report.records[0]["module"], round(report.records[0]["density"], 2)
        ('2', 0.25)

    Source: Liu et al. (2025), Training-free activation sparsity in large language models (TEAL), ICLR, and Lee et al.
    (2024), CATS: contextually-aware thresholding for sparsity in large language models, COLM.
    """
    check_runs(model)
    batches = check_batches(batches)
    _check(density, max_loss_increase, loss)
    chosen = _layers(model, batches, modules)
    old = {name: hook.value for name, module in chosen.items() if (hook := _hook(module)) is not None}
    hooks = {name: _hook(module) or _add(module) for name, module in chosen.items()}
    succeeded = False
    try:
        for hook in hooks.values():
            hook.value = None
        counts = _counts(model, batches, chosen)
        before = None if loss is None else _mean_loss(loss, model, batches)
        after: float | None
        if density is not None:
            _set(hooks, counts, density)
            after = None if loss is None else _mean_loss(loss, model, batches)
        elif loss is not None and before is not None and max_loss_increase is not None:  # as was checked
            after = _bisect(model, batches, hooks, counts, loss, before + max_loss_increase)
        counts_after = _counts(model, batches, chosen)
        succeeded = True
    finally:
        if not succeeded:
            for name, module in chosen.items():
                if name in old:
                    hooks[name].value = old[name]
                else:
                    remove_call_hooks(module, Threshold)
    reset_compiler()
    records = [
        {
            "module": name,
            "threshold": hooks[name].value,
            "density_before": counts[name].density,
            "density": counts_after[name].density,
            "rows": counts[name].rows,
        }
        for name in chosen
    ]
    return ThresholdReport(records, before, after)


def remove_thresholds_(model: nn.Module) -> bool:
    """Take the thresholds off all modules, and say whether there was one."""
    removed = [remove_call_hooks(module, Threshold) for module in model.modules()]
    return any(removed)


class Threshold:
    """The hook that makes a module's first input sparse; `value` None or 0 does nothing."""

    per_unit = True  # compaction may follow: it changes each unit by itself

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training or not self.value:
            return None
        if args:
            return (_shrink(args[0], self.value), *args[1:]), kwargs
        return args, {
            name: _shrink(x, self.value) if index == 0 else x for index, (name, x) in enumerate(kwargs.items())
        }


def _shrink(x: Any, value: float) -> Any:
    if not isinstance(x, fx.Proxy):  # which stands for a tensor, of a type that is not known
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.is_nested and x.layout is torch.strided:  # torch has no such function of these
            return torch.nested.as_nested_tensor([F.hardshrink(part, value) for part in x.unbind()])
    return F.hardshrink(x, value)


def _check(density: Any, max_loss_increase: Any, loss: Any) -> None:
    if (density is None) == (max_loss_increase is None):
        got = "neither" if density is None else "both"
        raise TypeError(expected("density", "given, or else `max_loss_increase` with a `loss`", got))
    if density is not None:
        check_number("density", density, "a number > 0 and <= 1", lambda value: 0 < value <= 1)
    else:
        check_positive("max_loss_increase", max_loss_increase, zero=True)
    if loss is None and max_loss_increase is not None:
        raise TypeError(expected("loss", "a function (model, batch) -> number", "None"))
    if loss is not None and not callable(loss):
        raise TypeError(expected("loss", "a function (model, batch) -> number", type_name(loss)))


def _layers(model: nn.Module, batches: Collection[Any], modules: Modules | None) -> dict[str, nn.Module]:
    all_modules = dict(named_modules(model))
    if modules is not None:
        return select(all_modules, modules)
    linears = select({name: module for name, module in all_modules.items() if _is_linear(module)} or all_modules, None)
    with evaluation(model):
        batch = next(iter(batches))
        after = linears_after_activations(linears.values(), lambda: call(model, batch), _first)
    layers = {name: module for name, module in linears.items() if module in after}
    if not layers:
        wanted = "a module with a Linear layer after an activation (or `modules` to say which)"
        raise ValueError(expected("model", wanted, f"{type_name(model)} without any"))
    return layers


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _hook(module: nn.Module) -> Threshold | None:
    return next((hook for hook in call_hooks(module) if isinstance(hook, Threshold)), None)


def _add(module: nn.Module) -> Threshold:
    hook = Threshold()
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return hook


class _Counts:
    """Counts of the magnitudes in a module's inputs: in bins of fp32 numbers without their last bits."""

    def __init__(self) -> None:
        self.bins: Tensor | None = None
        self.rows = 0

    def update(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _first(args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim:
            return
        parts, _ = counted_rows(x, -1, limit=None)
        x = torch.cat([part.flatten() for part in parts])
        self.rows += sum(len(part) for part in parts)
        bits = x.abs().float().view(torch.int32) >> _SHIFT
        bins = bits[bits <= _INF].bincount(minlength=_INF + 1)  # NaN is no magnitude
        self.bins = bins if self.bins is None else self.bins + bins

    @property
    def density(self) -> float:
        if self.bins is None or not (total := int(self.bins.sum())):
            return math.nan
        return 1 - int(self.bins[0]) / total

    def quantile(self, density: float) -> float:
        """The threshold above which the fraction `density` lies, as closely as bins have it: their upper ends."""
        if self.bins is None or not (total := int(self.bins.sum())):
            return 0.0
        below = self.bins.cumsum(0).double() / total
        bin_ = int((below - (1 - density)).abs().argmin())
        if bin_ == 0 or density >= 1:
            return 0.0
        upper = torch.tensor(((bin_ + 1) << _SHIFT) - 1, dtype=torch.int32, device="cpu").view(torch.float32)
        return float(upper)


_INF = 0x7F800000 >> _SHIFT


def _counts(model: nn.Module, batches: Collection[Any], layers: Mapping[str, nn.Module]) -> dict[str, _Counts]:
    counts = {name: _Counts() for name in layers}
    hooks = Hooks()
    try:
        for name, module in layers.items():
            hooks.before(module, counts[name].update)
        with evaluation(model):
            for batch in batches:
                with batch_mask(model, batch):
                    call(model, batch)
    finally:
        hooks.remove()
    if not any(count.rows for count in counts.values()):
        check_rows(batches)
    missing = [name for name, count in counts.items() if count.bins is None]
    if missing:
        wanted = "modules that are given a floating-point tensor first on these batches"
        raise ValueError(expected("modules", wanted, f"{missing[0]!r}, which is not"))
    return counts


def _mean_loss(loss: Loss, model: nn.Module, batches: Collection[Any]) -> float:
    with evaluation(model):
        losses = [float(loss(model, batch)) for batch in batches]
    return sum(losses) / len(losses)


def _set(hooks: Mapping[str, Threshold], counts: Mapping[str, _Counts], density: float) -> None:
    for name, hook in hooks.items():
        hook.value = counts[name].quantile(density)


def _bisect(
    model: nn.Module,
    batches: Collection[Any],
    hooks: Mapping[str, Threshold],
    counts: Mapping[str, _Counts],
    loss: Loss,
    max_loss: float,
) -> float:
    """Set the thresholds of the least density whose loss is no more than `most`, and return that loss."""
    feasible, low, after = 1.0, 0.0, math.nan
    for _ in range(_STEPS):
        density = (low + feasible) / 2
        _set(hooks, counts, density)
        value = _mean_loss(loss, model, batches)
        if value <= max_loss:
            feasible, after = density, value
        else:
            low = density
    _set(hooks, counts, feasible)
    if feasible == 1.0:
        warnings.warn("no threshold keeps the loss within `max_loss_increase`: none was set", stacklevel=3)
        after = _mean_loss(loss, model, batches)
    return after
