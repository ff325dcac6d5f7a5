"""Statistics of batch norm, estimated again without noise.

Noise in training widens what batch norm sees, while in evaluation there is none: with the running averages of training
an evaluated network is scaled wrongly, by how much depends on q and p.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from sparseout._utils.modules import named_modules, select
from sparseout._utils.validation import expected, kind


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of `model` that keep running statistics of their batches, by dotted name."""
    return {
        name: module
        for name, module in select(dict(named_modules(model)), None).items()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def recalibrate_norm_(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    r"""Replaces the running statistics of batch norm by plain means over `batches`, run without noise.

    :math:`\mu = \frac1B \sum_b \operatorname{mean}(x_b), \quad \sigma^2 = \frac1B \sum_b \operatorname{var}(x_b)`

    of what each batch-norm layer is given, in torch's unbiased variances. Only the batch norms are in training mode
    meanwhile: Sparseout, Dropout, the dropout inside an LSTM or an attention and all else run as in evaluation. Nothing
    else changes: no weight, no gradient, no training flag; after an error the statistics are the old ones. Without
    batch norm nothing is done, and no batch is asked for. With several processes each uses its own batches.

    Args:
        model: takes one batch.
        batches: at least one: tensors, or tuples or lists whose first element is the input. They are moved to the
            model's device. Every batch counts the same: pass batches of one size, a few thousand samples in all.

    Raises:
        ValueError: if there is no batch.
        TypeError: if `model` is not a module, or the first batch is neither a tensor nor begins with one.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
        >>> recalibrate_norm_(model, [torch.tensor([[1.0, 2.0], [3.0, 6.0]])])
        >>> model[1].running_mean, model[1].running_var
        (tensor([2., 4.]), tensor([2., 8.]))

    Source: `torch.optim.swa_utils.update_bn`, which is run underneath, with its noise left on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a module", kind(model)))
    norms = list(batch_norms(model).values())
    if not norms:
        return
    if not isinstance(batches, Iterable):
        raise TypeError(expected("batches", "an iterable of batches", kind(batches)))
    source = iter(batches)
    try:
        first = next(source)
    except StopIteration:
        raise ValueError(expected("batches", "at least one batch", "none")) from None
    begins = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(begins, Tensor):
        raise TypeError(expected("batches", "tensors, or tuples or lists that begin with one", kind(begins)))
    flags = [(module, module.training) for module in model.modules()]
    kept = [(norm, norm.momentum, [(old, old.clone()) for old in norm.buffers(recurse=False)]) for norm in norms]

    def quiet() -> Iterator[Tensor | Sequence[Tensor]]:
        for module, _ in flags:  # here, since `update_bn` begins by putting the whole model into training mode
            module.training = module in norms
        yield from chain([first], source)

    device = next(chain(model.parameters(), model.buffers())).device
    try:
        update_bn(quiet(), model, device)
    except BaseException:
        with torch.no_grad():
            for _, _, buffers in kept:
                for buffer, old in buffers:
                    buffer.copy_(old)
        raise
    finally:
        for module, flag in flags:
            module.training = flag
        for norm, momentum, _ in kept:  # `update_bn` does this too, but not after an error
            norm.momentum = momentum
