"""What studies with a training of their own share: a network, a training step, and the sparsity in evaluation."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


@contextmanager
def steered(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: baselines.ActivityPenalty | None,
    target: float | None,
    **control: Any,
) -> Iterator[tuple[Callable[[Tensor], list[str]], sparseout.SparsityController | None]]:
    """A block with a penalty and, given a target, a controller: yields the step of all three, and the controller.

    The step goes down the loss and the penalty, and returns what the controller warns of.
    """
    with ExitStack() as attached:
        if penalty is not None:
            attached.enter_context(penalty)
        controller = None
        if target is not None:
            controller = sparseout.SparsityController(model, target, **control)
            attached.callback(controller.detach)

        def step(loss: Tensor) -> list[str]:
            optimizer.zero_grad()
            (loss if penalty is None else loss + penalty.loss()).backward()
            optimizer.step()
            if controller is None:
                return []
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                controller.step()
            return [str(warning.message) for warning in caught]

        yield step, controller


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
