"""Families of generalized linear models in canonical form, and their exact means under the noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseout._utils.validation import expected
from sparseout.kernels.mask import variance

MOST_ENUMERATED = 16  # features, of which there are 2^16 masks

Function = Callable[[Tensor], Tensor]
Marginal = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Family:
    r"""An exponential family: density :math:`g(y) \exp(y \theta - A(\theta))`, natural parameter theta.

    Args:
        name: for its repr.
        log_partition: A. Elementwise, as the two below.
        mean: A', the mean of y.
        variance: A'', the variance of y.
        log_base: log g, which does not depend on theta.
        expected_log_partition: :math:`E[A(\theta + \sum_j a_j \xi_j)]` of theta of shape (...), amplitudes a of shape
            (..., d) and p, with the noise :math:`\xi_j` of Sparseout. If None, all 2^d masks are enumerated, for up
            to 16 features.

    None of the functions is checked: A' and A'' are those that are given.

    Example:
        >>> import torch
        >>> from sparseout import theory
        >>> theory.POISSON.negative_log_likelihood(torch.tensor(0.0), torch.tensor(2.0))  # 1 + log 2!
        tensor(1.6931)

    Source: McCullagh & Nelder (1989), Generalized Linear Models, section 2.2.
    """

    name: str
    log_partition: Function
    mean: Function
    variance: Function
    log_base: Function
    expected_log_partition: Marginal | None = None

    def negative_log_likelihood(self, theta: Tensor, target: Tensor) -> Tensor:
        r""":math:`A(\theta) - y \theta - \log g(y)`, including constants such as log y!."""
        return self.log_partition(theta) - target * theta - self.log_base(target)

    def __repr__(self) -> str:
        return f"<family {self.name}>"


def enumerated(log_partition: Function) -> Marginal:
    """The mean of A over all 2^d masks."""

    def mean(theta: Tensor, amplitude: Tensor, p: float) -> Tensor:
        features = amplitude.shape[-1]
        if features > MOST_ENUMERATED:
            wanted = f"of at most {MOST_ENUMERATED} features, since all of their masks are enumerated"
            raise ValueError(expected("features", wanted, f"{features}"))
        shifted, probability = theta.unsqueeze(-1), theta.new_ones(1)
        for column in amplitude.unsqueeze(-1).unbind(-2):
            kept, dropped = shifted + column * variance(p), shifted - column
            shifted = torch.cat([kept, dropped], -1)
            probability = torch.cat([probability * (1 - p), probability * p])
        return (log_partition(shifted) * probability).sum(-1)

    return mean


def _gaussian(theta: Tensor, amplitude: Tensor, p: float) -> Tensor:
    """Half of the second moment of a sum of independent terms."""
    return (theta.square() + amplitude.square().sum(-1) * variance(p)) / 2


def _poisson(theta: Tensor, amplitude: Tensor, p: float) -> Tensor:
    """The product of the moment generating functions of the a_j xi_j, in logarithms."""
    kept = amplitude * variance(p) + math.log1p(-p)
    dropped = math.log(p) - amplitude if p else torch.full_like(amplitude, -math.inf)
    return (theta + torch.logaddexp(kept, dropped).sum(-1)).exp()


def _softplus(theta: Tensor) -> Tensor:
    return torch.logaddexp(theta, torch.zeros_like(theta))  # F.softplus is a straight line from 20 on


GAUSSIAN = Family(
    "Gaussian",
    log_partition=lambda theta: theta.square() / 2,
    mean=lambda theta: theta,
    variance=torch.ones_like,
    log_base=lambda y: -y.square() / 2 - math.log(2 * math.pi) / 2,
    expected_log_partition=_gaussian,
)
"""Linear regression with unit variance: the loss is (y - theta)^2 / 2 + log(2 pi) / 2."""

BERNOULLI = Family(
    "Bernoulli",
    log_partition=_softplus,
    mean=torch.sigmoid,
    variance=lambda theta: torch.sigmoid(theta) * torch.sigmoid(-theta),
    log_base=torch.zeros_like,
)
"""Logistic regression, y in {0, 1}: the loss is the binary cross-entropy with the logit theta."""

POISSON = Family(
    "Poisson",
    log_partition=torch.exp,
    mean=torch.exp,
    variance=torch.exp,
    log_base=lambda y: -torch.lgamma(y + 1),
    expected_log_partition=_poisson,
)
"""Log-linear regression of counts, y in {0, 1, 2, ...}: the loss is exp(theta) - y theta + log y!."""
