"""Penalty terms: their closed forms, smoothness, and errors."""

import re

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from sparseout.baselines import kl_penalty, lq_penalty


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_away_from_zero_it_is_the_lq_norm(q):
    x = torch.tensor([[2.0, -0.5, 0.0], [0.0, 1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    eps = 1e-9
    assert lq_penalty(x, q, eps).item() == pytest.approx((x.abs() ** q).sum().item() / 2, abs=4 * eps**q)
    lq_penalty(x, q).backward()
    wanted = q * x * (x**2 + 1e-6) ** (q / 2 - 1) / 2
    torch.testing.assert_close(x.grad, wanted.detach())


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0, 2.0])
def test_smooth_at_zero(q):
    x = torch.zeros(2, 3, requires_grad=True)
    loss = lq_penalty(x, q)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(2, 3))
    y = torch.linspace(-2e-3, 2e-3, 41, dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: lq_penalty(y, q, 1e-3) * 1e3, y, eps=1e-7, rtol=1e-2)


@pytest.mark.parametrize("penalty", [lq_penalty, kl_penalty])
def test_neither_the_batch_nor_the_map_changes_it_and_units_add_up(penalty):
    x = torch.rand(6, 4)
    wanted = penalty(x)
    torch.testing.assert_close(penalty(x.repeat(3, 1)), wanted)
    torch.testing.assert_close(penalty(x.repeat(1, 3)), 3 * wanted)
    torch.testing.assert_close(penalty(x.view(2, 3, 4)), wanted)
    torch.testing.assert_close(penalty(x[:, :, None, None].expand(6, 4, 5, 7)), wanted)
    torch.testing.assert_close(penalty(x.T, unit_dim=0), wanted)
    assert penalty(x[:0]).item() == 0


def test_the_kl_penalty_is_the_divergence_of_coins():
    x = torch.rand(50, 4, dtype=torch.float64, requires_grad=True)
    wanted = kl_divergence(Bernoulli(torch.tensor(0.2, dtype=torch.float64)), Bernoulli(x.mean(0))).sum()
    torch.testing.assert_close(kl_penalty(x, 0.2), wanted)
    kl_penalty(x, 0.2).backward()
    mean = x.detach().mean(0)
    slope = (-0.2 / mean + 0.8 / (1 - mean)) / 50
    torch.testing.assert_close(x.grad, slope.expand_as(x))


def test_the_kl_penalty_of_saturated_units_is_finite():
    for value in (0.0, 1.0):
        x = torch.full((5, 2), value, requires_grad=True)
        kl_penalty(x).backward()
        assert kl_penalty(x).isfinite()
        assert x.grad.isfinite().all()


def test_half_types_are_computed_in_fp32():
    x = torch.full((4096, 16), 0.01, dtype=torch.float16)
    assert lq_penalty(x).dtype == torch.float32
    assert lq_penalty(x).item() == pytest.approx(16 * 0.00905, rel=0.01)  # sqrt(1e-4 + 1e-6) - 1e-3


@pytest.mark.parametrize(("size", "eps"), [(1e20, 1e-3), (1e-5, 1e-30), (1e-5, 1e-60)])
def test_squares_neither_overflow_nor_vanish(size, eps):
    x = torch.tensor([[size, 0.0], [-size, 0.0]], requires_grad=True)
    loss = lq_penalty(x, 1.0, eps)
    loss.backward()
    assert loss.item() == pytest.approx(size)
    torch.testing.assert_close(x.grad, torch.tensor([[0.5, 0.0], [-0.5, 0.0]]))


def test_one_row_without_a_batch():
    x = torch.tensor([0.5, 0.25])
    assert lq_penalty(x, 2.0).item() == pytest.approx(0.3125)
    assert kl_penalty(x, 0.25).item() == pytest.approx(kl_penalty(x[None], 0.25).item())


@pytest.mark.parametrize("penalty", [lq_penalty, kl_penalty])
@pytest.mark.parametrize(
    ("x", "unit_dim", "error", "sentence"),
    [
        (torch.tensor(0.5), None, ValueError, "expected `x` to be of at least one dim, but got a 0-d tensor"),
        (torch.rand(2, 3), 2, ValueError, "expected `unit_dim` to be in [-2, 1], but got 2"),
        (torch.rand(2, 3), 1.0, TypeError, "expected `unit_dim` to be an int, but got a float"),
        (torch.ones(2, 3, dtype=torch.cfloat), None, TypeError, "expected `x` to be a floating-point tensor, but got"),
        ([0.5], None, TypeError, "expected `x` to be a floating-point tensor, but got a list"),
    ],
)
def test_what_has_no_units_is_an_error(penalty, x, unit_dim, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        penalty(x, unit_dim=unit_dim)
