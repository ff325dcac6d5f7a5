"""One training step with penalty and controller, for studies that do not use the command's training loop."""

import warnings

import torch
from torch import Tensor

import sparseout
from sparseout import baselines


def step(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    penalty: baselines.ActivityPenalty | None,
    controller: sparseout.SparsityController | None,
) -> list[str]:
    """One step down the loss and the penalty, and one of the controller; returns what the controller warns of."""
    optimizer.zero_grad()
    (loss if penalty is None else loss + penalty.loss()).backward()
    optimizer.step()
    if controller is None:
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller.step()
    return [str(warning.message) for warning in caught]
