"""Batch-norm statistics, re-estimated without noise.

Noise in training increases the variance of the inputs of batch norm, and there is none in evaluation: with the running
statistics of training an evaluated network is scaled wrongly, by an amount that depends on q and p.
"""

import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.hooks import Hooks
from sparseout._utils.modes import restored_modes
from sparseout._utils.modules import check_model, named_modules, select
from sparseout._utils.torch_internals import BatchNormBase
from sparseout._utils.validation import expected, type_name


def batch_norms(model: nn.Module) -> dict[str, BatchNormBase]:
    """The layers of `model` that keep running statistics of their batches, by dotted name."""
    return {
        name: module
        for name, module in select(dict(named_modules(model)), None).items()
        if isinstance(module, BatchNormBase) and module.track_running_stats
    }


def recalibrate_norm_(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    r"""Replaces the running statistics of batch norm by plain means over `batches`, run without noise.

    :math:`\mu = \frac1B \sum_b \operatorname{mean}(x_b), \quad \sigma^2 = \frac1B \sum_b \operatorname{var}(x_b)`

    of the inputs of each batch-norm layer, with torch's unbiased variances. Only the batch norms are in training mode
    meanwhile: Sparseout, Dropout, the dropout inside an LSTM or an attention and everything else run as in evaluation.
    Nothing else changes: no weight, no gradient, no training flag. After an error the statistics are the old ones, as
    are those of a batch norm that is not called. The means are taken in fp32 whatever the dtype of the model. Without
    batch norm no batch is read. With several processes each uses its own batches.

    Args:
        model: takes one batch.
        batches: at least one: tensors, or tuples or lists whose first element is the input. They are moved to the
            model's device. Every batch counts the same: pass batches of one size, a few thousand samples in all.

    Raises:
        ValueError: if there is no batch.
        TypeError: if `model` is not a module, or the first batch is neither a tensor nor begins with one.

    Warns:
        UserWarning: if the model has no batch norm.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
        >>> recalibrate_norm_(model, [torch.tensor([[1.0, 2.0], [3.0, 6.0]])])
        >>> model[1].running_mean, model[1].running_var
        (tensor([2., 4.]), tensor([2., 8.]))

    Source: `torch.optim.swa_utils.update_bn`, which leaves the noise on and the running means in the model's dtype.
    """
    check_model(model)
    norms = list(batch_norms(model).values())
    if not norms:
        warnings.warn(f"no statistics were estimated: the {type(model).__name__} has no batch norm", stacklevel=2)
        return
    if not isinstance(batches, Iterable):
        raise TypeError(expected("batches", "an iterable of batches", type_name(batches)))
    source = iter(batches)
    try:
        first = next(source)
    except StopIteration:
        raise ValueError(expected("batches", "at least one batch", "none")) from None
    begins = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(begins, Tensor):
        raise TypeError(expected("batches", "tensors, or tuples or lists that begin with one", type_name(begins)))
    before = [(norm, norm.momentum, [(old, old.clone()) for old in norm.buffers(recurse=False)]) for norm in norms]
    sums = {norm: _Sums() for norm in norms}
    hooks = Hooks()
    for norm, means in sums.items():
        hooks.after(norm, means.update)
    device = next(chain(model.parameters(), model.buffers())).device
    estimated: set[nn.Module] = set()
    try:
        with restored_modes(model), torch.no_grad():
            for module in model.modules():
                module.training = module in sums
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = 1.0  # the running statistics are then those of the last batch
            for batch in chain([first], source):
                x: Any = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(x.to(device))
        estimated = {norm for norm, means in sums.items() if means.write(norm)}
    finally:
        hooks.remove()
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if norm not in estimated:  # after an error, or not called
                for buffer, old in buffers:
                    buffer.data.copy_(old)


class _Sums:
    """The sums of a norm's statistics over its calls, in fp32 at least: a mean that runs in half types stands still."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def update(self, norm: BatchNormBase, args: object, output: object) -> None:
        self.count += 1
        for name in ("running_mean", "running_var"):
            value = norm.get_buffer(name)
            wide = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            self.sums[name] = wide.add_(self.sums[name]) if name in self.sums else wide

    def write(self, norm: BatchNormBase) -> bool:
        """Give the norm the means, if there was a call."""
        for name, total in self.sums.items():
            norm.get_buffer(name).data.copy_(total / self.count)
        return self.count > 0
