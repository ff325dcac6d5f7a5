"""Cost of inference: the multiplications of each layer that have two factors other than zero, counted exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout._utils.dataflow import is_conv1d
from sparseout._utils.hooks import Hooks
from sparseout._utils.modules import named_modules, own_parameters
from sparseout._utils.records import RecordSequence
from sparseout._utils.unit_steps import padding_sizes
from sparseout.inference._batches import call, check_batches, check_runs, tensors_in
from sparseout.inference._compact_trial import undisturbed

_CONVS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)  # matrices that no input is multiplied by


class CostReport(RecordSequence):
    """Report of `cost`: a dict for each layer, in the order of the model.

    Its keys: `module`, `type`; `dense_macs`, `effective_macs`, means per example; `density`, their ratio;
    `input_density` and `weight_density`, the shares of the input's and the weight's elements that are not 0; `calls`.
    Printed, it is a table.

    - `total`: the sums, with the keys `dense_macs`, `effective_macs` and `density`.
    - `examples`: how many the means are over.
    - `uncounted`: name of a module with weights of its own -> why its multiplications are not in the sums.

    Source: Yik et al. (2025), NeuroBench, for the definition of effective MACs (synaptic operations).
    """

    def __init__(self, records: Sequence[dict[str, Any]], examples: int, uncounted: dict[str, str]) -> None:
        super().__init__(records)
        self.examples, self.uncounted = examples, dict(uncounted)

    @property
    def total(self) -> dict[str, float]:
        """The sums over layers, per example, and their ratio."""
        dense, effective = (sum(record[key] for record in self) for key in ("dense_macs", "effective_macs"))
        return {"dense_macs": dense, "effective_macs": effective, "density": effective / dense if dense else 0.0}

    def __str__(self) -> str:
        lines = [("module", "type", "dense MACs", "effective", "density", "input", "weight")]
        for r in self:
            shares = [f"{r[key]:.1%}" for key in ("density", "input_density", "weight_density")]
            macs = _count(r["dense_macs"]), _count(r["effective_macs"])
            lines.append((r["module"] or "(model)", r["type"], *macs, *shares))
        total = self.total
        sums = _count(total["dense_macs"]), _count(total["effective_macs"]), f"{total['density']:.1%}"
        lines.append(("total", "", *sums, "", ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if index < 2 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        title = f"Multiplications per example, means over {self.examples:,}:"
        uncounted = (f"not counted: {name or '(model)'}, {why}" for name, why in self.uncounted.items())
        return "\n".join([title, *text, *uncounted])


def cost(model: nn.Module, batches: Collection[Any]) -> CostReport:
    r"""Counts the multiply-accumulates (MACs) of linear and convolution layers: all, and those without a factor of 0.

    For a layer :math:`y_o = \sum_i w_{oi} x_i`, of an example

    .. math::
        \text{dense} = \sum_o \sum_i 1, \qquad
        \text{effective} = \sum_o \sum_i [\, w_{oi} \ne 0 \,] \, [\, x_i \ne 0 \,]

    where i runs over what enters the layer: for a convolution over the taps that read the input; those that read
    padding with zeros count neither as dense nor as effective, and other padding counts as what it repeats. Biases
    are not counted. The counts are exact, in whole numbers, whatever the dtype.

    Counted are calls of Linear, Conv, ConvTranspose, what is derived of them, and the ``Conv1D`` of `transformers`; by
    what they are given after their own hooks, in evaluation mode. Products of activations with each other, as in
    attention, are not, nor are layers that use weights in another way: `nn.MultiheadAttention`, `nn.LSTM` and the like
    are named in `uncounted`. Effective MACs are what a machine that skips zeros would do: dense kernels do all.

    Args:
        model: any module. It runs in evaluation mode and is left as it was.
        batches: a collection of tensors, of tuples or lists that begin with the model's input, or of mappings of the
            arguments of a model by name. The first dim of the first tensor is that of the examples. Padding counts as
            any other row: it is computed.

    Returns:
        A sequence of records, a dict for each layer that was called, with `total`, `examples` and `uncounted`.

    Raises:
        TypeError: if `model` is no module, or `batches` are not as above.
        ValueError: if there is no batch, or none has examples, or the model has lazy layers that have not seen an input
            or is on the meta device.

    Example:
        >>> import torch, sparseout
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.fill_(1.0)
        ...     _ = model[0].bias.copy_(torch.tensor([0.0, 0.0, -9.0]))
        >>> report = sparseout.inference.cost(model, [torch.ones(10, 2)])
        >>> [(record["module"], record["dense_macs"], record["effective_macs"]) for record in report]
        [('0', 6.0, 6.0), ('2', 12.0, 8.0)]
        >>> report.total["effective_macs"]
        14.0

    Source: Yik et al. (2025), The NeuroBench framework for benchmarking neuromorphic computing algorithms and systems,
    synaptic operations; the numbers are those of its package, release 2.3, whose Effective_ACs and Effective_MACs are
    added up here.
    """
    check_runs(model)
    batches = check_batches(batches)
    names: dict[nn.Module, str] = {}
    for name, module in named_modules(model):
        names.setdefault(module, name)
    counters = {module: _Counter() for module in names if _is_counted(module)}
    hooks, examples = Hooks(), 0
    try:
        for module, counter in counters.items():
            hooks.before(module, counter.keep)
            hooks.after(module, counter.update)
        with undisturbed(model):
            for batch in batches:
                call(model, batch)
                examples += next((x.shape[0] if x.ndim else 1 for x in tensors_in(batch)), 0)
    finally:
        hooks.remove()
    if not examples:
        raise ValueError("expected `batches` to have examples, but got none")
    records = [counter.record(names[module], module, examples) for module, counter in counters.items() if counter.calls]
    return CostReport(records, examples, _uncounted(names, counters))


class _Counter:
    """Sums over the calls of a layer. Everything is a whole number."""

    def __init__(self) -> None:
        self.calls = self.dense = self.effective = 0
        self.nonzeros, self.elements = 0, 0
        self._inputs: list[Tensor] = []  # a call's input, until it ends: a layer may change it in place

    def keep(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep where the input of a call is not 0."""
        x = args[0] if args else next(iter(kwargs.values()))
        parts = list(x.unbind()) if x.is_nested else [x]
        self._inputs = [part.detach() != 0 for part in parts]

    def update(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        """Add a call."""
        w = _weight(layer) != 0
        sizes = [tuple(part.shape) for part in (output.unbind() if output.is_nested else [output])]
        self.calls += 1
        for x, size in zip(self._inputs, sizes, strict=True):
            self.nonzeros += int(x.sum())
            self.elements += x.numel()
            if x.numel():
                self.effective += _macs(layer, x, w, size)
                self.dense += _macs(layer, torch.ones_like(x), torch.ones_like(w), size)
        self._inputs = []

    def record(self, name: str, layer: nn.Module, examples: int) -> dict[str, Any]:
        """The counts, per example."""
        w = _weight(layer)
        return {
            "module": name,
            "type": type(layer).__name__,
            "dense_macs": self.dense / examples,
            "effective_macs": self.effective / examples,
            "density": self.effective / self.dense if self.dense else 0.0,
            "input_density": self.nonzeros / self.elements if self.elements else 0.0,
            "weight_density": int((w != 0).sum()) / max(w.numel(), 1),
            "calls": self.calls,
        }


def _is_counted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *_CONVS)) or is_conv1d(module)


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight  # of a parametrized layer it is no parameter
    return weight.detach()  # type: ignore[no-any-return]


def _macs(layer: Any, x: Tensor, w: Tensor, size: tuple[int, ...]) -> int:
    """The products of an input and a weight of zeros and ones."""
    convolve = next((function for cls, function in _CONVS.items() if isinstance(layer, cls)), None)
    if convolve is None:
        outputs = 1 if is_conv1d(layer) else 0
        return int((x.reshape(-1, x.shape[-1]).sum(0) * w.sum(outputs)).sum())
    # Outputs of a group read the same inputs: one filter with the sum of theirs, in fp64, where whole numbers are.
    groups, transposed = layer.groups, isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    if transposed:
        filters = w.sum(1, keepdim=True).double()
        spatial = zip(size[-len(layer.stride) :], x.shape[-len(layer.stride) :], layer.stride, strict=True)
        more = zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
        extra = [
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for (n, m, s), (p, d, k) in zip(spatial, more, strict=True)
        ]
        out = convolve(x.double(), filters, None, layer.stride, layer.padding, extra, groups, layer.dilation)
        return round(float(out.sum()))
    filters = w.unflatten(0, (groups, -1)).sum(1).double()
    padding, x = layer.padding, x.double()
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, padding_sizes(layer), layer.padding_mode), 0
    return round(float(convolve(x, filters, None, layer.stride, padding, layer.dilation, groups).sum()))


def _uncounted(names: dict[nn.Module, str], counters: dict[nn.Module, _Counter]) -> dict[str, str]:
    """Modules whose matrices are used in a way that is not counted."""
    why: dict[str, str] = {}
    for module, name in names.items():
        matrices = [p for p in own_parameters(module).values() if p.ndim > 1]
        if module in counters:
            if not counters[module].calls:
                why[name] = f"a {type(module).__name__} that was not called: its weights may be used without a call"
        elif matrices and not isinstance(module, _LOOKUPS):
            why[name] = f"a {type(module).__name__}: calls of linear and convolution layers are counted"
        elif "quantized" in type(module).__module__ and hasattr(module, "weight"):
            why[name] = f"a quantized {type(module).__name__}"
    return why


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:,.1f}"
