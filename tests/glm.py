"""A generalized linear model of five features, its loss under the noise, and exact means over all masks."""

import itertools
import math

import torch
from torch import Tensor

from sparseout.kernels import reference
from sparseout.theory import BERNOULLI, GAUSSIAN, POISSON

FAMILIES = (GAUSSIAN, BERNOULLI, POISSON)


QS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


H = torch.tensor([0.9, -1.7, 0.0, 0.3, -0.05], dtype=torch.float64)


W = torch.tensor([0.7, 0.4, -1.2, -0.5, 0.6], dtype=torch.float64)


G = W * H.sign()  # all effects of one sign, so that no sum of cubes cancels


B = torch.tensor(0.35, dtype=torch.float64)


Y = torch.tensor(1.0, dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - wanted).abs().max() <= tolerance)


def mean_over_masks(function, d: int, p: float):
    """The mean of function(xi) over all masks, each by its probability; a tensor or a tuple of them."""
    total = None
    for kept in itertools.product((True, False), repeat=d):
        probability = math.prod(1 - p if one else p for one in kept)
        found = function(reference.noise(torch.tensor(kept), p, torch.float64))
        parts = [probability * part for part in (found if isinstance(found, tuple) else (found,))]
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    assert total is not None
    return total if len(total) > 1 else total[0]


def noisy_loss(h, w, b, xi, q, family, *, exact=True, unit=1.0, gain=1.0):
    y = reference.sparseout(h, xi, q, unit, gain, exact)
    return family.negative_log_likelihood((w * y).sum(-1) + b, Y)


def gradients(function, *values):
    """The gradient of function(*values) in each of them."""
    values = [value.detach().clone().requires_grad_() for value in values]
    return torch.autograd.grad(function(*values), values)


# How far the penalty is from the expected loss


def third_and_fourth_derivative(family, theta: Tensor) -> tuple[Tensor, Tensor]:
    theta = theta.detach().clone().requires_grad_()
    (third,) = torch.autograd.grad(family.variance(theta), theta, create_graph=True)
    (fourth,) = torch.autograd.grad(third, theta)
    return third.detach(), fourth
