"""Statistics of batch norm, estimated again without noise.

Noise in training widens what batch norm sees, while in evaluation there is none: with the running averages of training
an evaluated network is scaled wrongly, by how much depends on q and p, and methods could not be compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer of `model` keeps running statistics of its batches."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def reestimate(model: nn.Module, batches: Iterable[Tensor], noise: Sequence[nn.Module]) -> None:
    """Replaces the running statistics of batch norm by plain means over `batches`, with the layers `noise` turned off.

    Every batch counts the same: pass batches of one size. Variances are the unbiased ones of each batch, averaged, as
    batch norm keeps them. Nothing else changes: no weight, no layer's training flag. Without batch norm nothing is
    done, and no batch is asked for.

    Args:
        model: takes one batch.
        batches: at least one; on the model's device.
        noise: the layers that are to let their input pass.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    source = iter(batches)
    first = next(source, None)
    if first is None:
        raise ValueError("There must be at least one batch to estimate the statistics of batch norm from.")
    training = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]

    def quiet() -> Iterator[Tensor]:
        for layer in noise:  # here, since `update_bn` begins by putting the whole model into training mode
            layer.eval()
        yield from chain([first], source)

    try:
        update_bn(quiet(), model)
    finally:
        for module, flag in training:
            module.training = flag
        for norm, momentum in momenta:  # `update_bn` does this too, but not after an error
            norm.momentum = momentum
