"""Penalty terms: their closed forms, smoothness, and errors."""

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
