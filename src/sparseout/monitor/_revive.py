"""Revival of the dead units that a report names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparseout._utils.distributed import data_parallel_group, is_distributed
from sparseout._utils.modules import check_model
from sparseout._utils.revival import MeasuredUnits, RevivalReport, revive_units
from sparseout._utils.validation import expected, type_name
from sparseout.monitor._report import SparsityReport

__all__ = ["RevivalReport", "revive_"]


def revive_(model: nn.Module, report: SparsityReport, optimizer: Optimizer | None = None) -> RevivalReport:
    r"""Gives dead units fresh weights, in place, without a change of what the model computes at that moment.

    Dead units get no gradient and do not come back by themselves. For each of them the weights and the bias into it are
    drawn anew as by the layer's ``reset_parameters()``; the weights out of it become 0, so that it begins without
    effect, and with a gradient; a batch norm in between starts anew for it, with weight 1, bias 0, running mean 0 and
    variance 1; gradients and the optimizer's state of all these entries are cleared.

    In evaluation mode the output is the same up to rounding wherever these units were 0. If in between a batch norm or
    a sigmoid makes a constant of that 0, what the constant gave is added to the bias of the next layer. With the
    monitor's `eps` a dead unit need not be 0: the output changes by what it gave.

    **Which units.** Those that are dead in all of a module's records, in training and in evaluation: watch enough rows
    that a unit which fires rarely is not among them. They can be revived where they are in a chain, Linear or
    convolution -> (batch norm, activation, noise, pooling, flatten)* -> Linear or convolution, which is found in the
    traced forwards of the modules, and nothing else reads them; a product of two layers counts as one. Others are
    left, and the report says why: a residual stream, attention, recurrent layers, shared, parametrized or frozen
    weights, layers with hooks of others.

    Call it between a step of the optimizer and the next forward, and reset the monitor after it. With several processes
    all must call it, with one report of them all; they get the same weights.

    Args:
        model: the model that the report is of.
        report: of a :class:`sparseout.SparsityMonitor`.
        optimizer: the one that trains the model. Cleared is what it keeps in the shape of a parameter, such as the
            moments of Adam; its number of steps is not, nor what is of another shape, as with Adafactor and LBFGS.

    Returns:
        The units revived, by layer, and those that were left, with the reason.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if the report names a module that the model does not have; on all processes, if their reports name
            different units. Nothing is changed then.

    Example:
        >>> import torch, sparseout
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = model[0].weight.data[1].fill_(0), model[0].bias.data.fill_(1)[1].fill_(-1)
        >>> x = torch.rand(8, 4)
        >>> with sparseout.SparsityMonitor(model) as monitor:
        ...     before = model(x)
        >>> print(sparseout.revive_(model, monitor.report()))
        revived  0  1 unit
        >>> torch.allclose(model(x), before), model[2].weight[:, 1].tolist(), bool(model[0].weight[1].any())
        (True, [0.0, 0.0], True)

    Source: Sokar et al. (2023), "The dormant neuron phenomenon in deep reinforcement learning", ICML, section 4 (ReDo,
    at a threshold of 0); optimizer state after Ash & Adams (2020) and Lyle et al. (2023).
    """
    check_model(model)
    if not isinstance(report, SparsityReport):
        raise TypeError(expected("report", "a SparsityReport", type_name(report)))
    group = data_parallel_group(model) if is_distributed() else None
    return revive_units(model, _dead(report), optimizer, group)


def _dead(report: Iterable[dict[str, Any]]) -> dict[MeasuredUnits, set[int]]:
    """The units that are dead in all records of a module at a width."""
    dead: dict[MeasuredUnits, set[int]] = {}
    for record in report:
        if "dead_indices" not in record:
            raise ValueError(expected("report", "one of this version", "one without `dead_indices`"))
        units = MeasuredUnits(record["module"], record["tensor"], record["units"])
        dead[units] = dead.get(units, set(record["dead_indices"])) & set(record["dead_indices"])
    return dead
