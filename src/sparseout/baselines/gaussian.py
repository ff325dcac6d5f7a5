"""Gaussian dropout: the noise of Dropout with its mean and variance, and no drop."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparseout._utils.torch_internals import is_sharded, readable
from sparseout._utils.tracing import as_step
from sparseout._utils.validation import check_floating, check_probability, check_scalar, expected
from sparseout.baselines.rows import with_parts
from sparseout.functional import check_dims, normalise_dims
from sparseout.kernels.mask import variance


def gaussian_dropout(
    x: Tensor, p: float | Tensor = 0.5, training: bool = True, *, shared_dims: Sequence[int] = ()
) -> Tensor:
    r"""Multiplies by Gaussian noise that has the mean and the variance of Dropout's.

    .. math::
        y = x \, (1 + \sqrt{p / (1 - p)} \; n), \qquad n \sim \mathcal N(0, 1)

    so that :math:`E[y] = x` and :math:`\operatorname{Var}[y] = x^2 \, p / (1 - p)`, which is Sparseout's at q = 2. No
    unit is dropped and every unit can change sign. Linear models learn the same L2 penalty as from Dropout.

    Args:
        x: any floating-point tensor. Half types are computed in fp32.
        p: the drop probability of the Dropout that has the same variance, in [0, 1), or a 0-d tensor as for
            :func:`sparseout.sparseout`. At a float of 0 the input itself is returned.
        training: if False, the input itself is returned and no random number is drawn.
        shared_dims: dims along which one draw is shared, as in :func:`sparseout.sparseout`.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an argument of another type.

    Example:
        >>> x = torch.ones(3)
        >>> gaussian_dropout(x, 0.5).shape, gaussian_dropout(x, 0.5, training=False) is x
        (torch.Size([3]), True)

    Source: Srivastava et al. (2014), Dropout: a simple way to prevent neural networks from overfitting, section 10.
    """
    number: Any = _checked(readable(_checked(p)))
    dims = normalise_dims(check_dims(shared_dims), x.dim())
    if not training or (not isinstance(number, Tensor) and number == 0):
        return x
    check_floating("x", x)
    if x.is_nested:
        if 0 in dims:
            raise ValueError(expected("shared_dims", "dims within the examples of a nested tensor", shared_dims))
        inner = [dim - 1 for dim in dims]
        return with_parts(x, [gaussian_dropout(part, p, shared_dims=inner) for part in x.unbind()])
    wide = torch.promote_types(x.dtype, torch.float32)
    if is_sharded(x):  # a noise that is spread as x is
        noise = torch.randn_like(
            x[tuple(slice(1) if dim in dims else slice(None) for dim in range(x.dim()))], dtype=wide
        )
    else:
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        noise = torch.randn(shape, dtype=wide, device=x.device)
    factor: Tensor = 1 + variance(number) ** 0.5 * noise
    return (x * factor).to(x.dtype)


fx.wrap("gaussian_dropout")


def _checked(p: Any) -> float | Tensor:
    return check_scalar("p", p) if isinstance(p, Tensor) else check_probability(p)


class GaussianDropout(nn.Module):
    r"""Multiplies by Gaussian noise in training: the layer of :func:`sparseout.baselines.gaussian_dropout`.

    .. math:: y = x \, (1 + \sqrt{p / (1 - p)} \; n), \qquad n \sim \mathcal N(0, 1)

    Args:
        p: the drop probability of the Dropout that has the same variance, in [0, 1), or a 0-d tensor.
        shared_dims: dims along which one draw is shared, as in :class:`sparseout.Sparseout`.

    Shape:
        - Input: any.
        - Output: the same.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an argument of another type.

    Example:
        >>> GaussianDropout(0.2)
        GaussianDropout(p=0.2)

    Source: Srivastava et al. (2014), Dropout: a simple way to prevent neural networks from overfitting, section 10.
    """

    def __init__(self, p: float | Tensor = 0.5, *, shared_dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.p, self.shared_dims = _checked(p), check_dims(shared_dims)

    def forward(self, x: Tensor) -> Tensor:
        if (step := as_step(self, x)) is not None:
            return step  # type: ignore[return-value]
        return gaussian_dropout(x, self.p, self.training, shared_dims=self.shared_dims)

    def extra_repr(self) -> str:
        return f"p={self.p!s}" + (f", shared_dims={self.shared_dims}" if self.shared_dims else "")
