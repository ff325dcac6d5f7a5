"""The theorem: closed forms, exact marginals and Monte-Carlo estimates of the same quantity agree.

What a mask does is enumerated here with the definition of the operation, `kernels.reference`, and autograd: nothing is
shared with `theory` but the families."""

import itertools
import math

import pytest
import torch
from glm import FAMILIES, QS, B, G, H, W, Y, close, mean_over_masks, noisy_loss, third_and_fourth_derivative
from torch import Tensor

import sparseout
from sparseout import theory
from sparseout.kernels import reference
from sparseout.theory import BERNOULLI, GAUSSIAN, POISSON

# Families


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_mean_and_variance_are_the_derivatives_of_the_log_partition(family):
    theta = torch.linspace(-40, 40, 33, dtype=torch.float64, requires_grad=True)
    (mean,) = torch.autograd.grad(family.log_partition(theta).sum(), theta, create_graph=True)
    (variance,) = torch.autograd.grad(mean.sum(), theta)
    torch.testing.assert_close(family.mean(theta), mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(family.variance(theta), variance, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("family", "distribution", "targets"),
    [
        (GAUSSIAN, lambda theta: torch.distributions.Normal(theta, 1.0), [-2.5, 0.0, 4.0]),
        (BERNOULLI, lambda theta: torch.distributions.Bernoulli(logits=theta), [0.0, 1.0]),
        (POISSON, lambda theta: torch.distributions.Poisson(theta.exp()), [0.0, 1.0, 7.0]),
    ],
)
def test_the_loss_is_that_of_the_distribution(family, distribution, targets):
    theta = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for target in targets:
        y = torch.tensor(target, dtype=torch.float64)
        wanted = -distribution(theta).log_prob(y)
        torch.testing.assert_close(family.negative_log_likelihood(theta, y), wanted, rtol=1e-13, atol=1e-13)


# The expected loss


@pytest.mark.parametrize("scale", [None, 0.4, "matched"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_the_expected_loss_is_the_mean_over_masks(family, q, p, scale):
    unit, gain = reference.matched(H, q) if scale == "matched" else (scale or 1.0, 1.0)
    wanted = mean_over_masks(lambda xi: noisy_loss(H, W, B, xi, q, family, unit=unit, gain=gain), len(H), p)
    found = theory.expected_loss(H, W, Y, p, q, family, bias=B, scale=scale)
    assert close(found, wanted, 1e-12 * max(1.0, wanted.item()))
    if family is GAUSSIAN:  # the theorem, with equality
        penalty = theory.lq_penalty(H, W, p, q, family, bias=B, scale=scale)
        assert close(family.negative_log_likelihood(W @ H + B, Y) + penalty, wanted)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_the_library_s_noise_gives_the_expected_loss(family, q):
    h = torch.tensor([0.9, -1.7, 0.0, 0.3, 0.6, -0.2, 1.1, 0.5], dtype=torch.float64)
    w = torch.tensor([0.3, 0.2, -1.2, -0.5, 0.6, 0.4, -0.3, 0.1], dtype=torch.float64)
    found = theory.monte_carlo_loss(h, w, Y, 0.25, q, family, bias=B, samples=200_000, seed=3)
    wanted = theory.expected_loss(h, w, Y, 0.25, q, family, bias=B)
    assert (found.mean - wanted).abs() < 4 * found.standard_error
    excess = wanted - family.negative_log_likelihood(w @ h + B, Y)
    assert found.standard_error < 0.03 * excess  # sharp enough to see a wrong constant


def test_the_standard_error_is_that_of_the_mean():
    runs = [theory.monte_carlo_loss(H, W, Y, 0.25, 1.0, POISSON, samples=1000, seed=seed) for seed in range(400)]
    spread = torch.stack([run.mean for run in runs]).std()
    assert runs[0].standard_error.item() == pytest.approx(spread.item(), rel=0.15)


def test_batches_and_outputs_are_taken_one_by_one():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    y = torch.ones(3, 2, dtype=torch.float64)
    for family in FAMILIES:
        loss = theory.expected_loss(h, w, y, 0.25, 1.5, family, bias=B)
        penalty = theory.lq_penalty(h, w, 0.25, 1.5, family, bias=B)
        assert loss.shape == penalty.shape == (3, 2)
        for i, k in itertools.product(range(3), range(2)):
            assert close(loss[i, k], theory.expected_loss(h[i, 0], w[k], Y, 0.25, 1.5, family, bias=B))
            assert close(penalty[i, k], theory.lq_penalty(h[i, 0], w[k], 0.25, 1.5, family, bias=B))
    estimate = theory.monte_carlo_loss(h, w, y, 0.25, 1.5, BERNOULLI, samples=50)
    assert estimate.mean.shape == estimate.standard_error.shape == (3, 2)


def test_no_drops_add_nothing():
    for family in FAMILIES:
        loss = family.negative_log_likelihood(W @ H + B, Y)
        assert close(theory.expected_loss(H, W, Y, 0.0, 1.0, family, bias=B), loss)
        assert theory.lq_penalty(H, W, 0.0, 1.0, family, bias=B) == 0


def test_sixteen_features_are_enumerated_and_no_more():
    h = torch.full((16,), 0.5, dtype=torch.float64)
    found = theory.expected_loss(h, h, Y, 0.25, 1.0, BERNOULLI)
    # all features alike: the number of drops is binomial
    a = 0.5 * 0.5**0.5
    wanted = sum(
        math.comb(16, k) * 0.25**k * 0.75 ** (16 - k) * math.log1p(math.exp(4 + a * ((16 - k) / 3 - k)))
        for k in range(17)
    )
    assert found.item() == pytest.approx(wanted - 4, abs=1e-12)
    with pytest.raises(ValueError, match=r"`features` to be of at most 16 features.*but got 17"):
        theory.expected_loss(torch.ones(17), torch.ones(17), Y, 0.25, 1.0, BERNOULLI)


def test_a_family_of_one_s_own():
    """Exponential: y > 0, A = -log(-theta) for theta < 0."""
    family = theory.Family(
        "exponential",
        log_partition=lambda theta: -(-theta).log(),
        mean=lambda theta: -1 / theta,
        variance=lambda theta: theta**-2,
        log_base=torch.zeros_like,
    )
    h, w = H, 0.02 * W
    wanted = mean_over_masks(lambda xi: noisy_loss(h, w, -1.0, xi, 1.0, family), len(h), 0.25)
    assert close(theory.expected_loss(h, w, Y, 0.25, 1.0, family, bias=-1.0), wanted)
    excess = wanted - family.negative_log_likelihood(w @ h - 1, Y)
    penalty = theory.lq_penalty(h, w, 0.25, 1.0, family, bias=-1.0)
    assert penalty.item() == pytest.approx(excess.item(), rel=0.02)


def remainder(t: float, p: float, q: float, family, theta: Tensor) -> float:
    """E[loss] - loss - R with weights t G and a bias that keeps theta."""
    bias = theta - t * G @ H
    excess = theory.expected_loss(H, t * G, Y, p, q, family, bias=bias) - family.negative_log_likelihood(theta, Y)
    return (excess - theory.lq_penalty(H, t * G, p, q, family, bias=bias)).item()


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    ("family", "theta", "p", "order"),
    [
        (POISSON, 0.4, 0.25, 3),
        (POISSON, 0.4, 0.5, 4),  # the third moment of the noise is 0
        (BERNOULLI, 0.8, 0.25, 3),
        (BERNOULLI, 0.8, 0.5, 4),
        (BERNOULLI, 0.0, 0.25, 4),  # the third derivative of the log-partition is 0
    ],
)
def test_the_remainder_is_of_third_or_fourth_order_in_the_amplitude(family, theta, p, order, q):
    at = torch.tensor(theta, dtype=torch.float64)
    a = G * H.sign() * H.abs() ** (q / 2)
    third, fourth = third_and_fourth_derivative(family, at)
    if order == 3:
        leading = third / 6 * theory.noise_moment(3, p) * a.pow(3).sum()
    else:
        v, squares = theory.noise_moment(2, p), a.square()
        same = theory.noise_moment(4, p) * squares.square().sum()
        leading = fourth / 24 * (same + 3 * v**2 * (squares.sum() ** 2 - squares.square().sum()))
    ts = [0.04, 0.02]
    errors = [remainder(t, p, q, family, at) for t in ts]
    slope = math.log(abs(errors[0] / errors[1])) / math.log(ts[0] / ts[1])
    assert slope == pytest.approx(order, abs=0.1)
    assert errors[1] == pytest.approx(leading.item() * ts[1] ** order, rel=0.05)


@pytest.mark.parametrize("family", [BERNOULLI, POISSON], ids=repr)
def test_the_remainder_is_not_small_in_p(family):
    """As p falls, E[loss] - loss is p times the Bregman divergence of A to theta - a_j, summed; R is its first term."""
    a = G * H.sign() * H.abs() ** 0.5
    theta = G @ H + B
    divergence = family.log_partition(theta - a) - family.log_partition(theta) + a * family.mean(theta)
    ratios = []
    for p in (2.0**-10, 2.0**-16):
        excess = theory.expected_loss(H, G, Y, p, 1.0, family, bias=B) - family.negative_log_likelihood(theta, Y)
        ratios.append((excess / theory.lq_penalty(H, G, p, 1.0, family, bias=B)).item())
    limit = (divergence.sum() / (family.variance(theta) * a.square().sum() / 2)).item()
    assert ratios[1] == pytest.approx(limit, rel=1e-3)
    assert abs(ratios[0] - limit) > abs(ratios[1] - limit)
    assert abs(limit - 1) > 0.05


def test_the_moments_of_the_noise():
    for p in (0.1, 0.5, 0.8):
        xi = reference.noise(torch.tensor([True, False]), p, torch.float64)
        for order in range(6):
            wanted = ((1 - p) * xi[0] ** order + p * xi[1] ** order).item()
            assert theory.noise_moment(order, p) == pytest.approx(wanted, abs=1e-14)
    for order in (2, 3, 4, 5):
        assert theory.noise_moment(order, 1e-6) / 1e-6 == pytest.approx((-1) ** order, rel=1e-5)


# Special cases


def test_at_q_2_it_is_the_l2_penalty_of_dropout():
    """Wager et al. (2013): p / (1 - p) w' diag(X' V X) w / 2 over a data set X with the variances V."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    for family in FAMILIES:
        fisher = x.T @ torch.diag(family.variance(x @ W)) @ x
        wanted = 0.2 / 0.8 / 2 * W @ torch.diag(torch.diag(fisher)) @ W
        assert close(theory.lq_penalty(x, W, 0.2, 2.0, family).sum(), wanted)
        assert close(theory.lq_penalty(x, W, 0.2, 2.0, family, scale="matched").sum(), wanted)


def test_at_q_0_it_counts_what_is_not_zero():
    counted = (W.square() * (H != 0)).sum() / 2
    assert close(theory.lq_penalty(H, W, 0.5, 0.0, GAUSSIAN), counted)
    gaps = [(theory.lq_penalty(H, W, 0.5, q, GAUSSIAN) - counted).abs().item() for q in (1e-2, 1e-4, 1e-6)]
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]
    assert gaps[2] < 1e-5


# Errors


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"p": 1.0}, ValueError, "expected `p` to be < 1"),
        ({"p": -0.1}, ValueError, "expected `p` to be a number between 0 and 1, but got -0.1"),
        ({"p": True}, TypeError, "`p`"),
        ({"q": -1.0}, ValueError, "expected `q` to be a finite number >= 0, but got -1.0"),
        ({"scale": "big"}, ValueError, "`scale`"),
        (
            {"family": "poisson"},
            TypeError,
            "expected `family` to be a Family, such as theory.GAUSSIAN, but got 'poisson'",
        ),
        ({"features": [1.0]}, TypeError, "expected `features` to be a floating-point tensor, but got a list"),
        ({"features": torch.ones(5, dtype=torch.int64)}, TypeError, "`features`.*torch.int64"),
        ({"features": torch.tensor(1.0)}, ValueError, "`features`.*a 0-d one"),
        ({"weight": torch.ones(4)}, ValueError, r"`weight` to be of shape \(..., 5\).*but got \(4,\)"),
        ({"weight": torch.tensor(1.0)}, ValueError, "`weight`"),
        ({"features": torch.ones(3, 5), "weight": torch.ones(2, 5)}, ValueError, "`weight`.*broadcasts"),
        ({"bias": "0"}, TypeError, "`bias`"),
        ({"features": torch.ones(3, 5), "bias": torch.ones(2)}, ValueError, "`bias`.*broadcasts"),
    ],
)
def test_errors_about_what_all_take(changed, error, words):
    given = {"features": H, "weight": W, "p": 0.25, "q": 1.0, "family": GAUSSIAN} | changed
    with pytest.raises(error, match=words):
        theory.lq_penalty(**given)
    for function in (theory.expected_loss, theory.monte_carlo_loss):
        with pytest.raises(error, match=words):
            function(target=Y, **given)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"target": 1.0}, TypeError, "expected `target` to be a tensor, but got a float"),
        ({"features": torch.ones(3, 5), "target": torch.ones(2)}, ValueError, "`target`.*broadcasts"),
        ({"samples": 1}, ValueError, "expected `samples` to be an int >= 2, but got 1"),
        ({"samples": 1e4}, TypeError, "`samples`"),
        ({"seed": None}, TypeError, "expected `seed` to be an int, but got None"),
    ],
)
def test_errors_about_target_and_draws(changed, error, words):
    given = {"features": H, "weight": W, "target": Y, "p": 0.25, "q": 1.0, "family": GAUSSIAN} | changed
    with pytest.raises(error, match=words):
        theory.monte_carlo_loss(**given)
    if changed.keys() <= {"features", "target"}:
        with pytest.raises(error, match=words):
            theory.expected_loss(**given)


def test_errors_about_moments():
    for order, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`order`"):
            theory.noise_moment(order, 0.5)


def test_the_default_of_the_library_is_the_gradient_the_page_speaks_of():
    h = H.clone().requires_grad_()
    y = sparseout.sparseout(h, 0.25, 1.0, seed=0)
    (slope,) = torch.autograd.grad(y.sum(), h)
    assert close(slope[H != 0] * H[H != 0], y[H != 0])  # y is x times its slope
