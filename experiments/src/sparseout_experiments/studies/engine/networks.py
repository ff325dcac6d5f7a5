"""What studies with a training of their own share: a network, a training step, and the sparsity in evaluation."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import sparseout
from sparseout import baselines


def perceptron(
    sizes: Sequence[int],
    hidden: Callable[[], Sequence[nn.Module]],
    linear: Callable[[int, int], nn.Module] = nn.Linear,
) -> nn.Sequential:
    """Linear layers of these sizes, with the modules of `hidden` after each but the last."""
    *before, last = pairwise(sizes)
    modules = [module for size in before for module in (linear(*size), *hidden())]
    return nn.Sequential(*modules, linear(*last))


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


@torch.no_grad()
def measured(model: nn.Module, modules: Sequence[Any], batches: Iterable[Tensor]) -> sparseout.SparsityReport:
    """What modules put out in evaluation, over all batches."""
    model.eval()
    with sparseout.SparsityMonitor(model, modules) as monitor:
        for batch in batches:
            model(batch)
    return monitor.report()


def population(report: sparseout.SparsityReport, name: str) -> float:
    """A measure of the population of units, a mean over modules."""
    values = [float(record[name]) for record in report if record["axis"] == "population"]
    return sum(values) / len(values)
