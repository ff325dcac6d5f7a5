"""Bridgeout: the equation, the L_q penalty, noise per example and per batch, on Linear and Conv2d."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from moments import agrees
from torch import nn

from conftest import needs_symbols
from sparseout.baselines import bridgeout, bridgeout_

WEIGHTS = (0.8, -0.5, 0.0, 1.7)
P = 0.25  # a multiple of 2^-16, so that it is p to the last bit


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("q", [0, 0.5, 1.0, 2.0, 3.0])
def test_a_weight_has_the_two_values_of_the_equation(q, per_example):
    layer = bridgeout_(nn.Linear(4, 4, bias=False), P, q, per_example=per_example)
    weights = torch.tensor(WEIGHTS)
    if per_example:
        layer.weight.data = weights.diag() + 0.0
        seen = layer(torch.ones(2000, 4)).detach()  # of each weight
    else:
        layer.weight.data = weights.repeat(2000, 1)
        seen = layer(torch.eye(4)).T.detach()
    for weight, values in zip(torch.tensor(WEIGHTS), seen.T, strict=True):
        power = weight.abs() ** (q / 2) if weight != 0 else 0.0
        down, up = weight - power, weight + power * P / (1 - P)
        assert torch.all(torch.isclose(values, down, atol=1e-6) | torch.isclose(values, up, atol=1e-6))
        if power:
            agrees(torch.isclose(values, down, atol=1e-6).float(), P, 0.05)


def expected_loss(X, y, w, q):
    penalty = P / (1 - P) * sum(X[:, j].square().sum() * abs(w[j]) ** q for j in range(len(w)) if w[j] != 0)
    return ((y - X @ w).square().sum() + penalty).item()


def problem():
    X, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    return X, y, torch.tensor(WEIGHTS, dtype=torch.float64)


def layer_with(w, q, **kwargs):
    layer = bridgeout_(nn.Linear(4, 1, bias=False).to(w.dtype), P, q, **kwargs)
    layer.weight.data = w[None].clone()
    return layer


@pytest.mark.parametrize("q", [0, 0.7, 1.0, 2.0, 3.0])
def test_the_penalty_is_exact_over_all_masks(q, monkeypatch):
    X, y, w = problem()
    layer = layer_with(w, q, per_example=False)
    total = 0.0
    for mask in itertools.product([0.0, 1.0], repeat=4):
        drawn = torch.tensor([mask], dtype=torch.float64) / (1 - P)
        monkeypatch.setattr(bridgeout, "sparseout", lambda ones, p, q, drawn=drawn: drawn)
        probability = torch.tensor([1 - P if kept else P for kept in mask], dtype=torch.float64).prod().item()
        total += probability * (y - layer(X)[:, 0]).square().sum().item()
    assert total == pytest.approx(expected_loss(X, y, w, q), rel=1e-12)


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("q", [0.7, 1.0, 2.0, 3.0])
def test_the_penalty_by_monte_carlo(q, per_example):
    X, y, w = problem()
    layer = layer_with(w, q, per_example=per_example)
    if per_example:
        losses = (y - layer(X.expand(20_000, 6, 4))[..., 0]).square().sum(1)
    else:
        layer.weight.data = w.repeat(20_000, 1)  # so many outputs, each with weights of its own
        losses = (y[:, None] - layer(X)).square().sum(0)
    agrees(losses.detach(), expected_loss(X, y, w, q), 0.02)


def test_examples_have_their_own_noise_or_share_it():
    x = torch.randn(1, 5).expand(500, 5)
    for per_example in (True, False):
        out = bridgeout_(nn.Linear(5, 3), P, 1.0, per_example=per_example)(x).detach()
        assert torch.allclose(out, out[:1].expand_as(out)) != per_example
    image = torch.randn(1, 2, 4, 4).expand(50, 2, 4, 4)
    for per_example in (True, False):
        out = bridgeout_(nn.Conv2d(2, 3, 3), P, 1.0, per_example=per_example)(image).detach()
        assert torch.allclose(out, out[:1].expand_as(out)) != per_example


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_per_example_is_a_loop_over_rows(shape, bias):
    layer = bridgeout_(nn.Linear(5, 3, bias=bias), P, 1.5)
    x = torch.randn(shape)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    rows = x.reshape(-1, 5)
    weights = bridgeout.perturbed(layer.weight, P, 1.5, len(rows))
    wanted = [F.linear(row, weight, layer.bias) for row, weight in zip(rows, weights, strict=True)]
    assert out.shape == (*shape[:-1], 3)
    if wanted:
        torch.testing.assert_close(out.reshape(-1, 3), torch.stack(wanted))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "stride": 2, "padding": 1},
        {"groups": 2, "dilation": 2, "padding": "same"},
        {"padding": 2, "padding_mode": "circular", "groups": 2},
        {"padding": (1, 0), "padding_mode": "reflect", "stride": (1, 2)},
    ],
)
def test_conv_per_example_is_a_loop_over_images(options):
    plain = nn.Conv2d(4, 6, 3, **options)
    layer = bridgeout_(nn.Conv2d(4, 6, 3, **options), P, 1.5)
    x = torch.randn(5, 4, 7, 8)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    weights = bridgeout.perturbed(layer.weight, P, 1.5, 5)
    if layer.bias is not None:
        plain.bias.data = layer.bias.data
    for image, weight, one in zip(x, weights, out, strict=True):
        plain.weight.data = weight.data
        torch.testing.assert_close(one, plain(image[None])[0])
    assert layer(x[0]).shape == out[0].shape  # no batch


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, 3.0])
def test_the_gradient_is_that_of_the_equation(q):
    x = torch.randn(3, 4, dtype=torch.float64)
    for per_example in (True, False):
        layer = bridgeout_(nn.Linear(4, 2).double(), P, q, per_example=per_example)

        def out(weight, x, layer=layer):
            torch.manual_seed(5)
            return torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, (x,))

        assert torch.autograd.gradcheck(out, (layer.weight, x.requires_grad_()))


@pytest.mark.parametrize("q", [0, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-37])
def test_the_slope_at_and_near_zero_is_finite(q, value):
    layer = bridgeout_(nn.Linear(3, 2, bias=False), 0.9, q)
    nn.init.constant_(layer.weight, value)
    x = torch.ones(5, 3)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    if value < 1e-40:
        assert torch.equal(layer.weight.grad, torch.full((2, 3), 5.0))  # w itself, and nothing of the noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    for per_example in (True, False):
        layer = bridgeout_(nn.Linear(5, 3).to(dtype), P, 1.0, per_example=per_example)
        out = layer(torch.randn(4, 5, dtype=dtype))
        assert out.dtype == dtype
        out.sum().backward()
        assert layer.weight.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert bridgeout_(nn.Linear(5, 3), P, 1.0)(torch.randn(4, 5)).dtype == torch.bfloat16
        assert bridgeout_(nn.Conv2d(5, 3, 1), P, 1.0)(torch.randn(4, 5, 2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("per_example", [True, False])
def test_without_examples(per_example):
    assert bridgeout_(nn.Conv2d(3, 2, 1), per_example=per_example)(torch.zeros(0, 3, 4, 5)).shape == (0, 2, 4, 5)


@needs_symbols
@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(4, 2), (3, 4)), (nn.Conv2d(4, 2, 1), (3, 4, 2, 2))])
def test_exported_for_any_number_of_examples(layer, shape):
    x = torch.rand(shape)
    program = torch.export.export(bridgeout_(layer), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert program.module()(torch.cat([x, x])).shape[0] == 6


def test_half_weights_keep_their_mean():
    weight = torch.full((100_000,), 0.75, dtype=torch.bfloat16)
    noisy = bridgeout.perturbed(weight, P, 2.0).double()
    assert set(noisy.unique().tolist()) == {0.0, torch.tensor(1.0).bfloat16().item()}
