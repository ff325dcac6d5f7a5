"""A layer, a controller that has made a step, and rows of known sparsity."""

import torch
from torch import nn

from sparseout import Sparseout, SparsityController

HALF = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])  # rows of Hoyer 1 and 0


def one_layer(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), Sparseout(q=2.5, **options))


def watched(model: nn.Module, x: torch.Tensor, **options: object) -> SparsityController:
    """A controller after one step."""
    controller = SparsityController(model, 0.5, every=1, **options)
    model(x)
    controller.step()
    return controller
