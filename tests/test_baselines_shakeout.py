"""Shakeout: the equation, Dropout at c = 0, and its penalty with L0, L1 and L2 terms."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from moments import agrees
from torch import nn

from sparseout.baselines import shakeout_

P, C = 0.3, 0.4
WEIGHTS = torch.tensor([0.8, -0.5, 0.0, 1.7], dtype=torch.float64)


def test_a_unit_is_reversed_or_enhanced_for_all_outputs_together():
    layer = shakeout_(nn.Linear(1, 3, bias=False), P, C)
    weight = torch.tensor([0.7, -0.2, 0.0])
    layer.weight.data = weight[:, None].clone()
    out = layer(torch.full((4000, 1), 2.0)).detach() / 2
    reversed_, enhanced = -C * weight.sign(), (weight + C * P * weight.sign()) / (1 - P)
    back = torch.isclose(out, reversed_, atol=1e-6).all(1)
    assert torch.all(back ^ torch.isclose(out, enhanced, atol=1e-6).all(1))
    agrees(back.float(), P, 0.05)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(5, 3), (7, 5)), (nn.Conv2d(2, 3, 3, padding=1), (4, 2, 6, 6))], ids=["fc", "conv"]
)
def test_at_c_0_it_is_dropout_bit_for_bit(layer, shape):
    x = torch.randn(shape)
    found = []
    for shaking in (False, True):
        if shaking:
            shakeout_(layer, P, 0.0)
        layer.zero_grad()
        y = x.clone().requires_grad_()
        torch.manual_seed(2)
        out = layer(y) if shaking else layer(F.dropout(y, P))
        out.square().sum().backward()
        found.append((out, y.grad, layer.weight.grad.clone(), torch.rand(1)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def expected_loss(X, y, w):
    # L2, L1 and L0 of the weights, by their columns of X
    sizes = X.square().sum(0)
    terms = w.square() + 2 * C * w.abs() + C**2 * (w != 0).double()
    return ((y - X @ w).square().sum() + P / (1 - P) * (sizes * terms).sum()).item()


def problem():
    layer = shakeout_(nn.Linear(4, 1, bias=False).double(), P, C)
    layer.weight.data = WEIGHTS[None].clone()
    return layer, torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)


def test_the_penalty_is_exact_over_all_masks(monkeypatch):
    layer, X, y = problem()
    total = 0.0
    for mask in itertools.product([0.0, 1.0], repeat=4):
        r = torch.tensor(mask, dtype=torch.float64) / (1 - P)
        monkeypatch.setattr(F, "dropout", lambda x, p, r=r: x * r)
        probability = torch.tensor([1 - P if kept else P for kept in mask], dtype=torch.float64).prod()
        total += (probability * (y - layer(X)[:, 0]).square().sum()).item()
    assert total == pytest.approx(expected_loss(X, y, WEIGHTS), rel=1e-12)


def test_the_penalty_by_monte_carlo():
    layer, X, y = problem()
    losses = (y - layer(X.expand(20_000, 6, 4))[..., 0]).square().sum(1)
    agrees(losses.detach(), expected_loss(X, y, WEIGHTS), 0.02)


def test_mean_and_variance_of_a_convolution():
    layer = shakeout_(nn.Conv2d(2, 1, 3, padding=1).double(), P, C)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    out = layer(x.expand(40_000, 2, 4, 4)).detach()[:, 0]
    mean = layer.eval()(x)[0, 0].detach()
    variance = P / (1 - P) * F.conv2d(x.square(), (layer.weight.detach().abs() + C).square(), padding=1)[0, 0]
    for place in ((0, 0), (1, 2)):
        agrees(out[:, *place] - mean[place] + 1, 1.0, 0.02)
        agrees((out[:, *place] - mean[place]).square(), variance[place].item(), 0.02)


def test_the_gradient_takes_the_sign_for_a_constant():
    layer = shakeout_(nn.Linear(4, 2).double(), P, C)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def out(weight, x):
        torch.manual_seed(5)
        return torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (x,))

    assert torch.autograd.gradcheck(out, (layer.weight, x))
    nn.init.zeros_(layer.weight)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
