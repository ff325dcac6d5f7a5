"""Trial of a compaction: what a model returns with and without the units that would go."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseout._utils.modules import own_buffers, unwrapped
from sparseout._utils.row_mask import row_mask
from sparseout._utils.torch_internals import compiler_loaded
from sparseout._utils.tracing import untouched_random_state
from sparseout.inference._batches import call, evaluation, tensors_in
from sparseout.inference._compact_cut import Cut, State
from sparseout.inference._compact_ranges import masked


class Trial(NamedTuple):
    """Effect of cuts on a model."""

    difference: float
    largest: float
    parameters: int
    tolerance: float = math.inf

    @property
    def passed(self) -> bool:
        """Whether the outputs are the same but for rounding."""
        return self.difference <= self.tolerance * max(self.largest, 1.0)


def try_cuts(model: nn.Module, batches: Collection[Any], cuts: Sequence[Cut]) -> Trial | str:
    """Run the model with and without the units; the model is put back. A string is an error of the model without."""
    modules = [module for cut in cuts for module in cut.chain.modules]
    difference = largest = 0.0
    count = size(model)
    for batch in batches:
        before = _outputs(model, batch)
        state = State(modules)
        try:
            for cut in cuts:
                cut.apply_()
            count = size(model)
            after = _outputs(model, batch)
        except Exception as error:  # whatever a forward raises when a width is not what it thinks
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            state.restore()
        difference = max(difference, _difference(before, after))
        largest = max([largest, *(float(x.abs().nan_to_num(0, 0, 0).max()) for x in before if x.numel())])
    return Trial(difference, largest, count, math.sqrt(_coarsest(model)))


def _coarsest(model: nn.Module) -> float:
    """The distance of 1 to the next number, of the coarsest arithmetic that the model may be computed in."""
    eps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    for device in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(device):
            eps.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
        elif device == "cuda":  # TF32
            eps.append(2.0**-10)
    return max(eps, default=0.0)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Every tensor that the model returns, in fp64, but for rows that are padding."""
    with untouched_random_state(), batch_mask(model, batch):
        tensors = (x.detach() for x in tensors_in(call(model, batch)))
        return [masked(torch.view_as_real(x) if x.is_complex() else x).double() for x in tensors]


def batch_mask(model: nn.Module, batch: Any) -> AbstractContextManager[Any]:
    """The mask of a batch's padding, but for an encoder and a decoder, whose rows only their sizes tell apart."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    two = getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False)
    if two or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_complex() or ((mask != 0) & (mask != 1)).any():
        return nullcontext()
    return row_mask(mask)


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    if [x.shape for x in first] != [x.shape for x in second]:
        return math.inf
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        equal = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(equal, 0.0, (a - b).abs()).nan_to_num(math.inf)
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A block of passes in evaluation mode, in eager code, that leave buffers and random generators as they are."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, own_buffers(module)) for module in modules]
    values = [(x, x.clone()) for _, buffers in before for x in buffers.values()]
    cached = torch.is_autocast_cache_enabled()
    stance: Any = torch.compiler.set_stance("force_eager") if compiler_loaded() else nullcontext()
    with evaluation(model), stance:
        torch.set_autocast_cache_enabled(False)  # it would hold on to weights as they were before a cut
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            for module, buffers in before:
                unset = dict.fromkeys(own_buffers(module).keys() - buffers.keys())
                for name, tensor in (buffers | unset).items():
                    setattr(module, name, tensor)
            for buffer, value in values:
                if buffer.shape != value.shape:  # a buffer that takes its size at the first call
                    buffer.data = value
                elif not torch.equal(buffer, value):
                    buffer.copy_(value)


def size(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
