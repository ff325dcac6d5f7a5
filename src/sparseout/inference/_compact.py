"""Compaction: hidden units that never fire are taken out of a network, and what it computes stays the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.chains import Chain, Chains, find_chains
from sparseout._utils.unit_steps import spatial_dims
from sparseout.inference._batches import call, check_batches, check_rows, check_runs
from sparseout.inference._compact_cut import Cut, foldable
from sparseout.inference._compact_plan import CompactedChain, CompactionPlan
from sparseout.inference._compact_ranges import ChainRanges, proven, watched
from sparseout.inference._compact_trial import Trial, batch_mask, try_cuts, undisturbed


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

    Nothing is changed until `CompactionPlan.apply_()`. The model runs in evaluation mode; modes, buffers, hooks
    and random generators are afterwards as before.

    Args:
        model: any module.
        batches: a collection of tensors, of tuples or lists that begin with the model's input, or of mappings of the
            arguments of a model by name, such as those of `transformers`, whose `attention_mask` is respected: padding
            is no row (but in an encoder-decoder all rows count). An open `sparseout.row_mask` holds too. The batches
            are gone through twice or more; an iterator is read into a list. Tensors are moved to the model's device.

    Returns:
        The plan, to be printed and then applied by ``apply_()``. ``masks`` says which units stay.

    Raises:
        TypeError: if `model` is no module, or `batches` are not as above.
        ValueError: if there is no batch, or none has rows, or the model has lazy layers that have not seen an input, or
            is on the meta device.

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

    Source: the removal is exact and this library's; it is requested of PyTorch in issue 58846 (2021).
    """
    check_runs(model)
    batches = check_batches(batches)
    result = find_chains(model)
    with undisturbed(model):
        with watched(result.chains) as ranges:
            for batch in batches:
                with batch_mask(model, batch):
                    call(model, batch)
        if not any(s.hidden.rows for s in ranges):
            check_rows(batches)
        cuts = _cuts(result, ranges)
        cuts, trial = _tried(model, batches, cuts, result)
    return CompactionPlan(model, cuts, result.names, result.left, trial)


def _cuts(result: Chains, ranges_of_chains: Sequence[ChainRanges]) -> dict[Cut, CompactedChain]:
    """The cuts of all chains; those that cannot be cut after all join what is left."""
    cuts: dict[Cut, CompactedChain] = {}
    removed_columns: dict[nn.Module, Tensor] = {}
    for chain, ranges in zip(result.chains, ranges_of_chains, strict=True):
        if reason := _why_not(chain, ranges):
            result.left.update({result.names[layer]: reason for layer in chain.producers})
            continue
        low, high = ranges.hidden.low, ranges.hidden.high
        assert low is not None
        assert high is not None
        low, high = low.cpu(), high.cpu()
        unchanging = low.eq(high) & low.isfinite()
        zero = unchanging & low.eq(0)
        proof = proven(chain, ranges, removed_columns)
        varying_output = torch.zeros_like(unchanging)
        for output in ranges.outputs:
            assert output.low is not None
            assert output.high is not None
            varying_output |= output.low.ne(output.high).cpu()
        not_zero = unchanging & ~zero & (proof | varying_output)
        removes = zero | not_zero if foldable(chain) else zero
        bordered = 0 if foldable(chain) else int(not_zero.sum())
        if removes.all():
            removes = removes.clone()
            removes[0] = False
        cut = Cut(chain, ~removes, torch.where(removes, low, 0))
        removed_columns[chain.consumer] = removes.repeat_interleave(chain.block)
        cuts[cut] = CompactedChain(
            producers=tuple(result.names[layer] for layer in chain.producers),
            consumer=result.names[chain.consumer],
            units=chain.units,
            removed=tuple(removes.nonzero().flatten().tolist()),
            never_active=int((removes & zero & ~proof).sum()),
            provably_dead=int((removes & zero & proof).sum()),
            constant=int((removes & ~zero).sum()),
            bordered=bordered,
            rows=ranges.hidden.rows,
        )
    return cuts


def _why_not(chain: Chain, ranges: ChainRanges) -> str | None:
    """The reason why a chain is not cut that only a run shows."""
    if not ranges.hidden.rows:
        return "is not called on the rows given"
    if ranges.hidden.low is not None and bool(ranges.hidden.low.isnan().all()):
        return "is NaN on some of the rows given"
    if any(output.calls != ranges.hidden.calls for output in ranges.outputs):
        return "is not called as often as the layer that reads it"
    spatial = spatial_dims(chain.producers[0])
    strict = bool(chain.norms) or spatial_dims(chain.consumer) != spatial  # these take batches only
    if strict and any(output.ndims != {spatial + 2} for output in ranges.outputs):
        return f"has outputs that are not of {spatial + 2} dims"
    return None


def _tried(
    model: nn.Module, batches: Collection[Any], cuts: dict[Cut, CompactedChain], chains: Chains
) -> tuple[dict[Cut, CompactedChain], Trial]:
    """The cuts that leave the outputs as they are; the others join what is left."""
    candidates = [cut for cut, chain in cuts.items() if chain.removed]
    trial = try_cuts(model, batches, candidates)
    if isinstance(trial, Trial) and trial.passed:
        return cuts, trial
    passed: list[Cut] = []
    last: Trial | str = try_cuts(model, batches, [])
    for cut in candidates:
        trial = try_cuts(model, batches, [*passed, cut])
        if isinstance(trial, Trial) and trial.passed:
            passed.append(cut)
            last = trial
        else:
            why = f"differ by {trial.difference:.1e}" if isinstance(trial, Trial) else f"are not there: {trial}"
            chain = cuts.pop(cut)
            chains.left.update(dict.fromkeys(chain.producers, f"without its silent units the outputs {why}"))
    assert isinstance(last, Trial)
    return cuts, last
