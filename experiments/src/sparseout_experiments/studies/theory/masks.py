"""The example that the statements are checked on, and means over all of its masks.

What a mask does comes from `kernels.reference`, the definition of the operation, and from autograd; what is expected of
it from `sparseout.theory`.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseout import theory
from sparseout.kernels import reference
from sparseout.theory import Family

# Features of both signs and one that is 0; weights of the features' signs, so that no sum of cubes cancels.
FEATURES = torch.tensor([0.9, -1.7, 0.0, 0.3, -0.05], dtype=torch.float64)
WEIGHT = torch.tensor([0.7, -0.4, 1.2, 0.5, -0.6], dtype=torch.float64)
BIAS = torch.tensor(-0.9, dtype=torch.float64)
TARGET = torch.tensor(1.0, dtype=torch.float64)
WIDTH = len(FEATURES)


class Slopes(NamedTuple):
    """Gradients in the features, the weights and the bias."""

    features: Tensor
    weight: Tensor
    bias: Tensor


def every_noise(p: float) -> tuple[Tensor, Tensor]:
    """The noise of every mask, (2^d, d), and the probability of each."""
    masks = torch.tensor(list(itertools.product((True, False), repeat=WIDTH)))
    return reference.noise(masks, p, torch.float64), torch.where(masks, 1 - p, p).double().prod(-1)


def losses(
    features: Tensor, weight: Tensor, bias: Tensor, xi: Tensor, q: float, family: Family, exact: bool, beta: float = 1.0
) -> Tensor:
    """The loss under each noise, by the definition of the operation."""
    noisy = reference.sparseout(features, xi, q, 1.0, beta, exact)
    return family.negative_log_likelihood((noisy * weight).sum(-1) + bias, TARGET)


def mean_loss(q: float, p: float, family: Family) -> Tensor:
    """The mean over all masks."""
    xi, probability = every_noise(p)
    return probability @ losses(FEATURES, WEIGHT, BIAS, xi, q, family, exact=True)


def slopes_by_mask(
    q: float,
    p: float,
    family: Family,
    exact: bool,
    features: Tensor = FEATURES,
    weight: Tensor = WEIGHT,
    beta: float = 1.0,
) -> Slopes:
    """The library's gradient under each mask: (2^d, d), (2^d, d) and (2^d,)."""
    xi, _ = every_noise(p)
    copies = [value.expand(len(xi), *value.shape).clone().requires_grad_() for value in (features, weight, BIAS)]
    h, w, b = copies
    return Slopes(*torch.autograd.grad(losses(h, w, b, xi, q, family, exact, beta).sum(), copies))


def mean_slopes(q: float, p: float, family: Family, exact: bool, **at: Any) -> Slopes:
    """The mean over all masks of `slopes_by_mask`, which has the arguments."""
    _, probability = every_noise(p)
    return Slopes(*(torch.tensordot(probability, slopes, 1) for slopes in slopes_by_mask(q, p, family, exact, **at)))


def slopes_of(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Slopes:
    """The gradient of a function of features, weights and bias."""
    values = [value.clone().requires_grad_() for value in (FEATURES, WEIGHT, BIAS)]
    return Slopes(*torch.autograd.grad(function(*values), values))


def loss_and_penalty(
    q: float, p: float, family: Family, beta: float = 1.0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Loss + R as a function of features, weights and bias."""

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        loss = family.negative_log_likelihood(w @ h + b, TARGET)
        return loss + beta**2 * theory.lq_penalty(h, w, p, q, family, bias=b)

    return function


def expected(q: float, p: float, family: Family) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """E[loss] as a function of features, weights and bias."""
    return lambda h, w, b: theory.expected_loss(h, w, TARGET, p, q, family, bias=b)


def direct(q: float, p: float, family: Family) -> Tensor:
    """The gradient that R sends to the features other than through theta, times 2/q, so that it is finite at q = 0.

    A''(theta) p / (1 - p) w^2 sign(h) |h|^(q - 1).
    """
    size = torch.where(FEATURES == 0, 0.0, FEATURES.abs().pow(q - 1))
    variance = family.variance(WEIGHT @ FEATURES + BIAS)
    return variance * p / (1 - p) * WEIGHT.square() * FEATURES.sign() * size


def asymmetry(q: float, p: float, family: Family, weight_too: bool) -> Tensor:
    """Asymmetry of the derivatives of the mean detached gradient; that of a gradient of a loss is 0.

    By differences, since to autograd the multiplier of the noise is a constant also when it differentiates twice. In
    the features that are not 0 alone, or in these and their weights.
    """
    kept = FEATURES != 0
    count = WIDTH * (1 + weight_too)

    def field(point: Tensor) -> Tensor:
        weight = point[WIDTH:] if weight_too else WEIGHT
        slopes = mean_slopes(q, p, family, exact=False, features=point[:WIDTH], weight=weight)
        return torch.cat(slopes[: 1 + weight_too])

    point, step = torch.cat([FEATURES, WEIGHT])[:count], 1e-5
    moves = step * torch.eye(count, dtype=torch.float64)
    inside = torch.cat([kept, kept])[:count]
    columns = [(field(point + move) - field(point - move)) / (2 * step) for move in moves[inside]]
    cross = torch.stack(columns, 1)[inside]
    return cross - cross.T
