"""The gradients of the theorem: exact and detached, and what rescaling does to them."""

import itertools
import math

import pytest
import torch
from glm import FAMILIES, QS, B, H, W, Y, close, gradients, mean_over_masks, noisy_loss, third_and_fourth_derivative
from torch import Tensor

from sparseout import theory
from sparseout.kernels import reference
from sparseout.theory import BERNOULLI, GAUSSIAN, POISSON


def test_slopes_at_zero_are_zero():
    for q in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
        h = H.clone().requires_grad_()
        (slope,) = torch.autograd.grad(theory.lq_penalty(h, W, 0.5, q, GAUSSIAN), h)
        assert slope[2] == 0
        assert close(slope, q / 2 * W.square() * H.sign() * torch.where(H == 0, 0, H.abs() ** (q - 1)))


@pytest.mark.parametrize("scale", [None, 0.4, "matched"])
def test_q_may_be_a_tensor(scale):
    found, wanted = (
        [
            theory.lq_penalty(H, W, 0.25, q, POISSON, scale=scale),
            theory.expected_loss(H, W, Y, 0.25, q, POISSON, scale=scale),
            theory.monte_carlo_loss(H, W, Y, 0.25, q, POISSON, scale=scale, samples=100).mean,
        ]
        for q in (torch.tensor(1.5), 1.5)
    )
    assert close(torch.stack(found), torch.stack(wanted), 1e-6)  # a tensor q is fp32


def test_no_gradient_flows_through_beta():
    h = H.clone().requires_grad_()
    unit, gain = reference.matched(H, 1.0)
    (found,) = torch.autograd.grad(theory.lq_penalty(h, W, 0.5, 1.0, GAUSSIAN, scale="matched"), h)
    (plain,) = torch.autograd.grad(theory.lq_penalty(h, W, 0.5, 1.0, GAUSSIAN), h)
    assert close(found, plain * (gain * unit**0.5) ** 2)


# What the two gradients follow


def mean_gradients(family, q, p, exact):
    """The means over all masks of the gradients in (features, weight, bias)."""
    return mean_over_masks(
        lambda xi: gradients(lambda h, w, b: noisy_loss(h, w, b, xi, q, family, exact=exact), H, W, B), len(H), p
    )


def direct_term(family, q, p):
    """What R sends to the features other than through theta."""
    theta = W @ H + B
    return gradients(
        lambda h: family.variance(theta) * theory.lq_penalty(h, W, p, q, GAUSSIAN),
        H,
    )[0]


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("q", QS)
def test_gaussian_gradients(q, p):
    """Exact: that of loss + R. Detached: the direct term times 2/q, which also has a value at q = 0."""
    wanted = gradients(
        lambda h, w, b: (
            GAUSSIAN.negative_log_likelihood(w @ h + b, Y) + theory.lq_penalty(h, w, p, q, GAUSSIAN, bias=b)
        ),
        H, W, B,
    )  # fmt: skip
    for found, one in zip(mean_gradients(GAUSSIAN, q, p, exact=True), wanted, strict=True):
        assert close(found, one)
    features, *others = mean_gradients(GAUSSIAN, q, p, exact=False)
    for found, one in zip(others, wanted[1:], strict=True):
        assert close(found, one)
    if q:
        assert close(features, wanted[0] + (2 / q - 1) * direct_term(GAUSSIAN, q, p))
    else:
        pull = torch.where(H == 0, 0.0, W.square() / H)  # the slope of the sum of w^2 log |h|
        assert close(features, wanted[0] + p / (1 - p) * pull)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("family", [BERNOULLI, POISSON], ids=repr)
def test_the_exact_gradient_is_that_of_the_expected_loss(family, q):
    wanted = gradients(lambda h, w, b: theory.expected_loss(h, w, Y, 0.25, q, family, bias=b), H, W, B)
    for found, one in zip(mean_gradients(family, q, 0.25, exact=True), wanted, strict=True):
        assert close(found, one)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("family", [BERNOULLI, POISSON], ids=repr)
def test_the_detached_gradient_multiplies_the_direct_part_by_2_over_q(family, q):
    """To all orders: the direct part of an exact gradient is what is not in it when y is a constant to autograd."""

    def through_theta(xi):
        y = reference.value(H, xi, q, 1.0, 1.0)
        return (family.mean(W @ y + B) - Y) * W

    exact, detached = (mean_gradients(family, q, 0.25, exact=mode) for mode in (True, False))
    indirect = mean_over_masks(through_theta, len(H), 0.25)
    assert (exact[0] - indirect).abs().max() > 0.01
    assert close(detached[0] - indirect, 2 / q * (exact[0] - indirect))
    for found, one in zip(detached[1:], exact[1:], strict=True):
        assert close(found, one)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("family", [BERNOULLI, POISSON], ids=repr)
def test_that_part_is_the_direct_term_of_the_penalty_up_to_third_order(family, q):
    p, theta = 0.25, W @ H + B
    third, _ = third_and_fourth_derivative(family, theta)
    errors = []
    for beta in (0.004, 0.002):
        unit = beta ** (1 / (1 - q / 2))

        def slopes(xi, exact, unit=unit):
            return gradients(lambda h: noisy_loss(h, W, B, xi, q, family, exact=exact, unit=unit), H)[0]

        exact, detached = (mean_over_masks(lambda xi, mode=mode: slopes(xi, mode), len(H), p) for mode in (True, False))
        part = (detached - exact) / (2 / q - 1)
        errors.append(part - beta**2 * direct_term(family, q, p))
        slope_of_cube = q / 2 * (W * H.sign()) ** 3 * H.sign() * torch.where(H == 0, 0, H.abs() ** (1.5 * q - 1))
        leading = third / 2 * theory.noise_moment(3, p) * beta**3 * slope_of_cube
        torch.testing.assert_close(errors[-1], leading, rtol=0, atol=0.1 * leading.abs().max().item())
    ratio = errors[0].abs().max() / errors[1].abs().max()
    assert math.log2(ratio) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("q", [1.0, 2.0, 3.0])
def test_at_q_other_than_2_the_detached_gradient_is_that_of_no_loss(q):
    """The derivative of the slope in w_j by h_j, and the other way round, would be equal."""
    p = 0.25

    def field(point: Tensor) -> Tensor:
        h, w = point.split(len(H))
        found = mean_over_masks(
            lambda xi: gradients(lambda h, w: noisy_loss(h, w, B, xi, q, GAUSSIAN, exact=False), h, w), len(H), p
        )
        return torch.cat(found)

    # By differences: to autograd the multiplier of the noise is a constant also when it differentiates twice.
    point, step = torch.cat([H, W]), 1e-5
    moves = step * torch.eye(len(point), dtype=torch.float64)
    moves[:, H.tolist().index(0)] = 0  # where |h|^(q - 1) has no derivative
    cross = torch.stack([(field(point + move) - field(point - move)) / (2 * step) for move in moves], 1)
    gap = (cross - cross.T)[len(H) :, : len(H)]  # d slope_w / d h - (d slope_h / d w)'
    wanted = torch.diag((q - 2) * p / (1 - p) * W * H.sign() * torch.where(H == 0, 0, H.abs() ** (q - 1)))
    gap, wanted = gap[H != 0][:, H != 0], wanted[H != 0][:, H != 0]
    assert close(gap, wanted, 1e-7)
    assert (wanted.abs().max() > 0.1) == (q != 2)


# Scale


def test_rescaling_changes_the_penalty_and_not_the_model():
    for family, q, a in itertools.product(FAMILIES, QS[1:], (0.5, 3.0)):
        before = theory.lq_penalty(H, W, 0.25, q, family, bias=B)
        after = theory.lq_penalty(a * H, W / a, 0.25, q, family, bias=B)
        assert after.item() == pytest.approx((a ** (q - 2) * before).item(), rel=1e-12)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_the_detached_gradient_has_no_part_along_rescaling_for_any_mask(family, q):
    """d/da of the loss at (a h, w / a) is h . grad_h - w . grad_w."""
    for kept in itertools.product((True, False), repeat=len(H)):
        xi = reference.noise(torch.tensor(kept), 0.25, torch.float64)
        for exact in (False, True):
            h, w = gradients(lambda h, w: noisy_loss(h, w, B, xi, q, family, exact=exact), H, W)  # noqa: B023
            force = H * h - W * w
            if not exact:
                assert close(force, torch.zeros_like(H))
            else:
                y = reference.value(H, xi, q, 1.0, 1.0)
                assert close(force, (q / 2 - 1) * (family.mean(W @ y + B) - Y) * W * (y - H))
