"""Penalty terms: functions of the activations of one layer."""

from typing import Any

import torch
from torch import Tensor

from sparseout._utils.activations import unit_dim as dim_of_units
from sparseout._utils.validation import check_dim, check_floating, check_int, check_number, check_positive, expected

EPS = 1e-3


def lq_penalty(x: Tensor, q: float = 1.0, eps: float = EPS, *, unit_dim: int | None = None) -> Tensor:
    r"""The L_q^q of activations, summed over units and averaged over rows, and smooth at zero.

    .. math::
        R = \frac1N \sum_{n=1}^N \sum_j \left[ (x_{nj}^2 + \varepsilon^2)^{q/2} - \varepsilon^q \right]

    It differs from :math:`\sum_j |x_{nj}|^q` by the shift, and otherwise only where :math:`|x|` is not large against
    :math:`\varepsilon`. Units lie along dim 1 of a 4-d or 5-d tensor and along the last dim of others; rows are all
    the rest: examples, times positions of a map. So neither the size of the batch nor that of the map changes R, while
    twice the units give twice the R. The slope is :math:`q x (x^2 + \varepsilon^2)^{q/2 - 1} / N`.

    Args:
        x: activations; half types are computed in fp32.
        q: exponent, a finite number > 0; 1 is the L1 penalty, and for q < 1 the term is not convex.
        eps: a finite number > 0, in the unit of x.
        unit_dim: where units lie, if not as above.

    Returns:
        A 0-d tensor, in the unit of x to the power q.

    Raises:
        ValueError: for a value out of range; for an x without dims.
        TypeError: for an argument of another type.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [1.0, -1.0]])
        >>> lq_penalty(x, q=2.0)
        tensor(5.5000)

    Source: Glorot, Bordes & Bengio (2011), Deep sparse rectifier neural networks, section 3.3, at q = 1 and without
    the smoothing.
    """
    return lq_term(x, check_positive("q", q), check_positive("eps", eps), _checked_dim(x, unit_dim))


def kl_penalty(x: Tensor, target: float = 0.05, *, unit_dim: int | None = None) -> Tensor:
    r"""The divergence of each unit's mean activation from a target, summed over units.

    .. math::
        R = \sum_j \rho \log \frac{\rho}{\hat\rho_j} + (1 - \rho) \log \frac{1 - \rho}{1 - \hat\rho_j},
        \qquad \hat\rho_j = \frac1N \sum_n x_{nj}

    for activations in [0, 1], as those of a sigmoid: others are an error, ReLU's among them. The mean is that of the
    batch at hand, so that R has a bias upwards in small batches. A mean of 0 or 1, from units that are saturated
    for every row, counts as the nearest number to it that has a logarithm. Checking the range waits for the device.

    Args:
        x: activations, rows and units as in :func:`sparseout.baselines.lq_penalty`.
        target: :math:`\rho`, the mean activation wanted, a number > 0 and < 1.
        unit_dim: where units lie, if not as in :func:`sparseout.baselines.lq_penalty`.

    Returns:
        A 0-d tensor without unit (nats).

    Raises:
        ValueError: for a value out of range; for activations outside [0, 1].
        TypeError: for an argument of another type.

    Example:
        >>> kl_penalty(torch.full((4, 3), 0.05)).item(), kl_penalty(torch.full((4, 3), 0.5)).item() > 0
        (0.0, True)

    Source: Hinton (2010), A practical guide to training restricted Boltzmann machines, section 11 (a mean that decays
    over batches there); Lee, Ekanadham & Ng (2008), Sparse deep belief net model for visual area V2, which has the
    squared difference in place of the divergence.
    """
    return kl_term(x, check_target(target), _checked_dim(x, unit_dim))


def _checked_dim(x: Any, unit_dim: int | None) -> int:
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError(expected("x", "of at least one dim", "a 0-d tensor"))
    dim = dim_of_units(x, None if unit_dim is None else check_int("unit_dim", unit_dim))
    return check_dim("unit_dim", dim, x.ndim)


def lq_term(x: Tensor, q: float, eps: float, dim: int, copy: bool = False) -> Tensor:
    """`lq_penalty` with checked arguments; with `copy`, x may be overwritten before backward."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=copy)
    rows = max(1, x.numel() // max(1, x.shape[dim]))
    small = wide.new_full((), max(eps, torch.finfo(wide.dtype).tiny))
    terms: Tensor = torch.hypot(wide, small) ** q - small**q  # whose squares neither overflow nor vanish
    return terms.sum() / rows


def kl_term(x: Tensor, target: float, dim: int) -> Tensor:
    """`kl_penalty` with checked arguments."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, -1)
    if x.numel() == 0:
        return wide.sum()
    low, high = wide.detach().aminmax()
    if low < 0 or high > 1:
        got = f"some from {low.item():g} to {high.item():g}"
        raise ValueError(expected("x", "activations from 0 to 1, as of a sigmoid, for the KL penalty", got))
    limits = torch.finfo(wide.dtype)
    mean = wide.reshape(-1, wide.shape[-1]).mean(0).clamp(limits.tiny, 1 - limits.eps)
    inactive = (1 - target) * ((1 - target) / (1 - mean)).log()
    divergence: Tensor = target * (target / mean).log() + inactive
    return divergence.sum()


def check_target(value: Any) -> float:
    """Check the mean activation wanted."""
    return check_number("target", value, "a number > 0 and < 1", lambda target: 0 < target < 1)
