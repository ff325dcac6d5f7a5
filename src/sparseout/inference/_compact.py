"""Compaction: hidden units that never fire are taken out of a network, and what it computes stays the same."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseout._utils.chains import Chain, Chains, find_chains
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import check_model, named_modules
from sparseout._utils.outcome_table import aligned, outcome_rows
from sparseout._utils.torch_internals import compiler_loaded
from sparseout._utils.tracing import untouched_random_state
from sparseout._utils.unit_steps import spatial_dims
from sparseout.inference._batches import call, check_batches, evaluation
from sparseout.inference._compact_cut import Cut, State, fingerprint, foldable
from sparseout.inference._compact_ranges import Seen, proven, watched


@dataclass(frozen=True)
class CompactedChain:
    """Chain of layers in a `CompactionPlan`: its hidden units, and which of them go.

    Args:
        producers: the layers that make the units; several if their outputs are multiplied, as in a gated network.
        consumer: the layer that reads them.
        units: how many there are.
        removed: the numbers of those that go.
        never_active: how many of these are 0 on all rows given, though they need not be on others.
        provably_dead: how many are 0 for every input in the range seen: the upper bound of what their ReLU is given is
            no more than 0, or their weights are 0.
        constant: how many have another value that does not change: it is added to the consumer's bias.
        bordered: how many that do not change stay, since the consumer pads with zeros and so tells border from middle.
        rows: the rows on which the units were seen, positions of maps and sequences included.
    """

    producers: tuple[str, ...]
    consumer: str
    units: int
    removed: tuple[int, ...]
    never_active: int
    provably_dead: int
    constant: int
    bordered: int
    rows: int

    def __str__(self) -> str:
        counts = {
            f"never active on {self.rows:,} rows": self.never_active,
            "provably dead": self.provably_dead,
            "constant": self.constant,
        }
        text = f"{len(self.removed)} of {self.units} units"
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        text += f": {why}" if why else f": all active on {self.rows:,} rows" if not self.bordered else ""
        return text + (f"; {self.bordered} constant ones stay before padding with zeros" if self.bordered else "")


class CompactionPlan:
    """Plan of what `compact` would remove, why, and what it could not reach. Printed, it is a table.

    - `chains`: a `CompactedChain` for each chain of layers that was found, with what goes of it.
    - `unreached`: name of a layer -> why its outputs are no hidden units that can go.
    - `parameters`, `parameters_after`: how many the model has, and how many it would have.
    - `difference`: the largest difference of the outputs with and without the units on the rows given;
      `largest_output` is there for comparison.
    - `new_biases`: names of the parameters that would be there and are not now.
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Mapping[Cut, CompactedChain],
        names: Mapping[nn.Module, str],
        unreached: Mapping[str, str],
        trial: Trial,
    ) -> None:
        self._model, self._names = model, dict(names)
        self._cuts = [cut for cut, chain in cuts.items() if chain.removed]
        self._modules = [module for cut in self._cuts for module in cut.chain.modules]
        self._fingerprint: list[Any] | None = fingerprint(self._modules)
        self.chains = tuple(cuts.values())
        self.unreached = dict(unreached)
        self.parameters, self.parameters_after = _size(model), trial.parameters
        self.difference, self.largest_output = trial.difference, trial.largest
        self.new_biases = tuple(
            f"{names[cut.chain.consumer]}.bias".lstrip(".") for cut in self._cuts if cut.makes_bias()
        )

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a layer that makes hidden units -> (units,) bool, True for those that stay."""
        return {self._names[layer]: cut.kept.clone() for cut in self._cuts for layer in cut.chain.producers}

    @property
    def parameter_masks(self) -> dict[str, list[tuple[int, Tensor]]]:
        """Name of a parameter or buffer -> along which dims it is cut, each with a bool mask of what stays there.

        With it the state of an optimizer, which has the shape of its parameter, can be cut likewise.
        """
        masks: dict[str, list[tuple[int, Tensor]]] = {}
        for cut in self._cuts:
            for module, name, dim, kept in cut.masks():
                masks.setdefault(f"{self._names[module]}.{name}".lstrip("."), []).append((dim, kept.clone()))
        return masks

    def apply_(self) -> None:
        """Take the units out of the model, in place.

        Modules and parameters stay the objects that they are, with smaller tensors; gradients are dropped, and sizes
        such as ``in_features`` follow. The configuration of a model, such as ``config.intermediate_size`` of
        `transformers`, does not: layers may differ in width now, so keep the model, not only its ``state_dict``. The
        state of an optimizer is not carried over: make a new one, or cut its tensors by `parameter_masks`.

        Raises:
            RuntimeError: if the plan was applied before, or its layers have changed since it was made. Nothing is
                changed then.
        """
        if self._fingerprint is None:
            raise RuntimeError("expected a plan that has not been applied, but this one has: make a new one")
        there = dict(named_modules(self._model))
        same = all(there.get(self._names[module]) is module for module in self._modules)
        if not same or fingerprint(self._modules) != self._fingerprint:
            raise RuntimeError(
                "expected a model that has not changed since the plan was made, but layers of the plan have: make a "
                "new one"
            )
        state = State(self._modules)
        try:
            for cut in self._cuts:
                cut.apply_()
        except BaseException:
            state.restore()
            raise
        self._fingerprint = None
        reset_compiler()

    def __str__(self) -> str:
        removed, units = sum(len(c.removed) for c in self.chains), sum(c.units for c in self.chains)
        saved = self.parameters - self.parameters_after
        lines = [
            f"Compaction: {removed:,} of {units:,} hidden units go, and {saved:,} of {self.parameters:,} parameters "
            f"({saved / max(self.parameters, 1):.1%}).",
        ]
        texts = {f"{' * '.join(c.producers)} -> {c.consumer}": c for c in self.chains}
        rows = [
            *outcome_rows("remove", {name: str(c) for name, c in texts.items() if c.removed}),
            *outcome_rows("keep", {name: str(c) for name, c in texts.items() if not c.removed}),
            *outcome_rows("unreached", self.unreached),
        ]
        lines += [aligned(rows)] if rows else []
        if removed:
            lines.append(
                f"Largest difference of the outputs on these rows: {self.difference:.1e}; the largest output is "
                f"{self.largest_output:.3g}."
            )
            if self.new_biases:
                lines.append(f"New parameters: {', '.join(self.new_biases)}.")
            lines.append("The state of an optimizer is not carried over: make a new one after apply_().")
        return "\n".join(lines)

    __repr__ = __str__


def compact(model: nn.Module, batches: Collection[Any]) -> CompactionPlan:
    r"""Plans the removal of hidden units that never fire, with which the model computes the same on the rows given.

    For layers :math:`y = V f(W x + b) + d` whose hidden units :math:`h = f(W x + b)` nobody else reads, and a unit i
    that has one value :math:`c_i` on all rows, row i of W and b and column i of V go, and :math:`d` becomes
    :math:`d + V_{:i} c_i`. Where the layer has no bias and :math:`c_i \ne 0` it gets one. Batch norms between lose the
    unit too.

    A unit goes if

    - it is 0 on all rows where the next layer reads it: **never active**, or **provably dead**;
    - it has another value that its weights make constant for any input (a row of zeros before a GELU or a sigmoid), or
      at which it saturates: what its first layer puts out varies over the rows, and the unit does not.

    One unit of each chain stays. The more rows, and the more like those to come, the better: what never fires on ten
    rows may on the next.

    Chains are Linear, convolution or transposed convolution (torch's own classes, ungrouped, and the ``Conv1D`` of
    `transformers`), then batch norm, activations, noise layers, pooling, a flatten or a mean over positions, then such
    a layer again. In a gated network, :math:`V (f(W x) \cdot U x)`, a unit goes where the product is 0. They are found
    with `torch.fx`, each module traced for itself in both modes. Hidden units that are added to, concatenated with or
    read by something else, that a hook may read, whose layers share parameters, are parametrized, quantized, derived or
    called twice, are left, and the plan says so. Lastly the model is run with and without the units, and what changes
    its outputs beyond rounding is left too.

    Nothing is changed but by `CompactionPlan.apply_()`. The model runs in evaluation mode; modes, buffers, hooks
    and random generators are afterwards as before.

    Args:
        model: any module.
        batches: a collection of tensors, of tuples or lists that begin with the model's input, or of mappings of the
            arguments of a model by name, such as those of `transformers`. It is gone through twice or more; an iterator
            is read into a list. Tensors are moved to the model's device.

    Returns:
        The plan: print it, then call ``apply_()``. ``masks`` says which units stay.

    Raises:
        TypeError: if `model` is no module, or `batches` are not as above.
        ValueError: if there is no batch, or none has rows.

    Example:
        >>> import torch, sparseout
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:3].zero_()
        ...     _ = model[0].bias[:3].fill_(-1.0)
        >>> plan = sparseout.inference.compact(model, [torch.rand(100, 4) + 1])
        >>> plan.chains[0].provably_dead >= 3
        True
        >>> plan.apply_()
        >>> model[0].out_features == model[2].in_features <= 5
        True

    Source: exact removal of inactive units has been asked of PyTorch since 2021 (issue 58846).
    """
    check_model(model)
    batches = check_batches(batches)
    found = find_chains(model)
    with _undisturbed(model):
        with watched(found.chains) as seen:
            for batch in batches:
                call(model, batch)
        if found.chains and not any(s.hidden.rows for s in seen) and all(_is_empty(batch) for batch in batches):
            raise ValueError("expected `batches` to have rows, but got none")
        cuts = _cuts(found, seen)
        cuts, trial = _tried(model, batches, cuts, found)
    return CompactionPlan(model, cuts, found.names, found.left, trial)


def _cuts(found: Chains, seen: Sequence[Seen]) -> dict[Cut, CompactedChain]:
    """The cuts of all chains; those that cannot be cut after all join what is left."""
    cuts: dict[Cut, CompactedChain] = {}
    gone: dict[nn.Module, Tensor] = {}
    for chain, ranges in zip(found.chains, seen, strict=True):
        if reason := _why_not(chain, ranges):
            found.left.update({found.names[layer]: reason for layer in chain.producers})
            continue
        low, high = ranges.hidden.low, ranges.hidden.high
        assert low is not None
        assert high is not None
        low, high = low.cpu(), high.cpu()
        still = low.eq(high) & low.isfinite()
        zero = still & low.eq(0)
        proof = proven(chain, ranges, gone)
        moved = torch.zeros_like(still)
        for made in ranges.outputs:
            assert made.low is not None
            assert made.high is not None
            moved |= made.low.ne(made.high).cpu()
        fixed = still & ~zero & (proof | moved)
        goes = zero | fixed if foldable(chain) else zero
        bordered = 0 if foldable(chain) else int(fixed.sum())
        if goes.all():
            goes = goes.clone()
            goes[0] = False
        cut = Cut(chain, ~goes, torch.where(goes, low, 0))
        gone[chain.consumer] = goes.repeat_interleave(chain.block)
        cuts[cut] = CompactedChain(
            producers=tuple(found.names[layer] for layer in chain.producers),
            consumer=found.names[chain.consumer],
            units=chain.units,
            removed=tuple(goes.nonzero().flatten().tolist()),
            never_active=int((goes & zero & ~proof).sum()),
            provably_dead=int((goes & zero & proof).sum()),
            constant=int((goes & ~zero).sum()),
            bordered=bordered,
            rows=ranges.hidden.rows,
        )
    return cuts


def _why_not(chain: Chain, seen: Seen) -> str | None:
    """The reason why a chain is not cut that only a run shows."""
    if not seen.hidden.rows:
        return "is not called on the rows given"
    if any(made.calls != seen.hidden.calls for made in seen.outputs):
        return "is not called as often as the layer that reads it"
    spatial = spatial_dims(chain.producers[0])
    strict = bool(chain.norms) or spatial_dims(chain.consumer) != spatial  # these take batches only
    if strict and any(made.ndims != {spatial + 2} for made in seen.outputs):
        return f"has outputs that are not of {spatial + 2} dims"
    return None


class Trial(NamedTuple):
    """What cuts do to a model."""

    difference: float
    largest: float
    parameters: int
    tolerance: float = math.inf

    @property
    def passed(self) -> bool:
        """Whether the outputs are the same but for rounding."""
        return self.difference <= self.tolerance * max(self.largest, 1.0)


def _tried(
    model: nn.Module, batches: Collection[Any], cuts: dict[Cut, CompactedChain], found: Chains
) -> tuple[dict[Cut, CompactedChain], Trial]:
    """The cuts that leave the outputs as they are; the others join what is left."""
    whole = [cut for cut, chain in cuts.items() if chain.removed]
    trial = _try(model, batches, whole)
    if isinstance(trial, Trial) and trial.passed:
        return cuts, trial
    passed: list[Cut] = []
    last: Trial | str = _try(model, batches, [])
    for cut in whole:
        trial = _try(model, batches, [*passed, cut])
        if isinstance(trial, Trial) and trial.passed:
            passed.append(cut)
            last = trial
        else:
            why = f"differ by {trial.difference:.1e}" if isinstance(trial, Trial) else f"are not there: {trial}"
            chain = cuts.pop(cut)
            found.left.update(dict.fromkeys(chain.producers, f"without its silent units the outputs {why}"))
    assert isinstance(last, Trial)
    return cuts, last


def _try(model: nn.Module, batches: Collection[Any], cuts: Sequence[Cut]) -> Trial | str:
    """Run the model with and without the units; the model is put back. A string is an error of the model without."""
    modules = [module for cut in cuts for module in cut.chain.modules]
    difference = largest = 0.0
    size = _size(model)
    coarsest = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=1e-15)
    for batch in batches:
        before = _outputs(model, batch)
        state = State(modules)
        try:
            for cut in cuts:
                cut.apply_()
            size = _size(model)
            after = _outputs(model, batch)
        except Exception as error:  # whatever a forward raises when a width is not what it thinks
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            state.restore()
        difference = max(difference, _difference(before, after))
        largest = max([largest, *(float(x.abs().nan_to_num(0, 0, 0).max()) for x in before if x.numel())])
    return Trial(difference, largest, size, math.sqrt(coarsest))


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Every tensor of numbers that the model returns, in fp64."""
    with untouched_random_state():
        return [x.detach().double() for x in _tensors(call(model, batch)) if x.dtype != torch.bool]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from value.unbind() if value.is_nested else [value]
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    if [x.shape for x in first] != [x.shape for x in second]:
        return math.inf
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf)
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """A block of passes in evaluation mode, in eager code, that leave buffers and random generators as they are."""
    kept = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(x, x.clone()) for _, own in kept for x in own.values() if x is not None]
    stance: Any = torch.compiler.set_stance("force_eager") if compiler_loaded() else nullcontext()
    with untouched_random_state(), evaluation(model), stance:
        try:
            yield
        finally:
            for module, own in kept:
                module._buffers.update(own)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _is_empty(batch: Any) -> bool:
    return all(not x.numel() for x in _tensors(batch))
