"""Averaging the weights of a run from the moment on at which its validation loss no longer falls.

Source: Merity, Keskar & Socher (2017), Regularizing and Optimizing LSTM Language Models, section 3 and algorithm 1
(NT-ASGD).
"""

from collections.abc import Sequence

from torch import nn
from torch.optim.swa_utils import AveragedModel


def triggered(losses: Sequence[float], patience: int = 5) -> bool:
    """Whether averaging has begun: once begun, no later loss ends it.

    It begins with the first of the validation losses so far that is above the least of those `patience` and more
    checks before it, the `patience` losses just before it not looked at. So does the authors' code, and the reading
    that compares with those last losses instead, as the algorithm was first printed, is by their word a misprint.
    A loss that is not a number begins nothing.
    """
    checks = range(patience + 1, len(losses))
    return any(losses[check] > min(losses[: check - patience]) for check in checks)


def averaged(model: nn.Module) -> AveragedModel:
    """The equal average of the weights that `model` has at each call of `update_parameters(model)`; starts with none.

    SGD and this are averaged SGD: `torch.optim.ASGD(t0=0, lambd=0)` is the same average over every step but its
    first. Weights that are tied in `model` are tied in the average.
    """
    average = AveragedModel(model)
    for module in average.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # a copy's weights no longer lie in the one block that cuDNN reads
    return average
