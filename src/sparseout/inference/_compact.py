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
from sparseout.inference._compact_ranges import Seen, proven, watched
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

    Nothing is changed but by `CompactionPlan.apply_()`. The model runs in evaluation mode; modes, buffers, hooks
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

    Source: exact removal of inactive units has been asked of PyTorch since 2021 (issue 58846).
    """
    check_runs(model)
    batches = check_batches(batches)
    found = find_chains(model)
    with undisturbed(model):
        with watched(found.chains) as seen:
            for batch in batches:
                with batch_mask(model, batch):
                    call(model, batch)
        if not any(s.hidden.rows for s in seen):
            check_rows(batches)
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
    if seen.hidden.low is not None and bool(seen.hidden.low.isnan().all()):
        return "is NaN on some of the rows given"
    if any(made.calls != seen.hidden.calls for made in seen.outputs):
        return "is not called as often as the layer that reads it"
    spatial = spatial_dims(chain.producers[0])
    strict = bool(chain.norms) or spatial_dims(chain.consumer) != spatial  # these take batches only
    if strict and any(made.ndims != {spatial + 2} for made in seen.outputs):
        return f"has outputs that are not of {spatial + 2} dims"
    return None


def _tried(
    model: nn.Module, batches: Collection[Any], cuts: dict[Cut, CompactedChain], found: Chains
) -> tuple[dict[Cut, CompactedChain], Trial]:
    """The cuts that leave the outputs as they are; the others join what is left."""
    whole = [cut for cut, chain in cuts.items() if chain.removed]
    trial = try_cuts(model, batches, whole)
    if isinstance(trial, Trial) and trial.passed:
        return cuts, trial
    passed: list[Cut] = []
    last: Trial | str = try_cuts(model, batches, [])
    for cut in whole:
        trial = try_cuts(model, batches, [*passed, cut])
        if isinstance(trial, Trial) and trial.passed:
            passed.append(cut)
            last = trial
        else:
            why = f"differ by {trial.difference:.1e}" if isinstance(trial, Trial) else f"are not there: {trial}"
            chain = cuts.pop(cut)
            found.left.update(dict.fromkeys(chain.producers, f"without its silent units the outputs {why}"))
    assert isinstance(last, Trial)
    return cuts, last
