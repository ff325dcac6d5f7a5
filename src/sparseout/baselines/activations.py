"""Activation functions that are sparse by themselves: ReLU squared, and the statistical top-k."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparseout._utils.activations import UnitDim, UnitTracker
from sparseout._utils.activations import unit_dim as dim_of_units
from sparseout._utils.torch_internals import readable
from sparseout._utils.tracing import as_step
from sparseout._utils.validation import check_int, expected
from sparseout.baselines.rows import check_count, map_rows


def relu_squared(x: Tensor) -> Tensor:
    r"""ReLU squared, the square of the positive part.

    .. math::
        y = \max(0, x)^2

    It is zero where ReLU is. Trained with it, networks have had fewer active units than with ReLU, and large values
    count for more: so the Hoyer sparsity of the same pre-activations is higher. In fp16, y overflows for x above 255.

    Args:
        x: any tensor of real numbers.

    Returns:
        A tensor of the shape and dtype of x.

    Example:
        >>> relu_squared(torch.tensor([-2.0, 0.5, 3.0]))
        tensor([0.0000, 0.2500, 9.0000])

    Source: So et al. (2021), Primer: searching for efficient transformers for language modeling, section 4; Zhang et
    al. (2024), ReLU² wins: discovering efficient activation functions for sparse LLMs.
    """
    active = F.relu(x)
    return active * active  # nested tensors have no square


class ReLUSquared(nn.Module):
    r"""ReLU squared, :math:`y = \max(0, x)^2`, in place of an activation, or after a ReLU.

    Shape:
        - Input: any.
        - Output: the same.

    Example:
        >>> ReLUSquared()(torch.tensor([-1.0, 2.0]))
        tensor([0., 4.])

    Source: So et al. (2021), Primer: searching for efficient transformers for language modeling, section 4.
    """

    _is_activation = True

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared(x)


def statistical_topk(x: Tensor, k: float | Tensor = 0.1, *, unit_dim: int | None = None) -> Tensor:
    r"""The excess of each unit over a threshold that about k of n units pass if they are Gaussian: no sort.

    .. math::
        y_i = \max(0, x_i - \theta), \qquad
        \theta = \bar x + \sigma_x \, \Phi^{-1}(1 - k / n), \qquad
        \sigma_x^2 = \frac1n \sum_i (x_i - \bar x)^2

    with the mean, the standard deviation and n those of a row, and :math:`\Phi^{-1}` the quantile of the standard
    Gaussian. The fraction of units that pass is k / n for a Gaussian row and close to it for one that nearly is; for
    others it differs, by row: :func:`sparseout.measures.density` of y is the exact one. By Cantelli's inequality it is
    never above :math:`1 / (1 + z^2)` with :math:`z = \Phi^{-1}(1 - k / n)`, for k / n <= 1/2. Meant for what goes into
    an activation, in its place or before it: after a ReLU the rows are no Gaussians. For k / n > 1/2 zeros may become
    positive.

    The gradient passes through :math:`\theta` too. A row of equal values has none above the threshold: it becomes 0,
    and its gradient is 0. A row with NaN or infinity is NaN. Half types are computed in fp32. There is no state, and
    training and evaluation are the same.

    Args:
        x: activations; rows and units as in :class:`sparseout.baselines.KWinners`: the units of a map (N, C, H, W) or
            volume are all C H W of an example, those of other tensors lie along the last dim.
        k: a fraction of n in (0, 1), which may be a 0-d floating-point tensor without gradient, to be changed in place
            with no recompilation (best fp64 on the CPU), or a whole number >= 1 and < n.
        unit_dim: where units lie, if not as above; what follows that dim competes too, what precedes it are rows.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ValueError: for a value out of range; for a tensor without units.
        TypeError: for an argument of another type; for x of whole or complex numbers.

    Example:
        >>> statistical_topk(torch.tensor([[0.0, 1.0, 2.0, 3.0, 14.0]]), k=0.2)  # mean 4, deviation 5.099
        tensor([[0.0000, 0.0000, 0.0000, 0.0000, 5.7086]])

    Source: You et al. (2025), Spark Transformer: reactivating sparsity in FFN and attention, which names it; Gemma 3n
    (Google, 2025) has it before the GELU of its first layers, at k / n = 0.05, with the deviation as here.
    """
    fraction = check_count("k", readable(check_count("k", k)))
    if not x.is_floating_point():
        raise TypeError(expected("x", "of floating-point numbers", str(x.dtype)))
    if unit_dim is not None:
        check_int("unit_dim", unit_dim)
        if x.dim() and not -x.dim() <= unit_dim < x.dim():
            raise ValueError(expected("unit_dim", f"in [{-x.dim()}, {x.dim() - 1}]", unit_dim))
    dim = dim_of_units(x, unit_dim) % max(1, x.dim())
    return map_rows(x, dim, lambda parts, dim: [_above(part, fraction, dim) for part in parts])


fx.wrap("statistical_topk")


def _above(x: Tensor, k: float | Tensor, dim: int) -> Tensor:
    dims = tuple(range(dim, x.dim()))
    count = math.prod(x.shape[dim:])
    if count == 0:  # also in an example of a nested tensor; without rows there is nothing to ask the compiler
        return x
    if isinstance(k, int):
        if k >= count:
            raise ValueError(expected("k", f"less than {count}, the units that compete", k))
        k = k / count
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    high, low = wide.detach().amax(dims, keepdim=True), wide.detach().amin(dims, keepdim=True)
    equal = high == low  # no deviation; the rounding of the mean would make one
    scale = torch.where(equal, 1.0, torch.maximum(high, -low))  # squares of large or small numbers leave the dtype
    unit = wide / scale
    mean = unit.mean(dims, keepdim=True)
    variance = torch.where(equal, 1.0, (unit - mean).square().mean(dims, keepdim=True))
    if not isinstance(k, Tensor):
        k = torch.full((), k, dtype=torch.float64, device="cpu")
    quantile = -torch.special.ndtri(k.double()).to(wide.dtype)
    excess = F.relu(wide - scale * (mean + variance.sqrt() * quantile))
    return torch.where(equal, 0.0, excess).to(x.dtype)


class StatisticalTopK(nn.Module):
    r"""Statistical top-k: the layer of :func:`sparseout.baselines.statistical_topk`, which says more about it.

    .. math::
        y_i = \max(0, x_i - \theta), \qquad \theta = \bar x + \sigma_x \, \Phi^{-1}(1 - k / n)

    Args:
        k: a fraction of the n units of a row in (0, 1), also as a 0-d tensor, or a whole number >= 1 and < n.
        unit_dim: where the units lie, if not along the last dim, or along dim 1 of a 4-d or 5-d input: an int, or a
            function of a name (""), the layer and its input, for a layer that meets several kinds.

    Shape:
        - Input: (*, units), (N, units, H, W) or (N, units, D, H, W), or as `unit_dim` says. Nested tensors too, each
          example with its own rows.
        - Output: the same.

    Raises:
        ValueError: for a value out of range; for an input without units.
        TypeError: for an argument of another type.

    Example:
        >>> from sparseout.measures import density
        >>> y = StatisticalTopK(0.1)(torch.randn(4, 10_000))
        >>> round(density(y).mean().item(), 2)
        0.1

    Source: You et al. (2025), Spark Transformer: reactivating sparsity in FFN and attention.
    """

    _is_activation = True

    def __init__(self, k: float | Tensor = 0.1, *, unit_dim: UnitDim = None) -> None:
        super().__init__()
        self.k = check_count("k", k)
        self._tracker = UnitTracker(self, unit_dim)

    def forward(self, x: Tensor) -> Tensor:
        if (step := as_step(self, x)) is not None:
            return step  # type: ignore[return-value]
        given = self._tracker.unit_dim
        dim = given if given is None or isinstance(given, int) else self._tracker.dim("", self, x)
        return statistical_topk(x, self.k, unit_dim=dim)

    def extra_repr(self) -> str:
        return f"k={self.k!s}"
